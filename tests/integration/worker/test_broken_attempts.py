"""Attempts that break in the worker itself: their jobs go back, and only a culprit pays."""

import threading
from collections import Counter
from typing import Any

import pytest
from redis.asyncio import Redis
from structlog.testing import capture_logs

from autoflow_worker import TaskContext, TaskOptions, define_task
from autoflow_worker.recording import patches
from autoflow_worker.worker.breakages import MAX_BREAKAGES
from tests.support.api import Api
from tests.support.database import Database
from tests.support.plain import state
from tests.support.running import RunWorker
from tests.support.until import until

QUEUE = "q"
Payload = dict[str, Any]


class Scarcity:
    """Has encoding a result raise MemoryError, as it does on a machine that has none left."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.encode = patches.encoded_result
        self.refused = Counter[object]()
        self.limits: dict[object, int] = {}
        monkeypatch.setattr(patches, "encoded_result", self)

    def __call__(self, output: object, duration_ms: float) -> patches.Record:
        if self.refused[output] < self.limits.get(output, 0):
            self.refused[output] += 1
            raise MemoryError
        return self.encode(output, duration_ms)


@pytest.fixture
def scarcity(monkeypatch: pytest.MonkeyPatch) -> Scarcity:
    return Scarcity(monkeypatch)


async def echo(payload: Payload, ctx: TaskContext) -> object:
    return payload["n"]


async def test_what_breaks_once_runs_again_and_uses_up_no_attempt(
    run_worker: RunWorker, api: Api, scarcity: Scarcity
) -> None:
    scarcity.limits["scarce"] = 2
    with capture_logs() as logs:
        async with run_worker([define_task(QUEUE, echo)]):
            task_id = await api.schedule(QUEUE, {"n": "scarce"}, attempts=1)
            row = await api.until_both_say(QUEUE, task_id, "completed")
    assert row["attempts"] == 1
    assert row["result"]["output"] == "scarce"
    broken = [entry for entry in logs if entry["event"] == "attempt_broken"]
    assert [(entry["task_id"], entry["log_level"]) for entry in broken] == [(task_id, "error")] * 2
    assert all(entry["exc_info"] for entry in broken)


async def test_a_job_that_breaks_every_slot_fails_beside_others_that_do_not(
    run_worker: RunWorker, api: Api, scarcity: Scarcity
) -> None:
    scarcity.limits["hostile"] = 1_000
    async with run_worker([define_task(QUEUE, echo)]):
        hostile = await api.schedule(QUEUE, {"n": "hostile"}, attempts=1)
        others = [await api.schedule(QUEUE, {"n": n}) for n in range(10)]
        row = await api.until_both_say(QUEUE, hostile, "failed")
        for task_id in others:
            await api.until_both_say(QUEUE, task_id, "completed")
    assert row["error"]["reason"] == "MemoryError"
    assert scarcity.refused["hostile"] == 3


async def test_a_task_that_only_breaks_ends_the_service(
    run_worker: RunWorker, api: Api, scarcity: Scarcity, redis: Redis, prefix: str
) -> None:
    scarcity.limits = dict.fromkeys(range(20), 1_000)
    ids = [await api.schedule(QUEUE, {"n": n}) for n in range(20)]
    with capture_logs() as logs:
        async with run_worker([define_task(QUEUE, echo, TaskOptions(concurrency=4))]) as worker:
            death = await worker.death()
    assert f"broke {MAX_BREAKAGES} times in a row" in str(death)
    assert "MemoryError" in str(death)
    assert len([entry for entry in logs if entry["event"] == "attempt_broken"]) >= MAX_BREAKAGES
    for task_id in ids:
        assert await state(redis, prefix, QUEUE, task_id) in ("prioritized", "delayed")
        row = await api.db.task(task_id)
        assert (row.status, row.error) == ("pending", None)
        assert await redis.hget(f"{prefix}:{QUEUE}:{task_id}", "atm") in (None, "0")


async def test_sync_handlers_that_hang_take_no_further_job(
    run_worker: RunWorker, api: Api, db: Database
) -> None:
    """They are left behind at their time limit, and as many as there are slots may be."""
    gate = threading.Event()
    running = Counter[str]()

    def handler(payload: Payload, ctx: TaskContext) -> None:
        running[ctx.task_id] += 1
        gate.wait(60)

    options = TaskOptions(concurrency=2, timeout_ms=50)
    ids = [await api.schedule(QUEUE, {"n": n}, attempts=1) for n in range(8)]
    try:
        with capture_logs() as logs:
            async with run_worker([define_task(QUEUE, handler, options)]):
                await until(lambda: "handlers_stuck" in {entry["event"] for entry in logs})
                # A slot may have taken its next job before the other's handler was left behind.
                assert 2 <= running.total() <= 3
                [stuck] = [entry for entry in logs if entry["event"] == "handlers_stuck"]
                assert len(stuck["handlers"]) == 2
                assert {one["task_id"] for one in stuck["handlers"]} <= set(running)
                for one in stuck["handlers"]:
                    assert any("test_broken_attempts.py" in frame for frame in one["stack"])
                assert (await db.statuses())["pending"] >= 5
                gate.set()
                for task_id in ids:
                    await db.until_status(task_id, "completed", "failed", timeout=30)
    finally:
        gate.set()
    assert "handlers_unstuck" in {entry["event"] for entry in logs}
    assert running == dict.fromkeys(ids, 1)


async def test_a_backoff_strategy_that_exits_costs_its_job(run_worker: RunWorker, api: Api) -> None:
    def strategy(attempts: int, kind: str, error: object, job: object) -> int:
        raise SystemExit(3)

    async def handler(payload: Payload, ctx: TaskContext) -> None:
        raise ValueError("no luck")

    task = define_task(QUEUE, handler, worker_options={"settings": {"backoffStrategy": strategy}})
    async with run_worker([task]):
        backoff = {"backoff": {"type": "own"}}
        task_id = await api.schedule(QUEUE, {}, attempts=3, opts=backoff)
        row = await api.until_both_say(QUEUE, task_id, "failed")
    assert row["error"]["reason"] == "no luck (no retry: the backoff strategy raised SystemExit)"
