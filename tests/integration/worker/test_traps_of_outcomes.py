"""The traps of bullmq 3.4's own `Worker` in what becomes of a job.

docs/internals.md lists them. Where it can be shown, a test first runs the official Worker into
the trap, on the queue `plain`, and then this worker past it, on the queue `ours`.
"""

import asyncio
import datetime as dt
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from bullmq import Job
from bullmq.backoffs import Backoffs
from structlog.testing import capture_logs

from autoflow_worker import TaskContext, define_task
from autoflow_worker.broker.backoff import NoBackoffError, backoff_ms
from tests.support.database import Database
from tests.support.node import FOLDER, NODE
from tests.support.plain import (
    until_idle,
)
from tests.support.process import WorkerStarter
from tests.support.proxy import Proxy
from tests.support.scripts import load_scripts, sha_of
from tests.support.stage import Payload, Stage, holds
from tests.support.until import PATIENCE, until


async def test_05_a_handler_that_cancels_itself_fails_its_job_alone(
    stage: Stage, db: Database
) -> None:
    async def plain(job: Job, token: str) -> None:
        raise asyncio.CancelledError

    async def ours(payload: Payload, ctx: TaskContext) -> None:
        if payload["cancels"]:
            raise asyncio.CancelledError

    await stage.plain.add("plain", {})
    async with stage.run_plain(plain) as worker:
        # The whole worker ends, and nobody is told.
        await asyncio.wait({worker.task}, timeout=PATIENCE)
        assert worker.task.cancelled()
        assert worker.errors == []

    first = await stage.ours.add("ours", {"cancels": True}, {"jobId": "cancels", "attempts": 1})
    second = await stage.ours.add("ours", {"cancels": False}, {"jobId": "does-not"})
    async with stage.run_ours(define_task("ours", ours)):
        failed = await db.until_status(first.id, "failed")
        await db.until_status(second.id, "completed")
    assert failed.error is not None
    assert "cancelled" in failed.error.reason
    assert await stage.state("ours", first) == "failed"


async def test_06_no_listener_has_a_say_in_what_becomes_of_a_job(
    stage: Stage, db: Database
) -> None:
    def raising(*_: object) -> int:
        raise RuntimeError("a listener's bug")

    async with stage.run_plain() as worker:
        worker.on("active", raising)
        job = await stage.plain.add("plain", {})
        await until(lambda: worker.errors)
        # The job was fetched, and is forgotten.
        assert stage.begun == []
        assert await stage.state("plain", job) == "active"

    # Nothing listens here. Of the functions that a task may pass in, one raises.
    async def fails(payload: Payload, ctx: TaskContext) -> None:
        raise ValueError("no luck")

    options: Any = {"settings": {"backoffStrategy": raising}}
    task = define_task("ours", fails, worker_options=options)
    own = {"attempts": 3, "backoff": {"type": "own"}}
    built_in = {"attempts": 2, "backoff": {"type": "fixed", "delay": 300_000}}
    first = await stage.ours.add("ours", {}, {"jobId": "own", **own})
    second = await stage.ours.add("ours", {}, {"jobId": "built-in", **built_in})
    async with stage.run_ours(task):
        failed = await db.until_status(first.id, "failed")
        # `failed` is said only of what is final.
        delayed = await db.until_status(second.id, "delayed")
    assert failed.error is not None
    assert failed.error.reason.startswith("no luck")
    assert (delayed.attempts, delayed.failedAt) == (1, None)


async def test_11_work_is_not_repeated_for_its_return_value(stage: Stage, db: Database) -> None:
    ran: list[str] = []

    async def plain(job: Job, token: str) -> object:
        ran.append(job.id)
        return {1}

    async def ours(payload: Payload, ctx: TaskContext) -> object:
        ran.append(ctx.task_id)
        circle: list[object] = []
        circle.append(circle)
        noon = dt.datetime(2026, 1, 2, 12, tzinfo=dt.UTC)
        return circle if payload["circular"] else [{1}, float("nan"), noon, b"bytes"]

    twice = {"attempts": 2}
    await stage.plain.add("plain", {}, twice)
    async with stage.run_plain(plain):
        await until(lambda: len(ran) == 2)

    ran.clear()
    first = await stage.ours.add("ours", {"circular": False}, {"jobId": "odd", **twice})
    second = await stage.ours.add("ours", {"circular": True}, {"jobId": "circular", **twice})
    async with stage.run_ours(define_task("ours", ours)):
        completed = await db.until_status(first.id, "completed")
        failed = await db.until_status(second.id, "failed")
        await until(partial(holds, stage.redis, stage.key("ours", "failed"), 1))
    assert ran == [first.id, second.id]
    assert completed.result is not None
    assert completed.result.output[:3] == [[1], None, "2026-01-02T12:00:00Z"]
    assert failed.error is not None


