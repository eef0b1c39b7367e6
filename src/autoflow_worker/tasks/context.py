"""``TaskContext``: what a handler gets besides the payload."""

import asyncio
from typing import TYPE_CHECKING, Any, Generic, Protocol

from typing_extensions import TypeVar  # typing's own has defaults from Python 3.13 on

from autoflow_worker.logs.configure import job_logger

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

    from autoflow_worker.tasks.job_handle import JobHandle

ResourcesT_co = TypeVar("ResourcesT_co", covariant=True, default=object)


class TaskCancelledError(Exception):
    """The task was cancelled while its handler ran: its row says ``cancelled``."""


class RunningAttempt(Protocol):
    """What a context needs of the attempt that it belongs to, wherever its handler runs."""

    @property
    def job(self) -> "JobHandle": ...
    @property
    def resources(self) -> Any: ...
    @property
    def is_cancelled(self) -> bool: ...
    @property
    def is_stopping(self) -> bool: ...
    @property
    def last_progress(self) -> Any: ...
    def time_left(self) -> float | None: ...
    def report_progress(self, value: object) -> None: ...
    def append_log(self, line: str) -> None: ...
    async def until_cancelled(self) -> None: ...


class NoAttempt:
    """Answers for a context that a test made by hand: nothing is stored, nothing ends."""

    job: Any = None
    resources: Any = None
    is_cancelled = False
    is_stopping = False
    last_progress: Any = None

    def time_left(self) -> float | None:
        return None

    def report_progress(self, value: object) -> None:
        del value

    def append_log(self, line: str) -> None:
        del line

    async def until_cancelled(self) -> None:
        await asyncio.Event().wait()


class TaskContext(Generic[ResourcesT_co]):
    """What a handler gets to know about its attempt, and what it can do besides returning.

    Each method but ``wait_cancelled`` may be called from any thread.

    Attributes:
        task_id: the job's id, which is also the id of its row.
        correlation_id: the producer's, or a generated one.
        queue_name: the queue, which is the task's name.
        attempt: the number of this attempt, from 1.
        max_attempts: how many attempts the job has at most.
    """

    __slots__ = (
        "_running",
        "attempt",
        "correlation_id",
        "max_attempts",
        "queue_name",
        "task_id",
    )

    def __init__(
        self,
        *,
        task_id: str,
        correlation_id: str,
        queue_name: str,
        attempt: int = 1,
        max_attempts: int = 1,
        running: RunningAttempt | None = None,
    ) -> None:
        self._running: RunningAttempt = NoAttempt() if running is None else running
        self.task_id = task_id
        self.correlation_id = correlation_id
        self.queue_name = queue_name
        self.attempt = attempt
        self.max_attempts = max_attempts

    @property
    def job(self) -> "JobHandle":
        """BullMQ's ``Job``, for children and moves; made at the first access.

        It is None only in a context that was made by hand, as a handler's own test may do.
        """
        return self._running.job

    @property
    def resources(self) -> ResourcesT_co:
        """What the task's ``lifespan`` yielded; ``None`` without one."""
        resources: ResourcesT_co = self._running.resources
        return resources

    # -- reports ---------------------------------------------------------------------------------

    def progress(self, value: object) -> None:
        """Report progress: a number or any other JSON value, which Node's ``QueueEvents`` gets.

        Returns at once. Redis gets the last value at most ten times a second, and in any case
        before the attempt's outcome.

        Raises:
            NotStorableError: the value can't be stored as JSON.
        """
        self._running.report_progress(value)

    @property
    def last_progress(self) -> Any:
        """What an earlier attempt reported last, as a checkpoint to go on from; else ``None``."""
        return self._running.last_progress

    def log(self, line: str) -> None:
        """Append a line to the job's log in Redis, which bull-board shows; returns at once.

        Redis gets all lines, in order, before the attempt's outcome.
        """
        self._running.append_log(line)

    @property
    def logger(self) -> "FilteringBoundLogger":
        """A structlog logger whose lines name this attempt; made at each access."""
        return job_logger(**self.log_fields())

    def log_fields(self) -> dict[str, Any]:
        """Return what each log line says of this attempt."""
        return {
            "queue": self.queue_name,
            "task_id": self.task_id,
            "attempt": self.attempt,
            "max_attempts": self.max_attempts,
            "correlation_id": self.correlation_id,
        }

    # -- ends ------------------------------------------------------------------------------------

    @property
    def cancelled(self) -> bool:
        """Whether the task was cancelled, which takes up to two seconds to be noticed."""
        return self._running.is_cancelled

    def raise_if_cancelled(self) -> None:
        """Raise ``TaskCancelledError`` if the task was cancelled; for loops of sync handlers."""
        if self._running.is_cancelled:
            raise TaskCancelledError("the task is cancelled")

    async def wait_cancelled(self) -> None:
        """Wait until the task is cancelled; for an async handler that cancels work of its own."""
        await self._running.until_cancelled()

    @property
    def stopping(self) -> bool:
        """Whether the worker is stopping: a long handler may save its work, and return early."""
        return self._running.is_stopping

    def time_left(self) -> float | None:
        """Return the seconds until the time limit, at least 0; ``None`` if there is none.

        It suits as the ``timeout`` of a request: a missing one is why most handlers hang.
        """
        return self._running.time_left()
