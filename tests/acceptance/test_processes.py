"""`start --processes`: several workers, and a supervisor that starts, replaces and ends them."""

import asyncio
import signal
import subprocess
import time
from textwrap import dedent

import psutil
import pytest
from redis.asyncio import Redis

from autoflow_worker.process.signals import SAME_WITHIN
from tests.support.agreement import bull_jobs, differences
from tests.support.api import Api
from tests.support.process import WorkerProcess, WorkerStarter
from tests.support.until import until

QUEUE = "many"
TASKS = """
    import asyncio
    import os
    from autoflow_worker import define_task

    VERSION = "old"

    async def handler(payload, ctx):
        seconds = 0 if "SECONDS" in os.environ else payload.get("seconds", 0)
        await asyncio.sleep(seconds)
        while "until" in payload and not os.path.exists(payload["until"]):
            await asyncio.sleep(0.05)
        return [os.getpid(), VERSION]

    quick = {"lockDuration": 2000, "stalledInterval": 1000, "maxStalledCount": 100}
    tasks = [define_task("many", handler, worker_options=quick)]
"""
LONG = 600
GRACE = {"WORKER_SHUTDOWN_GRACE": str(LONG)}


async def two_processes(start: WorkerStarter, *options: str, **env: str) -> WorkerProcess:
    """A supervisor with two workers that take jobs."""
    worker = start(TASKS, "--processes", "2", *options, **{**GRACE, **env})
    await worker.until_logged("all_processes_ready")
    return worker


async def until_many(worker: WorkerProcess, event: str, count: int) -> None:
    """Wait until an event was logged so often."""

    def seen() -> bool:
        assert worker.running, worker.report()
        return len(worker.logged(event)) >= count

    await until(seen, message=worker.report)


async def running_jobs(api: Api, count: int) -> list[str]:
    ids = [await api.schedule(QUEUE, {"seconds": LONG}) for _ in range(count)]
    for task_id in ids:
        await api.until_both_say(QUEUE, task_id, "active")
    return ids


async def outputs(api: Api, ids: list[str]) -> list[list[object]]:
    """What the handlers returned, once all jobs have completed."""
    rows = [await api.until_both_say(QUEUE, task_id, "completed") for task_id in ids]
    return [row["result"]["output"] for row in rows]


async def assert_all_agree(api: Api, redis: Redis, prefix: str) -> None:
    assert differences(await api.db.rows(), await bull_jobs(redis, prefix, QUEUE)) == []


# -- stopping --------------------------------------------------------------------------------------


async def test_both_work_and_stop(worker_process: WorkerStarter, api: Api) -> None:
    worker = await two_processes(worker_process)
    ids = [await api.schedule(QUEUE, {"seconds": 2}) for _ in range(2)]
    for task_id in ids:
        await api.until_both_say(QUEUE, task_id, "active")
    worker.send(signal.SIGUSR1)
    await until_many(worker, "running_job", 2)
    pids = {child.pid for child in worker.children()}
    waiting = await api.schedule(QUEUE)
    worker.terminate()
    assert await worker.wait() == 0, worker.report()
    assert {pid for pid, _ in await outputs(api, ids)} == pids
    await api.until_both_say(QUEUE, waiting, "pending")
    assert worker.logged("supervisor_stopped")[0]["exit_code"] == 0


async def test_a_second_signal_hands_back(worker_process: WorkerStarter, api: Api) -> None:
    worker = await two_processes(worker_process)
    ids = await running_jobs(api, 2)
    worker.terminate()
    await until_many(worker, "worker_stopping", 2)
    stopped_at = time.monotonic()
    await until(lambda: time.monotonic() > stopped_at + SAME_WITHIN)
    assert len(worker.children()) == 2
    worker.send(signal.SIGINT)
    assert await worker.wait() == 4, worker.report()
    assert {await api.db.status(task_id) for task_id in ids} == {"pending"}


async def test_a_process_that_does_not_end_is_killed(worker_process: WorkerStarter) -> None:
    worker = await two_processes(worker_process, WORKER_SHUTDOWN_GRACE="0")
    worker.children()[0].suspend()
    worker.terminate()
    assert await worker.wait() == 1, worker.report()
    assert len(worker.logged("process_killed")) == 1


