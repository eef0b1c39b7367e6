"""Exceptions as `reason` and `stackTrace`, within limits of time and size, whatever they hold.

The standard library's `traceback` formats all there is: ten thousand chained exceptions, a message
of 10 MB, a `__str__` that exits. Here each part has its limit, what is left out says so, and
passwords are masked.
"""

import linecache
import stat
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TypeGuard, TypeVar

from autoflow_worker.encoding.cleaner import clean_text, type_name
from autoflow_worker.encoding.masking import mask_secrets

MAX_REASON = 2_000
"""Characters of a reason."""
MAX_STACK_TRACE = 16_000
"""Characters of a stack trace; its beginning and, as that tells most, more of its end are kept."""
MAX_MESSAGE = 2_000
"""Characters of one exception's message in a stack trace."""
MAX_FRAMES = 30
"""Frames of one exception: the first third and the last two thirds."""
MAX_EXCEPTIONS = 12
"""Exceptions in one stack trace: causes, contexts and members of groups."""

# Read beyond a cut, so that a password across it is still seen as one.
_MARGIN = 4_000
_MAX_LINE = 300
_MAX_NOTES = 5
_MAX_SOURCE_FILE = 2_000_000
_SHOWN_MEMBERS = 3
_CAUSE = "The above exception was the direct cause of the following exception:"
_CONTEXT = "During handling of the above exception, another exception occurred:"


