"""The BullMQ worker options that a task may set, checked."""

import difflib
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, TypedDict

from autoflow_worker.errors import TaskListError

#: The longest time in milliseconds that Node's timers can wait for; about 24 days.
MAX_MS = 2**31 - 1
#: Seconds. Below, an empty queue would be polled; above, a broken connection is noticed late.
MIN_DRAIN_DELAY = 0.001
MAX_DRAIN_DELAY = 60

_SHOWN_LENGTH = 80


class Limiter(TypedDict):
    """At most ``max`` jobs of the queue start in ``duration`` milliseconds, over all workers."""

    max: int
    duration: int


class KeepJobs(TypedDict, total=False):
    """How many finished jobs stay: the newest ``count``, for ``age`` seconds."""

    age: int
    count: int
    limit: int


class Metrics(TypedDict):
    """Keep one number of finished jobs per minute, for ``maxDataPoints`` minutes."""

    maxDataPoints: int


class AdvancedSettings(TypedDict):
    """``backoffStrategy(attempts_made, type, error, job)`` returns milliseconds; -1: no retry."""

    backoffStrategy: Callable[[int, str, BaseException, Any], int]


class WorkerOptions(TypedDict, total=False):
    """BullMQ's worker options that have an effect here, by BullMQ's names.

    Attributes:
        name: shown by Node's ``getWorkers()``.
        lockDuration: ms that a job stays locked without renewal (30000).
        lockRenewTime: ms between renewals (half of lockDuration).
        stalledInterval: ms between checks for stalled jobs (30000).
        maxStalledCount: how often a job may stall before it fails (1).
        drainDelay: seconds that a fetch from an empty queue blocks (5).
        limiter: the queue's rate limit.
        removeOnComplete: for jobs that do not say it themselves.
        removeOnFail: for jobs that do not say it themselves.
        metrics: count finished jobs per minute.
        settings: a backoff strategy for job types that BullMQ does not know.
    """

    name: str
    lockDuration: int
    lockRenewTime: int
    stalledInterval: int
    maxStalledCount: int
    drainDelay: float
    limiter: Limiter
    removeOnComplete: bool | int | KeepJobs
    removeOnFail: bool | int | KeepJobs
    metrics: Metrics
    settings: AdvancedSettings


_WAY_OUT = {
    "concurrency": "set TaskOptions(concurrency=...) or WORKER_CONCURRENCY",
    "connection": "set REDIS_URL",
    "prefix": "set BULLMQ_PREFIX",
    "autorun": "the worker starts all tasks or none",
    "skipVersionCheck": "`autoflow-worker check` reports the version",
    "skipStalledCheck": "set maxStalledCount and stalledInterval",
    "skipLockRenewal": "set lockDuration and lockRenewTime",
    "runRetryDelay": "reconnecting has a backoff of its own",
    "backoffStrategy": 'write it as {"settings": {"backoffStrategy": ...}}',
    "telemetry": "it exists for Node only",
    "useWorkerThreads": "it exists for Node only; a sync handler runs in a thread",
    "maximumRateLimitDelay": "the next job starts when the limit ends",
}
# Redis refuses any other character in the name of a client.
_CLIENT_NAME = re.compile(r"[!-~]{1,200}")

Check = Callable[[str, object], str | None]


def _whole(low: int, high: int = MAX_MS, unit: str = "") -> Check:
    def check(name: str, value: object) -> str | None:
        if type(value) is int and low <= value <= high:
            return None
        return f"{name} must be a whole number from {low} to {high}{unit}, not {_shown(value)}"

    return check


def _drain_delay(name: str, value: object) -> str | None:
    if (
        isinstance(value, int | float)
        and type(value) is not bool
        and MIN_DRAIN_DELAY <= value <= MAX_DRAIN_DELAY
    ):
        return None
    return (
        f"{name} must be a number of seconds from {MIN_DRAIN_DELAY} to {MAX_DRAIN_DELAY}, "
        f"not {_shown(value)}"
    )


