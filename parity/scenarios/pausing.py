"""Queues that are paused and resumed, before and beside a worker."""

import asyncio

from parity.scenario import scenario
from parity.side import Side


@scenario(short=True)
async def before_the_start(s: Side) -> None:
    await s.queue("pause")
    await s.add("a")
    await s.add("b", priority=2)
    await s.start()
    await asyncio.sleep(0.3)
    s.fact("while paused", [await s.state("a"), await s.state("b")])
    await s.queue("resume")
    await s.ended("a", "b")


@scenario()
async def while_it_works(s: Side) -> None:
    """What runs goes on."""
    await s.start()
    await s.add("a", {"hold": True, "return": 1})
    await s.add("b")
    await s.until("active", "a")
    await s.queue("pause")
    await s.add("c", priority=1)
    await s.let_go("a")
    await s.ended("a")
    await asyncio.sleep(0.2)
    s.fact("while paused", [await s.state("b"), await s.state("c")])
    await s.queue("resume")
    await s.ended("b", "c")


@scenario()
async def and_never_resumed(s: Side) -> None:
    await s.start()
    await s.add("a", {"hold": True})
    await s.add("b")
    await s.until("active", "a")
    await s.queue("pause")
    await s.let_go("a")
    await s.ended("a")
    await s.add("c", delay=20)
    await s.left("delayed", "c")
    s.fact("while paused", [await s.state("b"), await s.state("c")])


@scenario()
async def a_failure_while_paused(s: Side) -> None:
    """The retry of a job that fails while its queue is paused waits for the resumption."""
    await s.start()
    await s.add("a", {"hold": True, "throw": "x"}, {"return": 2}, attempts=2)
    await s.until("active", "a")
    await s.queue("pause")
    await s.let_go("a")
    await s.left("active", "a")
    s.fact("while paused", await s.state("a"))
    await s.queue("resume")
    await s.ended("a")


@scenario()
async def a_backoff_that_ends_while_paused(s: Side) -> None:
    await s.start()
    await s.add("a", {"hold": True, "throw": "x"}, {"return": 2}, attempts=2, backoff=150)
    await s.until("active", "a")
    await s.queue("pause")
    await s.let_go("a")
    await s.left("active", "a")
    await s.left("delayed", "a")
    await s.queue("resume")
    await s.ended("a")


@scenario()
async def a_delay_that_ends_while_paused(s: Side) -> None:
    await s.start()
    await s.queue("pause")
    await s.add("a", delay=150)
    await s.add("b", delay=150, priority=2)
    await s.left("delayed", "a")
    await s.left("delayed", "b")
    await s.queue("resume")
    await s.ended("a", "b")


@scenario()
async def again_and_again(s: Side) -> None:
    await s.start()
    for name in "abc":
        await s.queue("pause")
        await s.add(name, {"return": name})
        await s.queue("resume")
        await s.ended(name)


@scenario()
async def a_retry_by_the_api_while_paused(s: Side) -> None:
    await s.add("a", {"throw": "x"}, {"return": 2})
    await s.start()
    await s.ended("a")
    await s.queue("pause")
    await s.job("a", "retry", "failed")
    s.fact("while paused", await s.state("a"))
    await s.queue("resume")
    await s.ended("a")


@scenario(queues=["child"])
async def a_parents_queue(s: Side) -> None:
    await s.queue("pause")
    await s.flow("p", {"return": 1}, children=[s.child("c", queue="child")])
    await s.start()
    await s.ended("c", queue="child")
    s.fact("while paused", await s.state("p"))
    await s.queue("resume")
    await s.ended("p")
