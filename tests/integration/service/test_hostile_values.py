"""Whatever a handler returns or raises, the row and BullMQ hold the same, and the next job runs."""

import json
import math
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, NoReturn

import pytest
from redis.asyncio import Redis

from autoflow_worker import TaskContext, TaskOptions, define_task
from tests.support.api import Api, Json
from tests.support.running import RunWorker

QUEUE = "a-queue"


def nested(depth: int) -> object:
    value: object = "innermost"
    for _ in range(depth):
        value = [value]
    return value


def circular() -> object:
    value: list[object] = []
    value.append(value)
    return value


class HostileError(Exception):
    def __str__(self) -> str:
        raise SystemExit


def chained() -> Exception:
    error: Exception = ValueError("first")
    for number in range(2_000):
        later = ValueError(f"no. {number}")
        later.__cause__, error = error, later
    return error


OUTPUTS: dict[str, Callable[[], object]] = {
    "NUL and surrogates": lambda: {"a\0": "\0\ud800", "pair": "\ud83d\ude00", "text": "\\u0000"},
    "NaN": lambda: [math.nan, math.inf, -math.inf, {1: math.nan}],
    "numbers": lambda: [2**53 + 1, 2**64, -(10**300), 10**100_000, 1.7e308, 2.6e16, -0.0, 5e-324],
    "keys": lambda: {None: 1, True: 2, 1.5: 3, math.nan: 4, Decimal(7): 5, "7": 6},
    "sets and dates": lambda: [{3, 1}, datetime(2026, 1, 2, tzinfo=UTC), b"\xff"],
    "deep": lambda: nested(200),
    "10 MB": lambda: "é" * 5_000_000,
}
REFUSED: dict[str, Callable[[], object]] = {
    "too deep": lambda: nested(10_000),
    "circular": circular,
    "generator": lambda: (number for number in range(3)),
    "tuple as key": lambda: {(1, 2): 3},
    "too long": lambda: "x" * 17_000_000,
}
ERRORS: dict[str, Callable[[], BaseException]] = {
    "10 MB error": lambda: ValueError("x" * 10_000_000),
    "NUL error": lambda: ValueError("a\0\ud800"),
    "no text": HostileError,
    "secret": lambda: ConnectionError("redis://user:hunter2@host refused"),
    "chain": chained,
    "group": lambda: ExceptionGroup("many", [chained() for _ in range(50)]),
    "no words": KeyError,
}


def fail(error: BaseException) -> NoReturn:
    raise error


async def handler(payload: Json, ctx: TaskContext) -> object:
    case = payload["case"]
    if case in ERRORS:
        fail(ERRORS[case]())
    return (OUTPUTS | REFUSED).get(case, lambda: case)()


hostile_task = define_task(QUEUE, handler, TaskOptions(concurrency=2))


async def fields(redis: Redis, prefix: str, task_id: str) -> dict[str, str]:
    found: Any = await redis.hgetall(f"{prefix}:{QUEUE}:{task_id}")
    return dict(found)


@pytest.mark.parametrize("case", OUTPUTS)
async def test_an_output_is_the_same_in_both_stores(
    run_worker: RunWorker, api: Api, redis: Redis, prefix: str, case: str
) -> None:
    task_id = await api.schedule(QUEUE, {"case": case})
    async with run_worker([hostile_task]):
        row = await api.until_both_say(QUEUE, task_id, "completed")
    assert json.loads((await fields(redis, prefix, task_id))["returnvalue"]) == row["result"]
    assert row["attempts"] == 1


@pytest.mark.parametrize("case", [*REFUSED, *ERRORS])
async def test_a_failure_is_the_same_in_both_stores(
    run_worker: RunWorker, api: Api, redis: Redis, prefix: str, case: str
) -> None:
    attempts = 3 if case in REFUSED else 1
    task_id = await api.schedule(QUEUE, {"case": case}, attempts=attempts)
    neighbour = await api.schedule(QUEUE, {"case": "none"})
    async with run_worker([hostile_task]):
        row = await api.until_both_say(QUEUE, task_id, "failed")
        await api.until_both_say(QUEUE, neighbour, "completed")
    told = await fields(redis, prefix, task_id)
    assert told["failedReason"] == row["error"]["reason"]
    assert json.loads(told["stacktrace"])[-1] == row["error"]["stackTrace"]
    assert len(row["error"]["reason"]) <= 2_000
    assert len(row["error"]["stackTrace"]) <= 16_000
    assert "hunter2" not in str(row["error"]) + str(told)
    assert row["attempts"] == 1  # What can't be stored once is not tried again.


async def test_a_payload_with_numbers_beyond_64_bits_gets_its_row(
    run_worker: RunWorker, api: Api
) -> None:
    # JavaScript writes all the digits of a number below 1e21.
    payload = {"case": "none", "n": 10**20}
    task_id = await api.node.schedule(QUEUE, payload, task_id="not-of-the-api")
    async with run_worker([hostile_task]):
        row = await api.until_both_say(QUEUE, task_id, "completed")
    assert row["payload"] == {"case": "none", "n": 10**20}
