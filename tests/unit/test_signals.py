import asyncio
import os
import signal
import subprocess
import sys

import pytest

from autoflow_worker.signals import SIGNALS, hold_signals, stop_on_signals
from tests.support.until import until


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (signal.SIGTERM, signal.SIGTERM),
        (signal.SIGINT, signal.SIGTERM),
        (signal.SIGTERM, signal.SIGINT),
    ],
)
async def test_the_first_stops_and_the_second_aborts(
    first: signal.Signals, second: signal.Signals
) -> None:
    with stop_on_signals() as (stop, abort):
        os.kill(os.getpid(), first)
        await until(stop.is_set)
        assert not abort.is_set()
        os.kill(os.getpid(), second)
        await until(abort.is_set)
        os.kill(os.getpid(), second)


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


def test_a_second_early_signal_ends_the_process() -> None:
    code = (
        "import os, signal\n"
        "from autoflow_worker.signals import hold_signals\n"
        "hold_signals()\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
        "print('alive', flush=True)\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "print('never')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "alive\n"
    assert done.returncode == -signal.SIGTERM


@pytest.mark.parametrize("loop", ["asyncio.new_event_loop", "uvloop.new_event_loop"])
async def test_the_main_task_is_not_cancelled(loop: str) -> None:
    code = (
        "import asyncio, uvloop\n"
        "from autoflow_worker.signals import stop_on_signals\n"
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
    for word in (b"ready", b"stop"):
        async for line in process.stdout:
            if line.strip() == word:
                break
        process.send_signal(signal.SIGINT)
    assert await process.wait() == 7
