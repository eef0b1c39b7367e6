"""Tasks whose handler gets many jobs in one call: their options, their items, their context."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Generic, NamedTuple, get_args, get_origin

import structlog
from typing_extensions import TypeVar  # typing's own has defaults from Python 3.13 on

from autoflow_worker.errors import TaskListError
from autoflow_worker.logs.configure import job_logger
from autoflow_worker.tasks.context import TaskContext
from autoflow_worker.tasks.exceptions import RetryLater
from autoflow_worker.tasks.payload import NO_ANNOTATION

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

log = structlog.get_logger(__name__)

MAX_SIZE: Final = 1_000
MAX_WAIT_MS: Final = 60_000

MAX_SLOTS: Final = 10_000
"""The most jobs that one task has at once in one process."""

P_co = TypeVar("P_co", covariant=True, default=Any)
ResourcesT_co = TypeVar("ResourcesT_co", covariant=True, default=object)

# Threads of one handler may settle the same item.
_settling: Final = threading.Lock()


class BatchEndedError(Exception):
    """An item is settled after its handler has ended, or was cut off: it has its outcome."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchOptions:
    """How jobs are gathered for one call of the handler.

    Attributes:
        size: the most jobs of one call, from 1 to 1,000.
        wait_ms: how long the first job of a batch waits for others, from 0 to 60,000 milliseconds.
    """

    size: int = 100
    wait_ms: int = 50


class Settlement(NamedTuple):
    """What a handler said of one item: its output, or an exception."""

    output: Any
    error: BaseException | None


class BatchItem(Generic[P_co]):
    """One job of a batch. Its methods may be called from any thread, and return at once.

    The first of ``complete``, ``fail`` and ``retry_later`` counts. Each of them raises
    ``BatchEndedError`` after the handler has ended.

    Attributes:
        payload: the validated payload.
        ctx: the context of this job's attempt.
    """

    __slots__ = ("_has_ended", "_on_settled", "_settlement", "ctx", "payload")

    def __init__(self, payload: P_co, ctx: TaskContext[Any]) -> None:
        self.payload = payload
        self.ctx = ctx
        self._on_settled: Callable[[], None] | None = None
        self._settlement: Settlement | None = None
        self._has_ended = False

    @property
    def settlement(self) -> Settlement | None:
        """What the handler said of this item; ``None``: nothing yet."""
        return self._settlement

    def complete(self, output: object = None) -> None:
        """Complete the job with this output, as if a handler of its own had returned it."""
        self._settle(Settlement(output, None))

    def fail(self, error: BaseException) -> None:
        """Do with the job what an exception of a handler of its own would do.

        Args:
            error: ``UnrecoverableError``, for example, fails the job for good.

        Raises:
            TypeError: it is no exception.
        """
        if not isinstance(error, BaseException):
            raise TypeError(f"item.fail() takes an exception, not {error!r}")
        self._settle(Settlement(None, error))

    def retry_later(self, seconds: float) -> None:
        """Run the job again later, without using up its attempt: see ``RetryLater``.

        Raises:
            ValueError: the seconds are not from 0 to ten years.
        """
        self._settle(Settlement(None, RetryLater(seconds)))

    def _settle(self, settlement: Settlement) -> None:
        with _settling:
            if self._has_ended:
                raise BatchEndedError(f"the batch with the job {self.ctx.task_id} has ended")
            if is_first := self._settlement is None:
                self._settlement = settlement
        if not is_first:
            log.warning("item_settled_twice", **self.ctx.log_fields())
        elif self._on_settled is not None:
            self._on_settled()

    def begin(self, on_settled: Callable[[], None]) -> None:
        """Call this when the item is settled, in the thread that settles it; for the worker."""
        self._on_settled = on_settled

    def end(self) -> Settlement | None:
        """Take no further word on this item, and return what was said; for the worker."""
        with _settling:
            self._has_ended = True
            return self._settlement


class BatchContext(Generic[ResourcesT_co]):
    """What a batch's handler gets besides its items. Each item has a ``ctx`` of its own, too.

    Args:
        items: at least one.

    Attributes:
        queue_name: the queue, which is the task's name.
        task_id: the id of the first item's job, which names the batch in the log.
        size: how many items the batch has.
    """

    __slots__ = ("_first", "queue_name", "size", "task_id")

    def __init__(self, items: Sequence[BatchItem[Any]]) -> None:
        # What this context tells is the same for all items.
        self._first = items[0].ctx
        self.queue_name = self._first.queue_name
        self.task_id = self._first.task_id
        self.size = len(items)

    @property
    def resources(self) -> ResourcesT_co:
        """What the task's ``lifespan`` yielded; ``None`` without one."""
        resources: ResourcesT_co = self._first.resources
        return resources

    @property
    def stopping(self) -> bool:
        """Whether the worker is stopping: a long handler may settle what it has, and return."""
        return self._first.stopping

    def time_left(self) -> float | None:
        """Return the seconds until the batch's time limit, at least 0; ``None`` if there is none.

        One limit holds for the whole call, so it is the same as of each item.
        """
        return self._first.time_left()

    @property
    def logger(self) -> "FilteringBoundLogger":
        """A structlog logger whose lines name the queue, the first job, and how many items."""
        return job_logger(**self.log_fields())

    def log_fields(self) -> dict[str, Any]:
        """Return what each log line says of this batch."""
        return {"queue": self.queue_name, "task_id": self.task_id, "items": self.size}


def check_batch(queue_name: str, batch: BatchOptions | None, concurrency: int) -> int:
    """Return how many jobs a task has at once in one process: its slots.

    Args:
        concurrency: calls of the handler at once.

    Raises:
        TaskListError: the options make no sense, or the jobs are too many.
    """
    if batch is None:
        return concurrency
    if not isinstance(batch, BatchOptions):
        raise TaskListError(f"task {queue_name!r}: batch must be BatchOptions, not {batch!r}")
    ranges = (("size", batch.size, 1, MAX_SIZE), ("wait_ms", batch.wait_ms, 0, MAX_WAIT_MS))
    for name, value, low, high in ranges:
        if type(value) is not int or not low <= value <= high:
            raise TaskListError(
                f"task {queue_name!r}: the batch's {name} must be a whole number from {low} to "
                f"{high}, not {value!r}"
            )
    slots = concurrency * batch.size
    if slots > MAX_SLOTS:
        raise TaskListError(
            f"task {queue_name!r}: {concurrency} batches of {batch.size} are more than {MAX_SLOTS} "
            "jobs at once; set a smaller TaskOptions(concurrency=...), which counts batches here, "
            "or a smaller BatchOptions(size=...)"
        )
    return slots


def payload_of(queue_name: str, annotation: Any, *, in_batches: bool) -> Any:
    """Return the type of one payload, from the annotation of a handler's first parameter.

    Raises:
        TaskListError: the annotation is not that of a batch's items, or should not be.
    """
    [item, *_] = get_args(annotation) or (None,)
    is_items = item is BatchItem or get_origin(item) is BatchItem
    if is_items and not in_batches:
        raise TaskListError(
            f"task {queue_name!r}: the handler takes {annotation}, so define_task needs a batch=, "
            "such as BatchOptions()"
        )
    if not in_batches or annotation in (Any, NO_ANNOTATION):
        return annotation
    if not is_items:
        raise TaskListError(
            f"task {queue_name!r}: with a batch=, the handler's first parameter is a "
            f"Sequence[BatchItem[...]], not {annotation}"
        )
    [payload] = get_args(item) or (Any,)
    return payload
