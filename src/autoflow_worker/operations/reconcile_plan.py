"""What `reconcile` does about one row: pure functions of the row, of its job, and of the time.

They never guess. A row gets what BullMQ shows. A time that BullMQ does not know is left out, except
for `lastAttemptAt`, which gets the nearest known time.
"""

import json
import re
from collections.abc import Mapping
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
"""What to do about a row whose job is gone from Redis."""

# The API's (contract, section 1). A row does not hold its job's backoff.
_BACKOFF: Final = {"type": "exponential", "delay": 5_000}
# What a patch holds in place of a count or a time that BullMQ does not know.
_UNKNOWN: Final = (0, patches.iso(0))
_JSON_TEXT_ERRORS: Final = (ValueError, RecursionError)
_RESULT_KEYS: Final = frozenset({"success", "output", "duration"})
_ISO: Final = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", re.ASCII)
_INTEGER: Final = re.compile(r"-?(0|[1-9][0-9]*)", re.ASCII)


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
    """Have BullMQ retry the failed job, with its attempts reset."""

    job: KeptJob
    infinitive = "retry the job"
    past = "retried the job"


@dataclass(frozen=True, slots=True)
class PutBack:
    """Write a patch into the row, then put its job, which is in no list, back into its queue."""

    job: KeptJob
    patch: Mapping[str, Any]
    infinitive = "put the job back"
    past = "put the job back"


@dataclass(frozen=True, slots=True)
class AddAgain:
    """Write a patch into the row, then add its job again, with options by BullMQ's names."""

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
    """Read the row's `Task`, and add its job again as `job_of` says."""


Action: TypeAlias = Set | Retry | PutBack | AddAgain | Leave


def agrees(row: Row, job: KeptJob, now_ms: float) -> bool:
    """Whether a row says what BullMQ says of its job."""
    if not job.exists or job.fault is not None:
        return False
    if job.state == "delayed" and row.status == "pending":
        # Handed back at a shutdown: BullMQ keeps the job delayed, by 0, until its next fetch.
        return 0 < job.due_ms <= now_ms
    return STATUS_OF_STATE.get(job.state) == row.status


def plan(
    row: Row, job: KeptJob, *, lost: Lost | None, now_ms: float
) -> Set | Retry | PutBack | Leave | ReadTask:
    """Decide what to do about a row that does not agree with its job.

    Args:
        job: the job, with its fields.
        lost: what to do if the job is gone; None leaves the row alone.
        now_ms: the time, in ms since the epoch.
    """
    if job.fault is not None:
        return Leave(f"the job can't be read: {job.fault}")
    if job.exists and not job.state and job.text("finishedOn") is None:
        patch = patches.handed_back_patch()
        return PutBack(job, {**patch, "delayUntil": None} if row.status == "delayed" else patch)
    if not job.exists or not job.state:
        return _without_job(row, job, lost, now_ms)
    if job.state == "failed" and _was_retried(row):
        return Retry(job)
    patch, note = _patch(row, job, now_ms)
    return Set({key: value for key, value in patch.items() if value not in _UNKNOWN}, note)


def _was_retried(row: Row) -> bool:
    """Whether the API retried the task in vain: BullMQ ignores a job whose id it still keeps."""
    return row.status == "pending" and row.attempts == "0" and bool(row.started_at)


def _without_job(
    row: Row, job: KeptJob, lost: Lost | None, now_ms: float
) -> Set | Leave | ReadTask:
    if job.exists:
        what = "the job is finished, and in none of BullMQ's lists"
    elif job.state:
        what = f"the job's fields are gone from Redis, and only its id is left in '{job.state}'"
    elif row.started_at:
        what = "the job is gone from Redis, so nobody can tell its end"
    else:
        what = "the job was removed from Redis, or was never added"
    if lost is None:
        return Leave(f"{what}; --lost fail or --lost requeue settles the row")
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
    """Whether Node's BullMQ lets a producer choose this id."""
    return bool(job_id) and not _INTEGER.fullmatch(job_id) and job_id.count(":") in {0, 2}


