"""The servers that all contestants use, and the jobs and rows in them."""

import json
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.resources import files
from typing import Any

import psutil
import psycopg
from redis import Redis

from autoflow_worker.local.embedded import EmbeddedPostgres, EmbeddedRedis
from bench.process import ROOT, cpu_seconds

PREFIX = "bench"
_SCHEMA = files("autoflow_worker.recording").joinpath("schema.sql").read_text()

# Insert the rows of a queue's jobs `first` to `last`, as the API does before it enqueues.
_ROWS = """
INSERT INTO tasks (id, data)
SELECT left(md5(%(queue)s || '-' || i), 21), jsonb_build_object(
  'schemaVersion', 1, 'taskName', %(queue)s::text, 'queueName', %(queue)s::text,
  'payload', %(payload)s::jsonb, 'status', 'pending', 'priority', 'normal', 'attempts', 0,
  'maxAttempts', 3, 'enqueuedAt', '2026-01-02T03:04:05.678Z', 'startedAt', null,
  'completedAt', null, 'failedAt', null, 'delayUntil', null, 'result', null, 'error', null,
  'userId', null, 'externalId', null)
FROM generate_series(%(first)s::bigint, %(last)s::bigint) AS i
"""


class Servers:
    """Valkey and PostgreSQL with their default settings, fsync included, on a disk of their own.

    Attributes:
        redis: a client.
        database: a connection in autocommit mode.
    """

    def __init__(self, redis: EmbeddedRedis, postgres: EmbeddedPostgres) -> None:
        self._redis_server = redis
        self._postgres_server = postgres
        self.redis_url = redis.url
        self.database_url = postgres.url
        self.redis = Redis.from_url(redis.url, decode_responses=True)
        self.database: psycopg.Connection[Any] = psycopg.connect(postgres.url, autocommit=True)
        self.reset()

    def close(self) -> None:
        self.database.close()
        self.redis.close()

    def reset(self) -> None:
        """Remove all jobs and rows, and flush what was written."""
        self.redis.flushall()
        self.database.execute("DROP TABLE IF EXISTS tasks")
        self.database.execute(_SCHEMA)
        self.database.execute("CHECKPOINT")

    def add_jobs(self, queues: Sequence[str], count: int, **more: Any) -> None:
        """Add jobs as the API does (see node/add.mjs), and return when Redis has them."""
        adding = self.start_adding(queues, count, **more)
        if adding.wait():
            raise RuntimeError("Node could not add the jobs")

    def start_adding(
        self, queues: Sequence[str], count: int, **more: Any
    ) -> subprocess.Popen[bytes]:
        """Start a process that adds jobs, and return at once."""
        command = [ROOT / "tests/node/node_modules/.node", ROOT / "bench/node/add.mjs"]
        adding = subprocess.Popen([*command, self.redis_url, PREFIX], stdin=subprocess.PIPE)
        assert adding.stdin is not None
        adding.stdin.write(json.dumps({"queues": queues, "count": count, **more}).encode())
        adding.stdin.close()
        return adding

    def add_rows(
        self,
        queues: Sequence[str],
        count: int,
        *,
        first: int = 0,
        payload: Mapping[str, Any] | None = None,
    ) -> None:
        """Insert the rows of that many jobs."""
        text = json.dumps(payload or {})
        for queue in queues:
            values = {"queue": queue, "first": first, "last": first + count - 1, "payload": text}
            self.database.execute(_ROWS, values)
        # Otherwise autovacuum does so in the middle of a measurement.
        self.database.execute("VACUUM ANALYZE tasks")

    def jobs_left(self, queues: Sequence[str]) -> int:
        """Return how many jobs wait or run."""
        pipeline = self.redis.pipeline(transaction=False)
        for queue in queues:
            pipeline.llen(f"{PREFIX}:{queue}:wait")
            pipeline.llen(f"{PREFIX}:{queue}:active")
            pipeline.zcard(f"{PREFIX}:{queue}:prioritized")
        return sum(pipeline.execute())

    def redis_cpu_seconds(self) -> float:
        return cpu_seconds(psutil.Process(self._redis_server.pid))

    def postgres_cpu_seconds(self) -> float:
        server = psutil.Process(self._postgres_server.pid)
        return sum(cpu_seconds(process) for process in [server, *server.children()])


@contextmanager
def own_servers(**postgres_settings: str) -> Iterator[Servers]:
    """Run both servers for the length of a block.

    Args:
        postgres_settings: what PostgreSQL needs a restart for.
    """
    redis, postgres = EmbeddedRedis(), EmbeddedPostgres()
    try:
        redis.start()
        postgres.start()
        if postgres_settings:
            with psycopg.connect(postgres.url, autocommit=True) as connection:
                for name, value in postgres_settings.items():
                    connection.execute(f"ALTER SYSTEM SET {name} = '{value}'".encode())
            postgres.stop()
            postgres.start()
        servers = Servers(redis, postgres)
        try:
            yield servers
        finally:
            servers.close()
    finally:
        postgres.close()
        redis.close()
