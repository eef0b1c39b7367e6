"""Log lines: structlog renders them, as JSON in production, and a thread writes them.

An output can block, as a paused terminal does or a log collector that hangs. If the event loop
wrote the lines, it would block too. Locks would not be renewed, and running jobs would stall.
"""

import atexit
import logging
import re
import sys
from collections.abc import Callable
from typing import IO, Any, Literal, Protocol

import orjson
import structlog
from structlog.typing import EventDict, FilteringBoundLogger, Processor, WrappedLogger

from autoflow_worker.encoding.masking import MASK, mask_secrets
from autoflow_worker.logs.attempt_fields import add_attempt_fields
from autoflow_worker.logs.writer import LogWriter

LogLevel = Literal["debug", "info", "warning", "error", "critical"]
LogFormat = Literal["console", "json"]

#: A longer line, in characters, is rendered again with each value cut to MAX_VALUE_LENGTH.
MAX_LINE_LENGTH = 16_384
MAX_VALUE_LENGTH = 2_048

_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40, "critical": 50}
_HIGHEST_FIRST = tuple(reversed(_LEVELS.items()))
_SAFE_INTEGER = 2**53
# These texts may have several lines and are printed without quotes. Only these characters are
# escaped: control characters, with which escape sequences begin, and marks of a text's direction.
_TEXTS = frozenset({"event", "exception", "stack"})
_TERMINAL_CONTROLS = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]"
)
# The processors add these. The renderer chooses the colour by the level, so both stay as they are.
_OWN = frozenset({"level", "timestamp"})
_QUOTED = frozenset(" =\"'")
# Characters that are masked beyond a cut: a half of a URL or key would not be recognised as a
# secret. A private key of 4096 bits has 3,300 characters.
_SECRET_LENGTH = 4_096


class LineWriter(Protocol):
    """Writes lines; structlog calls the method that is named after a line's level."""

    def msg(self, line: str) -> None: ...
    def flush(self, timeout: float) -> bool: ...


class _Configured:
    """What the last ``configure_logging`` made."""

    level: LogLevel = "info"
    writer: LineWriter | None = None
    relay: "_StandardHandler | None" = None
    make_logger: Callable[..., FilteringBoundLogger] = staticmethod(structlog.get_logger)


def configure_logging(
    level: LogLevel = "info",
    fmt: LogFormat = "console",
    stream: IO[str] | None = None,
    *,
    writer: LineWriter | None = None,
) -> None:
    """Set up structlog, and make the standard library's logging write the same lines.

    Lines of the level and of higher ones go to the writer. If there is none, they go to the stream,
    which is stdout if not given.
    """
    flush_logs()
    stream = sys.stdout if stream is None else stream
    writer = LogWriter(stream) if writer is None else writer
    # No copy of the event, no call-site lookup, no filtering by processor: each slows every line.
    processors: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        add_attempt_fields,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        _renderer(_json if fmt == "json" else _console(stream)),
    ]
    bound_logger: Any = structlog.make_filtering_bound_logger(_LEVELS[level])
    structlog.configure(
        processors=processors,
        wrapper_class=bound_logger,
        logger_factory=lambda *_: writer,
        cache_logger_on_first_use=True,
    )
    _Configured.level, _Configured.writer = level, writer
    _Configured.relay = _StandardHandler(processors, writer)
    _Configured.make_logger = staticmethod(
        lambda **context: bound_logger(writer, processors=processors, context=context)
    )
    root = logging.getLogger()
    root.handlers = [_Configured.relay]
    root.setLevel(_LEVELS[level])
    logging.captureWarnings(True)


def job_logger(**context: Any) -> FilteringBoundLogger:
    """Return a logger that is bound to the context; each job that logs makes one."""
    # structlog.get_logger().bind() takes longer: it copies the context, reads the configuration.
    return _Configured.make_logger(**context)


def log_level() -> LogLevel:
    """Return the lowest level of which lines are written."""
    return _Configured.level


def relay_line(line: dict[str, Any]) -> None:
    """Write a line that another process logged at the same level, with its `event` and `level`."""
    level = line.pop("level", None)
    level = level if level in _LEVELS else "info"
    if _Configured.relay is None:
        structlog.get_logger().log(_LEVELS[level], str(line.pop("event", "")), line=line)
    elif _LEVELS[level] >= _LEVELS[_Configured.level]:
        _Configured.relay.write(level, {"event": "", **line})


