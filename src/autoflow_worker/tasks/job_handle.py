"""``JobHandle``: what a handler may do with its job, by the names of BullMQ's ``Job`` in Node."""

from collections.abc import Awaitable, Mapping
from typing import Any, Literal, Protocol, TypedDict


class Page(TypedDict, total=False):
    """Which part of a parent's children to return.

    Attributes:
        cursor: 0, or the ``next…Cursor`` of the last reply.
        count: how many, about; 20 by default.
    """

    cursor: int
    count: int


class ChildrenPages(TypedDict, total=False):
    """The kinds of children to return, and which part of each."""

    processed: Page
    unprocessed: Page
    ignored: Page
    failed: Page


class Children(TypedDict, total=False):
    """A parent's children by their keys in Redis (``bull:mail:17``); only the kinds asked for.

    Attributes:
        processed: completed, with their return values.
        unprocessed: not finished.
        ignored: failed with ``ignoreDependencyOnFailure``, with their reasons.
        failed: failed with ``failParentOnFailure``, or with ``continueParentOnFailure``.
        nextProcessedCursor: goes into the next ``Page``; 0 after the last one. This and the next
            three come only with a ``Page``.
        nextFailedCursor: as the others, but never 0: the last page is the first empty one.
    """

    processed: dict[str, Any]
    unprocessed: list[str]
    ignored: dict[str, str]
    failed: list[str]
    nextProcessedCursor: int
    nextUnprocessedCursor: int
    nextIgnoredCursor: int
    nextFailedCursor: int


class CountedChildren(TypedDict, total=False):
    """The kinds of children to count."""

    processed: bool
    unprocessed: bool
    ignored: bool
    failed: bool


class ChildrenCounts(TypedDict, total=False):
    """How many children a parent has of each kind; only the kinds asked for."""

    processed: int
    unprocessed: int
    ignored: int
    failed: int


