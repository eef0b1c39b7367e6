"""`start` with handlers in processes: signals, and how the worker's end is the end of all."""

import signal

import psutil

from tests.support.api import Api
from tests.support.process import WorkerProcess, WorkerStarter
from tests.support.until import until

TASKS = """
    import time
    from autoflow_worker import TaskOptions, define_task

    def plain(payload, ctx):
        print("begun", flush=True)
        while payload["how"] == "stubborn":
            try:
                time.sleep(1000)
            except BaseException:
                pass
        while payload["how"] == "patient" and not ctx.stopping:
            time.sleep(0.01)
        return "stopped early"

    async def coroutine(payload, ctx):
        return plain(payload, ctx)

    options = TaskOptions(run_in="process", timeout_ms=None)
    tasks = [define_task("plain", plain, options), define_task("async", coroutine, options)]
"""


async def begun(worker: WorkerProcess, jobs: int) -> list[psutil.Process]:
    """Wait until so many handlers run, and return their processes."""
    await until(lambda: len(worker.logged("handler_output")) == jobs, message=worker.report)
    return psutil.Process(worker.pid).children()


async def until_ended(processes: list[psutil.Process]) -> None:
    def ended() -> bool:
        running = [each for each in processes if each.is_running()]
        return all(each.status() == psutil.STATUS_ZOMBIE for each in running)

    await until(ended)


async def test_handlers_end_with_a_worker_that_is_killed(
    worker_process: WorkerStarter, api: Api
) -> None:
    worker = worker_process(TASKS)
    for queue in ("plain", "async"):
        await api.schedule(queue, {"how": "stubborn"})
    processes = await begun(worker, 2)
    assert len(processes) == 2
    worker.kill()
    await until_ended(processes)


async def test_a_signal_to_every_process_is_the_workers_to_heed(
    worker_process: WorkerStarter, api: Api
) -> None:
    """As systemd sends it. The handlers hear of it by `ctx.stopping`, and finish."""
    worker = worker_process(TASKS)
    ids = {queue: await api.schedule(queue, {"how": "patient"}) for queue in ("plain", "async")}
    processes = await begun(worker, 2)
    for process in [*processes, psutil.Process(worker.pid)]:
        process.send_signal(signal.SIGTERM)
    assert await worker.wait() == 0, worker.report()
    await until_ended(processes)
    for queue, task_id in ids.items():
        row = await api.until_both_say(queue, task_id, "completed")
        assert row["result"]["output"] == "stopped early"


async def test_a_handler_that_does_not_listen_is_killed_at_the_deadline(
    worker_process: WorkerStarter, api: Api
) -> None:
    worker = worker_process(TASKS, WORKER_SHUTDOWN_GRACE="0.5")
    ids = [await api.schedule(queue, {"how": "stubborn"}) for queue in ("plain", "async")]
    processes = await begun(worker, 2)
    worker.terminate()
    assert await worker.wait() == 4, worker.report()
    assert not any(process.is_running() for process in processes)
    assert [await api.db.status(task_id) for task_id in ids] == ["pending", "pending"]
