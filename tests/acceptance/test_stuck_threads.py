"""Sync handlers that hang: bounded threads, unharmed neighbours, a prompt exit."""

import time

from tests.support.api import Api
from tests.support.node import Scheduled
from tests.support.process import WorkerStarter
from tests.support.until import until

GRACE = 1
LIMIT = GRACE + 2
# What a busy machine may add to the limit.
SLACK = 10

TASKS = """
    import threading, time
    from autoflow_worker import TaskOptions, define_task

    def hang(payload, ctx):
        time.sleep(120)

    def other(payload, ctx):
        return threading.active_count()

    tasks = [
        define_task("stuck", hang, TaskOptions(concurrency=20, timeout_ms=1000)),
        define_task("other", other),
    ]
"""


async def test_they_harm_nobody_else(worker_process: WorkerStarter, api: Api) -> None:
    worker = worker_process(TASKS, WORKER_SHUTDOWN_GRACE=str(GRACE))
    jobs = [Scheduled(attempts=1) for _ in range(40)]
    await api.db.insert_tasks("stuck", {job.task_id: {} for job in jobs})
    await api.node.schedule_all("stuck", jobs)
    await until(lambda: bool(worker.logged("handlers_stuck")), message=worker.report)
    [stuck] = worker.logged("handlers_stuck")
    assert len(stuck["handlers"]) == 20
    assert all(any(" hang" in frame for frame in each["stack"]) for each in stuck["handlers"])

    task_id = await api.schedule("other")
    result = (await api.db.until_status(task_id, "completed")).result
    assert result is not None
    # A slot may have taken its next job before the last of the others was left behind.
    assert 20 < result.output < 2 * 20 + 10

    worker.terminate()
    began = time.monotonic()
    assert await worker.wait() in (0, 4), worker.report()
    assert time.monotonic() - began < LIMIT + SLACK
    statuses = await api.db.statuses()
    assert statuses["failed"] + statuses["pending"] == 40
    assert 20 <= statuses["failed"] < 40
