"""The marker of a queue as a worker reads it, beside the official producer."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from bullmq import Queue
from redis.asyncio import Redis

from autoflow_worker.broker.client import PipelinedRedis
from autoflow_worker.broker.marker import Marker
from tests.support.plain import producer
from tests.support.until import PATIENCE


@pytest.fixture
async def queue(redis_url: str, prefix: str) -> AsyncIterator[Queue]:
    async with producer("naps", redis_url, prefix) as made:
        yield made


@pytest.fixture
async def marker(redis_url: str, queue: Queue) -> AsyncIterator[Marker]:
    client = PipelinedRedis(redis_url)
    await client.open(PATIENCE)
    made = Marker(client, queue.keys)
    await made.open("a-name", PATIENCE)
    yield made
    await client.aclose()


async def test_it_tells_that_there_are_jobs_or_when_one_is_due(
    queue: Queue, marker: Marker
) -> None:
    job = await queue.add("naps", {}, {"delay": 600_000})
    assert await marker.wait(600, asyncio.Event()) == job.timestamp + 600_000
    await queue.add("naps", {}, {})
    assert await marker.wait(600, asyncio.Event()) == 0
    assert await marker.wait(0.01, asyncio.Event()) is None


async def test_a_lost_marker_is_made_good_while_the_read_goes_on(
    queue: Queue, marker: Marker, redis: Redis
) -> None:
    job = await queue.add("naps", {}, {"delay": 600_000})
    await redis.delete(queue.keys["marker"])
    assert await marker.wait(600, asyncio.Event(), look_after=0.05) == job.timestamp + 600_000
    await queue.add("naps", {}, {})
    await redis.delete(queue.keys["marker"])
    assert await marker.wait(600, asyncio.Event(), look_after=0.05) == 0


@pytest.mark.parametrize(("score", "told"), [("inf", 2**53), ("-inf", 0), ("1e300", 2**53)])
async def test_any_score_is_a_time(
    queue: Queue, marker: Marker, redis: Redis, score: str, told: int
) -> None:
    await redis.zadd(queue.keys["marker"], {"1": float(score)})
    assert await marker.wait(600, asyncio.Event()) == told
