"""Signals, sent to real processes: what runs is finished, or handed back; never dropped."""

import signal
import time

import pytest

from autoflow_worker.process.signals import SAME_WITHIN
from tests.support.api import Api
from tests.support.process import WorkerProcess, WorkerStarter
from tests.support.until import until

QUEUE = "users-send-welcome-email"

TASKS = f"""
    import asyncio
    import os
    import time
    from autoflow_worker import define_task

    async def asleep(seconds):
        await asyncio.sleep(seconds)

    async def stubborn(seconds):
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            await asyncio.sleep(seconds)

    async def handler(payload, ctx):
        print("attempt", ctx.attempt, flush=True)
        seconds = float(os.environ.get("SECONDS", payload["seconds"]))
        await globals()[payload.get("how", "asleep")](seconds)
        return ctx.attempt

    def in_a_thread(payload, ctx):
        print("in a thread", flush=True)
        time.sleep(payload["seconds"])  # what can't be interrupted

    tasks = [define_task("{QUEUE}", handler), define_task("threads", in_a_thread)]
"""
# Longer than any test: what a test waits for must not come of itself.
LONG = 600
GRACE = {"WORKER_SHUTDOWN_GRACE": str(LONG)}


async def running_job(
    api: Api, worker: WorkerProcess, seconds: float, queue: str = QUEUE, how: str = "asleep"
) -> str:
    """A job that the worker is running."""
    task_id = await api.schedule(queue, {"seconds": seconds, "how": how}, attempts=1)
    await api.until_both_say(queue, task_id, "active")
    return task_id


async def until_printed(worker: WorkerProcess, words: str) -> None:
    await until(lambda: words in worker.stdout, message=worker.report)


async def is_handed_back(api: Api, queue: str, task_id: str) -> bool:
    """Whether row and job are as if it had not been run: no attempt and no stall is used up."""
    job = await api.node.get_job(queue, task_id)
    assert job is not None
    return (
        await api.db.status(task_id),
        await api.node.get_state(queue, task_id),
        job["attemptsMade"],
        job["stalledCounter"],
    ) == ("pending", "delayed", 0, 0)


async def test_an_idle_worker_stops_at_once(worker_process: WorkerStarter, api: Api) -> None:
    worker = worker_process(TASKS, **GRACE)
    await worker.until_logged("worker_started")
    worker.terminate()
    assert await worker.wait() == 0, worker.report()
    assert worker.stderr == ""
    # It leaves the queue to the next one.
    task_id = await api.schedule(QUEUE, {"seconds": 0})
    assert await api.node.get_workers(QUEUE) == []
    worker = worker_process(**GRACE)
    await api.until_both_say(QUEUE, task_id, "completed")
    worker.send(signal.SIGINT)
    assert await worker.wait() == 0, worker.report()
    assert worker.stderr == ""


async def test_what_runs_is_finished_and_what_waits_is_left(
    worker_process: WorkerStarter, api: Api
) -> None:
    worker = worker_process(TASKS, **GRACE)
    running = await running_job(api, worker, 3)
    waiting = await api.schedule(QUEUE, {"seconds": 0})
    worker.terminate()
    assert await worker.wait() == 0, worker.report()
    assert (await api.until_both_say(QUEUE, running, "completed"))["attempts"] == 1
    await api.until_both_say(QUEUE, waiting, "pending")


async def test_at_the_deadline_jobs_are_handed_back(
    worker_process: WorkerStarter, api: Api
) -> None:
    """One that is cancelled, one that swallows its cancellation, and one in a thread."""
    worker = worker_process(TASKS, WORKER_SHUTDOWN_GRACE="0.2", WORKER_CONCURRENCY="2")
    jobs = [
        (queue, await running_job(api, worker, LONG, queue, how))
        for queue, how in ((QUEUE, "asleep"), (QUEUE, "stubborn"), ("threads", "asleep"))
    ]
    worker.terminate()
    assert await worker.wait() == 4, worker.report()
    for queue, task_id in jobs:
        assert await is_handed_back(api, queue, task_id)
    handed_back = {entry["task_id"] for entry in worker.logged("job_handed_back")}
    assert handed_back == {task_id for _, task_id in jobs}


