"""Jobs whose workers were killed by SIGKILL in the middle of them."""

from typing import Final

from parity.scenario import Json, scenario
from parity.side import Side

SHORT: Final[Json] = {"lockDuration": 2000, "lockRenewTime": 500, "stalledInterval": 1500}
HANGS: Final[Json] = {"sleep": 60_000}


@scenario(kills=True, varies=("q/events/picked up",), **SHORT)
async def once(s: Side) -> None:
    """The job runs again, and its attempt counts."""
    await s.add("a", HANGS, {"see": ["attemptsMade", "attemptsStarted"]}, attempts=2)
    await s.add("b")
    await s.start()
    await s.until("active", "a")
    await s.kill()
    await s.ended("a", "b")


@scenario(kills=True, maxStalledCount=0, **SHORT)
async def more_often_than_allowed(s: Side) -> None:
    await s.add("a", HANGS, {"return": 1}, attempts=3)
    await s.start()
    await s.until("active", "a")
    await s.kill()
    await s.ended("a")


@scenario(kills=True, varies=("q/events/picked up",), **SHORT)
async def with_priority(s: Side) -> None:
    await s.add("a", HANGS, {"return": 1}, priority=3)
    await s.start()
    await s.until("active", "a")
    await s.add("b", priority=1)
    await s.kill()
    await s.ended("a", "b")


@scenario(kills=True, queues={"child": SHORT}, **SHORT)
async def a_child(s: Side) -> None:
    child = s.child("c", HANGS, {"return": 1}, queue="child")
    await s.flow("p", {"call": [["getChildrenValues"]]}, children=[child])
    await s.start()
    await s.until("active", "c", queue="child")
    await s.kill()
    await s.ended("p")


@scenario(kills=True, maxStalledCount=0, queues={"child": {"maxStalledCount": 0, **SHORT}}, **SHORT)
async def a_child_that_fails_its_parent(s: Side) -> None:
    child = s.child("c", HANGS, {"return": 1}, queue="child", failParentOnFailure=True)
    await s.flow("p", {"return": 1}, children=[child])
    await s.start()
    await s.until("active", "c", queue="child")
    await s.kill()
    await s.ended("p")


@scenario(kills=True, **SHORT)
async def one_that_reported_progress(s: Side) -> None:
    await s.add("a", {"progress": 40, "log": "begun", **HANGS}, {"see": ["progress"]})
    await s.start()
    await s.until_events("progress", 1)
    await s.kill()
    await s.ended("a")


@scenario(kills=True, **SHORT)
async def an_iteration_of_a_scheduler(s: Side) -> None:
    await s.schedule({"every": 3_600_000}, HANGS, {"return": 1})
    await s.start()
    await s.until_count("active", 1)
    await s.kill()
    await s.until_events("completed", 1)
    await s.until_count("delayed", 1)


@scenario(kills=True, concurrency=3, **SHORT)
async def several_at_once(s: Side) -> None:
    names = [f"j{n}" for n in range(3)]
    for name in names:
        await s.add(name, HANGS, {"return": name})
    await s.start()
    await s.until("active", *names)
    await s.kill()
    await s.ended(*names)
