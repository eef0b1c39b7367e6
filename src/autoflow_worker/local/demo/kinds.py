"""The kinds of the demo's jobs, and what has to become of each in both stores."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from typing import Any, Final, Literal

from autoflow_worker.tasks.definition import PRIORITIES

Row = dict[str, Any]
FINAL: Final = frozenset({"completed", "failed", "cancelled"})


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Jobs that are to share a fate.

    Attributes:
        payload: from a job's number to its payload.
        delay_ms: the first is due after that, each further one 50 ms later; 0: none is delayed.
        raw: added by a producer of another sort, that inserts no row.
        ends: the status that each row has to end with.
        attempts: the attempts that each row has to show.
        reason: what has to be part of each error.
    """

    name: str
    queue: str
    count: int
    payload: Callable[[int], dict[str, Any]]
    delay_ms: int = 0
    raw: bool = False
    ends: Literal["completed", "failed", "cancelled"] = "completed"
    attempts: int = 1
    reason: str = ""

    @property
    def state(self) -> str:
        """The BullMQ state that goes with `ends`: a cancelled job fails without having run."""
        return "failed" if self.ends == "cancelled" else self.ends

    @property
    def expected(self) -> str:
        attempts = "1 attempt" if self.attempts == 1 else f"{self.attempts} attempts"
        return f"{self.ends}, {attempts}" if self.attempts else f"{self.ends}, never run"


BY_PRIORITY: Final = Kind(
    name="by priority",
    queue="tickets-triage",
    count=40,
    payload=lambda n: {"title": f"ticket {n}"},
)
DELAYED: Final = Kind(
    name="delayed",
    queue="users-send-digest",
    count=20,
    delay_ms=1000,
    payload=lambda n: {"email": f"user{n}@example.com", "articles": ["a", "b"]},
)
CANCELLED: Final = Kind(
    name="cancelled before it is due",
    queue="reports-build",
    count=5,
    delay_ms=2000,
    payload=lambda n: {"customer": f"gone{n}", "month": "2026-01-01"},
    ends="cancelled",
    attempts=0,
)
KINDS: Final = (
    Kind(
        name="quick",
        queue="users-send-welcome-email",
        count=100,
        payload=lambda n: {"email": f"user{n}@example.com", "name": f"User {n}"},
    ),
    Kind(
        name="slow",
        queue="reports-build",
        count=10,
        payload=lambda n: {"customer": f"customer{n}", "month": "2026-01-01"},
    ),
    Kind(
        name="in a thread",
        queue="files-checksum",
        count=24,
        payload=lambda n: {"name": f"file{n}", "size": 1_000_000 * (n % 4)},
    ),
    BY_PRIORITY,
    DELAYED,
    Kind(
        name="failing twice, then succeeding",
        queue="payments-refund",
        count=20,
        payload=lambda n: {"charge": f"charge{n}"},
        attempts=3,
    ),
    Kind(
        name="failing for good at once",
        queue="payments-charge",
        count=20,
        payload=lambda n: {"card": f"4111 {n:04} 0000", "amount": "9.90"},
        ends="failed",
        reason="declined",
    ),
    Kind(
        name="failing every time",
        queue="webhooks-deliver",
        count=10,
        payload=lambda n: {"url": "https://gone.example.com", "event": {"n": n}},
        ends="failed",
        attempts=3,
        reason="refuses connections",
    ),
    Kind(
        name="running past the time limit",
        queue="webhooks-deliver",
        count=5,
        payload=lambda n: {"url": "https://slow.example.com", "event": {"n": n}},
        ends="failed",
        attempts=3,
        reason="time limit",
    ),
    Kind(
        name="invalid payload",
        queue="users-send-welcome-email",
        count=20,
        payload=lambda n: {"email": n, "name": None},
        raw=True,
        ends="failed",
        reason="email",
    ),
    Kind(
        name="from another producer",
        queue="webhooks-deliver",
        count=20,
        payload=lambda n: {"url": "https://up.example.com", "event": {"n": n}},
        raw=True,
    ),
    CANCELLED,
)


@dataclass(frozen=True)
class Added:
    """A job that was added."""

    kind: Kind
    job_id: str
    row_id: str


def faults(
    added: Sequence[Added], rows: Mapping[str, Row], states: Sequence[str]
) -> dict[Kind, list[str]]:
    """What is not as it has to be, in words, of each kind.

    Args:
        added: the jobs.
        rows: every row's data, by id.
        states: the BullMQ state of each of the jobs.
    """
    found: dict[Kind, list[str]] = {kind: [] for kind in KINDS}
    for each, state in zip(added, states, strict=True):
        row = rows.get(each.row_id)
        reasons = ["it has no row"] if row is None else _faults_of_row(each.kind, row)
        if state != each.kind.state:
            reasons.append(f"BullMQ says {state}")
        if reasons:
            found[each.kind].append(f"{each.kind.queue} {each.job_id}: {'; '.join(reasons)}")
    for kind in KINDS:
        count = sum(each.kind is kind for each in added)
        if count != kind.count:
            found[kind].append(f"{count} jobs were added, and not {kind.count}")
    known = {each.row_id for each in added}
    found[KINDS[0]] += [f"there is a row {row_id} of no job" for row_id in rows.keys() - known]
    by_priority = (rows.get(each.row_id) for each in added if each.kind is BY_PRIORITY)
    found[BY_PRIORITY] += _faults_of_order([row for row in by_priority if row])
    return found


def _faults_of_row(kind: Kind, row: Row) -> list[str]:
    reasons = []
    if row["status"] != kind.ends:
        reasons.append(f"its row says {row['status']}")
    if row["attempts"] != kind.attempts:
        reasons.append(f"its row counts {row['attempts']} attempts")
    if (row["result"] is not None) != (kind.ends == "completed"):
        reasons.append(f"its result is {row['result']}")
    told = "" if row["error"] is None else row["error"]["reason"]
    if (row["error"] is not None) != (kind.ends == "failed") or kind.reason not in told:
        reasons.append(f"its error is {row['error']}")
    if kind is DELAYED and (waited := _waited_ms(row)) < kind.delay_ms:
        reasons.append(f"it started after {waited} ms")
    return reasons


def _waited_ms(row: Row) -> int:
    if row["startedAt"] is None:
        return 0
    waited = datetime.fromisoformat(row["startedAt"]) - datetime.fromisoformat(row["enqueuedAt"])
    return round(waited.total_seconds() * 1000)


def _faults_of_order(rows: Sequence[Row]) -> list[str]:
    # Two may have started in the same millisecond; then neither was late.
    started = sorted((row["startedAt"] or "", PRIORITIES[row["priority"]]) for row in rows)
    late = [b for a, b in pairwise(started) if a[1] > b[1]]
    return [f"one of priority {priority} started late, at {at}" for at, priority in late]
