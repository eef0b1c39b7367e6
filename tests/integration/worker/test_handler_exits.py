"""`SystemExit` and `KeyboardInterrupt` out of whatever a handler starts."""

import signal
from typing import Any

import pytest

from tests.support.api import Api
from tests.support.process import WorkerStarter
from tests.support.until import until

QUEUE = "exits"
TASKS = f"""
    import asyncio, sys
    from autoflow_worker import TaskOptions, define_task

    async def leave(raised):
        await asyncio.sleep(0)
        raise {{"exit": SystemExit(3), "interrupt": KeyboardInterrupt()}}[raised]

    async def gather(raised):
        await asyncio.gather(leave(raised), asyncio.sleep(0))

    async def group(raised):
        async with asyncio.TaskGroup() as group:
            group.create_task(leave(raised), name="leaving")

    async def create_task(raised):
        await asyncio.create_task(leave(raised))

    async def thread(raised):
        await asyncio.to_thread(sys.exit, 3)

    async def nested(raised):
        await asyncio.create_task(gather(raised))

    async def forgotten(raised):
        asyncio.get_running_loop().forgotten = asyncio.create_task(leave(raised))
        await asyncio.wait([asyncio.get_running_loop().forgotten])
        raise ValueError("the task was forgotten")

    async def callback(raised):
        asyncio.get_running_loop().call_soon(sys.exit, 3)
        await asyncio.sleep(600)

    async def done_callback(raised):
        asyncio.create_task(asyncio.sleep(0)).add_done_callback(lambda _: sys.exit(3))
        await asyncio.sleep(600)

    async def bare_task(raised):
        task = asyncio.Task(leave(raised), loop=asyncio.get_running_loop())
        await asyncio.sleep(600)

    async def handler(payload, ctx):
        await globals()[payload["how"]](payload.get("raised", "exit"))

    async def sleeper(payload, ctx):
        await asyncio.sleep(600)

    tasks = [
        define_task("{QUEUE}", handler, TaskOptions(concurrency=5)),
        define_task("neighbours", sleeper),
    ]
"""


@pytest.mark.parametrize("raised", ["exit", "interrupt"])
async def test_in_a_task_it_costs_the_job_and_nobody_else(
    worker_process: WorkerStarter, api: Api, raised: str
) -> None:
    worker = worker_process(TASKS)
    kinds = ["gather", "group", "create_task", "thread", "nested", "forgotten"]
    ids = {}
    for how in kinds:
        payload = {"how": how, "raised": raised}
        ids[how] = await api.schedule(QUEUE, payload, attempts=1)
    for how, task_id in ids.items():
        row = await api.until_both_say(QUEUE, task_id, "failed")
        words = "Interrupt" if raised == "interrupt" and how != "thread" else "SystemExit: 3"
        expected = "the task was forgotten" if how == "forgotten" else words
        assert expected in row["error"]["reason"], how
    assert worker.running
    worker.terminate()
    assert await worker.wait() == 0, worker.report()


@pytest.mark.parametrize("how", ["callback", "done_callback", "bare_task"])
async def test_outside_of_any_task_all_is_handed_back_and_the_reason_told(
    worker_process: WorkerStarter, api: Api, how: str
) -> None:
    worker = worker_process(TASKS)
    neighbour = await api.schedule("neighbours", {})
    await api.until_both_say("neighbours", neighbour, "active")
    task_id = await api.schedule(QUEUE, {"how": how})
    assert await worker.wait() == 1, worker.report()
    assert "ended the event loop by SystemExit: 3" in worker.stderr
    [left] = worker.logged("event_loop_left")
    assert "SystemExit: 3" in left["exception"]
    assert len(worker.logged("job_handed_back")) == 2
    await is_as_if_not_run(api, "neighbours", neighbour)
    await is_as_if_not_run(api, QUEUE, task_id)


async def test_while_draining_too(worker_process: WorkerStarter, api: Api) -> None:
    worker = worker_process(
        TASKS.replace("call_soon(sys.exit, 3)", "call_later(1, sys.exit, 3)"),
        WORKER_SHUTDOWN_GRACE="600",
    )
    task_id = await api.schedule(QUEUE, {"how": "callback"})
    await api.until_both_say(QUEUE, task_id, "active")
    worker.send(signal.SIGTERM)
    assert await worker.wait() == 1, worker.report()
    assert "ended the event loop by SystemExit: 3" in worker.stderr
    await is_as_if_not_run(api, QUEUE, task_id)


async def is_as_if_not_run(api: Api, queue: str, task_id: str) -> None:
    """Whether the job was handed back, in both stores."""

    async def told() -> tuple[Any, ...]:
        return (await api.db.status(task_id), await api.node.get_state(queue, task_id))

    async def handed_back() -> bool:
        return await told() == ("pending", "delayed")

    await until(handed_back, message=lambda: f"{queue} {task_id}")
