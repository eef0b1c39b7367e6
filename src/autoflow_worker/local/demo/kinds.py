"""The kinds of the demo's jobs, and what each job has to end as in both stores."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Literal

from autoflow_worker.tasks.definition import PRIORITIES

Row = dict[str, Any]
FINAL: Final = frozenset({"completed", "failed", "cancelled"})


@dataclass(frozen=True, eq=False)
class Kind:
    """Jobs that have to end in the same way.

    Attributes:
        queue: the queue of an example task.
        count: how many jobs there are, each with the same `payload`.
        ends: the status that each row has to end with, after so many `attempts`.
        reason: a part of each row's error.
        has_row: whether the producer inserts a row, as the API does.
    """

    name: str
    queue: str
    count: int
    payload: Mapping[str, Any]
    ends: Literal["completed", "failed", "cancelled"] = "completed"
    attempts: int = 1
    reason: str = ""
    delay_ms: int = 0
    has_row: bool = True

    @property
    def state(self) -> str:
        """The BullMQ state that goes with `ends`. A cancelled job fails without an attempt."""
        return "failed" if self.ends == "cancelled" else self.ends

    @property
    def expected(self) -> str:
        """What each job has to end as, in words."""
        return f"{self.ends}, attempt {self.attempts}" if self.attempts else f"{self.ends}, not run"


def _webhook(host: str) -> Mapping[str, Any]:
    return {"url": f"https://{host}.example.com", "event": {}}


_USER: Final = {"email": "ada@example.com", "name": "Ada", "articles": ["a", "b"]}
_REPORT: Final = {"customer": "ada", "month": "2026-01-01"}
_CHARGE: Final = {"card": "4111 1111 1111 0000", "amount": "9.90"}
_NOBODY: Final = {"email": 17, "name": None}

BY_PRIORITY: Final = Kind("by priority", "tickets-triage", 40, {"title": "the invoice"})
CANCELLED: Final = Kind("cancelled", "reports-build", 5, _REPORT, "cancelled", 0, delay_ms=2000)
KINDS: Final = (
    Kind("quick", "users-send-welcome-email", 100, _USER),
    Kind("slow", "reports-build", 10, _REPORT),
    Kind("in a thread", "files-checksum", 24, {"name": "a file", "size": 1_000_000}),
    BY_PRIORITY,
    Kind("delayed", "users-send-digest", 20, _USER, delay_ms=1000),
    Kind("fails twice", "payments-refund", 20, {"charge": "17"}, attempts=3),
    Kind("fails for good", "payments-charge", 20, _CHARGE, "failed", 1, "declined"),
    Kind("fails every time", "webhooks-deliver", 10, _webhook("gone"), "failed", 3, "refuses"),
    Kind("exceeds time limit", "webhooks-deliver", 5, _webhook("slow"), "failed", 3, "time limit"),
    Kind("invalid payload", "users-send-digest", 20, _NOBODY, "failed", 1, "email", has_row=False),
    Kind("added without a row", "webhooks-deliver", 20, _webhook("up"), has_row=False),
    CANCELLED,
)


@dataclass(frozen=True)
class Job:
    """A job that was added, and its ids in both stores."""

    kind: Kind
    job_id: str
    row_id: str


def faults(jobs: Sequence[Job], rows: Mapping[str, Row], states: Sequence[str]) -> list[str]:
    """Say what is not as it has to be in either store; an empty list if all is well.

    Args:
        jobs: every job that was added.
        rows: every row's data, by id.
        states: the BullMQ state of each job, in the order of `jobs`.
    """
    found = []
    for job, state in zip(jobs, states, strict=True):
        row = rows.get(job.row_id)
        wrong = ["it has no row"] if row is None else _faults_of_row(job.kind, row)
        if state != job.kind.state:
            wrong.append(f"BullMQ says {state}")
        if wrong:
            found.append(f"{job.kind.name}: job {job.job_id}: {', '.join(wrong)}")
    if strangers := rows.keys() - {job.row_id for job in jobs}:
        found.append(f"rows of no job: {', '.join(strangers)}")
    by_priority = [rows.get(job.row_id) for job in jobs if job.kind is BY_PRIORITY]
    # Jobs that started in the same millisecond count as started in the right order.
    started = sorted(
        (row["startedAt"] or "", PRIORITIES[row["priority"]]) for row in by_priority if row
    )
    order = [priority for _, priority in started]
    if order != sorted(order):
        found.append(f"{BY_PRIORITY.name}: the priorities started in the order {order}")
    return found


def _faults_of_row(kind: Kind, row: Row) -> list[str]:
    reason = row["error"]["reason"] if row["error"] else ""
    checks = {
        "status": row["status"] == kind.ends,
        "attempts": row["attempts"] == kind.attempts,
        "result": (row["result"] is not None) == (kind.ends == "completed"),
        "error": (row["error"] is not None) == (kind.ends == "failed") and kind.reason in reason,
        "startedAt": not kind.attempts or _waited_ms(row) >= kind.delay_ms,
    }
    return [f"its row's {key} is {row[key]}" for key, right in checks.items() if not right]


def _waited_ms(row: Row) -> float:
    enqueued, started = row["enqueuedAt"], row["startedAt"] or row["enqueuedAt"]
    waited = datetime.fromisoformat(started) - datetime.fromisoformat(enqueued)
    return waited.total_seconds() * 1000
