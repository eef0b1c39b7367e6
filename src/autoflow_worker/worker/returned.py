"""What a handler returns, where it is one of the shapes of handlers that come from Node.

There a handler may return its result in the shape of the row (contract, section 7): `{success:
true, output, duration}`, which must not be wrapped a second time, or `{success: false, reason}`,
which fails the attempt.
"""

from typing import Any, Final

_RESULT: Final = frozenset({"success", "output", "duration"})
_FAILURE: Final = frozenset({"success", "reason", "stackTrace", "lastAttemptAt"})


class ReportedFailureError(Exception):
    """The handler returned `{success: False, reason: ...}`."""


def output_of(value: Any, duration_ms: int) -> tuple[Any, float]:
    """Return a handler's output, and its duration in ms.

    Args:
        value: what the handler returned.
        duration_ms: as measured, for a value that does not tell it.

    Raises:
        ReportedFailureError: the value reports a failure.
    """
    if type(value) is not dict or type(value.get("success")) is not bool:
        return value, duration_ms
    if value["success"]:
        duration = value.get("duration")
        if value.keys() <= _RESULT and isinstance(duration, int | float):
            return value.get("output"), duration
    elif value.keys() <= _FAILURE and isinstance(value.get("reason"), str):
        raise ReportedFailureError(value["reason"])
    return value, duration_ms
