"""Jobs that no sound producer makes: each costs itself, and neither its neighbours nor the worker.

They are written straight into Redis, as BullMQ would refuse to make some of them.
"""

import json
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from redis.asyncio import Redis
from structlog.testing import capture_logs

from autoflow_worker import TaskContext, TaskDefinition, TaskOptions, define_task
from autoflow_worker.broker.client import PipelinedRedis
from autoflow_worker.broker.job_queue import JobQueue
from autoflow_worker.recording.patches import row_id
from tests.support.api import Api
from tests.support.database import Database
from tests.support.node import Node
from tests.support.plain import state, until_renewed
from tests.support.process import WorkerStarter
from tests.support.running import RunWorker
from tests.support.until import until

QUEUE = "q"
SOUND = {"name": QUEUE, "data": "{}", "opts": "{}", "timestamp": "1790000000000"}
OPTIONS: Any = {"lockDuration": 5000, "stalledInterval": 200}

Fields = Mapping[str, str | bytes | None]


def nested(depth: int) -> str:
    return '{"a":' * depth + "1" + "}" * depth


def opts(**options: Any) -> Fields:
    return {"opts": json.dumps(options)}


# What the fields hold, and a part of the reason. The handler never runs.
UNREADABLE: dict[str, tuple[Fields, str]] = {
    "data-empty": ({"data": ""}, "JSONDecodeError"),
    "data-half": ({"data": "{"}, "JSONDecodeError"),
    "data-number": ({"data": "5"}, "a JSON object is needed, not a number"),
    "data-array": ({"data": "[]"}, "a JSON object is needed, not an array"),
    "data-null": ({"data": "null"}, "a JSON object is needed, not null"),
    "data-deep": ({"data": nested(100_000)}, "RecursionError"),
    "data-many-digits": ({"data": '{"n": ' + "9" * 5000 + "}"}, "4300 digits"),
    "opts-empty": ({"opts": ""}, "JSONDecodeError"),
    "opts-half": ({"opts": "{"}, "JSONDecodeError"),
    "opts-null": ({"opts": "null"}, "NoneType"),
    "opts-array": ({"opts": "[]"}, "list"),
    "opts-bytes": ({"opts": b"\xff"}, "JSONDecodeError"),
    "opts-deep": ({"opts": nested(100_000)}, "RecursionError"),
    "name-missing": ({"name": None}, "its fields are gone"),
    "timestamp-text": ({"timestamp": "x"}, "invalid literal"),
    "timestamp-vast": ({"timestamp": "9" * 5000}, "4300 digits"),
    "delay-text": ({"delay": "x"}, "invalid literal"),
    "priority-text": ({"priority": "x"}, "invalid literal"),
    "made-text": ({"atm": "x"}, "invalid literal"),
    "made-fraction": ({"atm": "1.5"}, "invalid literal"),
    "started-text": ({"ats": "x"}, "invalid literal"),
    "stalled-text": ({"stc": "x"}, "invalid literal"),
    "progress-half": ({"progress": "{"}, "JSONDecodeError"),
    "stacktrace-half": ({"stacktrace": "{"}, "JSONDecodeError"),
    "finished-text": ({"finishedOn": "x"}, "invalid literal"),
    "deferred-bytes": ({"defa": b"its parent\xff"}, "its parent\ufffd"),
    "parent-half": ({"parent": "{"}, "JSONDecodeError"),
    "parent-number": ({"parent": "5", "parentKey": "p"}, "its parent is no object"),
    "parent-array": ({"parent": "[]"}, "its parent is no object"),
    "parent-null": ({"parent": "null"}, "its parent is no object"),
    "attempts-text": (opts(attempts="3"), "option attempts"),
    "attempts-object": (opts(attempts={}), "option attempts"),
    "attempts-true": (opts(attempts=True), "option attempts"),
    "attempts-vast": (opts(attempts=10**400), "option attempts"),
    "keep-text": (opts(removeOnComplete="x"), "option removeOnComplete"),
    "keep-array": (opts(removeOnComplete=[]), "option removeOnComplete"),
    "keep-age-text": (opts(removeOnComplete={"age": "x"}), "option removeOnComplete"),
    "keep-failed-text": (opts(removeOnFail="x"), "option removeOnFail"),
    "keep-failed-age": (opts(removeOnFail={"age": []}), "option removeOnFail"),
    "traces-text": (opts(stackTraceLimit="x"), "option stackTraceLimit"),
    "parent-opt-text": (opts(parent="x"), "'str'"),
    "parent-opt-array": (opts(parent=[1]), "'list'"),
    "parent-opt-number": (opts(parent=5), "'int'"),
    "exclusive-opts": (opts(fpof=True, idof=True), "cannot be used together"),
}

