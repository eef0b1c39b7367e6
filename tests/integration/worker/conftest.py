"""What several of these tests start from."""

from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from tests.support.closing import Queue
from tests.support.database import Database
from tests.support.plain import producer
from tests.support.poisoned import QUEUE, Poisoned
from tests.support.stage import Stage


@pytest.fixture
async def stage(
    redis: Redis, redis_url: str, database_url: str, prefix: str
) -> AsyncIterator[Stage]:
    async with (
        producer("plain", redis_url, prefix) as plain,
        producer("ours", redis_url, prefix) as ours,
    ):
        stage = Stage(redis, redis_url, database_url, prefix, plain, ours)
        stage.gate.set()
        yield stage


@pytest.fixture
async def poisoned(redis_url: str, prefix: str, db: Database) -> AsyncIterator[Poisoned]:
    async with Redis.from_url(redis_url) as raw:
        yield Poisoned(raw, f"{prefix}:{QUEUE}:".encode(), db)


@pytest.fixture
def queue(redis: Redis, prefix: str) -> Queue:
    return Queue(redis, prefix)