def _name(name: str, value: object) -> str | None:
    if isinstance(value, str) and _CLIENT_NAME.fullmatch(value):
        return None
    return f"{name} must be 1 to 200 ASCII characters without blanks, not {_shown(value)}"


def _record(**checks: Check) -> Callable[[str, object, frozenset[str]], str | None]:
    def check(name: str, value: object, required: frozenset[str]) -> str | None:
        if not isinstance(value, Mapping):
            return f"{name} must be a dict with {', '.join(checks)}, not {_shown(value)}"
        for key in value:
            if key not in checks:
                return f"{name} has no {_shown(key)}; it has {', '.join(checks)}"
        for key in required - value.keys():
            return f"{name} needs {key}"
        faults = (checks[key](f"{name}.{key}", item) for key, item in value.items())
        return next(filter(None, faults), None)

    return check


def _limiter(name: str, value: object) -> str | None:
    check = _record(max=_whole(1), duration=_whole(1, unit=" ms"))
    return check(name, value, frozenset({"max", "duration"}))


def _metrics(name: str, value: object) -> str | None:
    return _record(maxDataPoints=_whole(1))(name, value, frozenset({"maxDataPoints"}))


def _keep(name: str, value: object) -> str | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, Mapping):
        if not {"age", "count"} & value.keys():
            return f"{name} needs age or count"
        check = _record(age=_whole(0, unit=" s"), count=_whole(-1), limit=_whole(1))
        return check(name, value, frozenset())
    if type(value) is int:
        return _whole(-1)(name, value)
    return f"{name} must be true, false, a number of jobs to keep, or a dict with age and count"


def _settings(name: str, value: object) -> str | None:
    return _record(backoffStrategy=_strategy)(name, value, frozenset({"backoffStrategy"}))


def _strategy(name: str, value: object) -> str | None:
    if not callable(value):
        return f"{name} must be a function, not {_shown(value)}"
    if inspect.iscoroutinefunction(value):
        return f"{name} must be a plain function: it is not awaited"
    try:
        inspect.signature(value).bind(1, "type", None, None)
    except TypeError:
        return f"{name} must take (attempts_made, type, error, job)"
    except ValueError:  # a builtin that does not tell its parameters
        return None
    return None


_CHECKS: dict[str, Check] = {
    "name": _name,
    "lockDuration": _whole(100, unit=" ms"),
    "lockRenewTime": _whole(10, unit=" ms"),
    "stalledInterval": _whole(100, unit=" ms"),
    "maxStalledCount": _whole(0, 1_000_000),
    "drainDelay": _drain_delay,
    "limiter": _limiter,
    "removeOnComplete": _keep,
    "removeOnFail": _keep,
    "metrics": _metrics,
    "settings": _settings,
}


def check_worker_options(queue_name: str, options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a copy of the options, all of which have an effect.

    Raises:
        TaskListError: an option that has no effect here, or a value that makes no sense.
    """
    if options is None:
        return {}
    if not isinstance(options, Mapping):
        raise TaskListError(f"task {queue_name!r}: worker_options must be a dict")
    for name, value in options.items():
        fault = _CHECKS[name](name, value) if name in _CHECKS else _unknown(name)
        if fault:
            raise TaskListError(f"task {queue_name!r}: worker_options: {fault}")
    duration = options.get("lockDuration", 30_000)
    if options.get("lockRenewTime", 0) >= duration:
        raise TaskListError(
            f"task {queue_name!r}: worker_options: lockRenewTime must be shorter than "
            f"lockDuration ({duration} ms), or the lock is lost before it is renewed"
        )
    return dict(options)


def _unknown(name: object) -> str:
    if isinstance(name, str) and name in _WAY_OUT:
        return f"{name} has no effect here: {_WAY_OUT[name]}"
    close = difflib.get_close_matches(str(name), _CHECKS, n=1)
    hint = f"; did you mean {close[0]}?" if close else f"; there are {', '.join(sorted(_CHECKS))}"
    return f"{_shown(name)} is not a BullMQ worker option that has an effect here{hint}"


def _shown(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= _SHOWN_LENGTH else text[:_SHOWN_LENGTH] + "..."
