"""Node on the other side: BullMQ 5.65 as it is today, and 6.7 as it will be.

Where it can be said, the same job is run by a worker of Node's own, and Node has to see the same.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from redis.asyncio import Redis

from autoflow_worker import (
    DelayedError,
    RateLimitError,
    TaskContext,
    TaskDefinition,
    TaskOptions,
    UnrecoverableError,
    WaitingError,
    define_task,
)
from autoflow_worker.clock import now_ms
from autoflow_worker.recording.patches import own_row_id
from tests.support.api import Api, Json
from tests.support.database import Database
from tests.support.node import Node, NodeError, Scheduled
from tests.support.running import RunWorker
from tests.support.until import until

OURS = "ours"
NODES = "nodes"
EVENTS = (
    "added",
    "waiting",
    "active",
    "progress",
    "delayed",
    "completed",
    "failed",
    "retries-exhausted",
)


async def act(payload: Json, ctx: TaskContext) -> object:
    """What node.mjs does in a worker of its own."""
    script = payload["script"]
    step = script[ctx.job.attemptsStarted - 1] if ctx.job.attemptsStarted <= len(script) else {}
    if "progress" in step:
        await ctx.job.updateProgress(step["progress"])
    if "log" in step:
        await ctx.job.log(step["log"])
    if "delay" in step:
        await ctx.job.moveToDelayed(now_ms() + step["delay"], ctx.job.token)
        raise DelayedError
    if "wait" in step:
        await ctx.job.moveToWait(ctx.job.token)
        raise WaitingError
    if "limit" in step:
        await ctx.job.rateLimit(step["limit"])
        raise RateLimitError
    if "throw" in step:
        raise ValueError(step["throw"])
    if "unrecoverable" in step:
        raise UnrecoverableError(step["unrecoverable"])
    return step.get("return")


def task(queue: str, *, worker_options: Any = None, **options: Any) -> TaskDefinition[Any]:
    return define_task(queue, act, TaskOptions(**options), worker_options=worker_options)


def comparable(value: Any) -> Any:
    """What has to be equal: without times, and without what a stack trace says."""
    if isinstance(value, Mapping):
        without = {"timestamp", "delay", "duration"}
        found = {key: comparable(item) for key, item in value.items() if key not in without}
        for key in found.keys() & {"processedOn", "finishedOn"}:
            found[key] = found[key] is not None
        if "stacktrace" in found:
            found["stacktrace"] = [
                found["failedReason"] in trace for trace in value["stacktrace"] or []
            ]
        for key in found.keys() & {"name", "queueQualifiedName"}:
            found[key] = str(found[key]).replace(NODES, OURS)
        return found
    if isinstance(value, list):
        return [comparable(item) for item in value]
    return value


def story(node: Node, queue: str, job_id: str) -> list[tuple[str, Json]]:
    """The events of a job in their order."""
    return [
        (event.name, comparable(event.args))
        for event in node.events
        if event.queue == queue and event.args.get("jobId") == job_id
    ]


@dataclass(frozen=True)
class Case:
    """A job, and how often it is expected to run."""

    name: str
    script: list[Json]
    options: Mapping[str, Any]
    end: str


CASES = [
    Case("returns", [{"return": {"sent": ["a", None, 1.5, "ü\U0001f600"]}}], {}, "completed"),
    Case("returns nothing", [{}], {}, "completed"),
    Case("delayed at first", [{"return": 1}], {"delay": 20}, "completed"),
    Case(
        "fails twice",
        [{"throw": "one"}, {"throw": "two"}, {"return": 3}],
        {"attempts": 3, "backoff": 10},
        "completed",
    ),
    Case(
        "runs again at once",
        [{"throw": "one"}, {"return": 2}],
        {"attempts": 2, "backoff": 0},
        "completed",
    ),
    Case(
        "fails for good",
        [{"throw": "one"}, {"throw": "two"}],
        {"attempts": 2, "backoff": 10},
        "failed",
    ),
    Case("can not recover", [{"unrecoverable": "never"}], {"attempts": 3}, "failed"),
    Case("tells", [{"progress": {"at": 50}, "log": "half", "return": 1}], {}, "completed"),
    Case("goes back", [{"wait": True}, {"return": "again"}], {"attempts": 1}, "completed"),
    Case("rests", [{"limit": 20}, {"return": "rested"}], {"attempts": 1}, "completed"),
    Case("delays itself", [{"delay": 20}, {"return": "late"}], {"attempts": 1}, "completed"),
]


async def test_node_sees_what_it_sees_of_a_worker_of_its_own(
    node: Node, run_worker: RunWorker, db: Database
) -> None:
    jobs = [
        Scheduled({"script": case.script}, task_id=f"job-{n}", **case.options)
        for n, case in enumerate(CASES)
    ]
    for queue in (OURS, NODES):
        await node.listen(queue, *EVENTS)
        await node.schedule_all(queue, jobs)
    await node.work(NODES)

    def ended() -> bool:
        ends = [
            (event.queue, event.args["jobId"])
            for event in node.events
            if event.name in ("completed", "failed")
        ]
        return len(set(ends)) == 2 * len(CASES)

    async with run_worker([task(OURS)]):
        await until(ended)
        for job, case in zip(jobs, CASES, strict=True):
            seen = {queue: story(node, queue, job.task_id) for queue in (OURS, NODES)}
            assert seen[OURS] == seen[NODES], case.name
            kept = {queue: await node.get_job(queue, job.task_id) for queue in (OURS, NODES)}
            assert comparable(kept[OURS]) == comparable(kept[NODES]), case.name
            assert await node.get_state(OURS, job.task_id) == case.end
            assert await db.status(job.task_id) == case.end
            logs = [await node.queue(queue, "getJobLogs", job.task_id) for queue in (OURS, NODES)]
            assert logs[0] == logs[1]
        assert await node.get_counts(OURS) == await node.get_counts(NODES)


async def test_the_return_value_that_the_api_gets(node: Node, run_worker: RunWorker) -> None:
    await node.listen(OURS, "completed")
    task_id = await node.schedule(OURS, {"script": [{"return": {"sent": True}}]})
    async with run_worker([task(OURS)]):
        heard = await node.until_heard("completed", task_id)
    returned = heard.args["returnvalue"]
    assert returned.keys() == {"success", "output", "duration"}
    assert (returned["success"], returned["output"]) == (True, {"sent": True})
    assert type(returned["duration"]) is int


async def test_the_failure_that_the_api_gets(node: Node, run_worker: RunWorker) -> None:
    await node.listen(OURS, "failed")
    script = [{"throw": "one"}, {"throw": "two"}]
    task_id = await node.schedule(OURS, {"script": script}, attempts=2, backoff=10)
    async with run_worker([task(OURS)]):
        heard = await node.until_heard("failed", task_id)
    assert heard.args["failedReason"] == "two"
    job = await node.get_job(OURS, task_id)
    assert job is not None
    assert (job["failedReason"], job["attemptsMade"]) == ("two", 2)
    first, second = job["stacktrace"]
    assert "ValueError: one" in first
    assert "ValueError: two" in second
    assert "Traceback" in second


async def test_finished_jobs_are_kept_as_the_job_says(node: Node, run_worker: RunWorker) -> None:
    keep = {"removeOnComplete": 2, "removeOnFail": True}
    scripts = [[{"return": n}] for n in range(5)] + [[{"unrecoverable": "no"}]]
    jobs = [
        Scheduled({"script": script}, task_id=f"job-{n}", opts=keep)
        for n, script in enumerate(scripts)
    ]
    await node.listen(OURS, "completed", "failed")
    await node.schedule_all(OURS, jobs)
    async with run_worker([task(OURS)]):
        await until(lambda: len(node.heard("completed")) == 5 and node.heard("failed"))
    counts = await node.get_counts(OURS)
    assert (counts["completed"], counts["failed"], counts["active"]) == (2, 0, 0)


async def test_priorities_decide_the_order(node: Node, run_worker: RunWorker) -> None:
    await node.listen(OURS, "completed")
    words: list[Any] = ["low", "normal", "critical", "high", "critical"]
    jobs = [
        Scheduled({"script": []}, task_id=f"{n}-{word}", priority=word)
        for n, word in enumerate(words)
    ]
    await node.schedule_all(OURS, jobs)
    async with run_worker([task(OURS, concurrency=1)]):
        await until(lambda: len(node.heard("completed")) == len(jobs))
    order = [event.args["jobId"] for event in node.heard("completed")]
    assert order == ["2-critical", "4-critical", "3-high", "1-normal", "0-low"]


async def test_a_queue_with_a_colon_in_its_name(
    node: Node, run_worker: RunWorker, db: Database
) -> None:
    queue = "old:users:import"
    await node.listen(queue, "completed")
    task_id = await Api(db, node).schedule(queue, {"script": [{"return": 1}]})
    job_id = await node.add(queue, {"script": [{"return": 2}]})
    async with run_worker([task(queue)]):
        await until(lambda: len(node.heard("completed")) == 2)
    assert (await db.task(task_id)).queueName == queue
    row = await db.task(f"old=3Ausers=3Aimport~{job_id}")
    assert row.result is not None
    assert (row.taskName, row.status, row.result.output) == (queue, "completed", 2)


async def test_ids_that_bullmq_numbers(node: Node, run_worker: RunWorker, db: Database) -> None:
    await node.listen(OURS, "completed", "failed")
    data = [{"script": [{"return": n}]} for n in range(2)] + [{"script": [{"throw": "no"}]}]
    ids = [await node.add(OURS, item) for item in data]
    assert ids == ["1", "2", "3"]
    async with run_worker([task(OURS)]):
        await until(lambda: len(node.heard("completed")) == 2 and node.heard("failed", "3"))
    rows = await db.rows()
    assert {key: row["status"] for key, row in rows.items()} == {
        f"{OURS}~1": "completed",
        f"{OURS}~2": "completed",
        f"{OURS}~3": "failed",
    }


async def test_the_api_retries_a_numbered_job_that_is_gone(
    node: Node, run_worker: RunWorker, db: Database
) -> None:
    api = Api(db, node)
    job_id = await node.add(OURS, {"script": [{"throw": "no"}]}, removeOnFail=True)
    row_id = own_row_id(OURS, job_id)
    async with run_worker([task(OURS)]):
        await db.until_status(row_id, "failed")
        await until(lambda: gone(node, OURS, job_id))
        await api.retry(OURS, row_id)
        await api.until_both_say(OURS, row_id, "failed")
    assert (await db.rows()).keys() == {row_id}, "the retry goes on with the same row"


async def gone(node: Node, queue: str, job_id: str) -> bool:
    return await node.get_job(queue, job_id) is None


@pytest.mark.parametrize("queue", [OURS, "old:users:import"])
async def test_node_takes_the_id_of_an_own_row(node: Node, queue: str) -> None:
    row_id = own_row_id(queue, "17")
    assert await node.add(queue, {}, jobId=row_id) == row_id
    with pytest.raises(NodeError, match="Custom Id cannot contain :"):
        await node.add(queue, {}, jobId=f"{OURS}:17")


async def test_node_sees_the_worker(node: Node, run_worker: RunWorker) -> None:
    async with run_worker([task(OURS, worker_options={"name": "mail-1"}), task("other")]):
        [ours] = await node.get_workers(OURS)
        assert ours["rawname"].endswith(":w:mail-1")
        assert len(await node.get_workers("other")) == 1
        assert await node.get_workers("third") == []


async def test_a_job_that_node_promotes_and_one_that_it_removes(
    node: Node, run_worker: RunWorker, db: Database
) -> None:
    api = Api(db, node)
    ids = [await api.schedule(OURS, {"script": []}, delay=3_600_000) for _ in range(2)]
    async with run_worker([task(OURS)]):
        await node.job(OURS, ids[0], "remove")
        await node.job(OURS, ids[1], "promote")
        await api.until_both_say(OURS, ids[1], "completed")
    assert await db.status(ids[0]) == "delayed"


async def test_node_retries_a_failed_job(node: Node, run_worker: RunWorker, db: Database) -> None:
    api = Api(db, node)
    script = [{"unrecoverable": "not yet"}, {"return": "now"}]
    task_id = await api.schedule(OURS, {"script": script})
    async with run_worker([task(OURS)]):
        await api.until_both_say(OURS, task_id, "failed")
        await node.job(OURS, task_id, "retry")
        row = await api.until_both_say(OURS, task_id, "completed")
    assert row["result"]["output"] == "now"
    assert (row["error"], row["failedAt"]) == (None, None)


# -- paused queues -------------------------------------------------------------------------------


async def waiting(redis: Redis, prefix: str, queue: str) -> dict[str, set[Any]]:
    """The ids in each of the places where a job can wait."""
    base = f"{prefix}:{queue}:"
    return {
        "wait": set(await redis.lrange(base + "wait", 0, -1)),
        "paused": set(await redis.lrange(base + "paused", 0, -1)),
        "prioritized": set(await redis.zrange(base + "prioritized", 0, -1)),
    }


async def test_a_paused_queue_waits_until_it_is_resumed(
    node: Node, run_worker: RunWorker, db: Database
) -> None:
    """The API's jobs have a priority, and so any version may pause and resume their queue."""
    api = Api(db, node)
    script = [{"throw": "one"}, {"return": 2}]
    async with run_worker([task(OURS)]):
        delayed = await api.schedule(OURS, {"script": script}, attempts=2, backoff=200)
        await api.until_both_say(OURS, delayed, "delayed")
        await node.pause(OURS)
        added = await api.schedule(OURS, {"script": []})
        # Its backoff ends while the queue is paused.
        due = datetime.fromisoformat(str((await db.task(delayed)).delayUntil))
        await until(lambda: datetime.now(UTC) > due + timedelta(milliseconds=100))
        assert await db.statuses() == {"delayed": 1, "pending": 1}
        await node.resume(OURS)
        for task_id in (added, delayed):
            await api.until_both_say(OURS, task_id, "completed")


