"""What stays of finished jobs, and what the API removes."""

from typing import Any

from parity.scenario import Json, scenario
from parity.side import Side

FAILS: Json = {"throw": "no"}
NAMES = tuple(f"j{n}" for n in range(5))


async def five(s: Side, *, fail: bool = False, **opts: Any) -> None:
    for name in NAMES:
        await s.add(name, FAILS if fail else {"return": name}, **opts)
    await s.start()
    await s.ended(*NAMES)
    await s.until_events("failed" if fail else "completed", len(NAMES))


@scenario(short=True)
async def completed_all(s: Side) -> None:
    await five(s, removeOnComplete=True)


@scenario()
async def completed_none(s: Side) -> None:
    await five(s, removeOnComplete=False)


@scenario(varies=("q/q-*", "q/completed"))
async def completed_but_two(s: Side) -> None:
    """Jobs that end in one millisecond are removed in any order."""
    await five(s, removeOnComplete=2)
    s.fact("kept", await s.queue("getCompletedCount"))


@scenario()
async def completed_but_none(s: Side) -> None:
    await five(s, removeOnComplete=0)


@scenario(varies=("q/q-*", "q/completed"))
async def completed_by_count_and_age(s: Side) -> None:
    await five(s, removeOnComplete={"age": 3600, "count": 3})
    s.fact("kept", await s.queue("getCompletedCount"))


@scenario()
async def completed_by_age(s: Side) -> None:
    await five(s, removeOnComplete={"age": 3600})


@scenario()
async def failed_all(s: Side) -> None:
    await five(s, fail=True, removeOnFail=True)


@scenario(varies=("q/q-*", "q/failed"))
async def failed_but_two(s: Side) -> None:
    await five(s, fail=True, removeOnFail=2)
    s.fact("kept", await s.queue("getFailedCount"))


@scenario(removeOnComplete={"count": 0}, removeOnFail={"count": 0})
async def by_the_worker(s: Side) -> None:
    """The worker's options hold for jobs that say nothing themselves."""
    await s.add("a")
    await s.add("b", removeOnComplete=False)
    await s.add("c", FAILS)
    await s.add("d", FAILS, removeOnFail=False)
    await s.start()
    await s.ended(*"abcd")


@scenario(removeOnComplete={"age": 3600, "count": 100})
async def by_the_workers_age(s: Side) -> None:
    await five(s)


@scenario()
async def cleaned(s: Side) -> None:
    for name in NAMES:
        await s.add(name, FAILS if name == "j0" else {})
    await s.start()
    await s.ended(*NAMES)
    s.fact("completed", sorted(map(s.short, await s.queue("clean", 0, 100, "completed"))))
    s.fact("failed", sorted(map(s.short, await s.queue("clean", 0, 100, "failed"))))
    await s.add("later")
    await s.ended("later")


@scenario()
async def drained(s: Side) -> None:
    """What runs goes on; what waits is gone."""
    await s.start()
    await s.add("a", {"hold": True, "return": 1})
    await s.until("active", "a")
    for name in "bc":
        await s.add(name)
    await s.add("d", delay=3_600_000)
    await s.queue("drain", True)
    await s.let_go("a")
    await s.ended("a")


@scenario()
async def obliterated(s: Side) -> None:
    await s.add("a")
    await s.start()
    await s.ended("a")
    await s.queue("obliterate")
    await s.queue("resume")
    await s.add("b")
    await s.ended("b")


@scenario()
async def by_the_api(s: Side) -> None:
    await s.add("waiting", delay=3_600_000)
    await s.add("a")
    await s.start()
    await s.ended("a")
    for name in ("waiting", "a"):
        await s.job(name, "remove")
    await s.add("a", {"return": "again"})
    await s.until_events("completed", 2)


@scenario()
async def a_running_job_can_not_be(s: Side) -> None:
    await s.start()
    await s.add("a", {"hold": True, "return": 1})
    await s.until("active", "a")
    s.fact("removed", await s.queue("remove", s.id("a")))
    await s.let_go("a")
    await s.ended("a")
