"""A job that this worker holds, read from whatever its hash in Redis holds."""

import enum
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from bullmq import Job, Worker

# Numbers as JavaScript prints them, other than plain digits.
_NUMBER: Final = re.compile(r"-?[0-9]{1,300}(\.[0-9]{1,300})?(e\+[0-9]{1,2})?")


class Hold(enum.Enum):
    """Whose a job is that was claimed here."""

    OURS = "ours"
    LOST = "lost"  # finished, moved, or claimed by another worker
    GONE = "gone"  # Redis knows it no more, so nobody else will ever tell its end


class LockLostError(Exception):
    """The job is not this worker's any more."""


class ChildrenLeftError(Exception):
    """The job can't be completed: it has children that are unfinished or have failed."""


class MalformedJobError(Exception):
    """BullMQ's script can't work with what the job's fields hold."""


@dataclass(slots=True, eq=False)
class Claim:
    """A job that this worker holds.

    Attributes:
        job: bullmq's `Job`; of a malformed one, only what could be read.
        token: what the lock in Redis holds.
        locked_until: event loop time up to which the lock is surely ours.
        malformed: why the job's fields could not be read; None as a rule.
    """

    job: Job
    token: str
    locked_until: float
    malformed: str | None = None

    @property
    def id(self) -> str:
        return str(self.job.id)

    @property
    def attempt(self) -> int:
        """The number of this attempt, from 1; a counter that is none counts from there."""
        return min(max(int(self.job.attemptsMade), 0), 2**53 - 2) + 1

    @property
    def claimed_ms(self) -> int:
        """When it was claimed, in epoch ms by the claimer's clock; BullMQ's `processedOn`."""
        return int(self.job.processedOn)

    @property
    def max_attempts(self) -> int:
        return int(self.job.attempts)


@dataclass(frozen=True, slots=True)
class Reply:
    """What a fetch, or an acknowledgement that fetched, brought.

    Attributes:
        claim: the next job, if there was one.
        fetched: whether the queue was asked for one, so that the rest says something.
        limited_ms: the rate limit ends in so many ms; 0: there is none.
        delayed_until: epoch ms at which the next delayed job is due; 0: there is none.
    """

    claim: Claim | None = None
    fetched: bool = False
    limited_ms: int = 0
    delayed_until: int = 0


def read_claim(
    queue: Worker, fields: Mapping[str, str], job_id: str, token: str, locked_until: float
) -> Claim:
    """A claimed job as Redis holds it; its fields may hold anything.

    Args:
        queue: the bullmq `Worker` that the `Job` belongs to.
        fields: the job's hash.
        locked_until: event loop time up to which the lock is surely ours.
    """
    malformed = None
    try:
        job = Job.fromJSON(queue, _with_whole_numbers(fields), job_id)
        _check_fields(fields, job)
    except MalformedJobError as error:
        malformed = f"the job can't be read: {error}"
        job = _stand_in(queue, fields, job_id)
    except Exception as error:
        # Whatever the fields hold, the job is claimed: it has to end, and in words.
        malformed = f"the job can't be read: {type(error).__name__}: {error}"
        job = _stand_in(queue, fields, job_id)
    job.token = token
    return Claim(job, token, locked_until, malformed)


def _stand_in(queue: Worker, fields: Mapping[str, str], job_id: str) -> Job:
    job = Job(queue, fields.get("name") or queue.name, {}, {"attempts": 1}, job_id)
    job.attemptsMade = _whole(fields.get("atm"))
    job.attemptsStarted = _whole(fields.get("ats"))
    job.repeatJobKey = fields.get("rjk")
    job.timestamp = _whole(fields.get("timestamp"))
    return job


def _check_fields(fields: Mapping[str, str], job: Job) -> None:
    """Refuse what BullMQ's scripts would break on half-way, with the job in no list at all."""
    if "name" not in fields:
        raise MalformedJobError("its fields are gone from Redis")
    if "parent" in fields and not isinstance(json.loads(fields["parent"]), dict):
        raise MalformedJobError("its parent is no object")
    for option in ("attempts", "stackTraceLimit"):
        value = job.opts.get(option, 0)
        if value is None:  # as JavaScript producers say that they say nothing
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
    """Whether Redis had it as UTF-8; other bytes come from there as lone surrogates."""
    return text.isascii() or not any("\ud800" <= char <= "\udfff" for char in text)


def _with_whole_numbers(fields: Mapping[str, str]) -> Mapping[str, str]:
    """The fields without the fractions that JavaScript lets pass in times and priorities."""
    for name in ("timestamp", "delay", "priority"):
        text = fields.get(name, "0")
        if not text.isdigit() and _NUMBER.fullmatch(text):
            fields = {**fields, name: str(int(float(text)))}
    return fields


def _whole(text: str | None) -> int:
    try:
        return int(text or 0)
    except ValueError:
        return 0