@pytest.mark.parametrize("pausing", [5, 6])
async def test_jobs_without_priority_survive_a_pause_that_6_ends(
    node5: Node, node6: Node, run_worker: RunWorker, db: Database, pausing: int
) -> None:
    ids = [await node5.add(OURS, {"script": []}, jobId=f"before-{n}") for n in range(3)]
    await (node5 if pausing == 5 else node6).pause(OURS)
    ids += [await node5.add(OURS, {"script": []}, jobId="during")]
    async with run_worker([task(OURS)]):
        await node6.resume(OURS)
        for task_id in ids:
            await db.until_status(task_id, "completed")


async def test_a_resume_of_5_loses_jobs_without_priority(
    node5: Node, node6: Node, redis: Redis, prefix: str
) -> None:
    """Why the documentation says that only 6.x or Python may pause and resume such a queue.

    6.x and Python leave waiting jobs in `wait`; 5.65 moves them to `paused` and back, over
    whatever has come into `wait` meanwhile.
    """
    await node5.add(OURS, {"script": []}, jobId="before")
    await node5.pause(OURS)
    await node6.add(OURS, {"script": []}, jobId="during")
    assert await waiting(redis, prefix, OURS) == {
        "wait": {"during"},
        "paused": {"before"},
        "prioritized": set(),
    }
    await node5.resume(OURS)
    assert (await waiting(redis, prefix, OURS))["wait"] == {"before"}
    assert await node5.get_state(OURS, "during") == "unknown"
