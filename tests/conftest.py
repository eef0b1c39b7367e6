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
    Connection,
    Database,
    check_rows,
    create_database,
    reset_database,
)
from tests.support.node import Node, NodeProcess
from tests.support.process import WorkerStarter
from tests.support.running import RunWorker, running
from tests.support.servers import OwnServer, own_postgres_server, own_redis_server

_numbers = itertools.count(1)


@pytest.fixture(autouse=True)
def nothing_forgotten(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Fail a test in which asyncio met an exception that nobody asked for."""
    yield
    complaints = [r.getMessage() for r in caplog.get_records("call") if r.name == "asyncio"]
    assert not complaints, "\n".join(complaints)


@pytest.fixture(autouse=True)
def loggers_forget() -> Iterator[None]:
    """Undo what a test configured for logs: a logger used meanwhile keeps it for the next tests."""
    yield
    structlog.reset_defaults()
    for name, module in list(sys.modules.items()):
        if name.startswith("autoflow_worker") and hasattr(module, "log"):
            vars(module.log).pop("bind", None)


class SharedServers:
    """The servers that all tests share; started when they are first asked for."""

    def __init__(self) -> None:
        self.redis: EmbeddedRedis | None = None
        self.postgres: EmbeddedPostgres | None = None

    def urls(self) -> tuple[str, str]:
        """Redis' URL and PostgreSQL's, of servers that run."""
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
    """The shared Redis server. A test keeps to its own `prefix`."""
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
    """A database of the test's own with an empty tasks table.

    Afterwards every row is read back by the API's strict schema; a test that puts rows there which
    the API refuses is marked `foreign_rows`.
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
    """Reads and writes rows of `database_url` as the API does."""
    async with await Connection.connect(database_url, autocommit=True) as connection:
        yield Database(database_url, connection)


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
    """A Redis server that the test may stop, kill, suspend and start again; its data stays."""
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
    """A PostgreSQL server that the test may stop, kill, suspend and start again; its data stays."""
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
    """The API as it is today, with BullMQ 5.65: schedules tasks, and sees both stores."""
    return Api(db, node5)
