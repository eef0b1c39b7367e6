"""Redis goes away in every way that it can, and the worker goes on as if nothing had been.

Every break comes while some jobs run, some have just ended and some wait. Nothing is lost, and
nothing that was acknowledged is done again.
"""

import time
from collections import Counter

import psutil
import pytest
from structlog.testing import capture_logs

from autoflow_worker.broker import marker
from autoflow_worker.broker.channel import Channel
from tests.support.process import WorkerStarter
from tests.support.redis_scene import (
    Break,
    Scene,
    connections_killed,
    failed_over,
    killed,
    loading,
    read_only,
    stopped,
    suspended,
)
from tests.support.servers import OwnServer
from tests.support.until import until

WAYS = [killed, stopped, suspended, connections_killed, read_only, loading, failed_over]
ways = pytest.mark.parametrize("broken", WAYS, ids=lambda way: way.__name__)


# -- outages ---------------------------------------------------------------------------------------


@ways
async def test_jobs_run_on_over_an_outage(scene: Scene, broken: Break) -> None:
    with capture_logs() as log:
        async with scene.work():
            await scene.add("before")
            await scene.until_completed("before")
            await scene.add("held-1", "held-2", payload={"held": True})
            await scene.db.until_status("held-2", "active")
            await scene.add("fails", payload={"failures": 1}, attempts=2)
            await scene.db.until_status("fails", "completed")
            await scene.until_completed("fails")
            async with broken(scene):
                # They end now: the rows say so, and BullMQ has to be told later.
                scene.go_on.set()
                for job in ("held-1", "held-2"):
                    await scene.db.until_status(job, "completed")
            await scene.until_completed("held-1", "held-2")
            await scene.add("after-1", "after-2", "after-3")
            await scene.until_completed("after-1", "after-2", "after-3")
    assert scene.runs.pop("fails") == 2
    assert set(scene.runs.values()) == {1}
    # The connections beside the shared one say it at level debug.
    events = Counter(entry["event"] for entry in log if entry["log_level"] != "debug")
    assert events["redis_connection_lost"] <= 1 + (broken is connections_killed)
    assert events["redis_connection_restored"] == events["redis_connection_lost"]
    assert [entry for entry in log if entry["log_level"] == "error"] == []


@ways
async def test_an_idle_worker_wakes_after_an_outage(scene: Scene, broken: Break) -> None:
    async with scene.work():
        await scene.add("before")
        await scene.until_completed("before")
        async with broken(scene):
            pass
        await scene.add("after")
        await scene.until_completed("after")
    assert scene.runs == {"before": 1, "after": 1}


@ways
async def test_a_drain_goes_on_over_an_outage(scene: Scene, broken: Break) -> None:
    await scene.add("held-1", "held-2", "held-3", payload={"held": True})
    await scene.add("left")
    async with scene.work(worker_shutdown_grace=60) as worker:
        await scene.db.until_status("held-3", "active")
        worker.stopping.set()
        async with broken(scene):
            scene.go_on.set()
            for job in ("held-1", "held-2", "held-3"):
                await scene.db.until_status(job, "completed")
        assert await worker.stop() == 0
    assert [await scene.state(f"held-{n}") for n in (1, 2, 3)] == ["completed"] * 3
    assert await scene.state("left") == "wait"
    assert set(scene.runs.values()) == {1}


async def test_a_signal_that_comes_during_an_outage(scene: Scene) -> None:
    await scene.add("held", payload={"held": True})
    async with scene.work(worker_shutdown_grace=60) as worker:
        await scene.db.until_status("held", "active")
        async with killed(scene):
            scene.go_on.set()
            await scene.db.until_status("held", "completed")
            worker.stopping.set()
        assert await worker.stop() == 0
    assert await scene.state("held") == "completed"
    assert scene.runs == {"held": 1}


async def test_what_was_due_during_an_outage(scene: Scene) -> None:
    scene.worker_options = {"drainDelay": 60}
    async with scene.work():
        await scene.add("fails", payload={"failures": 1}, attempts=2, backoff=2500)
        await scene.add("is-delayed", delay=2500)
        await scene.db.until_status("fails", "delayed")
        async with killed(scene):
            await pass_time(2.6)
        await scene.until_completed("fails", "is-delayed")
    assert scene.runs == {"fails": 2, "is-delayed": 1}


async def test_an_outage_longer_than_the_locks(scene: Scene) -> None:
    """Who holds a job renews its lock before anybody takes the job for stalled."""
    scene.worker_options = {"lockDuration": 2000, "stalledInterval": 500}
    async with scene.work(), scene.work():
        jobs = [f"held-{n}" for n in range(6)]
        await scene.add(*jobs, payload={"held": True})
        for job in jobs:
            await scene.db.until_status(job, "active")
        for _ in range(2):
            # Just after a check, which marks what has no lock at the next one.
            await scene.until_checked()
            await scene.server.stop()
            await pass_time(2.2)
            await scene.server.start()
            for _ in range(2):
                await scene.until_checked()
        scene.go_on.set()
        await scene.until_completed(*jobs)
    assert set(scene.runs.values()) == {1}


async def pass_time(seconds: float) -> None:
    """Let an outage last."""
    over = time.monotonic() + seconds
    await until(lambda: time.monotonic() > over)


async def test_a_half_open_connection_costs_only_time(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's machine is gone without a word; another one has its address."""
    monkeypatch.setattr(Channel.execute, "__kwdefaults__", {"patience": 1.0})
    monkeypatch.setattr(marker, "REPLY_PATIENCE", 1.0)
    scene.worker_options = {"drainDelay": 0.5}
    async with scene.work():
        await scene.add("held", payload={"held": True})
        await scene.db.until_status("held", "active")
        scene.proxy.freeze()
        scene.go_on.set()
        await scene.add("after")
        await scene.until_completed("held", "after")
    assert scene.runs == {"held": 1, "after": 1}


TASKS = """
    from autoflow_worker import define_task

    async def handler(payload, ctx):
        pass

    tasks = [define_task(f"storms-{n}", handler) for n in range(5)]
"""


@pytest.mark.parametrize("way", ["stop", "suspend"])
async def test_waiting_for_redis_costs_next_to_nothing(
    worker_process: WorkerStarter, own_redis: OwnServer, way: str
) -> None:
    worker = worker_process(TASKS, REDIS_URL=own_redis.url, WORKER_CONCURRENCY="20")
    await worker.until_logged("worker_started")
    if way == "stop":
        await own_redis.stop()
        await worker.until_logged("redis_connection_lost")
    else:
        own_redis.suspend()
    process = psutil.Process(worker.pid)
    began, before = time.monotonic(), sum(process.cpu_times()[:2])
    await pass_time(2)
    used, elapsed = sum(process.cpu_times()[:2]) - before, time.monotonic() - began
    assert used < elapsed / 10
    assert len(worker.logged("redis_connection_lost")) == (way == "stop")
    if way == "stop":
        await own_redis.start()
        await worker.until_logged("redis_connection_restored")
    else:
        own_redis.resume()
    worker.terminate()
    assert await worker.wait() == 0