async def test_the_next_worker_runs_a_job_that_was_handed_back(
    worker_process: WorkerStarter, api: Api
) -> None:
    first = worker_process(TASKS, WORKER_SHUTDOWN_GRACE="0")
    task_id = await running_job(api, first, LONG)
    second = worker_process(SECONDS="0")
    await second.until_logged("worker_started")
    first.terminate()
    assert await first.wait() == 4, first.report()
    row = await api.until_both_say(QUEUE, task_id, "completed")
    assert (row["attempts"], row["result"]["output"]) == (1, 1)
    assert "attempt 1" in second.stdout


@pytest.mark.parametrize("last", [signal.SIGHUP, signal.SIGQUIT])
async def test_no_signal_cuts_a_job_off(
    worker_process: WorkerStarter, api: Api, last: signal.Signals
) -> None:
    worker = worker_process(TASKS, **GRACE)
    for sig in (signal.SIGUSR1, signal.SIGUSR2, last):
        assert worker.running, worker.report()
        task_id = await running_job(api, worker, 1)
        worker.send(sig)
        await until_printed(worker, sig.name)
        await api.until_both_say(QUEUE, task_id, "completed")
    assert await worker.wait() == 0, worker.report()


async def test_usr1_tells_what_runs(worker_process: WorkerStarter, api: Api) -> None:
    worker = worker_process(TASKS)
    ids = {
        await running_job(api, worker, LONG),
        await running_job(api, worker, LONG, "threads"),
    }
    # A row says `active` before its handler begins.
    await until_printed(worker, "attempt 1")
    await until_printed(worker, "in a thread")
    worker.send(signal.SIGUSR1)
    await until(lambda: len(worker.logged("running_job")) == 2, message=worker.report)
    jobs = {job["queue"]: job for job in worker.logged("running_job")}
    assert {job["task_id"] for job in jobs.values()} == ids
    assert all(job["seconds"] >= 0 and job["attempt"] == 1 for job in jobs.values())
    handler, asleep, *_ = jobs[QUEUE]["stack"]
    assert "tasks_config.py" in handler
    assert "await asyncio.sleep(seconds)" in asleep
    # The stacks of threads are on stderr.
    assert "in in_a_thread" in worker.stderr


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_that_comes_again_later_hands_back_at_once(
    worker_process: WorkerStarter, api: Api, second: signal.Signals
) -> None:
    worker = worker_process(TASKS, **GRACE)
    task_id = await running_job(api, worker, LONG)
    worker.terminate()
    await worker.until_logged("worker_stopping")
    stopped_at = time.monotonic()
    worker.send(second)  # of a supervisor that signals the whole process group
    await worker.until_logged("signal_repeated")
    await until(lambda: time.monotonic() > stopped_at + SAME_WITHIN)
    assert worker.running
    assert await api.db.status(task_id) == "active"
    worker.send(second)
    assert await worker.wait() == 4, worker.report()
    assert await is_handed_back(api, QUEUE, task_id)


async def test_many_jobs_are_handed_back(worker_process: WorkerStarter, api: Api) -> None:
    worker = worker_process(TASKS, WORKER_SHUTDOWN_GRACE="0", WORKER_CONCURRENCY="20")
    ids = [await api.schedule(QUEUE, {"seconds": LONG}) for _ in range(30)]

    async def all_slots_are_taken() -> bool:
        return (await api.db.statuses())["active"] == 20

    await until(all_slots_are_taken)
    worker.terminate()
    assert await worker.wait() == 4, worker.report()
    assert await api.db.statuses() == {"pending": len(ids)}
    counts = await api.node.get_counts(QUEUE)
    assert (counts["delayed"], counts["prioritized"], counts["active"]) == (20, 10, 0)
