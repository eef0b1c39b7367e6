"""Job schedulers and flows that Node makes go on as with a worker of Node's own.

Where it is cheap, the same flow is run by a Node worker beside this one, and Node has to see the
same of both.
"""

import asyncio
from collections import Counter
from functools import partial
from typing import Any

import pytest
from redis.asyncio import Redis

from autoflow_worker import (
    DelayedError,
    TaskContext,
    TaskDefinition,
    TaskOptions,
    WaitingChildrenError,
    WaitingError,
    define_task,
)
from autoflow_worker.recording.patches import own_row_id
from tests.support.api import STATUS_OF_STATE, Api, Json
from tests.support.database import Database
from tests.support.node import Node
from tests.support.running import RunWorker
from tests.support.until import until

QUEUE = "q"


class Iterations:
    """A scheduled task's handler.

    Attributes:
        ran: how often each job was run.
        payloads: what it was given, in order.
    """

    def __init__(self, *, fails: bool = False) -> None:
        self.fails = fails
        self.ran: Counter[str] = Counter()
        self.payloads: list[Json] = []

    async def __call__(self, payload: Json, ctx: TaskContext) -> None:
        self.ran[ctx.task_id] += 1
        self.payloads.append(payload)
        if self.fails:
            raise ValueError("no luck")

    def task(self) -> TaskDefinition[Any]:
        return define_task(QUEUE, self)


async def is_idle(node: Node) -> bool:
    counts = await node.get_counts(QUEUE)
    return not any(counts[state] for state in ("waiting", "active", "delayed", "prioritized"))


@pytest.mark.parametrize("repeat", [{"every": 150}, {"pattern": "* * * * * *"}])
async def test_a_scheduler_goes_on_until_it_is_removed(
    run_worker: RunWorker, node: Node, db: Database, repeat: Json
) -> None:
    handler = Iterations()
    template = {"name": QUEUE, "data": {"n": 1, "correlationId": "c"}, "opts": {"attempts": 2}}
    await node.queue(QUEUE, "upsertJobScheduler", "the-scheduler", repeat, template)
    async with run_worker([handler.task()]):
        await until(lambda: len(handler.ran) >= 3)
        assert await node.queue(QUEUE, "removeJobScheduler", "the-scheduler")
        await until(partial(is_idle, node))
    assert set(handler.ran.values()) == {1}
    assert handler.payloads == [{"n": 1}] * len(handler.ran)
    rows = await db.rows()
    assert rows.keys() == handler.ran.keys()
    assert {row["status"] for row in rows.values()} == {"completed"}
    assert {row["maxAttempts"] for row in rows.values()} == {2}
    # Each iteration has the time it was due in its id, and no two of them are due at once.
    due = sorted(int(job_id.rpartition(":")[2]) for job_id in handler.ran)
    every = repeat.get("every", 1000)
    assert all((later - due[0]) % every == 0 for later in due)
    assert await node.queue(QUEUE, "getJobSchedulersCount") == 0


async def test_a_scheduler_ends_at_its_limit(run_worker: RunWorker, node: Node) -> None:
    handler = Iterations()
    repeat = {"every": 50, "limit": 3}
    await node.queue(QUEUE, "upsertJobScheduler", "the-scheduler", repeat, {"name": QUEUE})
    async with run_worker([handler.task()]):
        await until(lambda: len(handler.ran) == 3)
        await until(partial(is_idle, node))
    assert list(handler.ran.values()) == [1, 1, 1]


