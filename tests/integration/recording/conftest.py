"""A recorder for each test."""

from collections.abc import AsyncIterator

import pytest

from autoflow_worker.recording.recorder import StatusRecorder
from tests.support.database import Database
from tests.support.recording import recording


@pytest.fixture
async def keeper(db: Database) -> AsyncIterator[StatusRecorder]:
    """A recorder with one connection on the test's database."""
    async with recording(db.url) as opened:
        yield opened