def reason_of(error: BaseException) -> str:
    """Return what went wrong, as Node's `error.message` would: one text, never empty.

    The exception's own words; its type's name where it has none, and before words that say nothing
    alone (a KeyError's key, a SystemExit's number). A group's members are named after it.
    """
    words = _message(error, MAX_REASON)
    if not words.strip():
        words = type_name(error)
    elif _is_a(error, KeyError) or not _is_a(error, Exception):
        words = f"{type_name(error)}: {words}"
    if members := _members(error)[:_SHOWN_MEMBERS]:
        words += ": " + "; ".join(_line(member, MAX_REASON // 4) for member in members)
    return _cut(words, MAX_REASON, len(words))


def shorten_reason(reason: str) -> str:
    """Return a reason that was given in words, cleaned, masked and cut to `MAX_REASON`."""
    return _presentable(reason, MAX_REASON)


def shorten_stack_trace(text: str) -> str:
    """Return a stack trace that came as text, cleaned, masked and cut to `MAX_STACK_TRACE`."""
    return _presentable(text, MAX_STACK_TRACE)


def stack_trace_of(error: BaseException) -> str:
    """Return the stack trace as Python prints it, causes first, cut to `MAX_STACK_TRACE`."""
    text = "\n".join(_Tracer().chain(error))
    if len(text) <= MAX_STACK_TRACE:
        return text
    head = MAX_STACK_TRACE // 4
    tail = MAX_STACK_TRACE - head - 60
    cut = len(text) - head - tail
    return f"{text[:head]}\n… ({cut:,} characters cut)\n{text[-tail:]}"


T = TypeVar("T")


class _Tracer:
    """Writes one stack trace; counts the exceptions in it, however they hang together."""

    def __init__(self) -> None:
        self._left = MAX_EXCEPTIONS
        self._seen: set[int] = set()

    def chain(self, error: BaseException) -> Iterator[str]:
        links: list[tuple[BaseException, str]] = []
        follow: BaseException | None = error
        how = ""
        while follow is not None and id(follow) not in self._seen and self._left:
            self._seen.add(id(follow))
            self._left -= 1
            links.append((follow, how))
            follow, how = _cause(follow)
        if follow is not None:
            yield "… (earlier exceptions left out)\n"
        for link, joint in reversed(links):
            yield from self._one(link)
            if joint:
                yield f"\n{joint}\n"

    def _one(self, error: BaseException) -> Iterator[str]:
        frames = list(_frames(error))
        if frames:
            yield "Traceback (most recent call last):"
            yield from frames
        yield _line(error, MAX_MESSAGE)
        yield from _notes(error)
        members = _members(error)
        for number, member in enumerate(members, 1):
            if not self._left:
                yield f"  … ({len(members) - number + 1:,} more exceptions left out)"
                break
            yield f"  ---- {number} of {len(members):,} ----"
            for text in self.chain(member):
                yield "  " + text.replace("\n", "\n  ")


def _is_a(value: object, kind: type[T]) -> TypeGuard[T]:
    # isinstance would ask the value for its __class__, which may be a property that raises.
    return issubclass(type(value), kind)


def _full_name(error: BaseException) -> str:
    module = type.__dict__["__module__"].__get__(type(error))
    if type(module) is not str or module in {"builtins", "__main__"}:
        return type_name(error)
    return f"{clean_text(module[:_MAX_LINE])}.{type_name(error)}"


def _line(error: BaseException, limit: int) -> str:
    words = _message(error, limit)
    return f"{_full_name(error)}: {words}" if words else _full_name(error)


def _message(error: BaseException, limit: int) -> str:
    try:
        text = str(error)
    except BaseException as trouble:  # a __str__ that exits must not end the worker
        return f"<its text can't be had: {type_name(trouble)}>"
    return _presentable(text, limit)


def _presentable(text: str, limit: int) -> str:
    text = str.__str__(text)
    if len(text) <= limit + _MARGIN:
        shown = mask_secrets(clean_text(text))
        return _cut(shown, limit, len(shown))
    # The @ ends a password that goes on beyond the part that is looked at.
    return _cut(mask_secrets(clean_text(text[: limit + _MARGIN]) + "@"), limit, len(text))


def _cut(text: str, limit: int, length: int) -> str:
    """Cut what is left of a text of that length to `limit` characters; say how many are missing."""
    if len(text) <= limit and length <= limit + _MARGIN:
        return text
    keep = limit - 40
    return f"{text[:keep]}… ({length - keep:,} characters cut)"


def _get(error: BaseException, attribute: str) -> object:
    try:
        return getattr(error, attribute, None)
    except BaseException:  # a property may stand in its place
        return None


def _cause(error: BaseException) -> tuple[BaseException | None, str]:
    cause, context = _get(error, "__cause__"), _get(error, "__context__")
    if _is_a(cause, BaseException):
        return cause, _CAUSE
    if _is_a(context, BaseException) and not _get(error, "__suppress_context__"):
        return context, _CONTEXT
    return None, ""


def _members(error: BaseException) -> Sequence[BaseException]:
    members = _get(error, "exceptions") if _is_a(error, BaseExceptionGroup) else ()
    return members if type(members) is tuple else ()


def _notes(error: BaseException) -> Iterator[str]:
    notes = _get(error, "__notes__")
    if type(notes) is list:
        for note in notes[:_MAX_NOTES]:
            if _is_a(note, str):
                yield _presentable(note, MAX_MESSAGE)


def _frames(error: BaseException) -> Iterator[str]:
    first: list[TracebackType] = []
    last: deque[TracebackType] = deque(maxlen=MAX_FRAMES - MAX_FRAMES // 3)
    total = 0
    step = _get(error, "__traceback__")
    while _is_a(step, TracebackType):
        total += 1
        (first if len(first) < MAX_FRAMES // 3 else last).append(step)
        step = step.tb_next
    yield from map(_frame, first)
    if left_out := total - len(first) - len(last):
        yield f"  … ({left_out:,} frames left out)"
    yield from map(_frame, last)


def _frame(step: TracebackType) -> str:
    code = step.tb_frame.f_code
    where = f'  File "{code.co_filename[:_MAX_LINE]}", line {step.tb_lineno}, in '
    place = clean_text(where + code.co_name[:_MAX_LINE])
    source = _source_line(code.co_filename, step.tb_lineno)
    return f"{place}\n    {source}" if source else place


def _source_line(path: str, number: int) -> str:
    try:
        if path not in linecache.cache:
            facts = Path(path).stat()
            # A code object may claim to come from a pipe or a device.
            if not stat.S_ISREG(facts.st_mode) or facts.st_size > _MAX_SOURCE_FILE:
                return ""
        return _presentable(linecache.getline(path, number).strip(), _MAX_LINE)
    except Exception:  # a trace without its source is still a trace
        return ""
