"""`start --until-idle`: the worker ends when no task had a job for so long."""

import pytest

from tests.support.api import Api
from tests.support.process import WorkerStarter

TASKS = """
    import asyncio
    from autoflow_worker import define_task

    async def handler(payload, ctx):
        await asyncio.sleep(payload["seconds"])
        if ctx.attempt < payload.get("attempts", 1):
            raise ValueError("once more")

    tasks = [define_task("one", handler), define_task("two", handler)]
"""


async def test_it_ends_when_every_queue_is_done(worker_process: WorkerStarter, api: Api) -> None:
    """A job that takes longer, one that is due soon and a retry count; a later one does not."""
    done = [
        await api.schedule("one", {"seconds": 2}),
        await api.schedule("one", {"seconds": 0}, delay=1000),
        await api.schedule("two", {"seconds": 0, "attempts": 2}, attempts=2, backoff=500),
    ]
    later = await api.schedule("two", {"seconds": 0}, delay=600_000)
    worker = worker_process(TASKS, "--until-idle", "1.5")
    assert await worker.wait() == 0, worker.report()
    assert {await api.db.status(task_id) for task_id in done} == {"completed"}
    assert await api.db.status(later) == "delayed"
    assert worker.logged("worker_idle")


@pytest.mark.parametrize("seconds", ["0", "-1", "soon"])
async def test_a_wrong_time_is_refused(worker_process: WorkerStarter, seconds: str) -> None:
    worker = worker_process(TASKS, "--until-idle", seconds)
    assert await worker.wait() == 2
    assert "--until-idle" in worker.stderr
