"""The dev command: embedded servers, hot reload, and an end that leaves nothing behind."""

import re
import signal
import time
from pathlib import Path
from textwrap import dedent

import psutil

from autoflow_worker.process.signals import SAME_WITHIN
from tests.support.api import Api
from tests.support.process import WorkerProcess, WorkerStarter
from tests.support.until import until

TASKS = """
    from autoflow_worker import define_task

    async def handler(payload, ctx): ...

    tasks = [define_task("{queue}", handler)]
"""


async def running_queue(dev: WorkerProcess, queue: str) -> None:
    """Wait until a worker serves this queue."""

    def seen() -> bool:
        assert dev.running, dev.report()
        return [queue] in [entry["queues"] for entry in dev.logged("worker_started")]

    await until(seen, message=dev.report)


async def test_a_change_starts_the_worker_again(
    worker_process: WorkerStarter, tmp_path: Path
) -> None:
    dev = worker_process(TASKS.format(queue="one"), command="dev")
    await running_queue(dev, "one")
    tasks_config = tmp_path / "tasks_config.py"
    tasks_config.write_text("tasks = [")
    await until(lambda: "exit code 2; waiting for a change" in dev.stderr, message=dev.report)
    assert "SyntaxError" in dev.stderr
    assert "Traceback" not in dev.stderr
    tasks_config.write_text("tasks = []")
    await until(lambda: dev.stderr.count("exit code 2; waiting") == 2, message=dev.report)
    tasks_config.write_text(dedent(TASKS.format(queue="two")))
    await running_queue(dev, "two")
    dev.send(signal.SIGINT)
    assert await dev.wait() == 0


async def test_a_change_of_an_env_file_counts_at_the_next_start(
    worker_process: WorkerStarter, tmp_path: Path
) -> None:
    for queue in ("one", "two"):
        (tmp_path / f"{queue}.py").write_text(dedent(TASKS.format(queue=queue)))
    env_file = tmp_path / ".env"
    env_file.write_text("TASKS_CONFIG=one:tasks")
    dev = worker_process(command="dev")
    await running_queue(dev, "one")
    env_file.write_text("TASKS_CONFIG=two:tasks")
    await running_queue(dev, "two")
    dev.send(signal.SIGINT)
    assert await dev.wait() == 0


async def test_servers_and_worker_end_with_it(worker_process: WorkerStarter) -> None:
    dev = worker_process(
        TASKS.format(queue="one"), command="dev", REDIS_URL=None, DATABASE_URL=None
    )
    await running_queue(dev, "one")
    [redis_url] = re.findall(r"^ +export (REDIS_URL=.+)$", dev.stderr, re.MULTILINE)
    [database_url] = re.findall(r"^ +export (DATABASE_URL=.+)$", dev.stderr, re.MULTILINE)
    scheduling = worker_process(
        None,
        "one",
        "{}",
        command="schedule",
        REDIS_URL=redis_url.partition("=")[2],
        DATABASE_URL=database_url.partition("=")[2],
    )
    assert await scheduling.wait() == 0, scheduling.report()
    family = psutil.Process(dev.pid).children(recursive=True)
    assert {"valkey-server", "postgres"} <= {process.name() for process in family}
    dev.kill()
    await until(lambda: not any(map(_alive, family)), message=lambda: str(family))


async def test_a_worker_that_has_to_be_killed_is_a_death(worker_process: WorkerStarter) -> None:
    stands_still = "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)"
    dev = worker_process(stands_still, command="dev", WORKER_SHUTDOWN_GRACE="0")

    def worker_stands() -> bool:
        assert dev.running, dev.report()
        workers = psutil.Process(dev.pid).children()
        return any(worker.status() == psutil.STATUS_STOPPED for worker in workers)

    await until(worker_stands, 30, message=dev.report)
    dev.send(signal.SIGTERM)
    assert await dev.wait() == 1
    assert "process_killed" in dev.stdout


async def test_a_signal_and_a_later_one_are_passed_on(
    worker_process: WorkerStarter, api: Api
) -> None:
    dev = worker_process(
        """
        import asyncio
        from autoflow_worker import TaskOptions, define_task

        async def handler(payload, ctx):
            await asyncio.sleep(600)

        tasks = [define_task("one", handler, TaskOptions(timeout_ms=None))]
        """,
        command="dev",
        WORKER_SHUTDOWN_GRACE="600",
    )
    task_id = await api.schedule("one", {})
    await until(lambda: dev.logged("worker_started"), 30, message=dev.report)
    await api.until_both_say("one", task_id, "active")
    dev.send(signal.SIGINT)
    dev.send(signal.SIGTERM)  # of make, which got it as well
    await until(lambda: dev.logged("worker_stopping"), message=dev.report)
    stopped_at = time.monotonic()
    await until(lambda: time.monotonic() > stopped_at + SAME_WITHIN)
    assert dev.running
    dev.send(signal.SIGINT)
    assert await dev.wait() == 4, dev.report()
    assert len(dev.logged("job_handed_back")) == 1
    assert await api.db.status(task_id) == "pending"


async def test_wrong_settings_are_told_at_once(worker_process: WorkerStarter) -> None:
    dev = worker_process(command="dev", WORKER_CONCURRENCY="many", REDIS_URL=None)
    assert await dev.wait() == 2
    assert "WORKER_CONCURRENCY='many'" in dev.stderr
    assert "REDIS_URL" not in dev.stderr


def _alive(process: psutil.Process) -> bool:
    # Where nobody reaps orphans they stay as zombies.
    return bool(process.is_running()) and process.status() != psutil.STATUS_ZOMBIE
