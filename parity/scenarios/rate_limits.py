"""Limits of how many jobs start in a time."""

import asyncio

from parity.scenario import scenario
from parity.side import Side


async def span(s: Side, *names: str) -> int:
    """Return the milliseconds between the first start and the last."""
    moments = [int((await s.hash(name))["processedOn"]) for name in names]
    return max(moments) - min(moments)


@scenario(limiter={"max": 2, "duration": 300}, varies=("q/limiter",))
async def of_the_worker(s: Side) -> None:
    names = [f"j{n}" for n in range(5)]
    for name in names:
        await s.add(name)
    await s.start()
    await s.ended(*names)
    s.fact("spread", await span(s, *names) >= 500)


@scenario(limiter={"max": 1, "duration": 200}, concurrency=5, varies=("q/limiter",))
async def of_a_worker_with_many_slots(s: Side) -> None:
    names = [f"j{n}" for n in range(4)]
    for name in names:
        await s.add(name)
    await s.start()
    await s.ended(*names)
    s.fact("spread", await span(s, *names) >= 500)


@scenario(limiter={"max": 1, "duration": 150}, varies=("q/limiter",))
async def with_priorities(s: Side) -> None:
    for name, priority in {"a": 3, "b": 1, "c": 2}.items():
        await s.add(name, priority=priority)
    await s.start()
    await s.ended(*"abc")


@scenario(varies=("q/limiter",))
async def by_the_handler(s: Side) -> None:
    """`rateLimit` and `RateLimitError` use no attempt up."""
    await s.add("a", {"limit": 300}, {"see": ["attemptsMade", "attemptsStarted"]})
    await s.add("b")
    await s.start()
    await s.ended("a", "b")


@scenario(varies=("q/limiter",))
async def by_the_handler_with_priority(s: Side) -> None:
    await s.add("a", {"limit": 200}, {"return": 1}, priority=2)
    await s.add("b", priority=3)
    await s.start()
    await s.ended("a", "b")


@scenario(varies=("q/limiter",))
async def by_the_api(s: Side) -> None:
    """A worker without a limiter of its own heeds a limit by hand."""
    await s.queue("rateLimit", 400)
    await s.add("a")
    await s.start()
    s.fact("limited", await s.state("a"))
    await s.ended("a")


@scenario(versions=(6,), varies=("q/limiter",))
async def of_the_queue(s: Side) -> None:
    """`setGlobalRateLimit`, which 6.x has."""
    await s.queue("setGlobalRateLimit", 1, 200)
    names = [f"j{n}" for n in range(3)]
    for name in names:
        await s.add(name)
    await s.start()
    await s.ended(*names)
    s.fact("spread", await span(s, *names) >= 300)


@scenario(limiter={"max": 1, "duration": 500}, varies=("q/limiter",))
async def delayed_jobs_wait_too(s: Side) -> None:
    await s.add("a")
    await s.add("b", delay=100)
    await s.start()
    await s.ended("a", "b")
    s.fact("spread", await span(s, "a", "b") >= 400)


@scenario(concurrency=4)
async def global_concurrency(s: Side) -> None:
    """One job at a time in the whole queue, whatever the worker's concurrency."""
    await s.queue("setGlobalConcurrency", 1)
    names = [f"j{n}" for n in range(4)]
    for name in names:
        await s.add(name, {"sleep": 60})
    await s.start()
    await s.ended(*names)
    s.fact("one by one", await one_by_one(s))


async def one_by_one(s: Side) -> bool:
    kinds = [e["event"] for e in await s.events() if e["event"] in ("active", "completed")]
    return kinds == ["active", "completed"] * (len(kinds) // 2)


@scenario(concurrency=4)
async def global_concurrency_lifted(s: Side) -> None:
    await s.start()
    await s.queue("setGlobalConcurrency", 1)
    await s.add("a", {"hold": True})
    await s.add("b", {"hold": True})
    await s.until("active", "a")
    await asyncio.sleep(0.1)
    s.fact("maxed", await s.state("b"))
    await s.queue("removeGlobalConcurrency")
    await s.until("active", "b")
    await s.let_go("a", "b")
    await s.ended("a", "b")
