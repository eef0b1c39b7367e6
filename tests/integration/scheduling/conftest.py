"""A scheduler for each test."""

from collections.abc import AsyncIterator

import pytest

from autoflow_worker import TaskScheduler
from tests.support.scheduling import wait_for_servers
from tests.support.until import PATIENCE


@pytest.fixture
async def scheduler(redis_url: str, database_url: str, prefix: str) -> AsyncIterator[TaskScheduler]:
    async with TaskScheduler(
        redis_url=redis_url, database_url=database_url, prefix=prefix
    ) as opened:
        yield opened


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that comes back has the time that a busy machine needs."""
    wait_for_servers(monkeypatch, PATIENCE)
