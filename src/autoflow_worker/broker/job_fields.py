"""Read a job's hash, whatever its fields hold, into a `Claim`; write the fields of a failure."""

import json
import re
from collections.abc import Mapping
from typing import Any, Final

import orjson
from bullmq import Worker

from autoflow_worker.broker.claim import Claim, MalformedJobError
from autoflow_worker.broker.handler_job import HandlerJob, job_from

MAX_DATA: Final = 16 * 1024 * 1024
"""Bytes of a job's `data`, where no setting MAX_PAYLOAD_BYTES is given."""

MAX_STACKTRACES: Final = 20  # kept on a job; its option `stackTraceLimit` may ask for fewer

# Numbers as JavaScript prints them, other than plain digits.
_NUMBER: Final = re.compile(r"-?[0-9]{1,300}(\.[0-9]{1,300})?(e\+[0-9]{1,2})?")

_FIRST_FIELDS: Final = frozenset(
    {"ats", "data", "delay", "name", "opts", "pb", "priority", "processedOn", "timestamp"}
)
_LATER_FIELDS: Final = _FIRST_FIELDS | {"atm", "failedReason", "progress", "stacktrace"}
_PLAIN_OPTIONS: Final = frozenset(
    {
        *("attempts", "backoff", "delay", "jobId", "priority", "removeOnComplete", "removeOnFail"),
        *("omc", "tm"),  # a producer's telemetry
    }
)

_raw_decode: Final = json.JSONDecoder().raw_decode


def read_claim(
    queue: Worker,
    fields: Mapping[str, str],
    job_id: str,
    token: str,
    locked_until: float,
    *,
    max_data: int = MAX_DATA,
    max_started: int | None = None,
) -> Claim:
    """Read a claimed job's hash, whatever its fields hold; `Claim` describes the arguments.

    Args:
        max_data: bytes of `data` at most; a job with more is not parsed.
        max_started: claims at most, BullMQ's `maxStartedAttempts`; a job with more is not parsed.
    """
    reason = _why_not_parsed(fields, max_data)
    if not reason and max_started and _counter(fields.get("ats")) > max_started:
        reason = "job started more than allowable limit"  # Node's own words
    if reason:
        claim = Claim(queue, {**fields, "data": "{}"}, job_id, token, locked_until)
        read_by_job(claim)
        claim.never = claim.malformed or reason
        return claim
    claim = Claim(queue, fields, job_id, token, locked_until)
    try:
        is_read = _read_plain(claim)
    except Exception:
        is_read = False
    if not is_read:
        read_by_job(claim)
    return claim


def _why_not_parsed(fields: Mapping[str, str], max_data: int) -> str | None:
    """Say why the data must not be parsed. Parsing it may have killed the last worker."""
    if deferred := fields.get("defa"):
        return deferred
    data = fields.get("data", "")
    # UTF-8 takes at most four bytes for a character.
    if 4 * len(data) > max_data and (size := len(data.encode(errors="surrogateescape"))) > max_data:
        return f"its data has {size:,} bytes, and MAX_PAYLOAD_BYTES allows {max_data:,}"
    return None


def _read_plain(claim: Claim) -> bool:
    """Read a job without a `Job`, which takes ten times as long; most jobs are plain.

    Return False, or raise anything, if the job needs a `Job`. What a `Job` would object to must not
    pass here, as one may be made later.
    """
    fields = claim.fields
    made = 0
    if not fields.keys() <= _FIRST_FIELDS:
        if not fields.keys() <= _LATER_FIELDS:
            return False
        made = int(fields.get("atm", "0"))
        for text in ("progress", "stacktrace"):
            if text in fields:
                _parse(fields[text])
    if "name" not in fields or not 0 <= made < 2**53 - 1 or not is_utf8(claim.id):
        return False
    options = orjson.loads(fields["opts"])
    if not options.keys() <= _PLAIN_OPTIONS or type(options.get("backoff", {})) is not dict:
        return False
    for option in ("attempts", "removeOnComplete", "removeOnFail"):
        value = options.get(option, 1)
        if type(value) is not int or not 0 < value < 2**53:
            return False
    for number in ("delay", "priority"):
        int(fields[number])
    claim.timestamp = int(fields["timestamp"])
    claim.data = _parse(fields["data"])
    claim.options = options
    claim.attempts_made, claim.attempt = made, made + 1
    claim.attempts_started = int(fields["ats"])
    claim.max_attempts = options.get("attempts", 1)
    claim.claimed_ms = int(fields["processedOn"])
    return True


