"""This worker's Redis client, open as long as a test needs it."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from autoflow_worker.broker.client import PipelinedRedis
from tests.support.until import PATIENCE

Connect = Callable[[str], Awaitable[PipelinedRedis]]
"""The fixture `connect`: opens a client of a URL, which is closed after the test."""


@asynccontextmanager
async def connected(url: str, timeout: float = PATIENCE) -> AsyncIterator[PipelinedRedis]:
    """An open client, closed afterwards."""
    client = PipelinedRedis(url)
    try:
        await client.open(timeout)
        yield client
    finally:
        await client.aclose()
