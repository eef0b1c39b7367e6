from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest

from tests.support.clients import Connect, connected
from tests.support.until import PATIENCE


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands wait for a connection as long as a busy machine needs to start a server."""
    monkeypatch.setattr("autoflow_worker.broker.channel.CONNECT_PATIENCE", PATIENCE)


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    """Open clients; all of them are closed at the end."""
    async with AsyncExitStack() as stack:
        yield lambda url: stack.enter_async_context(connected(url))
