"""Examining both servers: before the start, and again when one of them refuses for long."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, TypeVar

from redis.exceptions import ConnectionError as RedisConnectionError

from autoflow_worker.broker.client import PipelinedRedis
from autoflow_worker.broker.requirements import RedisReport, examine_redis
from autoflow_worker.errors import (
    DatabaseRefusedError,
    DatabaseUnavailableError,
    DatabaseUnfitError,
    RedisRefusedError,
    RedisUnavailableError,
    RedisUnfitError,
)
from autoflow_worker.outage import Refusals
from autoflow_worker.recording.pool import CONNECT_TIMEOUT
from autoflow_worker.recording.table import inspect_tasks_table
from autoflow_worker.settings import Settings

START_PAUSE: Final = 0.1  # seconds before a server that is away at the start is examined again

T = TypeVar("T")


class Oversight:
    """Examines the servers of a service that works on these queues, as `check` does."""

    def __init__(self, settings: Settings, queues: Sequence[str]) -> None:
        self._settings = settings
        self._queues = queues

    async def examine_database(self) -> None:
        """Find out whether statuses can be recorded.

        Raises:
            WorkerError: PostgreSQL is away, refuses, or is unfit.
        """
        settings = self._settings
        await inspect_tasks_table(
            settings.database_url.get_secret_value(),
            queue=self._queues[0],
            new_rows=settings.record_unknown_jobs,
            patience=min(CONNECT_TIMEOUT, settings.worker_startup_timeout),
        )

    async def examine_redis(self, redis: PipelinedRedis) -> RedisReport:
        """Find out whether jobs can be run.

        Raises:
            WorkerError: Redis refuses, or is unfit.
            redis.exceptions.ConnectionError: it is away.
        """
        return await examine_redis(redis, self._settings.bullmq_prefix, self._queues)

    async def examine_redis_anew(self) -> None:
        """Do so over a new connection, as Redis may refuse the one that the service has."""
        redis = PipelinedRedis(self._settings.redis_url.get_secret_value())
        try:
            await redis.open(CONNECT_TIMEOUT)
            await self.examine_redis(redis)
        finally:
            await redis.aclose()


async def oversee(refusals: Refusals, examine: Callable[[], Awaitable[Any]]) -> None:
    """End with an error when a server refuses for good; an outage is waited out.

    Raises:
        WorkerError: the server has refused for long, and refuses or is unfit when examined, too.
    """
    while True:
        await refusals.lasting.wait()
        try:
            await examine()
        except (
            DatabaseRefusedError,
            DatabaseUnfitError,
            RedisRefusedError,
            RedisUnfitError,
        ) as error:
            raise type(error)(f"refused for {refusals.patience:g} s: {error}") from None
        except (DatabaseUnavailableError, RedisUnavailableError, RedisConnectionError):
            pass
        refusals.forget()


async def persist(examine: Callable[[], Awaitable[T]], timeout: float) -> T:
    """Examine a server; one that is away may come in time.

    Raises:
        WorkerError: the server was away for `timeout` seconds, or it refuses, or it is unfit.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout
    while True:
        try:
            return await examine()
        except DatabaseRefusedError:
            raise
        except DatabaseUnavailableError as error:
            if loop.time() > deadline:
                raise DatabaseUnavailableError(f"{error} (waited {timeout:g} s)") from None
        except RedisConnectionError as error:
            if loop.time() > deadline:
                raise RedisUnavailableError(f"Redis went away: {error}") from error
        await asyncio.sleep(START_PAUSE)
