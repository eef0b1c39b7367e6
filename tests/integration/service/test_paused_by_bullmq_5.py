"""A queue that BullMQ 5 pauses or resumes, or that 5 and 6 use at the same time: no job is lost.

BullMQ 5 resumes a queue by renaming `paused` to `wait`. BullMQ's scripts for Python, as they are,
lose a job in each queue of the first test but "priority".
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from bullmq import Worker
from redis.asyncio import Redis
from structlog.testing import capture_logs

from autoflow_worker import TaskContext, TaskDefinition, TaskOptions, define_task
from autoflow_worker.tasks.worker_options import WorkerOptions
from tests.support.node import Node
from tests.support.running import RunWorker
from tests.support.until import until

Json = dict[str, Any]
# A worker's idle wait and its check for stalled jobs are short.
QUICK: WorkerOptions = {"drainDelay": 0.1, "stalledInterval": 200}
RETRIED: dict[str, Json] = {
    "at-once": {},
    "lifo": {"lifo": True},
    "priority": {"priority": 3},
    "backoff": {"backoff": {"type": "fixed", "delay": 1}},
}
FED = ("delayed", "scheduler", "parent")
STALLED: dict[str, Json] = {"stalled": {}, "stalled-priority": {"priority": 1}}
LISTS = ("wait", "paused")
WAITING = {"waiting", "prioritized", "paused"}


class Stage:
    """The tasks of some queues. Jobs with `hold` wait for `gate`; with `fail`, they fail once."""

    def __init__(self, node5: Node, *queues: str) -> None:
        self.gate = asyncio.Event()
        self.begun: set[tuple[str, str]] = set()
        self.tasks = [self._task(queue) for queue in queues]
        self._node = node5

    def _task(self, queue: str) -> TaskDefinition[Any]:
        return define_task(queue, self._run, TaskOptions(max_attempts=2), worker_options=QUICK)

    async def _run(self, payload: Json, ctx: TaskContext) -> None:
        self.begun.add((ctx.job.name, ctx.job.id))
        if ctx.job.attemptsStarted == 1 and payload.get("hold"):
            await self.gate.wait()
        if ctx.job.attemptsStarted == 1 and payload.get("fail"):
            raise ValueError("once")

    async def begin(self, queue: str, payload: Json, **opts: Any) -> str:
        """Add a job that holds its queue's only slot, and a second one that waits behind it."""
        job_id = await self._node.add(queue, {"hold": True, **payload}, attempts=2, **opts)
        await until(lambda: (queue, job_id) in self.begun)
        await self._node.add(queue, {})
        return job_id

    async def until_state(self, queue: str, job_id: str, *states: str) -> None:
        async def reached() -> bool:
            return await self._node.get_state(queue, job_id) in states

        await until(reached, message=f"{job_id} of {queue} in {states}")


Lists = Callable[[], Awaitable[tuple[Any, Any]]]


@pytest.fixture
def lists(redis: Redis, prefix: str) -> Lists:
    """`await lists()`: what queue `q` has in `wait` and in `paused`, the next job last."""

    async def read() -> tuple[Any, Any]:
        wait, paused = [await redis.lrange(f"{prefix}:q:{name}", 0, -1) for name in LISTS]
        return wait, paused

    return read


async def die_with(node: Node, redis_url: str, prefix: str, queue: str, **opts: Any) -> str:
    """Add a job, and claim it as a worker that dies at once."""
    job_id = await node.add(queue, {}, **opts)
    worker = Worker(queue, None, {"connection": redis_url, "prefix": prefix})
    claimed = await worker.scripts.moveToActive("dead", {"lockDuration": 1})
    assert claimed[1] == job_id
    await worker.client.aclose()
    await worker.bclient.aclose()
    return job_id


