"""A job that this worker holds, and what a fetch brings; `job_fields` reads the job's hash."""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bullmq import Worker

from autoflow_worker.broker.handler_job import HandlerJob, job_from


class Hold(enum.Enum):
    """Who holds a job that was claimed here."""

    OURS = "ours"
    LOST = "lost"  # finished, moved, or claimed by another worker
    GONE = "gone"  # deleted from Redis, so no other worker will ever record its end


class LockLostError(Exception):
    """This worker does not hold the job any more."""


class ChildrenLeftError(Exception):
    """The job can't be completed: it has children that are unfinished."""


class ChildFailedError(ChildrenLeftError):
    """The job can never be completed: a child has failed that is to fail its parent."""


class MalformedJobError(Exception):
    """BullMQ's script can't work with the job's fields."""


@dataclass(slots=True, eq=False, repr=False)
class Claim:
    """A job that this worker holds; `job_fields.read_claim` makes it.

    Attributes:
        queue: the bullmq `Worker` of its queue.
        fields: its hash in Redis.
        token: the value of its lock in Redis.
        locked_until: event loop time before which the lock can't have expired.
        data: the producer's data.
        options: BullMQ's job options, by their long names.
        attempt: the number of this attempt, from 1.
        attempts_made: attempts that ended before this one, as BullMQ counts them.
        attempts_started: claims of this job, this one included.
        max_attempts: how many attempts the job has at most.
        timestamp: when the producer added it, in epoch ms.
        claimed_ms: when it was claimed, in epoch ms by the claimer's clock; BullMQ's `processedOn`.
        scheduler: the job scheduler that produced it; None for most jobs.
        malformed: why its fields could not be read; None for most jobs.
        never: why it must fail without being run: it is malformed, its data is too long, or a child
            of it has failed. None for most jobs.
    """

    queue: Worker
    fields: Mapping[str, str]
    id: str
    token: str
    locked_until: float
    data: Any = field(init=False)
    options: dict[str, Any] = field(init=False)
    attempt: int = field(init=False)
    attempts_made: int = field(init=False)
    attempts_started: int = field(init=False)
    max_attempts: int = field(init=False)
    timestamp: int = field(init=False)
    claimed_ms: int = field(init=False)
    scheduler: str | None = field(default=None, init=False)
    malformed: str | None = field(default=None, init=False)
    never: str | None = field(default=None, init=False)
    _job: HandlerJob | None = field(default=None, init=False)

    @property
    def is_bare(self) -> bool:
        """Whether Redis has lost its data."""
        return "name" not in self.fields

    @property
    def has_dependents(self) -> bool:
        """Whether its end changes other jobs: its parent, or one that has its deduplication id."""
        fields = self.fields
        return "parent" in fields or "parentKey" in fields or "deid" in fields

    @property
    def job(self) -> HandlerJob:
        """bullmq's `Job`, made at first use. That of a malformed job has only what can be read."""
        job = self._job
        if job is None:
            self.job = job = job_from(self.queue, self.fields, self.id)
        return job

    @job.setter
    def job(self, job: HandlerJob) -> None:
        job.token = self.token
        self._job = job

    def job_of_handler(self) -> HandlerJob:
        """Return `job` so that this claim is told if the handler changes how long it is locked."""
        job = self.job
        job.lock = self
        return job


@dataclass(slots=True)
class Reply:
    """The reply to a fetch, or to an acknowledgement that may have fetched.

    Attributes:
        claim: the next job, if there was one.
        fetched: whether the queue was asked for a job; else the other fields say nothing.
        limited_ms: ms until the rate limit ends; 0 if there is none.
        delayed_until: epoch ms at which the next delayed job is due; 0 if there is none.
    """

    claim: Claim | None = None
    fetched: bool = False
    limited_ms: int = 0
    delayed_until: int = 0
