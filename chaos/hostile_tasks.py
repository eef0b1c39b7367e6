"""A handler that returns, raises and does what no handler should.

`TASKS_CONFIG=chaos.hostile_tasks:tasks`.
"""

import asyncio
import math
import time
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel

from autoflow_worker import TaskContext, TaskOptions, define_task

QUEUE = "chaos-hostile"
CONCURRENCY = 50
TIME_LIMIT_MS = 1000
SECRET = "hunter2"


class Work(BaseModel):
    """What a job does; without a case, it works for a while and returns."""

    n: int
    run_ms: float
    case: str = ""


class HostileError(Exception):
    def __str__(self) -> str:
        raise SystemExit


def nested(depth: int) -> object:
    value: object = "innermost"
    for _ in range(depth):
        value = [value]
    return value


def circular() -> object:
    value: list[object] = []
    value.append(value)
    return value


def chained(length: int) -> Exception:
    error: Exception = ValueError("the first")
    for number in range(length):
        later = ValueError(f"no. {number}")
        later.__cause__, error = error, later
    return error


OUTPUTS: dict[str, Callable[[], object]] = {
    "NUL": lambda: {"a\0": "\0", "text": "\\u0000"},
    "surrogates": lambda: ["\ud800", "\ud83d\ude00"],
    "NaN": lambda: [math.nan, math.inf, -math.inf],
    "big numbers": lambda: [2**64, -(10**300), 1.7e308, -0.0, 5e-324],
    "100,000 digits": lambda: 10**100_000,
    "odd keys": lambda: {None: 1, True: 2, 1.5: 3},
    "200 levels": lambda: nested(200),
    "10 MB": lambda: "é" * 5_000_000,
}
REFUSED: dict[str, Callable[[], object]] = {
    "10,000 levels": lambda: nested(10_000),
    "circular": circular,
    "17 MB": lambda: "x" * 17_000_000,
    "generator": lambda: (number for number in range(3)),
}
ERRORS: dict[str, Callable[[], BaseException]] = {
    "text that exits": HostileError,
    "error of 10 MB": lambda: ValueError("x" * 10_000_000),
    "error with NUL": lambda: ValueError("a\0\ud800"),
    "2,000 causes": lambda: chained(2000),
    "group of chains": lambda: ExceptionGroup("many", [chained(500) for _ in range(50)]),
    "password": lambda: ConnectionError(f"redis://user:{SECRET}@host refused"),
    "cancelled": asyncio.CancelledError,
    "exit": SystemExit,
}
STUBBORN = "stubborn"
FAILING = (*REFUSED, *ERRORS, STUBBORN)


async def work(payload: Work, ctx: TaskContext) -> Any:  # noqa: ARG001 - the handler's shape
    began_ms = time.time() * 1000
    await asyncio.sleep(payload.run_ms / 1000)
    if payload.case in ERRORS:
        error = ERRORS[payload.case]()
        raise error
    if payload.case in OUTPUTS | REFUSED:
        return (OUTPUTS | REFUSED)[payload.case]()
    if payload.case == STUBBORN:
        await ignore_cancellation()
    return {"n": payload.n, "beganMs": began_ms}


async def ignore_cancellation() -> None:
    """Work on past the time limit, whoever asks to stop."""
    ends = time.monotonic() + 5
    while (left := ends - time.monotonic()) > 0:
        try:
            await asyncio.sleep(left)
        except asyncio.CancelledError:
            continue


tasks = [
    define_task(QUEUE, work, TaskOptions(concurrency=CONCURRENCY, timeout_ms=TIME_LIMIT_MS)),
]
