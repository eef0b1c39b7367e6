"""Delayed jobs: those that are added so, and those that their handlers delay."""

import asyncio
import time

from parity.scenario import scenario
from parity.side import Side

HOUR = 3_600_000


@scenario()
async def in_the_order_of_their_times(s: Side) -> None:
    now = round(time.time() * 1000)
    for delay in (300, 100, 200):
        await s.add(f"d{delay}", delay=delay, timestamp=now)
    await s.start()
    await s.ended("d100", "d200", "d300")


@scenario()
async def not_before_their_time(s: Side) -> None:
    await s.start()
    await s.add("a", delay=400)
    await s.ended("a")
    job = await s.hash("a")
    s.fact("on time", int(job["processedOn"]) - int(job["timestamp"]) >= 399)


@scenario()
async def with_priority(s: Side) -> None:
    await s.add("a", delay=50, priority=3)
    await s.add("b", delay=50, priority=1)
    await s.add("c", delay=50)
    await asyncio.sleep(0.2)
    await s.start()
    await s.ended(*"abc")


@scenario()
async def promoted(s: Side) -> None:
    await s.add("a", delay=HOUR)
    await s.add("b", delay=HOUR, priority=2)
    await s.start()
    await s.job("a", "promote")
    await s.job("b", "promote")
    await s.ended("a", "b")


@scenario()
async def all_promoted(s: Side) -> None:
    for name in "abc":
        await s.add(name, delay=HOUR)
    await s.start()
    await s.queue("promoteJobs")
    await s.until_count("completed", 3)


@scenario()
async def changed(s: Side) -> None:
    await s.add("sooner", delay=HOUR)
    await s.add("later", delay=10)
    await s.job("later", "changeDelay", HOUR)
    await s.start()
    await s.job("sooner", "changeDelay", 50)
    await s.ended("sooner")
    await s.until("delayed", "later")


@scenario(short=True)
async def by_the_handler(s: Side) -> None:
    await s.add("a", {"delay": 100}, {"delay": 50}, {"see": ["attemptsMade", "attemptsStarted"]})
    await s.start()
    await s.ended("a")


@scenario()
async def by_the_handler_with_priority(s: Side) -> None:
    await s.add("a", {"delay": 30}, {"throw": "x"}, {}, attempts=2, priority=5)
    await s.start()
    await s.ended("a")


@scenario()
async def back_to_wait_by_the_handler(s: Side) -> None:
    """`moveToWait` and `WaitingError` use no attempt up."""
    await s.add("a", {"wait": True}, {"see": ["attemptsMade", "attemptsStarted"]})
    await s.add("b", {"wait": True}, {"return": 1}, priority=2)
    await s.start()
    await s.ended("a", "b")


@scenario()
async def an_idle_worker_wakes(s: Side) -> None:
    await s.start()
    await asyncio.sleep(0.3)
    await s.add("a", delay=200)
    await s.ended("a")
    await s.add("b")
    await s.ended("b")
