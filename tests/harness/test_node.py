"""The Node producers: jobs as the API makes them (contract, section 1)."""

import json

import pytest
from redis.asyncio import Redis

from tests.support.database import Database
from tests.support.node import Node, NodeError, Scheduled, produce
from tests.support.process import WorkerStarter
from tests.support.until import until

QUEUE = "users-send-welcome-email"


async def test_a_job_is_as_the_api_makes_it(node: Node, redis: Redis, prefix: str) -> None:
    task_id = await node.schedule(
        QUEUE, {"email": "a@b.c"}, correlation_id="c-1", priority="high", delay=60_000
    )
    raw = await redis.hgetall(f"{prefix}:{QUEUE}:{task_id}")
    assert len(task_id) == 21
    assert raw["name"] == QUEUE
    assert json.loads(raw["data"]) == {"email": "a@b.c", "correlationId": "c-1"}
    assert raw["priority"] == "2"
    assert raw["delay"] == "60000"
    opts = json.loads(raw["opts"])
    assert opts["attempts"] == 3
    assert opts["backoff"] == {"type": "exponential", "delay": 5000}
    assert opts["removeOnComplete"] == 100
    assert opts["removeOnFail"] == 500
    assert await node.get_state(QUEUE, task_id) == "delayed"


async def test_many_jobs(node5: Node, redis_url: str, prefix: str) -> None:
    ids = await produce(6, redis_url, prefix, QUEUE, [Scheduled({"n": n}) for n in range(2500)])
    assert len(set(ids)) == 2500
    assert (await node5.get_counts(QUEUE))["prioritized"] == 2500


async def test_other_producers_and_queries(node: Node) -> None:
    await node.listen("reports", "added", "waiting")
    job_id = await node.add("reports", {"a": [1, None]}, name="another-name", attempts=1)
    assert job_id == "1"
    job = await node.get_job("reports", job_id)
    assert job is not None
    assert (job["name"], job["data"], job["attemptsMade"]) == ("another-name", {"a": [1, None]}, 0)
    assert (await node.until_heard("added", job_id)).args["name"] == "another-name"
    await node.pause("reports")
    assert await node.queue("reports", "isPaused") is True
    await node.resume("reports")
    assert await node.get_workers("reports") == []
    await node.job("reports", job_id, "remove")
    assert await node.get_state("reports", job_id) == "unknown"
    await node.queue("reports", "upsertJobScheduler", "nightly", {"every": 60_000}, {"name": "n"})
    assert [s["key"] for s in await node.queue("reports", "getJobSchedulers")] == ["nightly"]
    await node.queue("reports", "obliterate")
    with pytest.raises(NodeError, match="no job nobody"):
        await node.job("reports", "nobody", "retry")


async def test_flows(node: Node) -> None:
    tree = await node.flow(
        {
            "name": "parent",
            "queueName": "parents",
            "children": [{"name": "child", "queueName": "children", "data": {"n": 1}}],
        }
    )
    assert tree["children"][0]["job"]["data"] == {"n": 1}
    assert await node.get_state("parents", tree["job"]["id"]) == "waiting-children"


async def test_a_queue_with_a_colon_in_its_name(node: Node, redis: Redis, prefix: str) -> None:
    task_id = await node.schedule("old:queue", {"n": 1})
    assert await redis.hget(f"{prefix}:old:queue:{task_id}", "name") == "old:queue"
    await node.listen("old:queue")
    await until(lambda: node.heard("added", task_id))


TASKS = """
    from autoflow_worker import define_task

    async def handler(payload, ctx):
        return {"sent": payload["email"]}

    tasks = [define_task("users-send-welcome-email", handler)]
"""


async def test_a_worker_process(
    worker_process: WorkerStarter, node5: Node, db: Database, prefix: str
) -> None:
    await node5.listen(QUEUE)
    worker = worker_process(TASKS)
    task_id = await db.insert_task(QUEUE, {"email": "a@b.c"})
    await node5.schedule(QUEUE, {"email": "a@b.c"}, task_id=task_id)
    task = await db.until_status(task_id, "completed")
    assert task.result is not None
    assert task.result.output == {"sent": "a@b.c"}
    await node5.until_heard("completed", task_id)
    assert worker.running
    worker.terminate()
    assert await worker.wait() == 0, worker.report()
    assert worker.logs


async def test_a_worker_process_that_can_not_start(worker_process: WorkerStarter) -> None:
    worker = worker_process("tasks = 1", LOG_LEVEL=None)
    assert await worker.wait() == 2
    assert "tasks" in worker.stderr
