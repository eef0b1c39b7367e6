"""The fixtures; tests/README.md lists them. All of xdist's workers share one pair of servers."""

import itertools
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import structlog
from redis.asyncio import Redis

from autoflow_worker.local.embedded import EmbeddedPostgres, EmbeddedRedis
from tests.support.api import Api
from tests.support.database import (
    Database,
    check_rows,
    create_database,
    open_database,
    reset_database,
)
from tests.support.node import Node, NodeProcess
from tests.support.process import WorkerStarter
from tests.support.running import RunWorker, running
from tests.support.servers import OwnServer, own_postgres_server, own_redis_server

_numbers = itertools.count(1)


@pytest.fixture(autouse=True)
def nothing_forgotten(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Fail a test in which asyncio logs an exception that was never retrieved."""
    yield
    complaints = [r.getMessage() for r in caplog.get_records("call") if r.name == "asyncio"]
    assert not complaints, "\n".join(complaints)


@pytest.fixture(autouse=True)
def loggers_forget() -> Iterator[None]:
    """Reset the logs' configuration, which used loggers cache."""
    yield
    structlog.reset_defaults()
    for name, module in list(sys.modules.items()):
        if name.startswith("autoflow_worker") and hasattr(module, "log"):
            vars(module.log).pop("bind", None)


class SharedServers:
    """The servers that all tests share; they start at first use."""

    def __init__(self) -> None:
        self.redis: EmbeddedRedis | None = None
        self.postgres: EmbeddedPostgres | None = None

    def urls(self) -> tuple[str, str]:
        """Return Redis' URL and PostgreSQL's; start the servers if needed."""
        if self.redis is None or self.postgres is None:
            self.redis, self.postgres = EmbeddedRedis(), EmbeddedPostgres()
            self.redis.start()
            self.postgres.start()
        return self.redis.url, self.postgres.url

    def close(self) -> None:
        for server in (self.redis, self.postgres):
            if server is not None:
                server.close()


SERVERS = pytest.StashKey[SharedServers]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[SERVERS] = SharedServers()


def pytest_unconfigure(config: pytest.Config) -> None:
    config.stash[SERVERS].close()


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    # In the controller, for each of xdist's workers.
    node.workerinput["server_urls"] = node.config.stash[SERVERS].urls()


@pytest.fixture(scope="session")
def server_urls(request: pytest.FixtureRequest) -> tuple[str, str]:
    """Redis' URL and PostgreSQL's, of the shared servers."""
    given = getattr(request.config, "workerinput", None)
    urls: tuple[str, str] = given["server_urls"] if given else request.config.stash[SERVERS].urls()
    return urls


@pytest.fixture
def redis_url(server_urls: tuple[str, str]) -> str:
    """The shared Redis server's URL. A test uses only its own `prefix`."""
    return server_urls[0]


@pytest.fixture
def prefix(worker_id: str) -> str:
    """A BullMQ key prefix that no other test has."""
    return f"t-{worker_id}-{next(_numbers)}"


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    """A plain client of the shared Redis server."""
    async with Redis.from_url(redis_url, decode_responses=True) as client:
        yield client


_database_urls: dict[str, str] = {}


@pytest.fixture
async def database_url(
    server_urls: tuple[str, str], worker_id: str, request: pytest.FixtureRequest
) -> AsyncIterator[str]:
    """The URL of the test's own database, with an empty tasks table.

    After the test, every row must pass the API's strict schema. A test that leaves other rows is
    marked `foreign_rows`.
    """
    if worker_id in _database_urls:
        url = _database_urls[worker_id]
    else:
        url = _database_urls[worker_id] = await create_database(
            server_urls[1], f"tests_{worker_id}"
        )
    yield url
    try:
        if request.node.get_closest_marker("foreign_rows") is None:
            await check_rows(url)
    finally:
        await reset_database(url)


@pytest.fixture
async def db(database_url: str) -> AsyncIterator[Database]:
    """Rows of `database_url`, read and written as the API does."""
    async with open_database(database_url) as db:
        yield db


@pytest.fixture
async def make_redis() -> AsyncIterator[Callable[..., Awaitable[OwnServer]]]:
    """Starts Redis servers of the test's own: `await make_redis(program=..., appendonly=...)`."""
    async with AsyncExitStack() as stack:

        async def make(*, program: Path | None = None, appendonly: bool = True) -> OwnServer:
            server = await own_redis_server(program=program, appendonly=appendonly)
            stack.push_async_callback(server.close)
            return server

        yield make


@pytest.fixture
async def own_redis(make_redis: Callable[..., Awaitable[OwnServer]]) -> OwnServer:
    """A Redis server that the test may stop, kill, suspend and start again."""
    return await make_redis()


@pytest.fixture
async def make_postgres() -> AsyncIterator[Callable[..., Awaitable[OwnServer]]]:
    """Starts PostgreSQL servers of the test's own: `await make_postgres(program=...)`."""
    async with AsyncExitStack() as stack:

        async def make(*, program: Path | None = None) -> OwnServer:
            server = await own_postgres_server(program=program)
            stack.push_async_callback(server.close)
            await reset_database(server.url)
            return server

        yield make


@pytest.fixture
async def own_postgres(
    make_postgres: Callable[..., Awaitable[OwnServer]], request: pytest.FixtureRequest
) -> AsyncIterator[OwnServer]:
    """A PostgreSQL server that the test may stop, kill, suspend and start again."""
    server = await make_postgres()
    yield server
    if server.server.running and request.node.get_closest_marker("foreign_rows") is None:
        server.resume()
        await check_rows(server.url)


@pytest.fixture
def run_worker(redis_url: str, database_url: str, prefix: str) -> RunWorker:
    """Runs the worker in the test's own process: `async with run_worker(tasks, **settings):`."""
    return partial(running, redis_url=redis_url, database_url=database_url, prefix=prefix)


@pytest.fixture
async def worker_process(
    tmp_path: Path, redis_url: str, database_url: str, prefix: str
) -> AsyncIterator[WorkerStarter]:
    """Starts real worker processes: `worker_process(tasks_text, *arguments, **env)`."""
    starter = WorkerStarter(
        tmp_path,
        {
            "REDIS_URL": redis_url,
            "DATABASE_URL": database_url,
            "BULLMQ_PREFIX": prefix,
            "LOG_FORMAT": "json",
        },
    )
    yield starter
    await starter.close()


@pytest.fixture(scope="session")
def node_process() -> Iterator[NodeProcess]:
    """The Node process that serves this worker's tests: starting one for each takes long."""
    with NodeProcess() as process:
        yield process


@pytest.fixture
async def node5(redis_url: str, prefix: str, node_process: NodeProcess) -> AsyncIterator[Node]:
    """BullMQ 5.65 in Node, on the shared Redis server and the test's prefix."""
    async with Node(5, redis_url, prefix, process=node_process) as node:
        yield node


@pytest.fixture
async def node6(redis_url: str, prefix: str, node_process: NodeProcess) -> AsyncIterator[Node]:
    """BullMQ 6.7 in Node, on the shared Redis server and the test's prefix."""
    async with Node(6, redis_url, prefix, process=node_process) as node:
        yield node


@pytest.fixture(params=[5, 6], ids=["node5", "node6"])
async def node(
    request: pytest.FixtureRequest, redis_url: str, prefix: str, node_process: NodeProcess
) -> AsyncIterator[Node]:
    """As `node5` and `node6`: the test runs once with each."""
    async with Node(request.param, redis_url, prefix, process=node_process) as node:
        yield node


@pytest.fixture
def api(db: Database, node5: Node) -> Api:
    """Today's API, with BullMQ 5.65, which schedules tasks and reads both stores."""
    return Api(db, node5)
