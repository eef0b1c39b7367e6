import asyncio
import os
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoflow_worker.process import watchdog
from autoflow_worker.process.signals import (
    SAME_WITHIN,
    SIGNALS,
    STOP,
    STOP_OR_ABORT,
    Request,
    Requests,
    hold_signals,
    stop_on_signals,
)
from tests.support.until import until


async def until_a_second_later(since: float) -> None:
    await until(lambda: time.monotonic() > since + SAME_WITHIN)


@pytest.mark.parametrize("number", [*STOP_OR_ABORT, *STOP])
async def test_the_first_stops(number: signal.Signals) -> None:
    with stop_on_signals() as (stop, abort):
        os.kill(os.getpid(), number)
        await until(stop.is_set)
        assert not abort.is_set()


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (signal.SIGTERM, signal.SIGTERM),
        (signal.SIGINT, signal.SIGTERM),
        (signal.SIGTERM, signal.SIGINT),
        (signal.SIGHUP, signal.SIGTERM),
    ],
)
async def test_one_that_comes_later_aborts(first: signal.Signals, second: signal.Signals) -> None:
    with stop_on_signals() as (stop, abort):
        os.kill(os.getpid(), first)
        await until(stop.is_set)
        stopped_at = time.monotonic()
        os.kill(os.getpid(), second)  # of a supervisor that signals the whole group
        await until_a_second_later(stopped_at)
        assert not abort.is_set()
        os.kill(os.getpid(), second)
        await until(abort.is_set)
        os.kill(os.getpid(), second)


@pytest.mark.parametrize("loop", ["asyncio.new_event_loop", "uvloop.new_event_loop"])
async def test_each_signal_on_each_loop(loop: str) -> None:
    code = (
        "import asyncio, os, signal, uvloop\n"
        "from autoflow_worker.process.signals import stop_on_signals\n"
        "async def main():\n"
        "    told = asyncio.Event()\n"
        "    with stop_on_signals(60, {signal.SIGUSR1: told.set}) as (stop, abort):\n"
        "        os.kill(os.getpid(), signal.SIGUSR2)\n"
        "        os.kill(os.getpid(), signal.SIGUSR1)\n"
        "        await told.wait()\n"
        "        assert not stop.is_set()\n"
        "        os.kill(os.getpid(), signal.SIGQUIT)\n"
        "        os.kill(os.getpid(), signal.SIGHUP)\n"
        "        await stop.wait()\n"
        "        assert not abort.is_set()\n"
        "        return 7\n"
        f"with asyncio.Runner(loop_factory={loop}) as runner:\n"
        "    raise SystemExit(runner.run(main()))"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, stderr=subprocess.PIPE
    )
    _, stacks = await process.communicate()
    assert process.returncode == 7, stacks
    assert b"most recent call first" in stacks
    assert b"in main" in stacks


async def test_a_loop_that_turns_is_not_ended() -> None:
    with stop_on_signals(600.0) as (stop, _):
        os.kill(os.getpid(), signal.SIGTERM)
        await until(stop.is_set)
        # As the thread does that reads signals, if it counts an abort where the loop does not.
        watchdog.end_at(time.monotonic() + watchdog.PATIENCE)
        await until(lambda: (watchdog.Deadline.at or 0) > time.monotonic() + 100)
    assert watchdog.Deadline.at is None


async def test_what_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signals() as (stop, _):
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)
            await until(stop.is_set)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


TIMES = st.lists(st.tuples(st.sampled_from(SIGNALS), st.floats(0, 5)), max_size=8)


@given(TIMES)
def test_what_signals_ask_for(signals: list[tuple[signal.Signals, float]]) -> None:
    requests, now = Requests(), 0.0
    stopped_at: float | None = None
    for number, pause in signals:
        now += pause
        request = requests.of(number, now)
        if number in (signal.SIGUSR1, signal.SIGUSR2):
            assert request in (Request.CALL, Request.NOTHING)
        elif stopped_at is None:
            assert request is Request.STOP
            stopped_at = now
        else:
            late = now - stopped_at >= SAME_WITHIN
            aborts = late and number in (signal.SIGTERM, signal.SIGINT)
            assert request is (Request.ABORT if aborts else Request.SAME)


async def test_the_old_handlers_come_back() -> None:
    def mine(*_: object) -> None: ...

    before = {number: signal.getsignal(number) for number in SIGNALS}
    signal.signal(signal.SIGTERM, mine)
    try:
        with stop_on_signals():
            assert signal.getsignal(signal.SIGTERM) is not mine
        assert signal.getsignal(signal.SIGTERM) is mine
        assert signal.getsignal(signal.SIGINT) == before[signal.SIGINT]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


async def test_an_early_signal_is_not_lost() -> None:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        hold_signals()
        os.kill(os.getpid(), signal.SIGTERM)
        with stop_on_signals() as (stop, abort):
            assert stop.is_set()
            assert not abort.is_set()
        with stop_on_signals() as (stop, _):
            assert not stop.is_set()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_early_signals_obey_the_same_rules() -> None:
    code = (
        "import os, signal, time\n"
        "from autoflow_worker.process.signals import hold_signals\n"
        "hold_signals()\n"
        "for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGTERM):\n"
        "    os.kill(os.getpid(), number)\n"
        "print('alive', flush=True)\n"
        "time.sleep(1.1)\n"
        "os.kill(os.getpid(), signal.SIGQUIT)\n"
        "print('still', flush=True)\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "print('never')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "alive\nstill\n"
    assert done.returncode == -signal.SIGTERM


@pytest.mark.parametrize("loop", ["asyncio.new_event_loop", "uvloop.new_event_loop"])
async def test_the_main_task_is_not_cancelled(loop: str) -> None:
    code = (
        "import asyncio, uvloop\n"
        "from autoflow_worker.process.signals import stop_on_signals\n"
        "async def main():\n"
        "    with stop_on_signals() as (stop, abort):\n"
        "        print('ready', flush=True)\n"
        "        await stop.wait()\n"
        "        print('stop', flush=True)\n"
        "        await abort.wait()\n"
        "        return 7\n"
        f"with asyncio.Runner(loop_factory={loop}) as runner:\n"
        "    raise SystemExit(runner.run(main()))"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    async for line in process.stdout:
        if line.strip() == b"ready":
            process.send_signal(signal.SIGINT)
        if line.strip() == b"stop":
            await until_a_second_later(time.monotonic())
            process.send_signal(signal.SIGINT)
    assert await process.wait() == 7