def _patch(row: Row, job: KeptJob, now_ms: float) -> tuple[patches.Record, str]:
    """Translate the job's state into a patch of its row, and a remark on that."""
    match job.state:
        case "completed":
            return _completed(job)
        case "failed":
            return _failed(row, job, now_ms), ""
        case "delayed":
            return patches.moved_to_delayed_patch(until_ms=job.due_ms), ""
        case "active":
            started, attempt = job.started_ms, job.attempts_made + 1
            return patches.active_patch(now_ms=started, attempt=attempt), ""
        case _:
            patch = patches.handed_back_patch()
            # The delay of a delayed row is over: the job was promoted, or is due.
            return {**patch, "delayUntil": None} if row.status == "delayed" else patch, ""


def _completed(job: KeptJob) -> tuple[patches.Record, str]:
    started, ended = job.started_ms, job.ended_ms
    took = max(0, ended - started) if started and ended else 0
    result, note = _result(job.text("returnvalue"), took)
    patch = patches.completed_patch(now_ms=ended, result=result)
    return {**patch, "attempts": job.attempts_made}, note


def _result(text: str | None, took_ms: int) -> tuple[patches.Record, str]:
    try:
        value = json.loads(text or "null")
        is_record = isinstance(value, dict) and value.keys() <= _RESULT_KEYS
        if is_record and value.get("success") is True:
            took_ms = value.get("duration", took_ms)
            value = value.get("output")
        # Any other value is the output itself: another producer's worker or an older one wrote it.
        return patches.success_result(value, took_ms), ""
    except (*_JSON_TEXT_ERRORS, NotStorableError):
        bare = patches.success_result(None, took_ms)
        del bare["output"]
        return bare, ", without the output, as the job's return value can't be read"


def _failed(row: Row, job: KeptJob, now_ms: float) -> patches.Record:
    last_ms = job.ended_ms or job.started_ms or _iso_ms(row.started_at) or now_ms
    error = patches.error_record(job.text("failedReason") or "BullMQ keeps no reason", last_ms)
    try:
        traces = json.loads(job.text("stacktrace") or "[]")
    except _JSON_TEXT_ERRORS:
        traces = []
    if isinstance(traces, list) and traces and isinstance(traces[-1], str):
        error["stackTrace"] = shorten_stack_trace(traces[-1])
    return patches.failed_patch(now_ms=job.ended_ms, attempt=job.attempts_made, error=error)


def job_of(row: Row, task: Task, now_ms: float) -> AddAgain | Leave:
    """Make the row's job as the API adds it (contract, sections 1 and 5), but for its backoff."""
    try:
        payload = json.loads(task.payload or "null")
        data = {**payload, "correlationId": str(uuid4())}
        json.dumps(data, allow_nan=False)
    except (TypeError, *_JSON_TEXT_ERRORS):
        return Leave("the job is gone from Redis, and the row's payload can't be read")
    delay = 0
    if row.status == "delayed":
        delay = min(max(0, _iso_ms(task.delay_until) - int(now_ms)), MAX_DELAY_MS)
    options: dict[str, Any] = {
        "jobId": row.id,
        "priority": PRIORITIES.get(task.priority or "", PRIORITIES["normal"]),  # type: ignore[call-overload]
        "attempts": min(max(1, whole(task.max_attempts)), MAX_ATTEMPTS),
        "backoff": _BACKOFF,
        **({"delay": delay} if delay else {}),
        "removeOnComplete": KEPT_COMPLETED,
        "removeOnFail": KEPT_FAILED,
    }
    # What the API writes at a retry.
    patch = {"status": "pending", "attempts": 0, "failedAt": None, "error": None}
    again = {"status": "delayed"} if delay else {"delayUntil": None}
    return AddAgain({**patch, **again}, data, options)


def _iso_ms(text: str | None) -> int:
    """Return a row's time in ms since the epoch; 0 if there is none."""
    if text is None or not _ISO.fullmatch(text):
        return 0
    try:
        return time_ms(datetime.fromisoformat(text).timestamp() * 1000)
    except ValueError:
        return 0
