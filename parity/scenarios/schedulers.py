"""Job schedulers, and the repeatable jobs that 5.65 still makes."""

import time
from datetime import UTC, datetime, timedelta
from typing import Any

from parity.scenario import scenario
from parity.side import Side

# An iteration that is added at its very second is not delayed.
BY_THE_SECOND = ("q/events/repeat:*", "q/*/delay")


@scenario(short=True)
async def every_with_a_limit(s: Side) -> None:
    await s.start()
    await s.schedule({"every": 1000, "limit": 3}, {"return": 1})
    await s.until_events("completed", 3)


@scenario()
async def every_until_removed(s: Side) -> None:
    await s.schedule({"every": 3_600_000}, {"return": 1})
    await s.start()
    await s.until_events("completed", 1)
    await s.until_count("delayed", 1)
    s.fact("removed", await s.queue("removeJobScheduler", "s"))


@scenario(varies=BY_THE_SECOND)
async def pattern(s: Side) -> None:
    await s.start()
    await s.schedule({"pattern": "* * * * * *", "limit": 2}, {"return": 1})
    await s.until_events("completed", 2)


@scenario()
async def pattern_at_once(s: Side) -> None:
    """`immediately` runs the first iteration now."""
    await s.schedule({"pattern": "0 0 1 1 *", "immediately": True}, {"return": 1})
    await s.start()
    await s.until_events("completed", 1)
    await s.until_count("delayed", 1)


@scenario()
async def pattern_with_zone(s: Side) -> None:
    """The next iteration is at the same moment on both sides."""
    repeat = {"pattern": "0 30 3 * * 1-5", "tz": "Asia/Kolkata", "immediately": True}
    await s.schedule(repeat, {"return": 1})
    await s.start()
    await s.until_events("completed", 1)
    await s.until_count("delayed", 1)
    s.fact("next", await next_of(s))


@scenario()
async def pattern_over_a_change_of_the_clock(s: Side) -> None:
    repeat = {"pattern": "0 15 2 * 3,10 7", "tz": "Europe/Berlin", "immediately": True}
    await s.schedule(repeat, {"return": 1})
    await s.start()
    await s.until_events("completed", 1)
    await s.until_count("delayed", 1)
    s.fact("next", await next_of(s))


@scenario()
async def patterns_of_every_kind(s: Side) -> None:
    """Each goes on, and at the same moment."""
    patterns = ["0 0 * * 5L", "@weekly", "0 12 * * FRI", "*/7 3-5 1,15 * *", "0 0 L * *"]
    template = {"name": s.scenario.queue, "data": {"script": []}}
    for number, one in enumerate(patterns):
        repeat = {"pattern": one, "immediately": True, "tz": "UTC"}
        await s.queue("upsertJobScheduler", f"p{number}", repeat, template)
    await s.start()
    await s.until_events("completed", len(patterns))
    await s.until_count("delayed", len(patterns))
    times: Any = await s.redis.zrange(s.key("repeat"), 0, -1, withscores=True)
    s.fact("next", {member: minute(score) for member, score in times})


async def next_of(s: Side) -> str:
    score = await s.redis.zscore(s.key("repeat"), "s")
    return "none" if score is None else minute(score)


def minute(score: float) -> str:
    return datetime.fromtimestamp(score / 1000, UTC).isoformat(timespec="minutes")


@scenario(varies=("q/*",))
async def end_date_that_is_near(s: Side) -> None:
    """Some iterations, and then none; how many depends on the moment of the first."""
    await s.start()
    end = datetime.now(UTC) + timedelta(seconds=4)
    await s.schedule({"every": 1000, "endDate": end.isoformat()}, {"return": 1})

    async def over() -> bool:
        return time.time() > end.timestamp() + 0.5 and not await s.redis.zcard(s.key("delayed"))

    await s.wait(over, "the end of the scheduler")
    ended = sum(event["event"] == "completed" for event in await s.events())
    s.fact("some", ended >= 2)


@scenario()
async def start_date(s: Side) -> None:
    await s.start()
    start = datetime.now(UTC) + timedelta(seconds=3)
    repeat = {"every": 3_600_000, "startDate": start.isoformat()}
    await s.schedule(repeat, {"return": 1})
    await s.until_events("completed", 1)
    await s.until_count("delayed", 1)


@scenario()
async def offset(s: Side) -> None:
    await s.start()
    await s.schedule({"every": 1000, "offset": 300, "limit": 2}, {"return": 1})
    await s.until_events("completed", 2)


@scenario()
async def template_with_options(s: Side) -> None:
    """The template's options hold for each iteration."""
    await s.start()
    opts = {"attempts": 2, "priority": 3, "removeOnComplete": False, "backoff": 20}
    await s.schedule({"every": 1000, "limit": 2}, {"throw": "x"}, {"return": 1}, **opts)
    await s.until_events("completed", 2)


@scenario()
async def iterations_that_fail(s: Side) -> None:
    """A scheduler goes on though its jobs fail."""
    await s.start()
    await s.schedule({"every": 1000, "limit": 3}, {"throw": "x"})
    await s.until_events("failed", 3)


@scenario()
async def upserted_beside_the_worker(s: Side) -> None:
    await s.schedule({"every": 3_600_000}, {"return": "old"})
    await s.start()
    await s.until_events("completed", 1)
    await s.until_count("delayed", 1)
    await s.schedule({"every": 1_800_000}, {"return": "new"})
    s.fact("schedulers", await s.queue("getJobSchedulersCount"))


@scenario(versions=(5,), varies=BY_THE_SECOND)
async def legacy_every(s: Side) -> None:
    """`add(..., {repeat})`: each iteration has the data."""
    await s.start()
    await s.add(None, {"return": "with data"}, repeat={"every": 1000, "limit": 3})
    await s.until_events("completed", 3)


@scenario(versions=(5,), varies=BY_THE_SECOND)
async def legacy_pattern(s: Side) -> None:
    await s.start()
    repeat = {"pattern": "* * * * * *", "limit": 2}
    await s.add(None, {"return": "with data"}, repeat=repeat)
    await s.until_events("completed", 2)


@scenario(versions=(5,), varies=BY_THE_SECOND)
async def legacy_with_a_key(s: Side) -> None:
    await s.start()
    repeat = {"every": 1000, "limit": 2, "key": "mine"}
    await s.add(None, {"throw": "x"}, {"return": 1}, repeat=repeat, attempts=2)
    await s.until_events("completed", 2)


@scenario(versions=(5,), varies=("q/*/opts/repeat/offset",))
async def legacy_removed(s: Side) -> None:
    await s.add(None, {"return": 1}, repeat={"every": 3_600_000, "immediately": True})
    await s.start()
    await s.until_events("completed", 1)
    await s.until_count("delayed", 1)
    [key] = [job["key"] for job in await s.queue("getRepeatableJobs")]
    s.fact("removed", await s.queue("removeRepeatableByKey", key))
