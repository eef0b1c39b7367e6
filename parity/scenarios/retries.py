"""Attempts and the pauses between them."""

from parity.scenario import Json, scenario
from parity.side import Side

FAILS: Json = {"throw": "not yet"}


@scenario()
async def at_once(s: Side) -> None:
    """Without a backoff the job waits again at once."""
    await s.add("a", FAILS, FAILS, {"return": "third"}, attempts=3)
    await s.start()
    await s.ended("a")


@scenario()
async def at_once_with_priority(s: Side) -> None:
    await s.add("a", FAILS, {"return": 1}, attempts=2, priority=2)
    await s.add("b", priority=2)
    await s.add("c", priority=1)
    await s.start()
    await s.ended("a", "b", "c")


@scenario()
async def fixed(s: Side) -> None:
    await s.add("a", FAILS, FAILS, {}, attempts=3, backoff={"type": "fixed", "delay": 60})
    await s.add("b", FAILS, {}, attempts=2, backoff=1000)
    await s.start()
    await s.ended("a", "b")


@scenario()
async def exponential(s: Side) -> None:
    backoff = {"type": "exponential", "delay": 30}
    await s.add("a", FAILS, FAILS, FAILS, {}, attempts=4, backoff=backoff)
    await s.start()
    await s.ended("a")


@scenario(varies=("q/q-a/delay", "q/events/q-a"))
async def jitter(s: Side) -> None:
    """A jitter shortens the backoff, at most by its share."""
    backoff = {"type": "fixed", "delay": 200, "jitter": 0.5}
    await s.add("a", FAILS, {}, attempts=2, backoff=backoff)
    await s.start()
    await s.ended("a")
    s.fact("within its bounds", 100 <= int((await s.hash("a"))["delay"]) <= 200)


@scenario()
async def no_backoff_delay(s: Side) -> None:
    await s.add("a", FAILS, {}, attempts=2, backoff={"type": "fixed", "delay": 0})
    await s.add("b", FAILS, {}, attempts=2, backoff={"type": "exponential", "delay": 0})
    await s.start()
    await s.ended("a", "b")


@scenario(backoff="linear")
async def own_strategy(s: Side) -> None:
    await s.add("a", FAILS, FAILS, {}, attempts=3, backoff={"type": "custom"})
    await s.start()
    await s.ended("a")


@scenario(backoff="once more")
async def own_strategy_that_ends(s: Side) -> None:
    """-1 says that there is no further attempt."""
    await s.add("a", FAILS, FAILS, {}, attempts=5, backoff={"type": "custom"})
    await s.start()
    await s.ended("a")


@scenario(backoff="by type")
async def own_strategy_by_type(s: Side) -> None:
    await s.add("a", FAILS, {}, attempts=2, backoff={"type": "slowly"})
    await s.add("b", {"throw": "longer message"}, {}, attempts=2, backoff={"type": "x"})
    await s.start()
    await s.ended("a", "b")


@scenario(backoff="later")
async def own_async_strategy(s: Side) -> None:
    await s.add("a", FAILS, {}, attempts=2, backoff={"type": "custom"})
    await s.start()
    await s.ended("a")


@scenario()
async def used_up(s: Side) -> None:
    await s.add("a", *[FAILS] * 3, attempts=3, backoff=20)
    await s.add("b", *[FAILS] * 2)
    await s.add("c", *[FAILS] * 2, attempts=0)
    await s.start()
    await s.ended("a", "b", "c")


@scenario(short=True)
async def by_the_api(s: Side) -> None:
    """`job.retry()` of a failed job, and of a completed one."""
    await s.add("a", FAILS, {"return": "second run"})
    await s.add("b", {"return": 1}, {"return": 2})
    await s.start()
    await s.ended("a", "b")
    await s.job("a", "retry", "failed")
    await s.job("b", "retry", "completed")
    await s.until_events("active", 4)
    await s.ended("a", "b")


@scenario(versions=(6,))
async def by_the_api_with_reset(s: Side) -> None:
    """`job.retry(state, options)`, which 6.x has."""
    options = {"resetAttemptsMade": True, "resetAttemptsStarted": True}
    await s.add("a", FAILS, FAILS, {"see": ["attemptsMade"]}, attempts=2)
    await s.start()
    await s.ended("a")
    await s.job("a", "retry", "failed", options)
    await s.until_events("active", 4)
    await s.ended("a")


@scenario()
async def all_failed_jobs(s: Side) -> None:
    """`queue.retryJobs()`."""
    for name in "abc":
        await s.add(name, FAILS, {"return": name})
    await s.start()
    await s.ended(*"abc")
    await s.queue("retryJobs", {"state": "failed"})
    await s.until_count("completed", 3)


@scenario()
async def added_again_after_the_failure(s: Side) -> None:
    """BullMQ ignores the id of a job that it keeps."""
    await s.add("a", FAILS, {})
    await s.start()
    await s.ended("a")
    await s.add("a", {"return": "new"})
    await s.add("b")
    await s.ended("b")