async def test_processes_do_not_outlive_their_supervisor(
    worker_process: WorkerStarter, api: Api
) -> None:
    worker = await two_processes(worker_process, WORKER_SHUTDOWN_GRACE="0")
    ids = await running_jobs(api, 2)
    family = worker.children()
    worker.kill()
    await until(lambda: not any(map(_alive, family)), message=worker.report)
    worker_process(SECONDS="0")
    await outputs(api, ids)


# -- the start -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tasks", "env", "code", "words"),
    [
        (TASKS, {"WORKER_CONCURRENCY": "none"}, 2, "WORKER_CONCURRENCY='none'"),
        ("tasks = []", {}, 2, "is empty"),
        (
            TASKS,
            {"REDIS_URL": "redis://127.0.0.1:1", "WORKER_STARTUP_TIMEOUT": "0.3"},
            3,
            "Redis can't be reached",
        ),
        (TASKS, {"WORKER_RECYCLE_MEMORY": "2M"}, 2, "WORKER_RECYCLE_MEMORY=2097152"),
    ],
)
async def test_what_is_wrong_at_the_start_is_said_once(
    worker_process: WorkerStarter, tasks: str, env: dict[str, str], code: int, words: str
) -> None:
    worker = worker_process(tasks, "--processes", "3", **env)
    assert await worker.wait() == code, worker.report()
    assert worker.stderr.count("autoflow-worker: ") == 1, worker.report()
    assert words in worker.stderr


# -- deaths ----------------------------------------------------------------------------------------


async def test_a_process_that_dies_is_replaced(
    worker_process: WorkerStarter, api: Api, redis: Redis, prefix: str
) -> None:
    worker = await two_processes(worker_process)
    ids = [await api.schedule(QUEUE, {"seconds": 1}) for _ in range(6)]
    await api.until_both_say(QUEUE, ids[0], "active")
    first, second = worker.children()
    first.kill()
    await until_many(worker, "process_ready", 3)
    second.terminate()  # It ends with 0, and nobody told the supervisor.
    await until_many(worker, "process_ready", 4)
    assert len(worker.logged("process_died")) == 2
    await outputs(api, ids)
    await assert_all_agree(api, redis, prefix)
    worker.terminate()
    assert await worker.wait() == 0, worker.report()


async def test_processes_that_die_too_often_end_the_supervisor(
    worker_process: WorkerStarter,
) -> None:
    worker = worker_process(TASKS, "--processes", "3")
    for ready in (3, 6):
        await until_many(worker, "process_ready", ready)
        for child in worker.children():
            child.kill()
    assert await worker.wait() == 1, worker.report()
    assert "6 worker processes died within 60 s, the last by SIGKILL" in worker.stderr


# -- replacing -------------------------------------------------------------------------------------


async def test_a_rolling_restart_under_load(
    worker_process: WorkerStarter, api: Api, redis: Redis, prefix: str
) -> None:
    """With a task list that is broken, and then with a new one."""
    worker = await two_processes(worker_process)
    before = {child.pid for child in worker.children()}
    tasks_config = worker.folder.parent / "tasks_config.py"
    tasks_config.write_text("tasks = [")
    worker.send(signal.SIGHUP)
    await worker.until_logged("rolling_restart_broken_off")
    assert {child.pid for child in worker.children()} == before
    await outputs(api, [await api.schedule(QUEUE)])
    tasks_config.write_text(dedent(TASKS.replace('"old"', '"new"')))

    async def load() -> None:
        while not worker.logged("rolling_restart_ended"):
            assert worker.running, worker.report()
            await outputs(api, [await api.schedule(QUEUE, {"seconds": 0.01})])

    worker.send(signal.SIGHUP)
    await asyncio.gather(*(load() for _ in range(4)))
    rows = await api.db.rows()
    assert {(row["status"], row["attempts"]) for row in rows.values()} == {("completed", 1)}
    assert {row["result"]["output"][1] for row in rows.values()} == {"old", "new"}
    jobs = await bull_jobs(redis, prefix, QUEUE)  # BullMQ keeps the last 100.
    assert differences({job_id: rows[job_id] for job_id in jobs}, jobs) == []
    assert not before & {child.pid for child in worker.children()}
    assert len(worker.children()) == 2
    assert worker.logged("process_died") == worker.logged("job_stalled") == []


