"""The successors of scheduled jobs are those that BullMQ's own worker makes in Node."""

import asyncio
import json
from functools import partial
from typing import Any

import pytest
from redis.asyncio import Redis

from autoflow_worker import TaskContext, TaskDefinition, define_task
from tests.support.api import Json
from tests.support.database import Database
from tests.support.node import Node
from tests.support.running import RunWorker
from tests.support.until import until

QUEUE, NODES = "q", "node"
YEARLY = "0 0 1 1 *"
FAULTY = "61 * * * *"
# Node's worker runs the script; a script without steps returns.
DATA = {"script": [], "n": "ä"}


class Runs:
    """A handler that notes its payloads, by job id."""

    def __init__(self) -> None:
        self.payloads: dict[str, Json] = {}

    async def __call__(self, payload: Json, ctx: TaskContext) -> None:
        self.payloads[ctx.task_id] = payload

    def task(self, **worker_options: Any) -> TaskDefinition[Any]:
        options: Any = worker_options
        return define_task(QUEUE, self, worker_options=options)


class Keys:
    """What BullMQ keeps of a queue's only schedule."""

    def __init__(self, redis: Redis, prefix: str) -> None:
        self.redis = redis
        self.prefix = prefix

    async def latest(self, queue: str) -> str:
        """Return the id of the job that is due next."""
        [job_id] = await self.redis.zrange(f"{self.prefix}:{queue}:delayed", 0, -1)
        return str(job_id)

    async def change(self, queue: str, pattern: str) -> str:
        """Write another pattern into the schedule and its latest job; return the job's id."""
        job_id = await self.latest(queue)
        base = f"{self.prefix}:{queue}:"
        options = json.loads(str(await self.redis.hget(base + job_id, "opts")))
        options["repeat"]["pattern"] = pattern
        await self.redis.hset(base + job_id, "opts", json.dumps(options))
        await self.redis.hset(base + job_id.rpartition(":")[0], "pattern", pattern)
        return job_id

    async def snapshot(self, queue: str) -> Json:
        """Return the schedule and its latest job, without times."""
        base = f"{self.prefix}:{queue}:"
        job_id = await self.latest(queue)
        job = await self.redis.hgetall(base + job_id)
        job["opts"] = json.loads(job["opts"])
        [key] = map(str, await self.redis.zrange(f"{base}repeat", 0, -1))
        found = {"schedule": await self.redis.hgetall(f"{base}repeat:{key}"), "job": job}
        return {name: _without_times(value) for name, value in found.items()}


