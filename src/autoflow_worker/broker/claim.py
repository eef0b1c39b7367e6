"""A job that this worker holds, read from whatever its hash in Redis holds."""

import enum
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import orjson
from bullmq import Job, Worker

# Numbers as JavaScript prints them, other than plain digits.
_NUMBER: Final = re.compile(r"-?[0-9]{1,300}(\.[0-9]{1,300})?(e\+[0-9]{1,2})?")

_PLAIN_FIELDS: Final = frozenset(
    {"ats", "data", "delay", "name", "opts", "pb", "priority", "processedOn", "timestamp"}
)
_PLAIN_OPTIONS: Final = frozenset(
    {"attempts", "backoff", "delay", "jobId", "priority", "removeOnComplete", "removeOnFail"}
)
MAX_DATA: Final = 16 * 1024 * 1024
"""Bytes of a job's `data`, where the setting MAX_PAYLOAD_BYTES does not say."""

_HAS_DEPENDENTS: Final = frozenset({"parent", "parentKey", "deid"})
_raw_decode: Final = json.JSONDecoder().raw_decode


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


class Claim:
    """A job that this worker holds; `read_claim` makes it.

    Attributes:
        id: the job's.
        data: what the producer put into it.
        options: BullMQ's job options, by their long names.
        attempt: the number of this attempt, from 1.
        attempts_made: attempts that ended before this one, as BullMQ counts them.
        attempts_started: claims of this job, this one included.
        max_attempts: how many attempts the job has at most.
        claimed_ms: when it was claimed, in epoch ms by the claimer's clock; BullMQ's `processedOn`.
        scheduler: the job scheduler that produced it; None as a rule.
        malformed: why its fields could not be read; None as a rule.
        never: why it must not run but fail: it is malformed, its data is too long, or a child of it
            has failed.
        is_bare: Redis has lost its data.
        is_plain: it has nothing special about it, such as a parent.
        token: what the lock in Redis holds.
        locked_until: event loop time up to which the lock is surely ours.
    """

    __slots__ = (
        "_fields",
        "_job",
        "_queue",
        "attempt",
        "attempts_made",
        "attempts_started",
        "claimed_ms",
        "data",
        "id",
        "is_bare",
        "is_plain",
        "locked_until",
        "malformed",
        "max_attempts",
        "never",
        "options",
        "scheduler",
        "token",
    )

    data: Any
    options: dict[str, Any]
    attempt: int
    attempts_made: int
    attempts_started: int
    max_attempts: int
    claimed_ms: int

    def __init__(
        self,
        queue: Worker,
        fields: Mapping[str, str],
        job_id: str,
        token: str,
        locked_until: float,
    ) -> None:
        self._queue = queue
        self._fields = fields
        self._job: Job | None = None
        self.id = job_id
        self.token = token
        self.locked_until = locked_until
        self.scheduler: str | None = None
        self.malformed: str | None = None
        self.never: str | None = None
        self.is_bare = "name" not in fields
        self.is_plain = False

    @property
    def has_dependents(self) -> bool:
        """Whether its end changes other jobs: its parent, or one that it keeps from being added."""
        return not _HAS_DEPENDENTS.isdisjoint(self._fields)

    @property
    def job(self) -> Job:
        """bullmq's `Job`, of a malformed one only what could be read; made when it is asked for."""
        if self._job is None:
            self._job = Job.fromJSON(self._queue, self._fields, self.id)
            self._job.token = self.token
        return self._job

    def refuse_data(self, reason: str) -> None:
        """Read everything but the data, which is neither parsed nor run."""
        self._fields = {**self._fields, "data": "{}"}
        self.read_by_job()
        self.never = self.malformed or reason

    @property
    def timestamp(self) -> int:
        """When it was added, in epoch ms; a `Job`, which may be dear, is not made for it."""
        return int(self._fields["timestamp"] if self._job is None else self._job.timestamp)

    def read_plain(self) -> bool:
        """Read a job that has nothing special about it, as most first attempts; False: it has.

        A `Job` does the same and much more, at ten times the cost. What it would object to must
        not pass here, as one is perhaps made later.

        Raises:
            ValueError: and others; then a `Job` would object.
        """
        fields = self._fields
        if not fields.keys() <= _PLAIN_FIELDS or "name" not in fields or not is_utf8(self.id):
            return False
        options = orjson.loads(fields["opts"])
        if not options.keys() <= _PLAIN_OPTIONS or type(options.get("backoff", {})) is not dict:
            return False
        for option in ("attempts", "removeOnComplete", "removeOnFail"):
            value = options.get(option, 1)
            if type(value) is not int or not 0 < value < 2**53:
                return False
        for number in ("timestamp", "delay", "priority"):
            int(fields[number])
        self.data = _parse(fields["data"])
        self.options = options
        self.attempts_made, self.attempt = 0, 1
        self.attempts_started = int(fields["ats"])
        self.max_attempts = options.get("attempts", 1)
        self.claimed_ms = int(fields["processedOn"])
        return True

    def read_by_job(self) -> None:
        """Read any other job; its fields may hold anything."""
        try:
            job = Job.fromJSON(self._queue, _with_whole_numbers(self._fields), self.id)
            _check_fields(self._fields, job)
        except MalformedJobError as error:
            self.malformed = f"the job can't be read: {error}"
            job = _stand_in(self._queue, self._fields, self.id)
        except Exception as error:
            # Whatever the fields hold, the job is claimed: it has to end, and in words.
            self.malformed = f"the job can't be read: {type(error).__name__}: {error}"
            job = _stand_in(self._queue, self._fields, self.id)
        job.token = self.token
        self._job = job
        self.data = job.data
        self.options = job.opts
        self.attempts_made = int(job.attemptsMade)
        # A counter that is none counts from 1.
        self.attempt = min(max(self.attempts_made, 0), 2**53 - 2) + 1
        self.attempts_started = job.attemptsStarted
        self.max_attempts = int(job.attempts)
        self.claimed_ms = int(job.processedOn)
        self.scheduler = job.repeatJobKey
        self.never = self.malformed or job.deferredFailure