# The handler fails once, and the backoff can't be followed.
NO_BACKOFF: dict[str, tuple[object, str]] = {
    "text": ("x", "the backoff option is a str"),
    "array": ([1], "the backoff option is a list"),
    "unknown": ({"type": "moon", "delay": 5}, "the backoff type 'moon' is unknown"),
    "number-type": ({"type": 5}, "the backoff type 5 is unknown"),
    "object-type": ({"type": {}}, "the backoff type {} is unknown"),
    "text-delay": ({"type": "fixed", "delay": "x"}, "the backoff's delay is no number"),
    "object-delay": ({"type": "exponential", "delay": {"a": 1}}, "delay is no number"),
    "text-jitter": ({"type": "fixed", "delay": 1, "jitter": "x"}, "jitter is no number"),
}

# Odd, but there is no doubt what is meant: these run, as they do with Node.
ODD: dict[str, Fields] = {
    "data-missing": {"data": None},
    "data-bytes": {"data": b'{"a": "\xff\xfe", "\xff": 1}'},
    "data-not-a-number": {"data": '{"a": NaN, "b": [Infinity, 1e999]}'},
    "data-big": {"data": '{"n": ' + "9" * 4000 + "}"},
    "data-nul": {"data": '{"a": "\\u0000", "\\u0000": 1}'},
    "data-surrogate": {"data": '{"a": "\\ud800", "\\ud800": 1}'},
    "data-correlation-id": {"data": '{"correlationId": {"a": 1}}'},
    "opts-missing": {"opts": None},
    "name-bytes": {"name": b"\xff"},
    "name-empty": {"name": ""},
    "timestamp-fraction": {"timestamp": "1790000000000.25"},
    "timestamp-negative": {"timestamp": "-5"},
    "timestamp-huge": {"timestamp": "9" * 400},
    "timestamp-missing": {"timestamp": None},
    "delay-fraction": {"delay": "20.5"},
    "made-negative": {"atm": "-4"},
    "started-huge": {"ats": str(2**63 - 1)},
    "started-negative": {"ats": "-9"},
    "stacktrace-object": {"stacktrace": "{}"},
    "returnvalue-half": {"returnvalue": "{"},
    "scheduler-gone": {"rjk": "no-such-scheduler"},
    "scheduler-bytes": {"rjk": b"\xff"},
    "deduplication-bytes": {"deid": b"\xff"},
    "parent-gone": {"parent": '{"id": "x", "queueKey": "p:gone"}', "parentKey": "p:gone:x"},
    "attempts-negative": opts(attempts=-1),
    "attempts-fraction": opts(attempts=2.5),
    "attempts-null": opts(attempts=None),
    "traces-null": opts(stackTraceLimit=None),
    "traces-negative": opts(stackTraceLimit=-3),
    "keep-null": opts(removeOnComplete=None, removeOnFail=None),
    "delay-opt-text": opts(delay="x", priority="x", timestamp={}),
    "repeat-number": opts(repeat=5, repeatJobKey=5),
    "id-opt": opts(jobId={}, de=5, kl="x", tm=5, lifo="x"),
    "opts-deep": {"opts": '{"x": ' + nested(300) + "}"},
}

