"""The table of tasks that `check` prints, and its warnings."""

import functools
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
from pydantic import BaseModel

from autoflow_worker import (
    BatchContext,
    BatchItem,
    BatchOptions,
    TaskContext,
    TaskDefinition,
    TaskOptions,
    define_task,
)
from autoflow_worker.operations.task_table import hidden_payloads, task_table

Handler = Callable[[Any, TaskContext], Awaitable[Any]]


class Email(BaseModel):
    to: str


async def send(payload: Email, ctx: TaskContext) -> None: ...


def render(payload: dict[str, Any], ctx: TaskContext) -> None: ...


async def note(items: Sequence[BatchItem[Email]], ctx: BatchContext) -> None: ...


async def untyped(payload, ctx):  # type: ignore[no-untyped-def]
    ...


def test_each_task_has_a_line() -> None:
    tasks: list[TaskDefinition[Any]] = [
        define_task("users-send-welcome-email", send, TaskOptions(concurrency=10)),
        define_task("reports-render", render, TaskOptions(timeout_ms=None, max_attempts=1)),
        define_task("files-hash", render, TaskOptions(run_in="process", timeout_ms=1500)),
        define_task("mails-log", note, TaskOptions(concurrency=2), batch=BatchOptions(size=50)),
        define_task("tickets-triage", untyped),
        define_task("a-queue-whose-name-is-longer-than-its-column", untyped, payload=Email),
    ]
    assert task_table(tasks, concurrency=4) == [
        "queue                     kind     slots  limit  attempts  payload",
        "users-send-welcome-email  async       10   30 s         3  Email",
        "reports-render            thread       4   none         1  dict",
        "files-hash                process      4  1.5 s         3  dict",
        "mails-log                 batch      100   30 s         3  Email",
        "tickets-triage            async        4   30 s         3  dict (no annotation)",
        "a-queue-whose-name-is-longer-than-its-column",
        "                          async        4   30 s         3  Email",
    ]


def test_no_line_is_wider_than_a_terminal() -> None:
    wide = define_task(
        "users-send-welcome-email",
        untyped,
        TaskOptions(run_in="process", timeout_ms=2**31 - 1, max_attempts=1_000_000),
        payload=dict[str, dict[str, dict[str, Email]]],
    )
    lines = task_table([wide], concurrency=10_000)
    assert max(map(len, lines)) <= 80
    assert lines[1].endswith("…")


def hides(handler: Handler) -> Handler:
    async def wrapper(payload: Any, ctx: TaskContext) -> Any:
        return await handler(payload, ctx)

    return wrapper


def hides_all(handler: Handler) -> Any:
    async def wrapper(*args, **kwargs):  # type: ignore[no-untyped-def]
        return await handler(*args, **kwargs)

    return wrapper


class Hides:
    def __init__(self, handler: Handler) -> None:
        self.handler = handler

    async def __call__(self, payload: Any, ctx: TaskContext) -> Any:
        return await self.handler(payload, ctx)


@pytest.mark.parametrize("decorator", [hides, hides_all, Hides])
def test_a_payload_type_that_a_decorator_hides_is_a_warning(decorator: Any) -> None:
    [warning] = hidden_payloads([define_task("mails", decorator(send))])
    assert "mails: a decorator hides the handler's payload type Email" in warning
    assert "functools.wraps" in warning
    assert "payload=Email" in warning
    for known in (
        define_task("mails", decorator(send), payload=dict),
        define_task("mails", decorator(send), payload=Email),
        define_task("mails", decorator(untyped)),
        define_task("mails", functools.wraps(send)(decorator(send))),
    ):
        assert list(hidden_payloads([known])) == []


def test_a_function_that_is_no_handler_hides_nothing() -> None:
    def parse(text: str, strict: bool) -> Any:
        return text

    async def handler(payload: dict[str, Any], ctx: TaskContext) -> Any:
        return parse(payload["text"], True)

    assert list(hidden_payloads([define_task("q", handler)])) == []
