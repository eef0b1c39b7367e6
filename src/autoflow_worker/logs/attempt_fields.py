"""Names the running attempt in each log line that its handler writes, in any thread."""

from contextvars import ContextVar
from typing import Any, Protocol

from structlog.typing import EventDict, WrappedLogger


class HasLogFields(Protocol):
    """A ``TaskContext``: what its handler's lines say of the attempt."""

    def log_fields(self) -> dict[str, Any]: ...


running_attempt: ContextVar[HasLogFields] = ContextVar("running_attempt")
"""Set in the context in which a handler runs, and so in all that the handler starts."""


def add_attempt_fields(_logger: WrappedLogger, _name: str, event: EventDict) -> EventDict:
    """Add the attempt's fields to a line, unless the line has its own; a structlog processor."""
    attempt = running_attempt.get(None)
    if attempt is not None:
        for key, value in attempt.log_fields().items():
            event.setdefault(key, value)
    return event