async def test_what_becomes_waiting_during_a_pause_is_there_after_it(
    node5: Node, run_worker: RunWorker, redis_url: str, prefix: str
) -> None:
    paused = (*RETRIED, *FED, *STALLED)
    stage = Stage(node5, *paused, "child")
    jobs: dict[str, str] = {}
    for queue, opts in STALLED.items():
        jobs[queue] = await die_with(node5, redis_url, prefix, queue, **opts)
        await node5.add(queue, {})
        await node5.pause(queue)
    async with run_worker(stage.tasks):
        for queue, opts in RETRIED.items():
            jobs[queue] = await stage.begin(queue, {"fail": True}, **opts)
        for queue in FED:
            await stage.begin(queue, {})
        jobs["delayed"] = await node5.add("delayed", {}, delay=1)
        every_second = {"pattern": "* * * * * *"}
        made = await node5.queue("scheduler", "upsertJobScheduler", "s", every_second)
        jobs["scheduler"] = made["id"]
        child = {"name": "child", "queueName": "child", "data": {"hold": True}}
        flow = {"name": "parent", "queueName": "parent", "children": [child]}
        jobs["parent"] = (await node5.flow(flow))["job"]["id"]
        await stage.until_state("parent", jobs["parent"], "waiting-children")
        for queue in (*RETRIED, *FED):
            await node5.pause(queue)
        stage.gate.set()
        for queue, job_id in jobs.items():
            await stage.until_state(queue, job_id, *WAITING)
        for queue in paused:
            await node5.resume(queue)

        states = {queue: await node5.get_state(queue, job_id) for queue, job_id in jobs.items()}
        assert {queue for queue, state in states.items() if state == "unknown"} == set()
        for queue, job_id in jobs.items():
            await stage.until_state(queue, job_id, "completed")


async def test_a_job_that_is_handed_back_during_a_pause_is_there_after_it(
    node5: Node, run_worker: RunWorker
) -> None:
    stage = Stage(node5, "q")
    async with run_worker(stage.tasks) as first:
        job_id = await stage.begin("q", {})
        await node5.pause("q")
        await first.abort()
    stage.gate.set()
    async with run_worker(stage.tasks):
        await stage.until_state("q", job_id, *WAITING)
        await node5.resume("q")
        assert await node5.get_state("q", job_id) != "unknown"
        await stage.until_state("q", job_id, "completed")


async def test_nodes_own_worker_of_bullmq_6_loses_a_job(node5: Node, node6: Node) -> None:
    """So this is BullMQ's own fault, and not that of its Python package."""
    await node5.pause("q")
    await node5.add("q", {"script": []})
    due = await node5.add("q", {"script": []}, delay=1)
    await node6.work("q")

    async def promoted() -> bool:
        return await node5.get_state("q", due) == "waiting"

    await until(promoted)
    await node5.resume("q")
    assert await node5.get_state("q", due) == "unknown"


async def test_a_queue_of_bullmq_6_alone_keeps_its_layout(
    node6: Node, run_worker: RunWorker, lists: Lists
) -> None:
    stage = Stage(node6, "q")
    async with run_worker(stage.tasks):
        job_id = await stage.begin("q", {"fail": True})
        await node6.pause("q")
        stage.gate.set()
        await stage.until_state("q", job_id, *WAITING)
        wait, paused = await lists()
        assert (job_id in wait, paused) == (True, [])
        await node6.resume("q")
        await stage.until_state("q", job_id, "completed")


@pytest.mark.parametrize("first", ["node5", "node6"])
async def test_lists_of_both_versions_are_joined_during_the_pause(
    first: str, node5: Node, node6: Node, run_worker: RunWorker, lists: Lists
) -> None:
    """BullMQ 5 loses what BullMQ 6 adds to a paused queue, or has in one that it paused."""
    stage = Stage(node5, "q")
    await {"node5": node5, "node6": node6}[first].pause("q")
    in_paused, in_wait = [
        [await node.add("q", {"n": number}) for number in range(2)] for node in (node5, node6)
    ]
    assert await lists() == (in_wait[::-1], in_paused[::-1])
    with capture_logs() as logs:
        async with run_worker(stage.tasks):
            await until(lambda: [log for log in logs if log["event"] == "paused_lists_joined"])
            assert logs[-1]["jobs"] == 2
            assert await lists() == ([], [*in_wait[::-1], *in_paused[::-1]])
            await node5.resume("q")
            for job_id in (*in_paused, *in_wait):
                await stage.until_state("q", job_id, "completed")