IDS = [
    *("a b", "\U0001f600", "ü", " ", "\n", "\0", "a\0b", "\x1b[31m", "x" * 5000),
    *("a:b", ":", "::", "repeat:x:5", "{x}", "..", "*", "%s", "'; drop table tasks; --"),
    *("0", "01", "-1", "1e3", "1" * 16, "1" * 17, "undefined", "null", "lock"),
]
NOT_UTF8 = [b"\xff\xfe", b"a\xc3", b"\xed\xa0\x80"]


@dataclass
class Poisoned:
    """A queue with such jobs in it.

    Attributes:
        raw: a client that decodes nothing.
        base: what the queue's keys begin with.
        ran: how often the handler ran for each id.
    """

    raw: Any
    base: bytes
    db: Database
    ran: Counter[str] = field(default_factory=Counter)

    async def handler(self, payload: object, ctx: TaskContext) -> None:
        self.ran[ctx.task_id] += 1
        if ctx.task_id.startswith("fails-"):
            raise ValueError("no luck")

    def task(self) -> TaskDefinition[Any]:
        return define_task(QUEUE, self.handler, TaskOptions(concurrency=1), worker_options=OPTIONS)

    async def add(self, job_id: str | bytes, fields: Fields = SOUND) -> None:
        """Add a job whose fields are sound but for these; None: it lacks the field."""
        raw_id = job_id if isinstance(job_id, bytes) else job_id.encode()
        stored = {
            name: value for name, value in (SOUND | dict(fields)).items() if value is not None
        }
        await self.raw.hset(self.base + raw_id, mapping=stored)
        await self.push(raw_id)

    async def push(self, raw_id: bytes) -> None:
        await self.raw.lpush(self.base + b"wait", raw_id)
        await self.raw.zadd(self.base + b"marker", {"0": 0})

    async def until_all_ended(self) -> None:
        """A sound job that was added last has run, and nothing is left anywhere."""
        await self.add("the-next")
        await self.db.until_status("the-next", "completed")

        async def settled() -> bool:
            left = [await self.raw.llen(self.base + name) for name in (b"wait", b"active")]
            left += [
                await self.raw.zcard(self.base + name) for name in (b"delayed", b"prioritized")
            ]
            return left == [0, 0, 0, 0]

        await until(settled)
        assert await self.raw.keys(self.base + b"*:lock") == []
        assert self.ran["the-next"] == 1

    async def ends(self, raw_id: bytes) -> list[bytes]:
        """The job's events that say how it ended, or that it did not."""
        events = await self.raw.xrange(self.base + b"events")
        return [
            event[b"event"]
            for _, event in events
            if event.get(b"jobId") == raw_id
            and event[b"event"] in (b"completed", b"failed", b"stalled", b"delayed")
        ]

    async def check_failed(self, job_id: str | bytes, reason: str) -> None:
        """It failed once, in both stores, for this reason."""
        raw_id = job_id if isinstance(job_id, bytes) else job_id.encode()
        text = raw_id.decode(errors="surrogateescape")
        row = await self.db.task(row_id(QUEUE, text))
        assert row.status == "failed", job_id
        assert row.error is not None
        assert reason in row.error.reason, job_id
        assert row.failedAt is not None
        assert await self.ends(raw_id) == [b"failed"], job_id
        assert await self.raw.zscore(self.base + b"failed", raw_id) is not None, job_id
        if await self.raw.type(self.base + raw_id) == b"hash":
            told = await self.raw.hget(self.base + raw_id, "failedReason")
            assert told.decode() == row.error.reason, job_id

    async def check_completed(self, job_id: str) -> None:
        """It ran once, and completed in both stores."""
        assert (await self.db.task(row_id(QUEUE, job_id))).status == "completed", job_id
        assert self.ran[job_id] == 1, job_id
        assert b"failed" not in await self.ends(job_id.encode()), job_id


@pytest.fixture
async def poisoned(redis_url: str, prefix: str, db: Database) -> AsyncIterator[Poisoned]:
    async with Redis.from_url(redis_url) as raw:
        yield Poisoned(raw, f"{prefix}:{QUEUE}:".encode(), db)


