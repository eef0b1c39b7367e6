"""The threads of sync handlers."""

import asyncio
import contextvars
import threading
from collections.abc import Callable
from typing import Any

import pytest

from autoflow_worker.errors import PartDiedError
from autoflow_worker.worker import threads
from autoflow_worker.worker.threads import Call, HandlerThreads
from autoflow_worker.worker.time_limit import TimeLimit

variable: contextvars.ContextVar[int] = contextvars.ContextVar("variable")


def begin(pool: HandlerThreads, function: Callable[[], Any]) -> Call:
    return pool.run(function, TimeLimit(None).start().ended)


async def run(pool: HandlerThreads, function: Callable[[], Any]) -> Any:
    call = begin(pool, function)
    assert await call.ended is None
    return call.result.result()


async def test_a_thread_runs_one_call_after_the_other() -> None:
    pool = HandlerThreads("q", 5)
    try:
        idents = {await run(pool, threading.get_ident) for _ in range(20)}
        assert len(idents) == 1
        assert threading.get_ident() not in idents
    finally:
        pool.close()


async def test_many_calls_have_a_thread_each_and_the_last_one_is_used_first() -> None:
    pool = HandlerThreads("q", 5)
    gate = threading.Barrier(6)
    try:
        calls = [begin(pool, gate.wait) for _ in range(5)]
        await asyncio.to_thread(gate.wait)
        for call in calls:
            await call.ended
        first = await run(pool, threading.get_ident)
        assert {await run(pool, threading.get_ident) for _ in range(5)} == {first}
    finally:
        pool.close()


async def test_a_call_has_a_copy_of_its_callers_context() -> None:
    pool = HandlerThreads("q", 1)

    def change() -> int:
        before = variable.get()
        variable.set(99)
        return before

    try:
        for number in range(3):
            variable.set(number)
            assert await run(pool, change) == number
            assert variable.get() == number
    finally:
        pool.close()


async def test_a_thread_is_named_after_what_it_does_and_ends_when_it_is_closed() -> None:
    pool = HandlerThreads("q", 1)
    name, thread = await run(
        pool, lambda: (threading.current_thread().name, threading.current_thread())
    )
    assert name == "handler of q"
    pool.close()
    assert thread.name == "idle thread of q"
    assert not thread.is_alive()


async def test_threads_that_stay_stuck_are_a_part_that_died(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(threads, "STUCK_PATIENCE", 0.05)
    pool = HandlerThreads("q", 1)
    gate = threading.Event()
    try:
        call = begin(pool, gate.wait)
        pool.leave_behind(call, "a-task")
        assert not pool.has_room
        with pytest.raises(PartDiedError, match="all 1 handlers of q run past their time limit"):
            await pool.watch()
        gate.set()
        await pool.room()
        assert pool.has_room
    finally:
        gate.set()
        pool.close()
