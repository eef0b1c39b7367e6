"""Exceptions as `reason` and `stackTrace`, within limits of time and size, whatever they hold.

`traceback.TracebackException` has no such limits. It visits each member of nested groups, so thirty
levels of a group that holds the next one twice take hours. It follows 10,000 causes, reads any
file that a code object names, and lets a hostile property raise. Here each part has its limit, a
note says what is left out, and passwords are masked.
"""

import linecache
import stat
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import CodeType
from typing import TypeGuard, TypeVar

from autoflow_worker.encoding.cleaner import clean_text, type_name
from autoflow_worker.encoding.masking import mask_secrets

MAX_REASON = 2_000  # characters
MAX_STACK_TRACE = 16_000  # characters: a quarter from its beginning, the rest from its end
MAX_MESSAGE = 2_000  # characters of one exception's message in a stack trace
MAX_FRAMES = 30  # of one exception: the first third and the last two thirds
MAX_EXCEPTIONS = 12  # in one stack trace: causes, contexts and members of groups

# Characters that are read beyond a cut, so that a password across the cut is still recognised.
_MARGIN = 4_000
_MAX_LINE = 300
_MAX_NOTES = 5
_MAX_SOURCE_FILE = 2_000_000
_SHOWN_MEMBERS = 3
_CAUSE = "\nThe above exception was the direct cause of the following exception:\n"
_CONTEXT = "\nDuring handling of the above exception, another exception occurred:\n"

T = TypeVar("T")


class DescribedError(Exception):
    """An exception of another process, described there by `reason_of` and `stack_trace_of`."""

    def __init__(self, reason: str, stack_trace: str) -> None:
        Exception.__init__(self, reason)  # A class that is both has another `__init__`.
        self.reason = reason
        self.stack_trace = stack_trace


# The interpreter's own fields. A subclass may hide them behind properties that raise.
_cause_of, _context_of, _hides_context, _traceback_of = (
    vars(BaseException)[name].__get__
    for name in ("__cause__", "__context__", "__suppress_context__", "__traceback__")
)
_members_of = vars(BaseExceptionGroup)["exceptions"].__get__


def reason_of(error: BaseException) -> str:
    """Return what went wrong, as Node's `error.message` would: one text, never empty.

    The text is the exception's own. Its type's name stands in for a missing text, and before one
    that says nothing alone (a KeyError's key, a SystemExit's number). A group's first members
    follow.
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
    text = "\n".join(_chain(error, set()))
    if len(text) <= MAX_STACK_TRACE:
        return text
    head = MAX_STACK_TRACE // 4
    tail = MAX_STACK_TRACE - head - 60
    cut = len(text) - head - tail
    return f"{text[:head]}\n… ({cut:,} characters cut)\n{text[-tail:]}"


def _chain(error: BaseException, seen: set[int]) -> Iterator[str]:
    """Yield an exception after its causes; `seen` holds the ids of all exceptions so far."""
    links: list[tuple[BaseException, str]] = []
    follow: BaseException | None = error
    joint = ""
    while follow is not None and id(follow) not in seen and len(seen) < MAX_EXCEPTIONS:
        seen.add(id(follow))
        links.append((follow, joint))
        cause, joint = _cause_of(follow), _CAUSE
        if cause is None and not _hides_context(follow):
            cause, joint = _context_of(follow), _CONTEXT
        follow = cause
    if follow is not None:
        yield "… (earlier exceptions left out)\n"
    for link, joint in reversed(links):
        yield from _one(link, seen)
        if joint:
            yield joint


def _one(error: BaseException, seen: set[int]) -> Iterator[str]:
    yield from _frames(error)
    yield _line(error, MAX_MESSAGE)
    yield from _notes(error)
    members = _members(error)
    for number, member in enumerate(members, 1):
        if len(seen) == MAX_EXCEPTIONS:
            yield f"  … ({len(members) - number + 1:,} more exceptions left out)"
            break
        yield f"  ---- {number} of {len(members):,} ----"
        for text in _chain(member, seen):
            yield "  " + text.replace("\n", "\n  ")


def _members(error: BaseException) -> tuple[BaseException, ...]:
    return (_members_of(error) or ()) if _is_a(error, BaseExceptionGroup) else ()


def _notes(error: BaseException) -> Iterator[str]:
    try:
        notes = getattr(error, "__notes__", None)
    except BaseException:  # a property may stand in its place
        return
    if type(notes) is list:
        for note in notes[:_MAX_NOTES]:
            if _is_a(note, str):
                yield _presentable(note, MAX_MESSAGE)


def _frames(error: BaseException) -> Iterator[str]:
    frames = [(frame.f_code, line) for frame, line in traceback.walk_tb(_traceback_of(error))]
    if frames:
        yield "Traceback (most recent call last):"
    left_out = len(frames) - MAX_FRAMES
    first = MAX_FRAMES // 3
    for number, (code, line) in enumerate(frames):
        if number < first or number >= first + left_out:
            yield _frame(code, line)
        elif number == first:
            yield f"  … ({left_out:,} frames left out)"


def _frame(code: CodeType, line: int) -> str:
    where = f'  File "{code.co_filename[:_MAX_LINE]}", line {line}, in {code.co_name[:_MAX_LINE]}'
    source = _source_line(code.co_filename, line)
    return clean_text(where) + (f"\n    {source}" if source else "")


def _is_a(value: object, kind: type[T]) -> TypeGuard[T]:
    # isinstance would ask the value for its __class__, which may be a property that raises.
    return issubclass(type(value), kind)


def _line(error: BaseException, limit: int) -> str:
    name = type_name(error)
    module = type.__dict__["__module__"].__get__(type(error))
    if type(module) is str and module not in {"builtins", "__main__"}:
        name = f"{clean_text(module[:_MAX_LINE])}.{name}"
    words = _message(error, limit)
    return f"{name}: {words}" if words else name


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
    # The @ ends a password that goes on beyond the part that is read.
    return _cut(mask_secrets(clean_text(text[: limit + _MARGIN]) + "@"), limit, len(text))


def _cut(text: str, limit: int, length: int) -> str:
    """Cut a text of `length` characters, or the beginning of it, and say how many are missing."""
    if len(text) <= limit and length <= limit + _MARGIN:
        return text
    keep = limit - 40
    return f"{text[:keep]}… ({length - keep:,} characters cut)"


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
