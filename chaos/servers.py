"""A Redis and a PostgreSQL server of our own, and the ways to break them."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import psycopg
from redis.asyncio import Redis

from tests.support.database import reset_database
from tests.support.servers import OwnServer, own_postgres_server, own_redis_server

REDIS, POSTGRES = "Redis", "PostgreSQL"


@dataclass(frozen=True)
class Outage:
    """When a server was away; epoch seconds."""

    server: str
    how: str
    began_at: float
    ended_at: float

    def __str__(self) -> str:
        return f"{self.server} {self.how} {self.began_at:.3f} to {self.ended_at:.3f}"


class Servers:
    """Both servers. A server breaks in one way at a time."""

    def __init__(self, redis: OwnServer, postgres: OwnServer, rng: random.Random) -> None:
        self.redis = redis
        self.postgres = postgres
        self.outages: list[Outage] = []
        self._rng = rng
        self._whole = {REDIS: asyncio.Lock(), POSTGRES: asyncio.Lock()}

    async def restart(self, name: str) -> None:
        """Stop the server, in good order or by SIGKILL, and start it again after a while."""
        server = self._server(name)
        kills = self._rng.random() < 0.5
        seconds = self._rng.choice([0.0, 0.0, self._rng.uniform(0.2, 3)])

        async def breaking() -> None:
            await (server.kill() if kills else server.stop())
            await asyncio.sleep(seconds)
            await server.start()

        await self._break(name, "killed" if kills else "stopped", breaking)

    async def suspend(self, name: str, seconds: float) -> None:
        """Let the server answer nothing for a while, with its connections open."""
        server = self._server(name)

        async def breaking() -> None:
            server.suspend()
            try:
                await asyncio.sleep(seconds)
            finally:
                server.resume()

        await self._break(name, "suspended", breaking)

    async def cut(self, name: str) -> None:
        """Cut every connection to the server."""
        if name == REDIS:
            await self._break(name, "connections cut", self._cut_redis)
        else:
            await self._break(name, "connections cut", self._cut_postgres)

    async def _cut_redis(self) -> None:
        async with Redis.from_url(self.redis.url) as client:
            await client.client_kill_filter(_type="normal", skipme=True)

    async def _cut_postgres(self) -> None:
        async with await psycopg.AsyncConnection.connect(
            self.postgres.url, autocommit=True
        ) as connection:
            await connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
            )

    async def _break(self, name: str, how: str, breaking: Callable[[], Awaitable[None]]) -> None:
        async with self._whole[name]:
            began_at = time.time()
            await breaking()
            self.outages.append(Outage(name, how, began_at, time.time()))

    def _server(self, name: str) -> OwnServer:
        return self.redis if name == REDIS else self.postgres


@asynccontextmanager
async def own_servers(rng: random.Random, *, appendonly: bool = True) -> AsyncIterator[Servers]:
    """Run both servers for the length of a block, with an empty tasks table.

    Args:
        appendonly: Redis keeps its data over a kill; each write waits for the disk.
    """
    redis = await own_redis_server(appendonly=appendonly)
    try:
        postgres = await own_postgres_server()
        try:
            await reset_database(postgres.url)
            yield Servers(redis, postgres, rng)
        finally:
            await postgres.close()
    finally:
        await redis.close()
