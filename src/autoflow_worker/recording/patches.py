"""What each moment of a job writes into its row: pure functions from facts to patches.

A patch is merged into the row's `data` (`data || patch`), so it holds exactly the keys that the
moment changes, each of the type that the API's strict schema takes (contract, sections 2 to 4).
Dates are ISO 8601 in UTC with milliseconds; times that come in are milliseconds since 1970, as
`Date.now()` and BullMQ give them.
"""

import math
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, cast

from autoflow_worker.clock import now_ms
from autoflow_worker.encoding.cleaner import clean_text
from autoflow_worker.encoding.failures import (
    DescribedError,
    reason_of,
    shorten_reason,
    shorten_stack_trace,
    stack_trace_of,
)
from autoflow_worker.encoding.results import dump, fragment, storable
from autoflow_worker.errors import NotStorableError

Record = dict[str, Any]
"""A patch of `data`, or a part of one; storable as it is."""

_LAST_MS = 253_402_300_799_999
_MAX_SAFE_INTEGER = 2**53 - 1
_COUNTED_ID = re.compile(r"[1-9][0-9]{0,15}")
# An earlier attempt may have ended for good: in a crash before BullMQ was told, or before a retry.
_NOT_FINISHED: Mapping[str, None] = {"completedAt": None, "failedAt": None, "result": None}
_API_ID = re.compile(r"[A-Za-z0-9_-]{21}")
_TO_ESCAPE = re.compile(r"[:~=]")
_ESCAPED = re.compile(r"=(3A|7E|3D)")
_PRIORITY_WORDS = {1: "critical", 2: "high", 3: "normal", 4: "low"}


def active_patch(*, now_ms: float, attempt: int, again: bool = True) -> Record:
    """A job was picked up, for the first time or again.

    Args:
        again: whether an earlier claim of the job may have left an end in the row.
    """
    patch: Record = {"status": "active", "startedAt": iso(now_ms), "attempts": attempt}
    return {**patch, **_NOT_FINISHED} if again else patch


def completed_patch(*, now_ms: float, result: Record) -> Record:
    """The handler returned; `result` is what `success_result` made of it."""
    return {
        "status": "completed",
        "completedAt": iso(now_ms),
        "result": result,
        "error": None,
        "failedAt": None,
        "delayUntil": None,
    }


def delayed_patch(*, until_ms: float, attempt: int, error: Record) -> Record:
    """The attempt failed and the job runs again after a backoff; `error` is from `error_record`."""
    return {**moved_to_delayed_patch(until_ms=until_ms), "attempts": attempt, "error": error}


def pending_patch(*, attempt: int, error: Record) -> Record:
    """The attempt failed and the job runs again at once; `error` is from `error_record`."""
    return {**handed_back_patch(), "attempts": attempt, "error": error}


def failed_patch(*, now_ms: float, attempt: int, error: Record) -> Record:
    """The job failed for good; `error` is from `error_record`."""
    return {
        "status": "failed",
        "completedAt": None,
        "failedAt": iso(now_ms),
        "attempts": attempt,
        "result": None,
        "error": error,
    }


def handed_back_patch() -> Record:
    """The job was given back to its queue without using up its attempt, or waits for children."""
    return {"status": "pending", **_NOT_FINISHED}


def moved_to_delayed_patch(*, until_ms: float) -> Record:
    """The handler delayed its own job; or its work has to be done again, and not at once."""
    return {"status": "delayed", "delayUntil": iso(until_ms), **_NOT_FINISHED}


def success_result(output: object, duration_ms: float) -> Record:
    """Return the row's `result`, which is BullMQ's return value too.

    Whole milliseconds are stored, as Node does.

    Raises:
        NotStorableError: the handler's output can't be stored (`results` has the rules).
    """
    return {"success": True, "output": storable(output), "duration": _whole(duration_ms)}


def encoded_result(output: object, duration_ms: float) -> Record:
    """Return what `success_result` does, with the output as JSON text already.

    Both stores are to hold the same, and large outputs take long to encode: so it is done once.
    `encode` and `dump` take such a record; nothing can be read from its output any more.

    Raises:
        NotStorableError: as above.
    """
    return {"success": True, "output": fragment(output), "duration": _whole(duration_ms)}


def error_record(failure: BaseException | str, now_ms: float) -> Record:
    """Return the row's `error`, passwords masked and cut to `MAX_REASON` and `MAX_STACK_TRACE`.

    Never raises, whatever the exception does when it is looked at.

    Args:
        failure: what the handler raised; or a reason in words, which comes without a stack trace.
        now_ms: when the attempt ended.
    """
    if isinstance(failure, str):
        about = {"reason": shorten_reason(failure)}
    elif isinstance(failure, DescribedError):
        about = {
            "reason": shorten_reason(failure.reason),
            "stackTrace": shorten_stack_trace(failure.stack_trace),
        }
    else:
        about = {"reason": reason_of(failure), "stackTrace": stack_trace_of(failure)}
    return {"success": False, **about, "lastAttemptAt": iso(now_ms)}


