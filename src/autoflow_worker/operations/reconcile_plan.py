"""What `reconcile` does about one row: pure functions of the row, of its job, and of the time.

Nothing is guessed. A row is set to what BullMQ shows, and a time that nobody knows is left out, or
is the time of the next best thing that is known.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Literal, TypeAlias
from uuid import uuid4

from autoflow_worker.broker.backoff import MAX_DELAY_MS
from autoflow_worker.broker.kept_job import STATUS_OF_STATE, KeptJob, time_ms, whole
from autoflow_worker.broker.producer import KEPT_COMPLETED, KEPT_FAILED
from autoflow_worker.encoding.failures import shorten_stack_trace
from autoflow_worker.errors import NotStorableError
from autoflow_worker.recording import patches
from autoflow_worker.recording.open_rows import Row, Task
from autoflow_worker.tasks.definition import MAX_ATTEMPTS, PRIORITIES

Lost: TypeAlias = Literal["fail", "requeue"]
"""What becomes of a row whose job is gone from Redis."""

BACKOFF_MS: Final = 5_000
"""The API's backoff (contract, section 1), exponential: the row does not keep its job's."""

_JSON_TEXT_ERRORS: Final = (ValueError, RecursionError)
_RESULT_KEYS: Final = frozenset({"success", "output", "duration"})
_ISO: Final = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", re.ASCII)
_INTEGER: Final = re.compile(r"-?(0|[1-9][0-9]*)", re.ASCII)
_PARTS_OF_A_REPEATED_ID: Final = 3


@dataclass(frozen=True, slots=True)
class Set:
    """Write a patch into the row."""

    patch: Mapping[str, Any]
    note: str = ""

    @property
    def infinitive(self) -> str:
        return f"set {self.patch['status']}{self.note}"

    past = infinitive


@dataclass(frozen=True, slots=True)
class Retry:
    """Retry the failed job, with its attempts reset, as BullMQ does."""

    job: KeptJob
    infinitive = "retry the job"
    past = "retried the job"


@dataclass(frozen=True, slots=True)
class AddAgain:
    """Add the row's job again, once the patch is in the row.

    Attributes:
        data: the job's data.
        options: its options, by BullMQ's names.
    """

    patch: Mapping[str, Any]
    data: Mapping[str, Any]
    options: Mapping[str, Any]
    infinitive = "add the job again"
    past = "added the job again"


@dataclass(frozen=True, slots=True)
class Leave:
    """Leave the row as it is."""

    reason: str


class ReadTask:
    """The row's job has to be added again: `job_of` says how, when the task was read."""


Action: TypeAlias = Set | Retry | AddAgain | Leave


def agrees(row: Row, job: KeptJob, now_ms: float) -> bool:
    """Whether a row says what BullMQ says of its job."""
    if not job.exists or job.fault is not None:
        return False
    if job.state == "delayed" and row.status == "pending":
        # Handed back at a shutdown: BullMQ has it delayed, by 0, until the next job is fetched.
        return job.due_ms is not None and job.due_ms <= now_ms
    return STATUS_OF_STATE.get(job.state) == row.status


def plan(
    row: Row, job: KeptJob, *, lost: Lost | None, now_ms: float
) -> Set | Retry | Leave | ReadTask:
    """What to do about a row that does not agree with its job.

    Args:
        job: with its fields.
        lost: what becomes of a row whose job is gone; None leaves it alone.
        now_ms: epoch ms.
    """
    if job.fault is not None:
        return Leave(f"the job can't be read: {job.fault}")
    if not job.exists or not job.state:
        return _without_job(row, job, lost, now_ms)
    if job.state == "failed" and _was_retried(row):
        return Retry(job)
    return _PATCH_OF_STATE[job.state](row, job, now_ms)


def _was_retried(row: Row) -> bool:
    """Whether the API has retried the task; BullMQ ignored the job, as it kept the failed one."""
    return row.status == "pending" and row.attempts == "0" and bool(row.started_at)


def _without_job(
    row: Row, job: KeptJob, lost: Lost | None, now_ms: float
) -> Set | Leave | ReadTask:
    if job.exists:
        what = "the job is in none of BullMQ's lists, so it will never run"
    elif job.state:
        what = f"the job's fields are gone from Redis, and only its id is left in '{job.state}'"
    elif row.started_at:
        what = "the job is gone from Redis, so nobody can tell its end"
    else:
        what = "the job was removed from Redis, or was never added"
    if lost is None:
        return Leave(f"{what}; --lost says what becomes of the row")
    if "\ufffd" in row.id:
        return Leave("the id of its job is no text, so the job can't be looked for")
    if lost == "fail":
        last_ms = _iso_ms(row.started_at) or now_ms
        error = patches.error_record(what, last_ms)
        return Set({"status": "failed", "failedAt": patches.iso(now_ms), "error": error})
    if job.exists or job.state:
        return Leave(f"{what}; remove what is left of it, or use --lost fail")
    if not _is_custom_id(row.id):
        return Leave(f"{what}; BullMQ takes no such id for a job: use --lost fail")
    return ReadTask()


