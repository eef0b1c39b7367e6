"""Whatever a handler raises becomes a reason and a stack trace of bounded size."""

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any, NoReturn

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoflow_worker.encoding.failures import (
    MAX_EXCEPTIONS,
    MAX_REASON,
    MAX_STACK_TRACE,
    reason_of,
    shorten_reason,
    stack_trace_of,
)


def stop(error: BaseException) -> NoReturn:
    raise error


def raised(error: BaseException) -> BaseException:
    with pytest.raises(BaseException) as caught:  # noqa: PT011 - whatever it is
        stop(error)
    return caught.value


def assert_presentable(error: BaseException) -> None:
    for text, limit in (
        (reason_of(error), MAX_REASON),
        (stack_trace_of(error), MAX_STACK_TRACE),
    ):
        assert type(text) is str
        assert 0 < len(text) <= limit
        assert "\0" not in text
        json.dumps(text).encode()
        text.encode()


# -- reasons -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("boom"), "boom"),
        (ValueError(), "ValueError"),
        (ValueError(" \n"), "ValueError"),
        (ValueError("a", 1), "('a', 1)"),
        (KeyError("email"), "KeyError: 'email'"),
        (TimeoutError(), "TimeoutError"),
        (OSError(2, "No such file", "x"), "[Errno 2] No such file: 'x'"),
        (asyncio.CancelledError(), "CancelledError"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (SystemExit(3), "SystemExit: 3"),
        (SyntaxError("odd", (3, "x", object(), 4)), None),  # type: ignore[arg-type]
        (ExceptionGroup("two", [ValueError("a"), KeyError("b")]), None),
        (ValueError("a\0\ud800"), "a\ufffd\ufffd"),
        (ConnectionError("redis://u:pw@h refused"), "redis://u:***@h refused"),
        (ConnectionError("host=h password=pw"), "host=h password=***"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_reason_is_what_the_exception_says(error: BaseException, reason: str | None) -> None:
    if reason is not None:
        assert reason_of(error) == reason
    assert_presentable(raised(error))


def test_a_group_names_its_first_members() -> None:
    group = ExceptionGroup("many", [ValueError(f"no. {number}") for number in range(1000)])
    assert reason_of(group) == (
        "many (1000 sub-exceptions): ValueError: no. 0; ValueError: no. 1; ValueError: no. 2"
    )


def test_a_long_reason_is_cut() -> None:
    for text in (reason_of(ValueError("x" * 10_000_000)), shorten_reason("x" * 10_000_000)):
        assert len(text) <= MAX_REASON
        assert text.startswith("xxx")
        assert text.endswith("x… (9,998,040 characters cut)")
    assert len(shorten_reason("x" * MAX_REASON)) == MAX_REASON
    assert shorten_reason("x" * (MAX_REASON + 1)).endswith("… (41 characters cut)")


@pytest.mark.parametrize("before", [MAX_REASON - 60, MAX_REASON - 10, MAX_REASON + 3_900])
@pytest.mark.parametrize("length", [50, 10_000])
def test_a_password_across_the_cut_is_masked(before: int, length: int) -> None:
    secret = "s3cr3t" * length
    text = "x" * before + f" redis://user:{secret}@host " + "x" * 10_000
    assert "s3cr3t" not in shorten_reason(text)
    assert "s3cr3t" not in stack_trace_of(ValueError(text))


# -- stack traces --------------------------------------------------------------------------------


def test_a_stack_trace_reads_as_pythons_own() -> None:
    def fail() -> NoReturn:
        raise ValueError("boom")

    def fail_after_failing() -> NoReturn:
        try:
            fail()
        except ValueError as error:
            raise LookupError("no luck") from error

    with pytest.raises(LookupError) as caught:
        fail_after_failing()
    text = stack_trace_of(caught.value)
    lines = text.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[1].startswith(f'  File "{__file__}", line ')
    assert '    raise ValueError("boom")' in lines
    assert lines.index("ValueError: boom") < lines.index(
        "The above exception was the direct cause of the following exception:"
    )
    assert lines[-1] == "LookupError: no luck"


def test_a_context_is_told_unless_it_is_suppressed() -> None:
    def fail(*, suppress: bool) -> NoReturn:
        try:
            stop(KeyError("first"))
        finally:
            error = ValueError("second")
            error.__suppress_context__ = suppress
            stop(error)

    with pytest.raises(ValueError, match="second") as told:
        fail(suppress=False)
    with pytest.raises(ValueError, match="second") as suppressed:
        fail(suppress=True)
    assert "During handling of the above exception" in stack_trace_of(told.value)
    assert "KeyError: 'first'" in stack_trace_of(told.value)
    assert "first" not in stack_trace_of(suppressed.value).partition("ValueError")[2]
    assert "During handling" not in stack_trace_of(suppressed.value)


def test_names_and_notes_are_told() -> None:
    error = json.JSONDecodeError("bad", "doc", 0)
    error.add_note("seen in postgresql://u:pw@h/db")
    assert stack_trace_of(error) == (
        "json.decoder.JSONDecodeError: bad: line 1 column 1 (char 0)\n"
        "seen in postgresql://u:***@h/db"
    )


def test_passwords_in_the_source_are_masked() -> None:
    def fail() -> NoReturn:
        raise ValueError("redis://user:hunter2@host")

    with pytest.raises(ValueError, match="hunter2") as caught:
        fail()
    text = stack_trace_of(caught.value)
    assert 'raise ValueError("redis://user:***@host")' in text
    assert "hunter2" not in text


def test_a_deep_stack_is_told_in_part() -> None:
    def down(depth: int) -> None:
        if depth:
            down(depth - 1)
        raise ValueError("bottom")

    with pytest.raises(ValueError, match="bottom") as caught:
        down(500)
    text = stack_trace_of(caught.value)
    assert "frames left out)" in text
    assert text.endswith("ValueError: bottom")
    assert len(text) <= MAX_STACK_TRACE


def endless() -> NoReturn:
    endless()


def test_a_recursion_error_is_presentable() -> None:
    with pytest.raises(RecursionError) as caught:
        endless()
    assert_presentable(caught.value)


def test_a_long_chain_is_told_in_part() -> None:
    error: BaseException = ValueError("the first of all")
    for number in range(100_000):
        later = ValueError(f"no. {number}")
        later.__cause__, error = error, later
    text = stack_trace_of(error)
    assert text.startswith("… (earlier exceptions left out)")
    assert text.endswith("ValueError: no. 99999")
    assert text.count("ValueError: ") == MAX_EXCEPTIONS


def test_a_circular_chain_ends() -> None:
    one, two = ValueError("one"), ValueError("two")
    one.__cause__, two.__cause__ = two, one
    one.__context__ = one
    text = stack_trace_of(one)
    assert (text.count("ValueError: one"), text.count("ValueError: two")) == (1, 1)


def test_groups_are_told_in_part() -> None:
    wide = ExceptionGroup("wide", [ValueError(f"no. {number}") for number in range(100_000)])
    text = stack_trace_of(raised(ExceptionGroup("outer", [wide, wide])))
    assert "  ExceptionGroup: wide (100000 sub-exceptions)" in text
    assert "    ValueError: no. 0" in text
    assert "more exceptions left out)" in text
    deep: Exception = ValueError("innermost")
    for _ in range(500):
        deep = ExceptionGroup("deep", [deep, deep])
    assert_presentable(deep)


def test_a_full_stack_trace_keeps_its_beginning_and_its_end() -> None:
    error = ValueError("last " + "x" * 5_000)
    for number in range(10):
        later = ValueError(f"no. {number} " + "y" * 5_000)
        later.__cause__, error = error, later
    text = stack_trace_of(error)
    assert len(text) <= MAX_STACK_TRACE
    assert text.startswith("ValueError: last")
    assert "characters cut)\n" in text
    assert "ValueError: no. 9" in text


@pytest.mark.parametrize(
    "name", ["/dev/zero", "/dev/stdin", "/no/such", "\0", "\ud800", "x" * 9999]
)
def test_code_may_claim_to_come_from_anywhere(name: str) -> None:
    code = compile("1 / 0", "placeholder", "exec").replace(co_filename=name)
    with pytest.raises(ZeroDivisionError) as caught:
        exec(code, {})
    assert_presentable(caught.value)
    assert "ZeroDivisionError: division by zero" in stack_trace_of(caught.value)


# -- the hostile ---------------------------------------------------------------------------------


class Quiet(str):
    __slots__ = ()

    def __len__(self) -> int:
        raise RuntimeError

    def __getitem__(self, _: Any) -> str:
        raise RuntimeError


def with_str(text: Callable[[], Any]) -> BaseException:
    class HostileError(Exception):
        def __str__(self) -> str:
            result: str = text()
            return result

    return HostileError()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (with_str(lambda: stop(ValueError())), "<its text can't be had: ValueError>"),
        (with_str(lambda: stop(SystemExit(1))), "<its text can't be had: SystemExit>"),
        (with_str(lambda: stop(KeyboardInterrupt())), "<its text can't be had: KeyboardInterrupt>"),
        (with_str(lambda: 7), "<its text can't be had: TypeError>"),
        (with_str(lambda: None), "<its text can't be had: TypeError>"),
        (with_str(endless), "<its text can't be had: RecursionError>"),
        (with_str(lambda: Quiet("quiet")), "quiet"),
    ],
)
def test_an_exception_without_a_text(error: BaseException, reason: str) -> None:
    assert reason_of(error) == reason
    assert_presentable(raised(error))


