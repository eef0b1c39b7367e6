"""A blocked output, or a blocked event loop, does not keep a worker that is to stop."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest

from autoflow_worker.process.signals import SAME_WITHIN
from tests.support.api import Api
from tests.support.process import WorkerStarter
from tests.support.until import until

# What a busy machine may add to two seconds.
SLACK = 8.0


class FullPipe:
    """A pipe that takes nothing more, as nobody reads it."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()

    def fill(self) -> None:
        """Fill it, without making the writers' end non-blocking for others."""
        writer = os.open(f"/proc/self/fd/{self.writer}", os.O_WRONLY | os.O_NONBLOCK)
        for size in (4096, 1):
            try:
                while True:
                    os.write(writer, b"x" * size)
            except BlockingIOError:
                pass
        os.close(writer)

    def close(self) -> None:
        os.close(self.reader)
        os.close(self.writer)


@pytest.fixture
def pipe() -> Iterator[FullPipe]:
    pipe = FullPipe()
    yield pipe
    pipe.close()


async def start(
    worker_process: WorkerStarter, folder: Path, pipe: FullPipe, tasks: str, **env: str
) -> asyncio.subprocess.Process:
    """Start a worker whose stdout and stderr are the pipe."""
    (folder / "tasks_config.py").write_text(dedent(tasks))
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "autoflow_worker", "start"),
        cwd=folder,
        env=os.environ | worker_process.env | env,
        stdout=pipe.writer,
        stderr=pipe.writer,
    )


async def exit_code(process: asyncio.subprocess.Process, limit: float) -> int:
    """Its exit code; it has to end within the limit."""
    try:
        return await asyncio.wait_for(process.wait(), limit + SLACK)
    finally:
        if process.returncode is None:
            process.kill()


TASKS = """
    import asyncio, time
    from autoflow_worker import define_task

    async def handler(payload, ctx):
        if payload.get("prints"):
            print("x" * 1_000_000, flush=True)
        if payload.get("buffered"):
            import sys
            sys.stdout = open(1, "w", buffering=10_000_000, closefd=False)
            print("x" * 100_000)

    tasks = [define_task("q", handler)]
"""


@pytest.mark.parametrize("payload", [{}, {"buffered": True}], ids=["idle", "something buffered"])
async def test_a_blocked_output_does_not_hold_the_exit(
    worker_process: WorkerStarter,
    api: Api,
    tmp_path: Path,
    pipe: FullPipe,
    payload: dict[str, bool],
) -> None:
    process = await start(worker_process, tmp_path, pipe, TASKS)
    task_id = await api.schedule("q", payload)
    await api.until_both_say("q", task_id, "completed")
    pipe.fill()
    process.terminate()
    assert await exit_code(process, 2) == 0


async def test_a_blocked_output_does_not_hold_an_error_message(
    worker_process: WorkerStarter, tmp_path: Path, pipe: FullPipe
) -> None:
    pipe.fill()
    process = await start(worker_process, tmp_path, pipe, "tasks = []")
    assert await exit_code(process, 4) == 2


async def test_a_handler_that_a_blocked_output_holds_does_not_hold_the_exit(
    worker_process: WorkerStarter, api: Api, tmp_path: Path, pipe: FullPipe
) -> None:
    process = await start(worker_process, tmp_path, pipe, TASKS, WORKER_SHUTDOWN_GRACE="0.5")
    task_id = await api.schedule("q", {"prints": True}, attempts=1)
    await api.db.until_status(task_id, "active")
    await until_asleep(process.pid)
    process.terminate()
    assert await exit_code(process, 2.5) == 1


async def until_asleep(pid: int) -> None:
    """Wait until the main thread waits in a system call that is not the event loop's."""

    def blocked() -> bool:
        return "pipe" in Path(f"/proc/{pid}/wchan").read_text()

    await until(blocked)


BLOCKING = """
    import hashlib, re, time
    from autoflow_worker import define_task

    def sleep():
        time.sleep(600)

    def spin():
        while True:
            pass

    def swallow():
        while True:
            try:
                time.sleep(600)
            except BaseException:
                pass

    def match():
        re.match("(a+)+$", "a" * 60 + "b")

    def native():
        hashlib.pbkdf2_hmac("sha512", b"x", b"x", 2**31 - 1)

    async def handler(payload, ctx):
        print("blocking", flush=True)
        globals()[payload["how"]]()

    tasks = [define_task("q", handler)]
"""


@pytest.mark.parametrize("how", ["sleep", "spin", "swallow", "match", "native"])
async def test_a_blocked_loop_ends_the_process_past_the_deadline_with_its_stacks(
    worker_process: WorkerStarter, api: Api, how: str
) -> None:
    worker = worker_process(BLOCKING, WORKER_SHUTDOWN_GRACE="0.5")
    await api.schedule("q", {"how": how})
    await until(lambda: "blocking" in worker.stdout, message=worker.report)
    worker.terminate()
    assert await worker.wait() == 1, worker.report()
    assert "Timeout (0:00:02" in worker.stderr
    assert f"in {how}" in worker.stderr


async def test_a_later_signal_ends_a_blocked_loop_before_its_deadline(
    worker_process: WorkerStarter, api: Api
) -> None:
    worker = worker_process(BLOCKING, WORKER_SHUTDOWN_GRACE="600")
    await api.schedule("q", {"how": "sleep"})
    await until(lambda: "blocking" in worker.stdout, message=worker.report)
    worker.terminate()
    stopped_at = time.monotonic()
    await until(lambda: time.monotonic() > stopped_at + SAME_WITHIN + 0.5)
    worker.terminate()
    assert await worker.wait() == 1, worker.report()
    assert "in sleep" in worker.stderr


async def test_a_loop_that_is_blocked_up_to_its_deadline_stops_in_order(
    worker_process: WorkerStarter, api: Api
) -> None:
    worker = worker_process(
        """
        import time
        from autoflow_worker import define_task

        async def handler(payload, ctx):
            print("blocking", flush=True)
            time.sleep(2)

        tasks = [define_task("q", handler)]
        """,
        WORKER_SHUTDOWN_GRACE="30",
    )
    task_id = await api.schedule("q", {})
    await until(lambda: "blocking" in worker.stdout, message=worker.report)
    worker.terminate()
    assert await worker.wait() == 0, worker.report()
    await api.until_both_say("q", task_id, "completed")


async def test_an_import_that_hangs_does_not_hold_the_stacks(
    worker_process: WorkerStarter,
) -> None:
    worker = worker_process("import time\nprint('importing', flush=True)\ntime.sleep(600)")
    await until(lambda: "importing" in worker.stdout, message=worker.report)
    worker.send(signal.SIGUSR1)
    await until(lambda: "tasks_config.py" in worker.stderr, message=worker.report)
    assert worker.running


def test_a_fault_leaves_its_stack(tmp_path: Path) -> None:
    (tmp_path / "tasks_config.py").write_text("import os\nos.abort()\n")
    done = subprocess.run(
        [sys.executable, "-m", "autoflow_worker", "start"],
        cwd=tmp_path,
        env=os.environ | {"REDIS_URL": "redis://h", "DATABASE_URL": "postgresql://h/d"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGABRT
    assert "Fatal Python error: Aborted" in done.stderr
    assert "tasks_config.py" in done.stderr
