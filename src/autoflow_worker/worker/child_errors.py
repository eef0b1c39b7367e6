"""What a handler raised in a process of its own, as the same kind of exception in the worker."""

from typing import Any, Final

from autoflow_worker.encoding.failures import DescribedError, reason_of, stack_trace_of
from autoflow_worker.errors import NotStorableError, PayloadError
from autoflow_worker.tasks.exceptions import (
    MAX_SECONDS,
    DelayedError,
    RateLimited,
    RateLimitError,
    RetryLater,
    UnrecoverableError,
    WaitingChildrenError,
    WaitingError,
)

_KINDS: Final[tuple[type[Exception], ...]] = (
    *(PayloadError, NotStorableError, UnrecoverableError),
    *(RetryLater, RateLimited, RateLimitError),
    *(DelayedError, WaitingChildrenError, WaitingError),
)
"""The exceptions that mean more to an attempt than a failure."""

_TIMES: Final = {"RetryLater": "delay_ms", "RateLimited": "rest_ms"}
"""The attribute of a kind that says for how many milliseconds."""

# Each is both: its kind, and described where it was raised.
_DESCRIBED: Final[dict[str, type[DescribedError]]] = {
    kind.__name__: type(kind.__name__, (DescribedError, kind), {}) for kind in _KINDS
}


def described(error: BaseException) -> dict[str, Any]:
    """Describe an exception for `rebuilt`, within the limits of `encoding.failures`."""
    kind = next((kind.__name__ for kind in _KINDS if issubclass(type(error), kind)), "")
    description = {"kind": kind, "reason": reason_of(error), "stack": stack_trace_of(error)}
    return description | {"ms": getattr(error, _TIMES[kind])} if kind in _TIMES else description


def rebuilt(description: dict[str, Any]) -> Exception:
    """Return an exception of the described kind, whatever the description holds."""
    name, ms = str(description.get("kind")), description.get("ms")
    if name in _TIMES and (type(ms) is not int or not 0 <= ms <= MAX_SECONDS * 1000):
        name = ""
    kind = _DESCRIBED.get(name, DescribedError)
    error = kind(str(description.get("reason")), str(description.get("stack")))
    if name in _TIMES:
        setattr(error, _TIMES[name], ms)
    return error