def _without_times(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    times = ("delay", "timestamp", "prevMillis", "jobId", "offset")
    return {key: "..." if key in times else _without_times(each) for key, each in value.items()}


@pytest.fixture
def keys(redis: Redis, prefix: str) -> Keys:
    return Keys(redis, prefix)


async def run_both(
    run_worker: RunWorker, node: Node, keys: Keys, handler: Runs, **options: Any
) -> None:
    """Let the latest job of both queues run: here, and in Node."""
    for queue in (QUEUE, NODES):
        if (await node.get_counts(queue))["delayed"]:
            await node.job(queue, await keys.latest(queue), "promote")
    await node.work(NODES)

    async def both_ran() -> bool:
        counts = [await node.get_counts(queue) for queue in (QUEUE, NODES)]
        return [(each["completed"], each["delayed"]) for each in counts] == [(1, 1), (1, 1)]

    async with run_worker([handler.task(**options)]):
        await until(both_ran)


END = 4_000_000_000_000


@pytest.mark.parametrize(
    "repeat",
    [
        {"every": 86_400_000},
        {"every": 86_400_000, "offset": 500, "limit": 5},
        {"every": 86_400_000, "startDate": END - 1000, "endDate": END},
        {"pattern": YEARLY},
        {"pattern": YEARLY, "tz": "America/New_York", "limit": 5, "endDate": END},
        {"pattern": YEARLY, "startDate": "2020-01-01T00:00:00.000Z"},
        {"pattern": "0 0 * * 1L,5L", "tz": "Europe/Berlin", "immediately": True},
    ],
)
async def test_the_next_job_of_a_scheduler_is_as_node_writes_it(
    run_worker: RunWorker, node6: Node, keys: Keys, repeat: Json
) -> None:
    options = {"attempts": 2, "backoff": 10, "priority": 3, "telemetry": {"metadata": "{}"}}
    template = {"name": "a-name", "data": DATA, "opts": {**options, "removeOnFail": {"age": 5}}}
    for queue in (QUEUE, NODES):
        if "immediately" in repeat:
            await node6.pause(queue)
        await node6.queue(queue, "upsertJobScheduler", "an:id", repeat, template)
        if "immediately" in repeat:
            # Its first job waits, so it is made a delayed one.
            await node6.queue(queue, "upsertJobScheduler", "an:id", {"pattern": YEARLY}, template)
            await node6.resume(queue)
    await run_both(run_worker, node6, keys, handler := Runs())
    assert list(handler.payloads.values()) == [DATA]
    assert await keys.snapshot(QUEUE) == await keys.snapshot(NODES)


@pytest.mark.parametrize("key", [None, f"{QUEUE}::::{YEARLY}", "a:b:c"])
@pytest.mark.parametrize("repeat", [{"every": 86_400_000}, {"pattern": YEARLY, "limit": 3}])
async def test_the_next_job_of_a_legacy_repeatable_is_as_node_writes_it(
    run_worker: RunWorker, node5: Node, keys: Keys, repeat: Json, key: str | None
) -> None:
    for queue in (QUEUE, NODES):
        named = {} if key is None else {"key": key}
        await node5.add(queue, DATA, attempts=3, repeat={**repeat, **named}, name="a-name")
    if key == "a:b:c":
        # 5.65 itself ends these in silence, so there is nothing to compare.
        await node5.job(QUEUE, await keys.latest(QUEUE), "promote")
        async with run_worker([Runs().task()]):
            await until(partial(_completed, node5, QUEUE))
        assert json.loads((await keys.snapshot(QUEUE))["job"]["data"]) == DATA
        return
    await run_both(run_worker, node5, keys, Runs())
    ours, theirs = await keys.snapshot(QUEUE), await keys.snapshot(NODES)
    assert json.loads(ours["job"].pop("data")) == json.loads(theirs["job"].pop("data")) == DATA
    assert ours == theirs


async def _completed(node: Node, queue: str) -> bool:
    return (await node.get_counts(queue))["completed"] > 0


@pytest.mark.parametrize("key", [None, f"{QUEUE}::::* * * * * *"])
@pytest.mark.parametrize(
    "repeat", [{"every": 300, "limit": 3}, {"pattern": "* * * * * *", "limit": 3}]
)
async def test_a_legacy_repeatable_goes_on_with_its_data(
    run_worker: RunWorker, node5: Node, keys: Keys, repeat: Json, key: str | None
) -> None:
    if key is None:
        await node5.add(QUEUE, DATA, repeat=repeat)
    else:
        await node5.add(QUEUE, DATA, repeat={**repeat, "key": key})
        # The keys of older versions are of this shape, without an option that says so.
        job_key = f"{keys.prefix}:{QUEUE}:{await keys.latest(QUEUE)}"
        options = json.loads(str(await keys.redis.hget(job_key, "opts")))
        del options["repeat"]["key"]
        await keys.redis.hset(job_key, "opts", json.dumps(options))
    handler = Runs()
    async with run_worker([handler.task()]):
        await until(lambda: len(handler.payloads) >= 3)
    assert list(handler.payloads.values())[:3] == [DATA] * 3


@pytest.mark.parametrize(
    "repeat",
    [
        {"pattern": "30 2 * * *", "tz": "Europe/Berlin"},
        {"pattern": "0 9 * * FRIL", "tz": "America/New_York"},
        {"pattern": "0 9 * * 1L,5L"},
    ],
)
async def test_a_pattern_has_the_next_time_that_node_gives_it(
    *,
    run_worker: RunWorker,
    node5: Node,
    node6: Node,
    keys: Keys,
    repeat: Json,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    await node5.queue(QUEUE, "upsertJobScheduler", "an-id", repeat, {"name": QUEUE, "data": DATA})
    first = await keys.latest(QUEUE)
    await node5.job(QUEUE, first, "promote")
    async with run_worker([Runs().task()]):
        await until(partial(_completed, node5, QUEUE))
    due = [int(job_id.rpartition(":")[2]) for job_id in (first, await keys.latest(QUEUE))]
    [answer] = await node6.next_millis([{"millis": due[0], "options": repeat}], tz="Asia/Tokyo")
    assert answer == {"at": due[1]}


@pytest.mark.parametrize("way_out", ["upsert", "remove", "remove while it runs"])
async def test_a_scheduler_that_cannot_be_advanced_keeps_its_job(
    *,
    run_worker: RunWorker,
    node6: Node,
    keys: Keys,
    db: Database,
    capsys: pytest.CaptureFixture[str],
    way_out: str,
) -> None:
    template = {"name": QUEUE, "data": DATA, "opts": {"attempts": 1}}
    await node6.queue(QUEUE, "upsertJobScheduler", "an-id", {"pattern": YEARLY}, template)
    kept = await keys.change(QUEUE, FAULTY)
    await node6.job(QUEUE, kept, "promote")
    handler = Runs()
    async with run_worker([handler.task(lockDuration=400)]):
        job_key = f"{keys.prefix}:{QUEUE}:{kept}"

        async def tried_twice() -> bool:
            return int(await keys.redis.hget(job_key, "ats") or 0) >= 2

        await until(tried_twice)
        await node6.add(QUEUE, {})
        await until(partial(_completed, node6, QUEUE))
        assert kept not in handler.payloads
        assert await keys.redis.hget(job_key, "atm") in (None, "0")
        assert await db.status(kept) == "delayed"
        if way_out == "upsert":
            soon = {"pattern": "* * * * * *"}
            await node6.queue(QUEUE, "upsertJobScheduler", "an-id", soon, template)
            await until(lambda: len(handler.payloads) >= 3)
        elif way_out == "remove":
            assert await node6.queue(QUEUE, "removeJobScheduler", "an-id")
            await until(partial(_is_gone, node6, kept))
        else:
            await keys.redis.zrem(f"{keys.prefix}:{QUEUE}:repeat", "an-id")
            await db.until_status(kept, "completed")
    assert (kept in handler.payloads) is (way_out == "remove while it runs")
    assert "job_scheduler_not_advanced" in capsys.readouterr().out


async def _is_gone(node: Node, job_id: str) -> bool:
    return await node.get_job(QUEUE, job_id) is None


async def test_a_strategy_of_the_task_s_own(run_worker: RunWorker, node6: Node, keys: Keys) -> None:
    asked: list[tuple[Any, ...]] = []

    async def strategy(millis: int, options: Json, name: str) -> int:
        asked.append((options["pattern"], name))
        await asyncio.sleep(0)
        if len(asked) == 1:
            raise SystemExit(3)
        return END

    await node6.queue(QUEUE, "upsertJobScheduler", "an-id", {"pattern": YEARLY}, {"name": "a-name"})
    await keys.change(QUEUE, "full moon")
    await node6.job(QUEUE, await keys.latest(QUEUE), "promote")
    handler = Runs()
    task = handler.task(lockDuration=200, settings={"repeatStrategy": strategy})
    async with run_worker([task]):
        await until(lambda: len(handler.payloads) == 1)
    assert asked == [("full moon", "a-name")] * 2
    assert await keys.latest(QUEUE) == f"repeat:an-id:{END}"