class JobHandle(Protocol):
    """A handler's own job, as ``ctx.job``.

    Names, arguments and results are those of BullMQ's ``Job`` in Node, so that a handler can be
    ported line by line. Times are milliseconds since 1970, durations milliseconds. A method that
    asks Redis is awaited, so an ``async def`` handler can use it. Where BullMQ's script refuses, it
    raises a ``TypeError`` with the words that Node's ``Error`` has.

    Attributes:
        name: the job's; the API gives it the queue's name.
        data: the producer's data, with ``correlationId``.
        opts: BullMQ's job options.
        token: the value of the job's lock. Node hands it to the processor as its second argument.
        progress: as last reported by ``updateProgress``.
        timestamp: when the producer added the job.
        delay: how long it was delayed, in ms.
        priority: 0 for none, else the lowest runs first.
        attemptsMade: attempts that have ended, this one not included.
        attemptsStarted: claims of the job, this one included.
        stalledCounter: how often it was found stalled.
        processedOn: when it was claimed.
        processedBy: the name of the worker that claimed it; None if the worker has none.
        failedReason: why its last attempt failed; None if none did.
        stacktrace: of each attempt that failed.
        parent: ``id`` and ``queueKey`` of its parent; None without one.
        parentKey: its parent's key in Redis; None without one.
        repeatJobKey: the job scheduler that produced it; None for most jobs.
        deduplicationId: the option ``deduplication.id``; None without one.
    """

    id: str
    name: str
    data: Any
    opts: dict[str, Any]
    token: str
    progress: Any
    timestamp: int
    delay: int
    priority: int
    attemptsMade: int
    attemptsStarted: int
    stalledCounter: int
    processedOn: int
    processedBy: str | None
    failedReason: str | None
    stacktrace: list[str]
    parent: dict[str, Any] | None
    parentKey: str | None
    repeatJobKey: str | None

    @property
    def deduplicationId(self) -> str | None: ...

    @property
    def queueName(self) -> str:
        """The queue, which is the task's name."""

    @property
    def queueQualifiedName(self) -> str:
        """The prefix and the queue, ``bull:mail``: what a child names as its parent's queue."""

    @property
    def prefix(self) -> str:
        """BullMQ's key prefix."""

    # -- what it tells ---------------------------------------------------------------------------

    def updateProgress(self, progress: Any) -> Awaitable[None]:
        """Store the progress, any JSON, and tell it to who listens to the queue's events."""

    def updateData(self, data: Any) -> Awaitable[None]:
        """Replace the job's data in Redis. The row keeps its payload."""

    def log(self, logRow: str) -> Awaitable[int]:
        """Add a line to the job's log in Redis, and return how many it has.

        The job's option ``keepLogs`` bounds them.
        """

    def clearLogs(self, keepLogs: int = 0) -> Awaitable[None]:
        """Delete the job's log but for its last ``keepLogs`` lines."""

    # -- moves: each is followed by its exception --------------------------------------------------

    def moveToDelayed(self, timestamp: int, token: str) -> Awaitable[None]:
        """Run again at ``timestamp``; then raise ``DelayedError``."""

    def moveToWait(self, token: str) -> Awaitable[int]:
        """Run again as soon as the queue allows; then raise ``WaitingError``.

        Returns:
            Milliseconds until the queue's rate limit ends; 0 without one.
        """

    def moveToWaitingChildren(
        self, token: str, opts: Mapping[str, Any] | None = None
    ) -> Awaitable[bool]:
        """Run again when the children have ended; then raise ``WaitingChildrenError``.

        Args:
            opts: ``child``, ``{"id": …, "queue": …}``: wait only if that child is unfinished.

        Returns:
            False, and nothing was moved, if no child is unfinished.

        Raises:
            bullmq.UnrecoverableError: a child has failed that was to fail its parent.
        """

    def rateLimit(self, expireTimeMs: int) -> Awaitable[None]:
        """Let the queue rest for so many ms; then raise ``RateLimitError``.

        This is Node's ``worker.rateLimit(ms)`` and ``queue.rateLimit(ms)``: a handler here has
        neither object. As in Node, workers with the option ``limiter`` keep the limit; a worker
        without it keeps only the limits that its own handlers raise.
        """

    # -- children --------------------------------------------------------------------------------

    def getChildrenValues(self) -> Awaitable[dict[str, Any]]:
        """Return what the completed children returned, by their keys in Redis."""

    def getIgnoredChildrenFailures(self) -> Awaitable[dict[str, str]]:
        """Return why children failed that have ``ignoreDependencyOnFailure``, by their keys."""

    def getFailedChildrenValues(self) -> Awaitable[dict[str, str]]:
        """Return what ``getIgnoredChildrenFailures`` does; BullMQ's older name for it."""

    def getDependencies(self, opts: ChildrenPages | None = None) -> Awaitable[Children]:
        """Return all children of all kinds, or a page of each kind that is asked for."""

    def getDependenciesCount(
        self, opts: CountedChildren | None = None
    ) -> Awaitable[ChildrenCounts]:
        """Count the children of all kinds, or of those that are asked for."""

    def removeUnprocessedChildren(self) -> Awaitable[None]:
        """Delete the children that neither ended nor run right now."""

    def removeChildDependency(self) -> Awaitable[bool]:
        """Take this job away from its parent, which no longer waits for it.

        Returns:
            False if the parent does not wait for it.
        """

    # -- the rest ----------------------------------------------------------------------------------

    def extendLock(self, token: str, duration: int) -> Awaitable[int]:
        """Hold the job's lock for so many ms from now; 1, or 0 if it is not held any more.

        The worker renews the lock every ``lockRenewTime``, for ``lockDuration``, as Node's does.
        """

    def discard(self) -> None:
        """Let this attempt be the last, should it fail (BullMQ 5; as ``UnrecoverableError``)."""

    def removeDeduplicationKey(self) -> Awaitable[bool]:
        """Let jobs with this job's deduplication id be added again; False if it keeps none away."""

    def changePriority(self, opts: Mapping[str, Any]) -> Awaitable[None]:
        """Change the job's ``priority``, for its further attempts; with ``lifo``, as the next."""

    def promote(self) -> Awaitable[None]:
        """Run a delayed job now; a job that its handler has not moved is not delayed."""

    def retry(
        self, state: Literal["failed", "completed"] = "failed", opts: Mapping[str, Any] = ...
    ) -> Awaitable[None]:
        """Run a finished job again; a job whose handler runs is not finished."""

    def remove(self, opts: Mapping[str, Any] = ...) -> Awaitable[None]:
        """Delete the job; refused while it is locked, as it is while its handler runs."""

    # -- where it is -------------------------------------------------------------------------------

    def getState(self) -> Awaitable[str]:
        """Return BullMQ's word for the job's state: ``active``, ``waiting``, ``delayed``."""

    def isActive(self) -> Awaitable[bool]: ...
    def isWaiting(self) -> Awaitable[bool]: ...
    def isDelayed(self) -> Awaitable[bool]: ...
    def isWaitingChildren(self) -> Awaitable[bool]: ...
    def isCompleted(self) -> Awaitable[bool]: ...
    def isFailed(self) -> Awaitable[bool]: ...
