"""The BullMQ worker options that a task may set, checked."""

import inspect
from collections.abc import Awaitable, Callable, Mapping
from typing import Annotated, Any, get_type_hints

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict  # pydantic takes typing's own from Python 3.12 on

from autoflow_worker.errors import TaskListError
from autoflow_worker.lookalikes import nearest

#: The longest time in milliseconds that Node's timers can wait for; about 24 days.
MAX_MS = 2**31 - 1

_SHOWN_LENGTH = 80

_checked = with_config(ConfigDict(strict=True, extra="forbid"))


# A field's description says what its value must be: the refusal of any other value quotes it.
def _whole(low: int, high: int = MAX_MS, unit: str = "") -> Any:
    wanted = f"a whole number from {low} to {high}{unit}"
    return Field(ge=low, le=high, description=wanted)


Positive = Annotated[int, _whole(1)]


def _age_or_count(value: "KeepJobs") -> "KeepJobs":
    if not {"age", "count"} & value.keys():
        raise ValueError
    return value


def _strategy(value: Callable[..., Any]) -> Callable[..., Any]:
    try:
        signature = inspect.signature(value)
    except ValueError:  # a builtin does not tell its parameters
        return value
    try:
        signature.bind(1, "type", None, None)
    except TypeError as error:
        raise ValueError from error
    return value


def _repeat_strategy(value: Callable[..., Any]) -> Callable[..., Any]:
    try:
        inspect.signature(value).bind(0, {}, "a name")
    except TypeError as error:
        raise ValueError from error
    return value


def _settings(value: "AdvancedSettings") -> "AdvancedSettings":
    if not value:
        raise ValueError
    return value


@_checked
class Limiter(TypedDict):
    """At most ``max`` jobs of the queue start in ``duration`` milliseconds, over all workers."""

    max: Positive
    duration: Positive


@_checked
class KeepJobs(TypedDict, total=False):
    """How many finished jobs stay: the newest ``count``, for ``age`` seconds."""

    age: Annotated[int, _whole(0)]
    count: Annotated[int, _whole(-1)]
    limit: Positive


@_checked
class Metrics(TypedDict):
    """Keep one number of finished jobs per minute, for ``maxDataPoints`` minutes."""

    maxDataPoints: Positive


@_checked
class AdvancedSettings(TypedDict, total=False):
    """What BullMQ lets a task compute itself.

    Attributes:
        backoffStrategy: of (attempts_made, type, error, job), returns milliseconds; -1: no retry.
        repeatStrategy: of (millis, repeat_options, job_name), returns when a job scheduler's next
            job is due, in epoch ms, or None for no further job. It may be async.
    """

    backoffStrategy: Annotated[
        Callable[[int, str, BaseException, Any], int | Awaitable[int]], AfterValidator(_strategy)
    ]
    repeatStrategy: Annotated[
        Callable[[int, dict[str, Any], str], Any], AfterValidator(_repeat_strategy)
    ]


Keep = Annotated[
    bool | Annotated[int, _whole(-1)] | Annotated[KeepJobs, AfterValidator(_age_or_count)],
    Field(
        description="true, false, a number of jobs to keep, or a dict with age (seconds) or count, "
        "and limit"
    ),
]