HIDDEN = [
    "__cause__",
    "__context__",
    "__traceback__",
    "__notes__",
    "__suppress_context__",
    "__class__",
]


class Evil:
    @property
    def __class__(self) -> Any:
        raise SystemExit

    @__class__.setter
    def __class__(self, _: Any) -> None: ...


@pytest.mark.parametrize("name", HIDDEN)
@pytest.mark.parametrize("result", [stop, lambda _: Evil(), lambda _: 7, lambda error: error])
def test_an_exception_with_hostile_properties(
    name: str, result: Callable[[BaseException], Any]
) -> None:
    def read(_: Any) -> Any:
        return result(SystemExit())

    # Nothing of pytest's may look at it.
    hostile = type("Hostile", (Exception,), {name: property(read)})
    assert_presentable(hostile("boom"))
    assert reason_of(hostile("boom")) == "boom"


def test_odd_notes_and_members() -> None:
    error = ValueError("boom")
    error.__notes__ = [1, Evil(), "a note", Quiet("quiet")] * 1000  # type: ignore[list-item]
    assert "a note" in stack_trace_of(error)
    error.__notes__ = "not a list"  # type: ignore[assignment]
    assert stack_trace_of(error) == "ValueError: boom"
    hostile = type("Hostile", (ExceptionGroup,), {"exceptions": property(lambda _: [1])})
    assert_presentable(hostile("group", [ValueError()]))


def test_a_hostile_failure_costs_bounded_time() -> None:
    error: Exception = ValueError("x" * 10_000_000)
    for _ in range(20):
        later = ExceptionGroup("y" * 1_000_000, [error] * 1000)
        later.__cause__, error = error, later
    started = time.process_time()
    assert_presentable(error)
    assert time.process_time() - started < 5  # hours, if all of it were formatted


@given(st.text(st.characters(exclude_categories=()), max_size=50), st.integers(0, 5_000))
def test_any_text_becomes_a_reason(text: str, times: int) -> None:
    assert_presentable(ValueError(text * times))
    assert len(shorten_reason(text * times)) <= MAX_REASON
