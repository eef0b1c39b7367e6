"""A dead part kills the whole, in good order: nothing may look alive and not work.

The parts are ended from inside: nothing else ends them, and that is the point.
"""

import asyncio
from typing import Any

import pytest
from structlog.testing import capture_logs

from autoflow_worker import TaskContext, TaskOptions, define_task
from autoflow_worker.errors import PartDiedError
from autoflow_worker.recording.recorder import StatusRecorder
from autoflow_worker.recording.write import Write
from autoflow_worker.worker.handler import LoopRunner
from autoflow_worker.worker.running_jobs import waiting_frames
from tests.support.api import Api
from tests.support.node import Node
from tests.support.process import WorkerStarter
from tests.support.proxy import Proxy
from tests.support.running import RunWorker, end_part
from tests.support.until import until

QUEUE = "q"
PARTS = [
    "slot 0 of q",
    "slot 1 of q",
    "the lock renewal of q",
    "the stalled check of q",
    "status recorder 0",
    "status recorder 1",
]


async def handler(payload: dict[str, object], ctx: TaskContext) -> None:
    return None


async def hang(payload: dict[str, object], ctx: TaskContext) -> None:
    await asyncio.Event().wait()


async def end_reconnecting(proxy: Proxy) -> None:
    """Cut the connections to Redis, and cancel what would replace them."""

    def connectors() -> list[asyncio.Task[Any]]:
        tasks = asyncio.all_tasks()
        return [task for task in tasks if "Channel._reconnect" in str(task.get_coro())]

    await proxy.refuse()
    proxy.cut()
    for connector in await until(connectors):
        connector.cancel()


@pytest.mark.parametrize("part", PARTS)
async def test_a_part_that_ends_unasked_ends_all(
    run_worker: RunWorker, api: Api, part: str
) -> None:
    before = asyncio.all_tasks()
    with capture_logs() as logs:
        task_id = await api.schedule(QUEUE)
        tasks = [define_task(QUEUE, hang), define_task("other", handler)]
        async with run_worker(tasks, worker_concurrency=2) as worker:
            await api.until_both_say(QUEUE, task_id, "active")
            end_part(part)
            death = await worker.death()
    assert isinstance(death, PartDiedError)
    assert death.exit_code == 1
    assert str(death) == f"{part} ended unasked: it was cancelled"
    # In good order: what ran was handed back, and its row says so if there was who could write it.
    assert [entry["event"] for entry in logs][-2:] == ["job_handed_back", "worker_stopped"]
    assert await api.node.get_state(QUEUE, task_id) == "delayed"
    assert await api.db.status(task_id) == ("active" if part == "status recorder 0" else "pending")
    assert await api.node.get_workers(QUEUE) == []
    assert asyncio.all_tasks() - before == set()
    async with run_worker([define_task(QUEUE, handler)]):
        await api.until_both_say(QUEUE, task_id, "completed")


async def test_reconnecting_to_redis_that_ends_unasked_ends_all(
    redis_url: str, run_worker: RunWorker
) -> None:
    async with (
        Proxy(redis_url) as proxy,
        run_worker([define_task(QUEUE, handler)], redis_url=proxy.url) as worker,
    ):
        await end_reconnecting(proxy)
        death = await worker.death()
    assert str(death) == "the connection to Redis ended unasked: it was cancelled"


async def test_a_recorder_that_dies_over_a_batch(
    run_worker: RunWorker, node5: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(StatusRecorder, "take", broken)
    async with run_worker([define_task("q", handler)]) as worker:
        await node5.schedule("q")
        death = await worker.death()
    assert isinstance(death, PartDiedError)
    assert str(death) == "status recorder 0 ended unasked: RuntimeError: a bug"


async def test_a_recorder_that_breaks_over_every_write(
    run_worker: RunWorker, node5: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(Write, "as_parameters", broken)
    monkeypatch.setattr(Write, "as_json", broken)
    async with run_worker([define_task("q", handler)], worker_concurrency=10) as worker:
        for _ in range(5):
            await node5.schedule("q")
        death = await worker.death()
    assert isinstance(death, PartDiedError)
    assert str(death) == (
        "status recorder 0 ended unasked: no row can be written: RuntimeError: a bug"
    )


async def test_the_process_exits_with_1_and_the_reason(
    worker_process: WorkerStarter, api: Api
) -> None:
    worker = worker_process(
        f"""
        import asyncio
        from autoflow_worker import define_task

        async def handler(payload, ctx):
            for task in asyncio.all_tasks():
                if task.get_name() == payload["part"]:
                    task.cancel()
            await asyncio.Event().wait()

        tasks = [define_task("{QUEUE}", handler)]
        """
    )
    await worker.until_logged("worker_started")
    task_id = await api.schedule(QUEUE, {"part": "the lock renewal of q"})
    assert await worker.wait() == 1
    assert "the lock renewal of q ended unasked: it was cancelled" in worker.stderr
    await api.db.until_status(task_id, "pending")
    assert worker.logged("job_handed_back")


@pytest.mark.parametrize("part", PARTS)
async def test_a_part_that_dies_while_draining_ends_the_wait(
    run_worker: RunWorker, api: Api, part: str
) -> None:
    task_id = await api.schedule(QUEUE)
    tasks = [define_task(QUEUE, hang, TaskOptions(timeout_ms=None))]
    async with run_worker(tasks, worker_concurrency=2, worker_shutdown_grace=3600.0) as worker:
        await api.until_both_say(QUEUE, task_id, "active")
        slots = {task for task in asyncio.all_tasks() if task.get_name().startswith("slot ")}
        [busy] = [slot for slot in slots if waits_for_hang(slot)]
        worker.stopping.set()
        # The other one ends by itself, as it should.
        await asyncio.wait(slots - {busy})
        if part.startswith("slot"):
            part = busy.get_name()
        end_part(part)
        death = await worker.death()
    assert isinstance(death, PartDiedError)
    assert str(death) == f"{part} ended unasked: it was cancelled"
    assert await api.node.get_state(QUEUE, task_id) == "delayed"


def waits_for_hang(slot: asyncio.Task[Any]) -> bool:
    return any(frame.f_code is LoopRunner.run.__code__ for frame in waiting_frames(slot.get_coro()))


async def test_reconnecting_to_redis_that_dies_while_draining_ends_the_wait(
    redis_url: str, run_worker: RunWorker, node5: Node, api: Api
) -> None:
    tasks = [define_task(QUEUE, hang, TaskOptions(timeout_ms=None))]
    async with (
        Proxy(redis_url) as proxy,
        run_worker(tasks, redis_url=proxy.url, worker_shutdown_grace=3600.0) as worker,
    ):
        task_id = await api.schedule(QUEUE)
        await api.until_both_say(QUEUE, task_id, "active")
        worker.stopping.set()
        await end_reconnecting(proxy)
        death = await worker.death()
    assert str(death) == "the connection to Redis ended unasked: it was cancelled"