def unknown_job_row(queue: str, *, data: object, options: object, timestamp: object) -> Record:
    """Return the whole `data` of a row for a job that came without one (contract, section 4).

    Never raises: a producer that nobody knows may have put anything into the job. The payload is
    the data without `correlationId`; `{"value": data}` for data that is no object, `{}` for what
    can't be stored. A priority other than BullMQ's 1 to 4 is "normal", fewer than one attempt is
    one, and what is no time is now.
    """
    options = options if isinstance(options, Mapping) else {}
    added = cast(float, timestamp) if _is_finite(timestamp) else now_ms()
    name = storable(queue)
    return {
        "schemaVersion": 1,
        "taskName": name,
        "queueName": name,
        "payload": _payload(data),
        "status": "pending",
        "priority": _PRIORITY_WORDS.get(_whole(options.get("priority")), "normal"),
        "attempts": 0,
        "maxAttempts": max(1, _whole(options.get("attempts"))),
        "enqueuedAt": iso(added),
        "startedAt": None,
        "completedAt": None,
        "failedAt": None,
        "delayUntil": None,
        "result": None,
        "error": None,
        "userId": None,
        "externalId": None,
    }


def row_id(queue: str, job_id: str) -> str:
    """Return the id of a job's row: the job's own, or `own_row_id` (contract, section 4).

    The queue's name goes before the integers, from 1 up, that BullMQ gives to jobs of every queue;
    it refuses them as ids of a producer's choice.
    """
    return own_row_id(queue, job_id) if _COUNTED_ID.fullmatch(job_id) else clean_text(job_id)


def own_row_id(queue: str, job_id: str) -> str:
    """Return the id of a row for a job whose own id is taken: `<queue>~<job id>`.

    A job can be added under this id, as the API does when it retries a task: BullMQ refuses
    integers and a `:` in it. A `:`, `~` or `=` in either part is written as `=3A`, `=7E` or `=3D`,
    so two different pairs never have the same id (but for what jsonb refuses in a text). Another
    job can have it only if its producer puts a queue's name and a `~` before an id on purpose.
    """
    return clean_text(f"{_escape(queue)}~{_escape(job_id)}")


def job_ids_of(queue: str, row_id: str) -> list[str]:
    """Return the ids that the job of a row may have: the row's own, then that of `own_row_id`."""
    before = f"{_escape(queue)}~"
    if not row_id.startswith(before):
        return [row_id]
    escaped = row_id.removeprefix(before)
    return [row_id, _ESCAPED.sub(lambda match: chr(int(match[1], 16)), escaped)]


def _escape(text: str) -> str:
    return _TO_ESCAPE.sub(lambda match: f"={ord(match[0]):02X}", text)


def is_task_of_api(job_id: str, options: Mapping[str, Any]) -> bool:
    """Whether the API made a job (contract, section 1), so that its row was there before it."""
    return (
        _API_ID.fullmatch(job_id) is not None
        and options.get("jobId") == job_id
        and options.get("priority") in _PRIORITY_WORDS
        # bullmq's `Job` gives a job without these options 0 and None.
        and bool(options.get("attempts"))
        and options.get("backoff") is not None
    )


def encode(record: Record) -> str:
    """Return the compact JSON text of a patch or a row of this module."""
    return dump(record)


def iso(ms: float) -> str:
    """Return a time as `2026-01-02T03:04:05.678Z`.

    Args:
        ms: milliseconds since 1970; a part of one is dropped. A time before 1970 or after 9999
            becomes the nearest one in between, NaN the first.
    """
    # Written so that NaN fails the first comparison.
    if not ms >= 0:
        ms = 0
    seconds, millis = divmod(int(min(ms, _LAST_MS)), 1000)
    return f"{_second(seconds)}.{millis:03}Z"


@lru_cache(maxsize=64)
def _second(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def _payload(data: object) -> Record:
    if isinstance(data, dict):
        data = {key: value for key, value in data.items() if key != "correlationId"}
    else:
        data = {"value": data}
    try:
        payload = storable(data)
    except NotStorableError:
        return {}
    return payload if isinstance(payload, dict) else {}


def _is_finite(value: object) -> bool:
    return type(value) is int or (type(value) is float and math.isfinite(value))


def _whole(value: object) -> int:
    """Return a number as an integer of JavaScript's, at least 0; 0 for what is no number."""
    if not _is_finite(value):
        return 0
    return min(max(0, int(value)), _MAX_SAFE_INTEGER)  # type: ignore[call-overload, no-any-return]
