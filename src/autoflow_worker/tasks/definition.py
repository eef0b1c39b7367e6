"""``define_task``, and the objects that a task's author meets."""

import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, ParamSpecArgs, overload

from pydantic import TypeAdapter
from typing_extensions import TypeVar  # typing's own has defaults from Python 3.13 on

from autoflow_worker.errors import TaskListError
from autoflow_worker.tasks import payload as payloads
from autoflow_worker.tasks.batches import (
    BatchContext,
    BatchItem,
    BatchOptions,
    check_batch,
    payload_of,
)
from autoflow_worker.tasks.context import TaskContext
from autoflow_worker.tasks.worker_options import MAX_MS, WorkerOptions, check_worker_options

Priority = Literal["critical", "high", "normal", "low"]

#: BullMQ's number for each priority; the lowest runs first (contract, section 1).
PRIORITIES: Mapping[Priority, int] = {"critical": 1, "high": 2, "normal": 3, "low": 4}

#: The field of a job's data that is no part of the payload (contract, section 1).
CORRELATION_ID = "correlationId"

MAX_CONCURRENCY = 10_000
MAX_ATTEMPTS = 1_000_000

P = TypeVar("P")
R = TypeVar("R", default=Any)
C = TypeVar("C")

Lifespan = Callable[[], AbstractAsyncContextManager[C]]
Around = Callable[[TaskContext[Any]], AbstractContextManager[object]]
AroundAsync = Callable[[TaskContext[Any]], AbstractAsyncContextManager[object]]
AroundBatch = Callable[[BatchContext[Any]], AbstractContextManager[object]]
AroundBatchAsync = Callable[[BatchContext[Any]], AbstractAsyncContextManager[object]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskOptions:
    """How a task's jobs run.

    ``TaskScheduler`` writes the first three into the jobs that it adds. Jobs of other producers
    bring their own.

    Attributes:
        priority: which of the queue's jobs run first.
        max_attempts: how often a job runs at most.
        backoff_ms: milliseconds before the first retry, doubled before each further one.
        timeout_ms: time limit of one call of the handler in milliseconds; ``None``: no limit.
        concurrency: calls of the handler at once in one process; ``None``: WORKER_CONCURRENCY. A
            call has one job, or those of one batch.
        run_in: ``"process"`` runs the handler in processes of its own, one for each job at once,
            for work that needs the CPU or may crash. They import the task list by its name.
            ``None``: an ``async def`` runs in the event loop, a ``def`` in a thread.
        recycle_after_jobs: jobs after which a fresh process takes the place; ``None``: no limit.
        recycle_above_mb: memory in MB above which a process is replaced after its job; ``None``:
            no limit.
    """

    priority: Priority = "normal"
    max_attempts: int = 3
    backoff_ms: int = 1000
    timeout_ms: int | None = 30_000
    concurrency: int | None = None
    run_in: Literal["process"] | None = None
    recycle_after_jobs: int | None = None
    recycle_above_mb: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class TaskDefinition(Generic[P, R]):
    """A queue and the handler that runs its jobs; made by ``define_task``.

    ``P`` is the payload's type, ``R`` that of the handler's result.

    Attributes:
        queue_name: the queue, which is the task's name.
        handler: takes ``(payload, ctx)``, or ``(items, ctx)`` if the task has a ``batch``.
        worker_options: checked.
        is_async: whether the handler is awaited; a handler that is not runs in a thread.
        payload_adapter: pydantic's validator, ``None`` for the plain JSON object.
        payload_source: what told the payload's type: the argument ``payload``, the handler's
            annotation, or nothing.
        takes_correlation_id: whether the payload's type has a field ``correlationId``.
        lifespan: yields the ``resources`` of the handler's context.
        around: a context manager that each attempt of the handler is inside of.
        around_async: the same, entered in the event loop.
        batch: how jobs are gathered for one call of the handler; ``None``: a call has one job.
    """

    queue_name: str
    handler: Callable[[P, Any], Awaitable[R] | R]
    options: TaskOptions
    worker_options: Mapping[str, Any]
    is_async: bool
    payload_adapter: TypeAdapter[P] | None = field(repr=False)
    takes_correlation_id: bool
    payload_source: Literal["argument", "annotation"] | None = None
    lifespan: Lifespan[Any] | None = None
    around: Callable[[Any], AbstractContextManager[object]] | None = None
    around_async: Callable[[Any], AbstractAsyncContextManager[object]] | None = None
    batch: BatchOptions | None = None

    def parse_payload(self, data: object) -> P:
        """Return the payload from a job's data, without the ``correlationId`` that it may not take.

        Raises:
            PayloadError: the data does not validate; the message names the fields.
        """
        if isinstance(data, dict) and not self.takes_correlation_id and CORRELATION_ID in data:
            data = data.copy()
            del data[CORRELATION_ID]
        return payloads.parse(self.payload_adapter, data)  # type: ignore[no-any-return]


# Type checkers take the first overload that fits: the result of an `async def` is what it returns.
@overload
def define_task(
    queue_name: str,
    handler: Callable[[P, TaskContext[None]], Awaitable[R]],
    options: TaskOptions = ...,
    payload: type[P] | TypeAdapter[P] | None = ...,
    worker_options: WorkerOptions | None = ...,
    *,
    around: Around | None = ...,
    around_async: AroundAsync | None = ...,
) -> TaskDefinition[P, R]: ...
@overload
def define_task(
    queue_name: str,
    handler: Callable[[P, TaskContext[C]], Awaitable[R]],
    options: TaskOptions = ...,
    payload: type[P] | TypeAdapter[P] | None = ...,
    worker_options: WorkerOptions | None = ...,
    *,
    lifespan: Lifespan[C],
    around: Around | None = ...,
    around_async: AroundAsync | None = ...,
) -> TaskDefinition[P, R]: ...
@overload
def define_task(
    queue_name: str,
    handler: Callable[[P, TaskContext[None]], R],
    options: TaskOptions = ...,
    payload: type[P] | TypeAdapter[P] | None = ...,
    worker_options: WorkerOptions | None = ...,
    *,
    around: Around | None = ...,
) -> TaskDefinition[P, R]: ...
@overload
def define_task(
    queue_name: str,
    handler: Callable[[P, TaskContext[C]], R],
    options: TaskOptions = ...,
    payload: type[P] | TypeAdapter[P] | None = ...,
    worker_options: WorkerOptions | None = ...,
    *,
    lifespan: Lifespan[C],
    around: Around | None = ...,
) -> TaskDefinition[P, R]: ...
@overload
def define_task(
    queue_name: str,
    handler: Callable[[Sequence[BatchItem[P]], BatchContext[None]], Awaitable[None] | None],
    options: TaskOptions = ...,
    payload: type[P] | TypeAdapter[P] | None = ...,
    worker_options: WorkerOptions | None = ...,
    *,
    around: AroundBatch | None = ...,
    around_async: AroundBatchAsync | None = ...,
    batch: BatchOptions,
) -> TaskDefinition[P, Any]: ...
@overload
def define_task(
    queue_name: str,
    handler: Callable[[Sequence[BatchItem[P]], BatchContext[C]], Awaitable[None] | None],
    options: TaskOptions = ...,
    payload: type[P] | TypeAdapter[P] | None = ...,
    worker_options: WorkerOptions | None = ...,
    *,
    lifespan: Lifespan[C],
    around: AroundBatch | None = ...,
    around_async: AroundBatchAsync | None = ...,
    batch: BatchOptions,
) -> TaskDefinition[P, Any]: ...
def define_task(
    queue_name: str,
    handler: Callable[..., Any],
    options: TaskOptions = TaskOptions(),
    payload: Any = None,
    worker_options: WorkerOptions | None = None,
    *,
    lifespan: Lifespan[Any] | None = None,
    around: Callable[[Any], AbstractContextManager[object]] | None = None,
    around_async: Callable[[Any], AbstractAsyncContextManager[object]] | None = None,
    batch: BatchOptions | None = None,
) -> TaskDefinition[Any, Any]:
    """Define the task that runs the jobs of one queue.

    Args:
        handler: ``async def`` or ``def``, called with ``(payload, ctx)``; a ``def`` runs in a
            thread. If it returns an awaitable, as a decorator's wrapper may, that is awaited. Its
            return value is the job's output; an exception fails the attempt.
        payload: the payload's type, where the handler has no annotation for it: any type that
            pydantic's ``TypeAdapter`` takes, or an adapter. Without both, the handler gets the
            plain JSON object.
        lifespan: an ``@asynccontextmanager`` that yields the ``ctx.resources`` of the handler: a
            pool, a client. It is entered before the first job is fetched, and left when all jobs
            have ended. Tasks with the same function share what it yields.
        around: called with the context, it returns a context manager that each attempt is inside
            of: a database session, a Sentry scope. It is entered where the handler runs: in its
            thread, or in the event loop.
        around_async: the same for an async context manager; for async handlers only.
        batch: the handler is called with ``(items, ctx)``, a ``Sequence[BatchItem[...]]`` and a
            ``BatchContext``, for up to ``size`` jobs at once. Each job keeps its own row, lock and
            attempts: ``item.complete()``, ``item.fail()`` and ``item.retry_later()`` settle one.
            For the items that are not settled, an exception of the handler fails all of them, and
            its return completes all of them, without an output. A job whose payload does not
            validate fails, and is never among the items. The time limit is that of one call,
            and ``concurrency`` is the number of batches at once. An item whose task was cancelled
            says so in ``item.ctx.cancelled``; if it is not settled, its task stays cancelled.

    Raises:
        TaskListError: an argument is invalid.
    """
    _check_queue_name(queue_name)
    _check_handler(queue_name, handler)
    _check_options(queue_name, options)
    is_async = inspect.iscoroutinefunction(payloads.underlying_function(handler))
    _check_contexts(queue_name, lifespan, around, around_async, is_async=is_async)
    check_batch(queue_name, batch, options.concurrency or 1)
    if batch is not None and options.run_in == "process":
        raise TaskListError(
            f"task {queue_name!r}: batches run in the event loop or in a thread, not in processes; "
            "take batch= or run_in='process' away"
        )
    adapter, source = _adapter(queue_name, handler, payload, in_batches=batch is not None)
    return TaskDefinition(
        queue_name=queue_name,
        handler=handler,
        options=options,
        worker_options=check_worker_options(queue_name, worker_options),
        is_async=is_async,
        payload_adapter=adapter,
        takes_correlation_id=payloads.has_field(adapter, CORRELATION_ID),
        payload_source=source,
        lifespan=lifespan,
        around=around,
        around_async=around_async,
        batch=batch,
    )


def _adapter(
    queue_name: str, handler: Callable[..., object], payload: Any, *, in_batches: bool
) -> tuple[Any, Any]:
    """Return the payload's validator, and what told its type; see `TaskDefinition`."""
    way_out = "give define_task a payload= that pydantic can validate"
    try:
        annotation = payloads.payload_annotation(handler) if payload is None else payload
    except Exception as error:
        raise TaskListError(
            f"task {queue_name!r}: the annotation of the handler's payload can't be evaluated "
            f"({type(error).__name__}: {error}); make the name importable at run time, or {way_out}"
        ) from error
    if isinstance(annotation, ParamSpecArgs):
        raise TaskListError(
            f"task {queue_name!r}: the handler's decorator hides the type of its payload; let it "
            f"use functools.wraps, or {way_out}"
        )
    known = annotation is not payloads.NO_ANNOTATION
    source = "argument" if payload is not None else "annotation" if known else None
    if payload is None:
        annotation = payload_of(queue_name, annotation, in_batches=in_batches)
    try:
        return payloads.payload_adapter(annotation), source
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise TaskListError(
            f"task {queue_name!r}: payload type {annotation!r} can't be validated: "
            f"{first}; {way_out}"
        ) from error


def _check_queue_name(queue_name: object) -> None:
    if not isinstance(queue_name, str) or not queue_name.strip():
        raise TaskListError(f"define_task: queue_name must be a name, not {queue_name!r}")
    # A colon is allowed: BullMQ 5 for Node refuses it in new names, but older queues have one.
    if not queue_name.isprintable():
        raise TaskListError(f"define_task: queue_name {queue_name!r} has a control character")


def _check_handler(queue_name: str, handler: object) -> None:
    def refuse(reason: str) -> TaskListError:
        return TaskListError(f"task {queue_name!r}: handler {reason}")

    if inspect.isclass(handler) or not callable(handler):
        raise refuse(f"must be a function of (payload, ctx), not {handler!r}")
    function = payloads.underlying_function(handler)
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise refuse("must return its result, not yield it")
    try:
        signature = inspect.signature(handler)
    except ValueError:  # a builtin without a signature
        return
    try:
        signature.bind(object(), object())
    except TypeError:
        raise refuse(f"must take two arguments (payload, ctx), and takes {signature}") from None


def _check_contexts(
    queue_name: str, lifespan: object, around: object, around_async: object, *, is_async: bool
) -> None:
    given = {"lifespan": lifespan, "around": around, "around_async": around_async}
    for name, value in given.items():
        if value is not None and not callable(value):
            raise TaskListError(
                f"task {queue_name!r}: {name} must be a function that returns a context manager, "
                f"not {value!r}"
            )
        function = inspect.unwrap(value) if callable(value) else None
        if function is not value:  # made by contextlib
            continue
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise TaskListError(
                f"task {queue_name!r}: {name} must be decorated with contextlib's "
                f"@{'contextmanager' if name == 'around' else 'asynccontextmanager'}"
            )
    if around_async is not None and not is_async:
        raise TaskListError(
            f"task {queue_name!r}: around_async is for async handlers; give a sync one around="
        )


def _check_options(queue_name: str, options: object) -> None:
    if not isinstance(options, TaskOptions):
        raise TaskListError(f"task {queue_name!r}: options must be TaskOptions, not {options!r}")
    if options.priority not in tuple(PRIORITIES):
        raise TaskListError(
            f"task {queue_name!r}: priority must be one of {', '.join(PRIORITIES)}, "
            f"not {options.priority!r}"
        )
    _check_whole(queue_name, "max_attempts", options.max_attempts, 1, MAX_ATTEMPTS)
    _check_whole(queue_name, "backoff_ms", options.backoff_ms, 0, MAX_MS)
    if options.timeout_ms is not None:
        _check_whole(queue_name, "timeout_ms", options.timeout_ms, 1, MAX_MS, besides="None or ")
    if options.concurrency is not None:
        _check_whole(queue_name, "concurrency", options.concurrency, 1, MAX_CONCURRENCY)
    if options.run_in not in (None, "process"):
        raise TaskListError(
            f"task {queue_name!r}: run_in must be 'process' or None, not {options.run_in!r}"
        )
    for name in ("recycle_after_jobs", "recycle_above_mb"):
        if (value := getattr(options, name)) is not None:
            if options.run_in is None:
                raise TaskListError(f"task {queue_name!r}: {name} needs run_in='process'")
            _check_whole(queue_name, name, value, 1, MAX_MS, besides="None or ")


def _check_whole(
    queue_name: str, name: str, value: object, low: int, high: int, *, besides: str = ""
) -> None:
    if type(value) is not int or not low <= value <= high:
        raise TaskListError(
            f"task {queue_name!r}: {name} must be {besides}a whole number from {low} to {high}, "
            f"not {value!r}"
        )