async def test_a_process_that_has_had_its_jobs_is_replaced(
    worker_process: WorkerStarter, api: Api, redis: Redis, prefix: str
) -> None:
    """Even one process has a supervisor then. A job that takes long is not cut off."""
    worker = worker_process(
        TASKS, WORKER_RECYCLE_JOBS="4", WORKER_SHUTDOWN_GRACE="0", WORKER_CONCURRENCY="2"
    )
    await worker.until_logged("all_processes_ready")
    [old] = worker.children()
    gate = worker.folder / "gate"
    long = await api.schedule(QUEUE, {"until": str(gate)})
    await api.until_both_say(QUEUE, long, "active")
    await outputs(api, [await api.schedule(QUEUE) for _ in range(4)])
    await until_many(worker, "process_ready", 2)
    await worker.until_logged("worker_quiet")
    [[pid, _]] = await outputs(api, [await api.schedule(QUEUE)])
    assert pid != old.pid
    assert old in worker.children()
    gate.touch()
    assert await outputs(api, [long]) == [[old.pid, "old"]]
    await until(lambda: old not in worker.children(), message=worker.report)
    await assert_all_agree(api, redis, prefix)
    assert worker.logged("process_died") == []


async def test_a_process_that_has_grown_is_replaced(
    worker_process: WorkerStarter, api: Api
) -> None:
    tasks = TASKS.replace("return [", "kept.append(bytearray(payload['size'])); return [")
    worker = worker_process(f"{tasks}\n    kept = []", WORKER_RECYCLE_MEMORY="300M")
    await worker.until_logged("all_processes_ready")
    [child] = worker.children()
    await outputs(api, [await api.schedule(QUEUE, {"size": 300 * 1024**2})])
    await until_many(worker, "process_ready", 2)
    await until(lambda: child not in worker.children(), message=worker.report)
    [[pid, _]] = await outputs(api, [await api.schedule(QUEUE, {"size": 1})])
    assert pid != child.pid
    assert worker.logged("worker_worn")[0]["memory_mb"] >= 300


# -- quiet, idle, process 1 ------------------------------------------------------------------------


async def test_quiet_and_awake(worker_process: WorkerStarter, api: Api) -> None:
    worker = await two_processes(worker_process)
    worker.send(signal.SIGTSTP)
    await until_many(worker, "worker_quiet", 2)
    waiting = await api.schedule(QUEUE)
    worker.children()[0].kill()
    await until_many(worker, "process_ready", 3)
    await until_many(worker, "worker_quiet", 3)
    assert await api.db.status(waiting) == "pending"
    worker.send(signal.SIGCONT)
    await outputs(api, [waiting])
    worker.send(signal.SIGTSTP)
    await until_many(worker, "worker_quiet", 5)
    worker.terminate()
    assert await worker.wait() == 0, worker.report()


async def test_it_ends_when_all_are_idle(worker_process: WorkerStarter, api: Api) -> None:
    ids = [await api.schedule(QUEUE, {"seconds": 1}) for _ in range(3)]
    worker = worker_process(TASKS, "--processes=2", "--until-idle=1")
    assert await worker.wait() == 0, worker.report()
    await outputs(api, ids)
    assert worker.logged("process_died") == []


async def test_process_1_reaps_orphans(worker_process: WorkerStarter, api: Api) -> None:
    worker_process.launcher = ("unshare", "--pid", "--fork", "--mount-proc")
    if await asyncio.to_thread(_fails, [*worker_process.launcher, "true"]):
        pytest.skip("unshare may not make a PID namespace here")
    tasks = TASKS.replace("return [", "subprocess.run(['sh', '-c', 'sleep 0.1 &']); return [")
    worker = worker_process(
        tasks.replace("import os", "import os, subprocess"), "--processes=2", LOG_LEVEL="debug"
    )
    await worker.until_logged("all_processes_ready")
    await outputs(api, [await api.schedule(QUEUE)])
    await worker.until_logged("orphan_reaped")
    [supervisor] = worker.children()
    assert len(supervisor.children()) == 2
    supervisor.terminate()
    assert await worker.wait() == 0, worker.report()


def _fails(command: list[str]) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode != 0


def _alive(process: psutil.Process) -> bool:
    # Where nobody reaps orphans they stay as zombies.
    return bool(process.is_running()) and process.status() != psutil.STATUS_ZOMBIE