async def test_what_can_not_be_read_fails_once_for_a_reason(
    run_worker: RunWorker, poisoned: Poisoned
) -> None:
    for name, (fields, _) in UNREADABLE.items():
        await poisoned.add(name, fields)
    async with run_worker([poisoned.task()]):
        await poisoned.until_all_ended()
    for name, (_, reason) in UNREADABLE.items():
        await poisoned.check_failed(name, reason)
    assert poisoned.ran == {"the-next": 1}


async def test_what_is_no_job_at_all_fails_once(run_worker: RunWorker, poisoned: Poisoned) -> None:
    await poisoned.push(b"gone")
    await poisoned.raw.set(poisoned.base + b"text", "a text")
    await poisoned.push(b"text")
    await poisoned.raw.rpush(poisoned.base + b"list", "an item")
    await poisoned.push(b"list")
    async with run_worker([poisoned.task()]):
        await poisoned.until_all_ended()
    await poisoned.check_failed("gone", "its fields are gone from Redis")
    await poisoned.check_failed("text", "its fields are gone")
    await poisoned.check_failed("list", "its fields are gone")
    assert poisoned.ran == {"the-next": 1}


async def test_a_backoff_that_can_not_be_followed(
    run_worker: RunWorker, poisoned: Poisoned
) -> None:
    for name, (backoff, _) in NO_BACKOFF.items():
        await poisoned.add(f"fails-{name}", opts(attempts=3, backoff=backoff))
    async with run_worker([poisoned.task()]):
        await poisoned.until_all_ended()
    for name, (_, reason) in NO_BACKOFF.items():
        await poisoned.check_failed(f"fails-{name}", "no luck (no retry: ")
        await poisoned.check_failed(f"fails-{name}", reason)
        assert poisoned.ran[f"fails-{name}"] == 1


async def test_a_backoff_that_is_odd_is_followed(run_worker: RunWorker, poisoned: Poisoned) -> None:
    backoffs: list[object] = [
        None,
        0,
        -1,
        1.5,
        {},
        {"type": "fixed", "delay": None},
        {"type": "fixed", "delay": -7},
        {"type": "exponential"},
        {"type": "fixed", "delay": 1, "jitter": 7},
    ]
    for number, backoff in enumerate(backoffs):
        await poisoned.add(f"fails-{number}", opts(attempts=2, backoff=backoff))
    async with run_worker([poisoned.task()]):
        await poisoned.until_all_ended()
    for number, backoff in enumerate(backoffs):
        assert poisoned.ran[f"fails-{number}"] == 2, backoff
        assert await poisoned.db.status(f"fails-{number}") == "failed"


async def test_what_is_odd_but_plain_runs(run_worker: RunWorker, poisoned: Poisoned) -> None:
    for name, fields in ODD.items():
        await poisoned.add(name, fields)
    async with run_worker([poisoned.task()]):
        await poisoned.until_all_ended()
    for name in ODD:
        await poisoned.check_completed(name)


async def test_ids_with_odd_characters(run_worker: RunWorker, poisoned: Poisoned) -> None:
    for job_id in IDS:
        await poisoned.add(job_id)
    async with run_worker([poisoned.task()]):
        await poisoned.until_all_ended()
    for job_id in IDS:
        await poisoned.check_completed(job_id)


async def test_ids_outside_of_utf8(poisoned: Poisoned, worker_process: WorkerStarter) -> None:
    """In a process of its own: what it logs has to pass its output, too."""
    for job_id in NOT_UTF8:
        await poisoned.add(job_id)
    await poisoned.add("a-scheduler", {"rjk": b"\xff"})
    tasks = f"""
        from autoflow_worker import define_task

        async def handler(payload, ctx):
            pass

        tasks = [define_task("{QUEUE}", handler, worker_options={OPTIONS})]
    """
    for log_format in ("json", "console"):
        worker = worker_process(tasks, LOG_FORMAT=log_format)
        await poisoned.add(f"after-{log_format}")
        await poisoned.db.until_status(f"after-{log_format}", "completed")
        for job_id in NOT_UTF8:
            await poisoned.check_failed(job_id, "its id is not UTF-8")
        worker.terminate()
        assert await worker.wait() == 0, worker.report()
        for job_id in NOT_UTF8:
            await poisoned.raw.zrem(poisoned.base + b"failed", job_id)
            await poisoned.raw.delete(poisoned.base + job_id, poisoned.base + b"events")
            await poisoned.add(job_id)
        await poisoned.db.execute("DELETE FROM tasks")