def _parse(text: str) -> Any:
    """Parse JSON as `json.loads` does, without its checks for other types and encodings."""
    value, end = _raw_decode(text)
    if end != len(text):
        raise ValueError("something follows the JSON")
    return value


def read_by_job(claim: Claim) -> None:
    """Read a job by bullmq's `Job`; a job that can't be read becomes `malformed`."""
    try:
        job = job_from(claim.queue, _with_whole_numbers(claim.fields), claim.id)
        _check_fields(claim.fields, job)
    except Exception as error:
        # The job is claimed, so it has to end with a reason, whatever its fields hold.
        told = error if isinstance(error, MalformedJobError) else f"{type(error).__name__}: {error}"
        claim.malformed = f"the job can't be read: {told}"
        job = _stand_in(claim)
    claim.job = job
    claim.data = job.data
    claim.options = job.opts
    claim.attempts_made = int(job.attemptsMade)
    # A negative counter counts as 0.
    claim.attempt = min(max(claim.attempts_made, 0), 2**53 - 2) + 1
    claim.attempts_started = job.attemptsStarted
    claim.max_attempts = int(job.attempts)
    claim.timestamp = int(job.timestamp)
    claim.claimed_ms = int(job.processedOn)
    claim.scheduler = job.repeatJobKey
    claim.never = claim.malformed or job.deferredFailure


def _stand_in(claim: Claim) -> HandlerJob:
    fields = claim.fields
    name = fields.get("name") or claim.queue.name
    job = HandlerJob(claim.queue, name, {}, {"attempts": 1}, claim.id)
    job.attemptsMade = _counter(fields.get("atm"))
    job.attemptsStarted = _counter(fields.get("ats"))
    job.repeatJobKey = fields.get("rjk")
    job.timestamp = _counter(fields.get("timestamp"))
    return job


def _counter(text: str | None) -> int:
    """Read a whole number; a field that holds anything else counts as 0."""
    try:
        return int(text or 0)
    except ValueError:
        return 0


def _check_fields(fields: Mapping[str, str], job: HandlerJob) -> None:
    """Refuse fields on which BullMQ's scripts would break half-way, with the job in no list."""
    if "name" not in fields:
        raise MalformedJobError("its fields are gone from Redis")
    if "parent" in fields and not isinstance(json.loads(fields["parent"]), dict):
        raise MalformedJobError("its parent is no object")
    for option in ("attempts", "stackTraceLimit"):
        value = job.opts.get(option, 0)
        if value is None:  # JavaScript producers write null for an option that is not set.
            del job.opts[option]
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 2**53:
            raise MalformedJobError(f"its option {option} is no number")
    job.attempts = max(int(job.opts.get("attempts", 1)), 1)
    for option in ("removeOnComplete", "removeOnFail"):
        if not _says_what_to_keep(job.opts.get(option)):
            raise MalformedJobError(f"its option {option} says nothing that can be followed")
    if not is_utf8(job.id):
        raise MalformedJobError("its id is not UTF-8")


def _says_what_to_keep(option: object) -> bool:
    if isinstance(option, Mapping):
        numbers = [option.get(key) for key in ("age", "count", "limit")]
        return all(n is None or (isinstance(n, int | float) and abs(n) < 2**53) for n in numbers)
    return option is None or (isinstance(option, int) and abs(option) < 2**53)


def is_utf8(text: str) -> bool:
    """Whether a text was UTF-8 in Redis; `replies` reads other bytes as lone surrogates."""
    return text.isascii() or not any("\ud800" <= char <= "\udfff" for char in text)


def _with_whole_numbers(fields: Mapping[str, str]) -> Mapping[str, str]:
    """Return the fields without the fractions that JavaScript allows in times and priorities."""
    for name in ("timestamp", "delay", "priority"):
        text = fields.get(name, "0")
        if not text.isdigit() and _NUMBER.fullmatch(text):
            fields = {**fields, name: str(int(float(text)))}
    return fields


def failure_fields(job: HandlerJob, reason: str, stack_trace: str | None) -> dict[str, str]:
    """Return the fields that Node writes at a failure: the reason, and each attempt's stack."""
    limit = int(min(job.opts.get("stackTraceLimit", MAX_STACKTRACES), MAX_STACKTRACES))
    known = job.stacktrace if isinstance(job.stacktrace, list) else []
    traces = [*known, stack_trace or reason][-limit:] if limit > 0 else []
    return {"failedReason": reason, "stacktrace": json.dumps(traces)}