@atexit.register
def flush_logs(timeout: float = 1.0) -> bool:
    """Wait at most ``timeout`` seconds until all lines are written; return whether they are."""
    return _Configured.writer is None or _Configured.writer.flush(timeout)


def _renderer(render: Callable[[EventDict], str]) -> Processor:
    """Return the last processor, which renders a line of text, whatever the values are."""

    def to_line(_logger: WrappedLogger, _name: str, event: EventDict) -> str:
        try:
            line = render(dict(event))
        except Exception:
            line = render({key: _plain(value) for key, value in event.items()})
        if len(line) > MAX_LINE_LENGTH:
            line = render({key: _cut(_plain(value)) for key, value in event.items()})
        return line

    return to_line


def _json(event: EventDict) -> str:
    line = orjson.dumps(event, default=repr, option=orjson.OPT_NON_STR_KEYS).decode()
    if mask_secrets(line) == line:
        return line
    # Mask each value by itself: in the whole line, a match could span two values.
    return orjson.dumps(_masked(orjson.loads(line))).decode()


def _masked(value: Any) -> Any:
    if isinstance(value, str):
        return mask_secrets(value)
    if isinstance(value, list):
        return [_masked(item) for item in value]
    if isinstance(value, dict):
        return {
            mask_secrets(key): MASK if _is_secret(key, item) else _masked(item)
            for key, item in value.items()
        }
    return value


def _is_secret(key: str, value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return False
    pair = f'"{key}": ""'
    return mask_secrets(pair) != pair


def _console(stream: IO[str] | None) -> Callable[[EventDict], str]:
    renderer = structlog.dev.ConsoleRenderer(
        colors=stream is not None and stream.isatty(),
        exception_formatter=structlog.dev.plain_traceback,
        sort_keys=False,
    )
    return lambda event: mask_secrets(str(renderer(None, "", _for_terminal(event))))


def _for_terminal(event: EventDict) -> EventDict:
    """Return the event with all characters escaped that a terminal would obey.

    A value whose key marks it as secret is masked here. In the rendered line a colour separates
    the key and the value.
    """
    shown: EventDict = {}
    for key, value in event.items():
        if key in _TEXTS:
            shown[key] = _escaped(str(value))
        elif key in _OWN:
            shown[key] = value
        else:
            name = key if key.isprintable() else repr(key)
            shown[name] = _Shown(MASK if _is_secret(key, value) else value)
    return shown


class _Shown:
    """A value's text, which the renderer does not quote or escape again."""

    def __init__(self, value: object) -> None:
        plain = isinstance(value, str) and value.isprintable() and not _QUOTED.intersection(value)
        self._text = str(value) if plain else _escaped(repr(value))

    def __repr__(self) -> str:
        return self._text


def _escaped(text: str) -> str:
    return _TERMINAL_CONTROLS.sub(lambda match: repr(match[0])[1:-1], text)


def _plain(value: object) -> str | float | None:
    if isinstance(value, float | None) or (isinstance(value, int) and abs(value) <= _SAFE_INTEGER):
        return value
    try:
        text = value if isinstance(value, str) else repr(value)
        return text.encode("utf-8", "backslashreplace").decode()
    except Exception as error:
        return f"<{type(value).__name__}, whose repr raised {type(error).__name__}>"


def _cut(text: str | float | None) -> str | float | None:
    if not isinstance(text, str) or len(text) <= MAX_VALUE_LENGTH:
        return text
    return mask_secrets(text[: MAX_VALUE_LENGTH + _SECRET_LENGTH])[:MAX_VALUE_LENGTH] + "..."


class _StandardHandler(logging.Handler):
    """Turns a library's log records into lines of the same form."""

    def __init__(self, processors: list[Processor], writer: LineWriter) -> None:
        super().__init__()
        self._processors = processors
        self._writer = writer

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = record.getMessage()
        except Exception:
            text = str(record.msg)
        level = next((name for name, number in _HIGHEST_FIRST if number <= record.levelno), "debug")
        line: Any = {"event": text, "logger": record.name}
        if record.exc_info:
            line["exc_info"] = record.exc_info
        try:
            self.write(level, line)
        except Exception:
            self.handleError(record)

    def write(self, level: str, line: Any) -> None:
        """Render a line, and write it."""
        for process in self._processors:
            line = process(self._writer, level, line)
        self._writer.msg(line)