async def test_the_lock_of_an_id_outside_of_utf8_is_renewed(
    run_worker: RunWorker, poisoned: Poisoned
) -> None:
    options: Any = {"lockDuration": 600, "stalledInterval": 200}
    task = define_task(QUEUE, poisoned.handler, worker_options=options)
    async with run_worker([task]):
        async with poisoned.db.connection.transaction():
            # It can't be recorded, so it is held.
            await poisoned.db.execute("LOCK TABLE tasks IN ACCESS EXCLUSIVE MODE")
            await poisoned.add(NOT_UTF8[0])
            lock: Any = poisoned.base + NOT_UTF8[0] + b":lock"
            await until(lambda: poisoned.raw.exists(lock))
            for _ in range(3):
                await until_renewed(poisoned.raw, lock)
        await poisoned.until_all_ended()
    await poisoned.check_failed(NOT_UTF8[0], "its id is not UTF-8")


async def test_a_job_that_the_stalled_check_breaks_on(
    run_worker: RunWorker, poisoned: Poisoned
) -> None:
    """A worker died with both in its hands; the sound one still has to come back."""
    await poisoned.raw.set(poisoned.base + b"a-text", "no hash")
    await poisoned.add("sound")
    await poisoned.raw.delete(poisoned.base + b"wait")
    for job_id in (b"a-text", b"sound"):
        await poisoned.raw.lpush(poisoned.base + b"active", job_id)
        await poisoned.raw.sadd(poisoned.base + b"stalled", job_id)
    with capture_logs() as logs:
        async with run_worker([poisoned.task()]):
            await poisoned.db.until_status("sound", "completed")
            await poisoned.until_all_ended()
    assert len([entry for entry in logs if entry["event"] == "stalled_check_refused"]) == 1
    await poisoned.check_completed("sound")


async def test_a_completed_job_that_bullmq_can_not_finish_stays_completed(
    run_worker: RunWorker, api: Api, redis: Redis, prefix: str
) -> None:
    """The handler did the work, and then broke what BullMQ's script counts with."""

    async def handler(payload: object, ctx: TaskContext) -> str:
        await redis.hset(f"{prefix}:{QUEUE}:{ctx.task_id}", "atm", "x")
        return "done"

    with capture_logs() as logs:
        async with run_worker([define_task(QUEUE, handler, worker_options=OPTIONS)]):
            task_id = await api.schedule(QUEUE)
            row = await api.until_both_say(QUEUE, task_id, "completed")
    assert row["result"]["output"] == "done"
    assert "job_buried" in {entry["event"] for entry in logs}
    value = await redis.hget(f"{prefix}:{QUEUE}:{task_id}", "returnvalue")
    assert json.loads(value or "") == row["result"]


async def test_a_job_that_another_worker_has_is_not_buried(
    redis_url: str, redis: Redis, prefix: str, node5: Node
) -> None:
    client = PipelinedRedis(redis_url)
    await client.open(15)
    try:
        queue = JobQueue(QUEUE, client, prefix, {})
        job_id = await node5.schedule(QUEUE)
        claim = (await queue.fetch("ours")).claim
        assert claim is not None
        await redis.set(f"{prefix}:{QUEUE}:{job_id}:lock", "theirs")
        assert not await queue.bury(claim, "failedReason", "no reason", None)
        assert await state(redis, prefix, QUEUE, job_id) == "active"
        await redis.set(f"{prefix}:{QUEUE}:{job_id}:lock", "ours")
        assert await queue.bury(claim, "failedReason", "no reason", None)
        assert await state(redis, prefix, QUEUE, job_id) == "failed"
    finally:
        await client.aclose()