@_checked
class WorkerOptions(TypedDict, total=False):
    """BullMQ's worker options that have an effect here, by BullMQ's names.

    Attributes:
        name: shown by Node's ``getWorkers()``.
        lockDuration: ms that a job stays locked without renewal (30000).
        lockRenewTime: ms between renewals (half of lockDuration).
        stalledInterval: ms between checks for stalled jobs (30000).
        maxStartedAttempts: how often a job may start before it fails unrecoverably (no limit).
        maxStalledCount: how often a job may stall before it fails (1).
        drainDelay: seconds that a fetch from an empty queue blocks (5).
        maximumRateLimitDelay: ms after which a rate limited queue is asked again (30000).
        removeOnComplete: for jobs that do not say it themselves.
        removeOnFail: for jobs that do not say it themselves.
    """

    # Redis refuses any other character in the name of a client.
    name: Annotated[
        str,
        Field(pattern="^[!-~]{1,200}$", description="1 to 200 ASCII characters without blanks"),
    ]
    lockDuration: Annotated[int, _whole(100, unit=" ms")]
    lockRenewTime: Annotated[int, _whole(10, unit=" ms")]
    stalledInterval: Annotated[int, _whole(100, unit=" ms")]
    maxStartedAttempts: Positive
    maxStalledCount: Annotated[int, _whole(0, 1_000_000)]
    # A shorter delay would poll an empty queue. With a longer one a broken connection is noticed
    # late.
    drainDelay: Annotated[
        float, Field(ge=0.001, le=60, description="a number of seconds from 0.001 to 60")
    ]
    maximumRateLimitDelay: Annotated[int, _whole(1, unit=" ms")]
    limiter: Annotated[
        Limiter, Field(description="a dict with max (jobs) and duration (ms), from 1")
    ]
    removeOnComplete: Keep
    removeOnFail: Keep
    metrics: Annotated[Metrics, Field(description="a dict with maxDataPoints (minutes), from 1")]
    settings: Annotated[
        AdvancedSettings,
        Field(
            description="a dict with backoffStrategy, a function of "
            "(attempts_made, type, error, job), or repeatStrategy, one of "
            "(millis, repeat_options, job_name), async or not"
        ),
        AfterValidator(_settings),
    ]


_WANTED: dict[str, str] = {
    name: hint.__metadata__[0].description
    for name, hint in get_type_hints(WorkerOptions, include_extras=True).items()
}
_ADAPTER = TypeAdapter(WorkerOptions)

_WAY_OUT = {
    "concurrency": "set TaskOptions(concurrency=...) or WORKER_CONCURRENCY, and restart the "
    "worker; while it runs, BullMQ's queue.setGlobalConcurrency() limits the queue",
    "connection": "set REDIS_URL",
    "prefix": "set BULLMQ_PREFIX",
    "autorun": "the worker starts all tasks or none",
    "skipVersionCheck": "`autoflow-worker check` reports the version",
    "skipStalledCheck": "set maxStalledCount and stalledInterval",
    "skipLockRenewal": "set lockDuration and lockRenewTime",
    "runRetryDelay": "the worker has its own backoff for reconnecting",
    "backoffStrategy": 'write it as {"settings": {"backoffStrategy": ...}}',
    "blockingConnection": "the worker opens a connection of its own for blocking reads",
    "skipWaitingForReady": "set WORKER_STARTUP_TIMEOUT",
    "telemetry": "it exists for Node only",
    "useWorkerThreads": "it exists for Node only; a sync handler runs in a thread",
    "workerForkOptions": "it exists for Node only",
    "workerThreadsOptions": "it exists for Node only; a sync handler runs in a thread",
}


def check_worker_options(queue_name: str, options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a copy of the options, all of which have an effect.

    Raises:
        TaskListError: an option has no effect here, or its value makes no sense.
    """
    if options is None:
        return {}

    def refuse(fault: str) -> TaskListError:
        return TaskListError(f"task {queue_name!r}: worker_options: {fault}")

    if not isinstance(options, Mapping):
        raise refuse(f"they must be a dict, not {_shown(options)}")
    copy = dict(options)
    try:
        _ADAPTER.validate_python(copy)
    except ValidationError as error:
        name: Any = error.errors(include_url=False)[0]["loc"][0]
        if name not in _WANTED:
            raise refuse(_unknown(name)) from None
        wanted = _WANTED[name]
        raise refuse(f"{name} must be {wanted}, not {_shown(copy[name])}") from None
    duration = copy.get("lockDuration", 30_000)
    if copy.get("lockRenewTime", 0) >= duration:
        raise refuse(
            f"lockRenewTime must be shorter than lockDuration ({duration} ms), or the lock is lost "
            "before it is renewed"
        )
    return copy


def _unknown(name: object) -> str:
    if name in _WAY_OUT:
        return f"{name} has no effect here: {_WAY_OUT[str(name)]}"
    like = nearest(str(name), _WANTED)
    hint = f"did you mean {like}?" if like else f"there are {', '.join(sorted(_WANTED))}"
    return f"{_shown(name)} is not a BullMQ worker option that has an effect here; {hint}"


def _shown(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= _SHOWN_LENGTH else text[:_SHOWN_LENGTH] + "..."