@pytest.mark.parametrize(
    ("template", "runs"),
    [
        ({"data": {}, "opts": {"attempts": 2, "backoff": 10}}, 2),
        ({"data": 5}, 0),
        ({"data": {}, "opts": {"attempts": "2"}}, 0),
    ],
)
@pytest.mark.parametrize("repeat", [{"every": 150}, {"pattern": "* * * * * *", "limit": 2}])
async def test_a_scheduler_goes_on_though_its_jobs_fail(
    run_worker: RunWorker, api: Api, repeat: Json, template: Json, runs: int
) -> None:
    handler = Iterations(fails=True)
    template = {"name": QUEUE, **template}
    await api.node.queue(QUEUE, "upsertJobScheduler", "the-scheduler", repeat, template)
    async with run_worker([handler.task()]):

        async def some_failed() -> bool:
            return (await api.db.statuses())["failed"] >= 2

        await until(some_failed)
        await api.node.queue(QUEUE, "removeJobScheduler", "the-scheduler")
        await until(partial(is_idle, api.node))
    # A job that runs again has no second successor.
    due = [int(job_id.rpartition(":")[2]) for job_id in await api.db.rows()]
    assert len(due) == len(set(due))
    assert set(handler.ran.values()) == ({runs} if runs else set())


async def test_a_scheduler_goes_on_though_one_of_its_jobs_is_broken(
    run_worker: RunWorker, api: Api, redis: Redis, prefix: str
) -> None:
    handler = Iterations()
    template = {"name": QUEUE, "data": {"n": 1}}
    repeat = {"every": 300}
    await api.node.queue(QUEUE, "upsertJobScheduler", "the-scheduler", repeat, template)
    base = f"{prefix}:{QUEUE}:"
    [key] = await redis.keys(f"{base}repeat:the-scheduler:*")
    await redis.hset(key, "data", "{")
    async with run_worker([handler.task()]):
        await api.db.until_status(str(key).removeprefix(base), "failed")
        await until(lambda: len(handler.ran) >= 2)
    assert handler.payloads[:2] == [{"n": 1}] * 2


# -- flows ---------------------------------------------------------------------------------------

OPTIONS = [
    "",
    "failParentOnFailure",
    "ignoreDependencyOnFailure",
    "removeDependencyOnFailure",
    "continueParentOnFailure",
]
ENDS = {
    "": "waiting-children",
    "failParentOnFailure": "failed",
    "ignoreDependencyOnFailure": "completed",
    "removeDependencyOnFailure": "completed",
    "continueParentOnFailure": "completed",
}


async def scripted(payload: Json, ctx: TaskContext) -> object:
    """What node.mjs does in a worker of its own."""
    [step] = payload["script"]
    if "throw" in step:
        raise ValueError(step["throw"])
    return step.get("return")


def flow(side: str, option: str) -> Json:
    """A parent with three children, of which the last one fails."""
    steps: list[Json] = [{"return": 1}, {"return": {"two": 2}}, {"throw": "no luck"}]
    children = [
        {
            "name": "child",
            "queueName": f"{side}-children",
            "data": {"script": [step]},
            "opts": {"jobId": f"child-{number}-{option}"} | ({option: True} if option else {}),
        }
        for number, step in enumerate(steps)
    ]
    return {
        "name": "parent",
        "queueName": f"{side}-parents",
        "data": {"script": [{"return": "all"}]},
        "opts": {"jobId": f"parent-{option}"},
        "children": children,
    }


async def family(node: Node, side: str, option: str) -> Json:
    """What Node sees of a flow."""
    parents, children = f"{side}-parents", f"{side}-children"
    parent = await node.get_job(parents, f"parent-{option}")
    assert parent is not None
    ask = partial(node.job, parents, f"parent-{option}")
    seen = {
        "parent": await node.get_state(parents, f"parent-{option}"),
        "children": [await node.get_state(children, f"child-{n}-{option}") for n in range(3)],
        "reason": parent.get("failedReason"),
        "made": [parent["attemptsMade"], parent.get("attemptsStarted")],
        "values": await ask("getChildrenValues"),
        "ignored": await ask("getIgnoredChildrenFailures"),
        "left": await ask("getDependenciesCount"),
        "dependencies": await ask("getDependencies"),
    }
    found: Json = without_sides(seen)
    return found