async def test_12_an_acknowledgement_is_not_sent_again_blindly(stage: Stage, db: Database) -> None:
    async with Proxy(stage.redis_url) as proxy, stage.run_plain(url=proxy.url) as worker:
        script = worker.scripts.commands["moveToFinished"]
        # Otherwise the reply that is lost may be NOSCRIPT, and nothing was done.
        await stage.redis.script_load(script.script)
        lost = proxy.lose_reply_to(script.sha.encode())
        job = await stage.plain.add("plain", {})
        await until(lambda: worker.errors)
        # It was done the first time, and is said to have gone wrong.
        assert "Missing lock" in worker.errors[0]
        assert lost.count > 1
        assert await stage.state("plain", job) == "completed"

    await load_scripts(stage.redis)
    async with Proxy(stage.redis_url) as proxy:
        task = define_task("ours", stage.our_handler)
        with capture_logs() as log:
            async with stage.run_ours(task, url=proxy.url):
                lost = proxy.lose_reply_to(sha_of("moveToFinished"))
                job = await stage.ours.add("ours", {}, {"jobId": "our-job"})
                await lost.sprung.wait()
                await until_idle(stage.redis, stage.our_name)
            assert lost.count == 1
    assert await stage.state("ours", job) == "completed"
    assert (await db.task(job.id)).status == "completed"
    assert stage.ended.count(job.id) == 1
    assert not {"job_lost", "attempt_broken"} & {entry["event"] for entry in log}


@pytest.mark.parametrize(
    ("name", "value"),
    [("data", "{"), ("opts", "[]"), ("opts", "x"), ("atm", "x"), ("ats", "x"), ("priority", "x")],
)
async def test_13_a_job_that_can_not_be_parsed_fails(
    stage: Stage, db: Database, name: str, value: str
) -> None:
    for queue in (stage.plain, stage.ours):
        job = await queue.add(queue.name, {}, {"jobId": "the-job"})
        await stage.redis.hset(stage.key(queue.name, job.id), name, value)
    async with stage.run_plain() as worker:
        await until(lambda: worker.errors)
        # It is claimed, and nobody's.
        assert await stage.state("plain", job) == "active"
        assert stage.begun == []

    other = await stage.ours.add("ours", {}, {"jobId": "the-next"})
    async with stage.run_ours(define_task("ours", stage.our_handler)):
        await db.until_status(job.id, "failed")
        await db.until_status(other.id, "completed")
        await until(partial(holds, stage.redis, stage.key("ours", "failed"), 1))
    failed = await db.task(job.id)
    assert failed.error is not None
    told = await stage.redis.hget(stage.key("ours", job.id), "failedReason")
    assert failed.error.reason == told
    assert stage.begun == [other.id]


async def test_13_a_job_that_is_no_hash_fails(stage: Stage, db: Database) -> None:
    job = await stage.ours.add("ours", {}, {"jobId": "the-job"})
    other = await stage.ours.add("ours", {}, {"jobId": "the-next"})
    await stage.redis.set(stage.key("ours", job.id), "a string")
    async with stage.run_ours(define_task("ours", stage.our_handler)):
        await db.until_status(job.id, "failed")
        await db.until_status(other.id, "completed")
        await until(partial(holds, stage.redis, stage.key("ours", "failed"), 1))


