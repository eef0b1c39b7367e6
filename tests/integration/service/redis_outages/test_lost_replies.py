"""The connection breaks after Redis has run a command and before its reply arrives."""

from dataclasses import dataclass
from typing import Any

import pytest

from tests.support.redis_scene import Payload, Scene
from tests.support.scripts import sha_of
from tests.support.until import until


@dataclass(frozen=True)
class Acknowledgement:
    """What is acknowledged by which script, and what becomes of the job."""

    script: str
    payload: Payload
    options: dict[str, Any]
    end: str


ACKNOWLEDGEMENTS = {
    "complete": Acknowledgement("moveToFinished", {}, {}, "completed"),
    "fail": Acknowledgement("moveToFinished", {"failures": 1}, {}, "failed"),
    "delay": Acknowledgement(
        "moveToDelayed", {"failures": 1}, {"attempts": 2, "backoff": 100}, "completed"
    ),
    "retry": Acknowledgement("retryJob", {"failures": 1}, {"attempts": 2}, "completed"),
}


@pytest.mark.parametrize("concurrency", [1, 3])
@pytest.mark.parametrize("what", ACKNOWLEDGEMENTS)
async def test_a_lost_reply_to_an_acknowledgement(
    scene: Scene, what: str, concurrency: int
) -> None:
    """The reply may have brought the next job: that one is found, and run."""
    jobs, ack = ["first", "second", "third", "fourth"], ACKNOWLEDGEMENTS[what]
    await scene.add(*jobs, payload=ack.payload, **ack.options)
    lost = scene.proxy.lose_reply_to(sha_of(ack.script))
    async with scene.work(concurrency):
        for job in jobs:
            await scene.db.until_status(job, ack.end)
        await until(lambda: all_in(scene, ack.end, jobs))
    # Each was sent once; what else was on its way when the connection broke, perhaps again.
    assert lost.sprung.is_set()
    assert len(jobs) <= lost.count < len(jobs) + concurrency
    assert scene.runs == dict.fromkeys(jobs, ack.options.get("attempts", 1))


async def all_in(scene: Scene, end: str, jobs: list[str]) -> bool:
    return {await scene.state(job) for job in jobs} == {end}


async def test_a_lost_reply_to_a_fetch(scene: Scene) -> None:
    async with scene.work():
        await scene.add("before")
        await scene.until_completed("before")
        lost = scene.proxy.lose_reply_to(sha_of("moveToActive"))
        await scene.add("claimed-unawares", "next")
        await scene.until_completed("claimed-unawares", "next")
        assert lost.sprung.is_set()
    assert scene.runs == {"before": 1, "claimed-unawares": 1, "next": 1}


@pytest.mark.parametrize("script", ["extendLocks", "moveStalledJobsToWait"])
async def test_a_lost_reply_to_a_keeper(scene: Scene, script: str) -> None:
    scene.worker_options = {"lockDuration": 2000, "stalledInterval": 500}
    async with scene.work():
        await scene.add("held", payload={"held": True})
        await scene.db.until_status("held", "active")
        lost = scene.proxy.lose_reply_to(sha_of(script))
        await until(lambda: lost.count > 2)
        scene.go_on.set()
        await scene.until_completed("held")
    assert scene.runs == {"held": 1}


async def test_a_lost_reply_to_handing_back(scene: Scene) -> None:
    await scene.add("held", payload={"held": True})
    async with scene.work(worker_shutdown_grace=0.05) as worker:
        await scene.db.until_status("held", "active")
        lost = scene.proxy.lose_reply_to(sha_of("moveToDelayed"))
        assert await worker.stop() == 4
        assert lost.sprung.is_set()
    assert await scene.state("held") in ("wait", "delayed")
    scene.go_on.set()
    async with scene.work():
        await scene.until_completed("held")
    assert (await scene.db.task("held")).attempts == 1
