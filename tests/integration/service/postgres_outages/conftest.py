"""A PostgreSQL server that a test may break, and a worker that uses it."""

from collections.abc import AsyncIterator, Iterator

import pytest
from redis.asyncio import Redis

from autoflow_worker.local.embedded import EmbeddedPostgres
from autoflow_worker.recording import recorder
from tests.support.database import check_rows, reset_database
from tests.support.node import Node
from tests.support.postgres_scene import Scene
from tests.support.servers import OwnServer


@pytest.fixture(scope="session")
def breakable_postgres() -> Iterator[OwnServer]:
    """One server for these tests: each leaves it whole, and starting one takes long."""
    server = EmbeddedPostgres()
    server.start()
    yield OwnServer(server)
    server.close()


@pytest.fixture
async def postgres(breakable_postgres: OwnServer) -> AsyncIterator[OwnServer]:
    """A server with an empty tasks table, which the test may break."""
    server = breakable_postgres
    await reset_database(server.url)
    yield server
    if not server.server.running:
        await server.start()
    await check_rows(server.url)


@pytest.fixture
async def scene(  # noqa: PLR0917 - fixtures
    postgres: OwnServer,
    node5: Node,
    redis: Redis,
    prefix: str,
    redis_url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> Scene:
    # Starts go on after a second here, so that a test sees it happen.
    monkeypatch.setattr(recorder, "START_PATIENCE", 0.2)
    scene = Scene(postgres, node5, redis, prefix, redis_url)
    scene.gate.set()
    return scene