def _is_custom_id(job_id: str) -> bool:
    """Whether a producer may choose this id; Node's BullMQ refuses the others."""
    if not job_id or _INTEGER.fullmatch(job_id):
        return False
    return ":" not in job_id or len(job_id.split(":")) == _PARTS_OF_A_REPEATED_ID


def _completed(_: Row, job: KeptJob, __: float) -> Set:
    started, ended = job.started_ms, job.ended_ms
    took = max(0, ended - started) if started and ended else 0
    result, note = _result(job.text("returnvalue"), took)
    patch = patches.completed_patch(now_ms=ended or 0, result=result)
    if not ended:
        del patch["completedAt"]
    return Set({**patch, **_attempts(job)}, note)


def _result(text: str | None, took_ms: int) -> tuple[patches.Record, str]:
    try:
        value = json.loads(text or "null")
        if (
            isinstance(value, dict)
            and value.get("success") is True
            and not value.keys() - _RESULT_KEYS
        ):
            took_ms = value.get("duration", took_ms)
            value = value.get("output")
        # Otherwise another producer's or an older worker's: the contract wants it as the output.
        return patches.success_result(value, took_ms), ""
    except (*_JSON_TEXT_ERRORS, NotStorableError):
        bare = patches.success_result(None, took_ms)
        del bare["output"]
        return bare, ", without the output, as the job's return value can't be read"


def _failed(row: Row, job: KeptJob, now_ms: float) -> Set:
    ended = job.ended_ms
    last_ms = ended or job.started_ms or _iso_ms(row.started_at) or now_ms
    error = patches.error_record(job.text("failedReason") or "BullMQ keeps no reason", last_ms)
    try:
        traces = json.loads(job.text("stacktrace") or "[]")
    except _JSON_TEXT_ERRORS:
        traces = []
    if isinstance(traces, list) and traces and isinstance(traces[-1], str):
        error["stackTrace"] = shorten_stack_trace(traces[-1])
    patch = patches.failed_patch(now_ms=ended or 0, attempt=0, error=error)
    del patch["attempts"]
    if not ended:
        del patch["failedAt"]
    return Set({**patch, **_attempts(job)})


def _attempts(job: KeptJob) -> patches.Record:
    """How many attempts a finished job took; nothing if BullMQ does not say."""
    return {"attempts": job.attempts_made} if job.attempts_made else {}


def _delayed(_: Row, job: KeptJob, __: float) -> Set:
    patch = patches.moved_to_delayed_patch(until_ms=job.due_ms or 0)
    if not job.due_ms:
        del patch["delayUntil"]
    return Set(patch)


def _active(_: Row, job: KeptJob, __: float) -> Set:
    started = job.started_ms
    patch = patches.active_patch(now_ms=started or 0, attempt=(job.attempts_made or 0) + 1)
    if not started:
        del patch["startedAt"]
    return Set(patch)


def _pending(row: Row, _: KeptJob, __: float) -> Set:
    patch = patches.handed_back_patch()
    # Promoted, or due: it waits for nothing but its turn.
    return Set({**patch, "delayUntil": None} if row.status == "delayed" else patch)


_PATCH_OF_STATE: Final[Mapping[str, Callable[[Row, KeptJob, float], Set]]] = {
    "completed": _completed,
    "failed": _failed,
    "delayed": _delayed,
    "active": _active,
    "wait": _pending,
    "paused": _pending,
    "prioritized": _pending,
    "waiting-children": _pending,
}


def job_of(row: Row, task: Task, now_ms: float) -> AddAgain | Leave:
    """The row's job as the API adds it (contract, sections 1 and 5); only its backoff is gone."""
    try:
        payload = json.loads(task.payload or "null")
        data = {**payload, "correlationId": str(uuid4())}
        json.dumps(data, allow_nan=False)
    except (TypeError, *_JSON_TEXT_ERRORS):
        return Leave("the job is gone from Redis, and the row's payload can't be read")
    attempts = whole(task.max_attempts) or 1
    delay = min(max(0, (_iso_ms(task.delay_until) or 0) - int(now_ms)), MAX_DELAY_MS)
    if row.status != "delayed":
        delay = 0
    options: dict[str, Any] = {
        "jobId": row.id,
        "priority": PRIORITIES.get(task.priority or "", PRIORITIES["normal"]),  # type: ignore[call-overload]
        "attempts": min(max(1, attempts), MAX_ATTEMPTS),
        "backoff": {"type": "exponential", "delay": BACKOFF_MS},
        **({"delay": delay} if delay else {}),
        "removeOnComplete": KEPT_COMPLETED,
        "removeOnFail": KEPT_FAILED,
    }
    # As the API's retry has it.
    patch = {"status": "pending", "attempts": 0, "failedAt": None, "error": None}
    again = {"status": "delayed"} if delay else {"delayUntil": None}
    return AddAgain({**patch, **again}, data, options)


def _iso_ms(text: str | None) -> int | None:
    if text is None or not _ISO.fullmatch(text):
        return None
    try:
        return time_ms(datetime.fromisoformat(text).timestamp() * 1000)
    except ValueError:
        return None