def without_sides(value: Any) -> Any:
    """The same for both sides: without the queues' names and how long it took."""
    if isinstance(value, dict):
        kept = {key: item for key, item in value.items() if key != "duration"}
        return {without_sides(key): without_sides(item) for key, item in kept.items()}
    if isinstance(value, list):
        return [without_sides(item) for item in value]
    if isinstance(value, str):
        return value.replace("ours-", "").replace("nodes-", "")
    return value


async def test_flows_end_as_with_a_worker_of_nodes_own(
    run_worker: RunWorker, node: Node, db: Database
) -> None:
    for side in ("ours", "nodes"):
        for option in OPTIONS:
            await node.flow(flow(side, option))
    for queue in ("nodes-children", "nodes-parents"):
        await node.work(queue)
    tasks = [define_task(f"ours-{name}", scripted) for name in ("children", "parents")]
    async with run_worker(tasks):
        for option in OPTIONS:

            async def both_ended(option: str = option) -> bool:
                ends = [
                    [
                        await node.get_state(f"{side}-children", f"child-2-{option}"),
                        await node.get_state(f"{side}-parents", f"parent-{option}"),
                    ]
                    for side in ("ours", "nodes")
                ]
                return ends == [["failed", ENDS[option]]] * 2

            await until(both_ended, message=option)
            assert await family(node, "ours", option) == await family(node, "nodes", option)
            statuses = [await db.status(f"child-{n}-{option}") for n in range(3)]
            assert statuses == ["completed", "completed", "failed"]
            # A parent that was never picked up has no row of its own yet.
            end = STATUS_OF_STATE[ENDS[option]]
            assert await db.status(f"parent-{option}") == (end if option else None)


async def test_a_parent_sees_its_childrens_values(
    run_worker: RunWorker, node: Node, db: Database
) -> None:
    async def parent(payload: Json, ctx: TaskContext) -> object:
        values = await ctx.job.getChildrenValues()
        return {key.rpartition(":")[2]: value["output"] for key, value in values.items()}

    tree = flow("ours", "ignoreDependencyOnFailure")
    tree["opts"]["jobId"] = task_id = "the-parent"
    await db.insert_task("ours-parents", task_id=task_id)
    await node.flow(tree)
    tasks = [define_task("ours-children", scripted), define_task("ours-parents", parent)]
    async with run_worker(tasks):
        row = await Api(db, node).until_both_say("ours-parents", task_id, "completed")
    assert row["result"]["output"] == {
        "child-0-ignoreDependencyOnFailure": 1,
        "child-1-ignoreDependencyOnFailure": {"two": 2},
    }
    assert row["attempts"] == 1


async def test_a_failure_goes_up_through_the_generations(run_worker: RunWorker, api: Api) -> None:
    ran: list[str] = []

    async def handler(payload: Json, ctx: TaskContext) -> None:
        ran.append(ctx.task_id)
        raise ValueError("no luck")

    tree: Json = {}
    for name in ("grandchild", "child", "parent"):
        tree = {
            "name": QUEUE,
            "queueName": QUEUE,
            "opts": {"jobId": name, "failParentOnFailure": name != "parent"},
            "children": [tree] if tree else [],
        }
    await api.node.flow(tree)
    async with run_worker([define_task(QUEUE, handler)]):
        for name in ("grandchild", "child", "parent"):
            await api.until_both_say(QUEUE, name, "failed")
    assert ran == ["grandchild"]


# -- jobs that move themselves -------------------------------------------------------------------


async def test_a_job_that_delays_itself_and_then_waits_for_children_of_its_own(
    run_worker: RunWorker, api: Api, prefix: str
) -> None:
    steps: list[str] = []

    async def parent(payload: Json, ctx: TaskContext) -> object:
        if not steps:
            steps.append("delayed")
            await ctx.job.moveToDelayed(0, ctx.job.token)
            raise DelayedError
        if len(steps) == 1:
            steps.append("waiting")
            family = {"id": ctx.task_id, "queue": f"{prefix}:{QUEUE}"}
            for n in range(3):
                script = [{"throw": "no"} if n == 2 else {"return": n}]
                options: Any = {"parent": family, "ignoreDependencyOnFailure": True}
                await api.node.add("children", {"script": script}, **options)
            assert await ctx.job.moveToWaitingChildren(ctx.job.token, {})
            raise WaitingChildrenError
        steps.append("done")
        assert not await ctx.job.moveToWaitingChildren(ctx.job.token, {})
        return sorted(value["output"] for value in (await ctx.job.getChildrenValues()).values())

    task_id = await api.schedule(QUEUE, attempts=1)
    async with run_worker([define_task(QUEUE, parent), define_task("children", scripted)]):
        row = await api.until_both_say(QUEUE, task_id, "completed")
    assert steps == ["delayed", "waiting", "done"]
    assert (row["result"]["output"], row["attempts"]) == ([0, 1], 1)