async def test_a_queue_that_is_broken_itself_does_not_cost_the_others(
    run_worker: RunWorker, poisoned: Poisoned, node5: Node
) -> None:
    """As by a job whose id is the name of one of the queue's own keys."""
    await poisoned.raw.set(poisoned.base + b"failed", "no sorted set")
    await poisoned.add("fails-1")
    with capture_logs() as logs:
        async with run_worker([poisoned.task(), define_task("other", poisoned.handler)]):
            await until(lambda: "job_not_buried" in {entry["event"] for entry in logs})
            await poisoned.db.until_status("fails-1", "failed")
            other = await node5.schedule("other", task_id="not-of-the-api")
            await poisoned.db.until_status(other, "completed")


async def test_a_poisoned_child_fails_its_parent(
    run_worker: RunWorker, api: Api, node5: Node, redis: Redis, prefix: str
) -> None:
    async def handler(payload: object, ctx: TaskContext) -> None:
        pytest.fail("none of them can run")

    for child_id, name, value in (("child-1", "data", "{"), ("child-2", "opts", "5")):
        parent_id = f"parent-of-{child_id}"
        child = {
            "name": "child",
            "queueName": "children",
            "opts": {"jobId": child_id, "failParentOnFailure": True},
        }
        await node5.flow(
            {
                "name": "parent",
                "queueName": "parents",
                "opts": {"jobId": parent_id},
                "children": [child],
            }
        )
        await redis.hset(f"{prefix}:children:{child_id}", name, value)
    tasks = [define_task(name, handler) for name in ("parents", "children")]
    async with run_worker(tasks):
        for child_id in ("child-1", "child-2"):
            await api.until_both_say("children", child_id, "failed")
            row = await api.until_both_say("parents", f"parent-of-{child_id}", "failed")
            assert row["error"]["reason"] == f"child {prefix}:children:{child_id} failed"


async def test_a_job_that_redis_forgets_while_it_runs_stays_completed(
    run_worker: RunWorker, api: Api, redis: Redis, prefix: str
) -> None:
    """As by an eviction: its hash and its lock are gone, and its id is still active."""
    base = f"{prefix}:{QUEUE}:"

    async def handler(payload: object, ctx: TaskContext) -> str:
        await redis.delete(base + ctx.task_id, f"{base}{ctx.task_id}:lock")
        return "done"

    async with run_worker([define_task(QUEUE, handler, worker_options=OPTIONS)]):
        task_id = await api.schedule(QUEUE)
        row = await api.db.until_status(task_id, "completed")
        await until(lambda: _is_empty(redis, base + "active"))
    assert await api.db.task(task_id) == row
    assert await redis.exists(base + task_id) == 0


async def test_a_finished_row_stays_as_it_is_when_its_job_comes_back_without_data(
    run_worker: RunWorker, api: Api, redis: Redis, prefix: str
) -> None:
    """A worker died with the job in its hands, and Redis lost its hash and its lock."""
    base = f"{prefix}:{QUEUE}:"

    async def handler(payload: object, ctx: TaskContext) -> None:
        raise AssertionError("it never runs")

    done, open_ = "the-finished-one", "the-open-one"
    await api.db.insert_tasks(QUEUE, {done: {}}, status="completed")
    await api.db.insert_tasks(QUEUE, {open_: {}}, status="active")
    before = await api.db.task(done)
    await redis.lpush(base + "active", done, open_)
    await redis.sadd(base + "stalled", done, open_)
    async with run_worker([define_task(QUEUE, handler, worker_options=OPTIONS)]):
        await api.db.until_status(open_, "failed")
        await until(lambda: _is_empty(redis, base + "active"))

        async def is_gone() -> bool:
            return await redis.exists(base + done) == 0

        await until(is_gone)
    assert await api.db.task(done) == before
    assert await state(redis, prefix, QUEUE, done) == ""


async def _is_empty(redis: Redis, key: str) -> bool:
    return await redis.llen(key) == 0