@dataclass(slots=True)
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
    queue: Worker,
    fields: Mapping[str, str],
    job_id: str,
    token: str,
    locked_until: float,
    *,
    max_data: int = MAX_DATA,
) -> Claim:
    """A claimed job as Redis holds it; its fields may hold anything.

    Args:
        queue: the bullmq `Worker` that the `Job` belongs to.
        fields: the job's hash.
        locked_until: event loop time up to which the lock is surely ours.
        max_data: bytes of `data` at most; a job with more is not parsed.
    """
    claim = Claim(queue, fields, job_id, token, locked_until)
    # UTF-8 takes four bytes for a character at most.
    if ("defa" in fields or 4 * len(fields.get("data", "")) > max_data) and (
        reason := _why_not_parsed(fields, max_data)
    ):
        claim.refuse_data(reason)
        return claim
    try:
        claim.is_plain = claim.read_plain()
    except Exception:
        claim.is_plain = False
    if not claim.is_plain:
        claim.read_by_job()
    return claim


def _why_not_parsed(fields: Mapping[str, str], max_data: int) -> str | None:
    """Why the data must not even be looked at: parsing it may be what killed the last worker."""
    if deferred := fields.get("defa"):
        return deferred
    if (size := _size_of(fields.get("data", ""))) > max_data:
        return f"its data has {size:,} bytes, and MAX_PAYLOAD_BYTES allows {max_data:,}"
    return None


def _size_of(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode(errors="surrogateescape"))


def _parse(text: str) -> Any:
    """What `json.loads` does, without its preparations for other kinds of text."""
    value, end = _raw_decode(text)
    if end != len(text):
        raise ValueError("something follows the JSON")
    return value


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