async def test_14_backoffs_are_as_nodes(stage: Stage, db: Database) -> None:
    async def plain(job: Job, token: str) -> None:
        raise ValueError("no luck")

    async def ours(payload: Payload, ctx: TaskContext) -> None:
        raise ValueError("no luck")

    half = {"type": "fixed", "delay": 1000, "jitter": 0.5}
    assert {await Backoffs.calculate(half, 1, None, None, None) for _ in range(50)} == {1000}
    unknown = {"attempts": 2, "backoff": {"type": "unknown"}}
    job = await stage.plain.add("plain", {}, {"jobId": "unknown", **unknown})
    async with stage.run_plain(plain) as worker:
        await until(lambda: worker.errors)
        assert await stage.state("plain", job) == "active"

    job = await stage.ours.add("ours", {}, {"jobId": "unknown", **unknown})
    none = await stage.ours.add("ours", {}, {"jobId": "no-attempts"})
    await stage.redis.hset(stage.key("ours", none.id), "opts", "{}")
    async with stage.run_ours(define_task("ours", ours)):
        failed = [await db.until_status(each.id, "failed") for each in (job, none)]
    assert [row.attempts for row in failed] == [1, 1]
    assert failed[0].error is not None
    assert "unknown" in failed[0].error.reason

    cases: list[Any] = [
        [{"type": kind, "delay": delay, "jitter": jitter}, attempt]
        for kind in ("fixed", "exponential")
        for delay in (0, 1, 999, 1000.5)
        for jitter in (0, 0.1, 0.5, 1)
        for attempt in (1, 2, 3, 10)
    ]
    for (backoff, attempt), (low, high) in zip(cases, await nodes_backoffs(cases), strict=True):
        drawn = [await backoff_ms(backoff, attempt) for _ in range(20)]
        assert all(low - 1 < delay <= high for delay in drawn if delay is not None), (
            f"{backoff}, attempt {attempt}: {drawn}, but Node's are {low} to {high}"
        )
    with pytest.raises(NoBackoffError):
        await backoff_ms({"type": "unknown"}, 1)


async def nodes_backoffs(cases: list[Any]) -> list[tuple[float, float]]:
    """The shortest and the longest wait that Node could choose in each case."""
    backoffs = FOLDER / "node_modules/bullmq5/dist/cjs/classes/backoffs.js"
    script = f"""
        const {{ Backoffs }} = require({json.dumps(str(backoffs))});
        const draw = (number, [backoff, attempt]) => {{
            Math.random = () => number;
            return Backoffs.calculate(backoff, attempt);
        }};
        const cases = {json.dumps(cases)};
        console.log(JSON.stringify(cases.map((c) => [draw(0, c), draw(1, c)])));
    """
    node = await asyncio.create_subprocess_exec(NODE, "-e", script, stdout=-1)
    output, _ = await node.communicate()
    result: list[tuple[float, float]] = json.loads(output)
    return result


# The official Worker records nothing, so all that it would show here is an error.
TASKS_18 = """
    import time
    from pathlib import Path
    from autoflow_worker import define_task

    async def handler(payload, ctx):
        try:
            Path("first").touch(exist_ok=False)
        except FileExistsError:
            return "second"
        while not Path("go-on").exists():
            time.sleep(0.01)  # blocks the event loop, and so the renewal of locks
        return "first"

    tasks = [
        define_task("ours", handler, worker_options={"lockDuration": 1000, "stalledInterval": 400})
    ]
"""


async def test_18_an_attempt_whose_lock_was_lost_has_no_say(
    stage: Stage, worker_process: WorkerStarter, db: Database, tmp_path: Path
) -> None:
    workers = [worker_process(TASKS_18) for _ in range(2)]
    for worker in workers:
        await worker.until_logged("worker_started")
    job = await stage.ours.add("ours", {}, {"jobId": "our-job"})
    completed = await db.until_status(job.id, "completed")
    assert completed.result is not None
    assert completed.result.output == "second"
    (tmp_path / "go-on").touch()
    await until(lambda: any(worker.logged("job_lost") for worker in workers))
    for worker in workers:
        worker.terminate()
        assert await worker.wait() == 0
    assert await db.task(job.id) == completed
    kept = json.loads(await stage.redis.hget(stage.key("ours", job.id), "returnvalue") or "")
    assert kept["output"] == "second"