@pytest.mark.parametrize("error", [DelayedError, WaitingError, WaitingChildrenError])
async def test_a_job_that_says_it_moved_and_did_not(
    run_worker: RunWorker, api: Api, error: type[Exception]
) -> None:
    async def handler(payload: Json, ctx: TaskContext) -> None:
        raise error

    task_id = await api.schedule(QUEUE, attempts=1)
    async with run_worker([define_task(QUEUE, handler)]):
        row = await api.until_both_say(QUEUE, task_id, "failed")
    assert row["error"]["reason"] == f"the handler raised {error.__name__} without moving"


async def test_a_job_that_moved_and_says_nothing_of_it(run_worker: RunWorker, api: Api) -> None:
    """Where BullMQ has the job is what counts; it runs again."""
    attempts: list[int] = []
    again = asyncio.Event()

    async def handler(payload: Json, ctx: TaskContext) -> str:
        attempts.append(ctx.attempt)
        if len(attempts) == 1:
            await ctx.job.moveToDelayed(0, ctx.job.token)
        else:
            again.set()
        return f"run {len(attempts)}"

    task_id = await api.schedule(QUEUE, attempts=1)
    async with run_worker([define_task(QUEUE, handler, TaskOptions(concurrency=1))]):
        await again.wait()
        row = await api.until_both_say(QUEUE, task_id, "completed")
    assert row["result"]["output"] == "run 2"


async def test_a_parent_that_returns_before_its_children(
    run_worker: RunWorker, api: Api, prefix: str
) -> None:
    """BullMQ refuses to complete it, so it has failed, in both stores."""

    async def parent(payload: Json, ctx: TaskContext) -> str:
        family = {"id": ctx.task_id, "queue": f"{prefix}:{QUEUE}"}
        await api.node.add("children", {"script": [{}]}, parent=family)
        return "too early"

    task_id = await api.schedule(QUEUE, attempts=1)
    async with run_worker([define_task(QUEUE, parent)]):
        row = await api.until_both_say(QUEUE, task_id, "failed")
        job = await api.node.get_job(QUEUE, task_id)
    reason = f"Job {task_id} has pending dependencies. moveToFinished"
    assert row["error"]["reason"] == reason
    assert (row["result"], row["completedAt"]) == (None, None)
    assert job is not None
    assert job["failedReason"] == reason


async def test_a_parent_that_returns_after_a_child_has_failed(
    run_worker: RunWorker, api: Api, prefix: str
) -> None:
    """It can never complete, so it is not retried."""

    async def parent(payload: Json, ctx: TaskContext) -> str:
        family = {"id": ctx.task_id, "queue": f"{prefix}:{QUEUE}"}
        options: Any = {"parent": family, "failParentOnFailure": True}
        child = await api.node.add("children", {"script": [{"throw": "no luck"}]}, **options)
        await api.until_both_say("children", child, "failed", row_id=own_row_id("children", child))
        return "too late"

    task_id = await api.schedule(QUEUE, attempts=3)
    async with run_worker([define_task(QUEUE, parent), define_task("children", scripted)]):
        row = await api.until_both_say(QUEUE, task_id, "failed")
    assert row["error"]["reason"] == (
        f"Cannot complete job {task_id} because it has at least one failed child. moveToFinished"
    )
    assert row["attempts"] == 1
