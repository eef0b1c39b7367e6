"""Schedule tasks from Python: a row and its job, as the API makes them (contract, section 5)."""

import asyncio
from collections.abc import Mapping
from typing import Any, Final, Self, TypeVar

import structlog
from redis.exceptions import ConnectionError as RedisConnectionError

from autoflow_worker.broker.client import PipelinedRedis
from autoflow_worker.broker.producer import Producer
from autoflow_worker.broker.replies import CommandRefusedError
from autoflow_worker.clock import now_ms
from autoflow_worker.errors import RedisUnavailableError, RedisUnfitError, WorkerError
from autoflow_worker.pauses import Pauses
from autoflow_worker.recording import patches
from autoflow_worker.recording.new_rows import PATIENCE, RETRY_PAUSE, RETRY_PAUSE_MAX, NewRows
from autoflow_worker.scheduling.jobs import job_data, job_options
from autoflow_worker.settings import check_urls
from autoflow_worker.tasks.definition import TaskDefinition

log = structlog.get_logger(__name__)

CLOSE_PATIENCE: Final = 6 * PATIENCE  # seconds that closing waits for calls of `schedule`

P = TypeVar("P")


class TaskScheduler:
    """Schedules tasks: for each, a row in PostgreSQL and a job in BullMQ.

    An async context manager. May be used by many coroutines at once.

    Args:
        redis_url: as REDIS_URL.
        database_url: as DATABASE_URL.
        prefix: BullMQ's key prefix.

    Raises:
        SettingsError: a URL can't be used; its message shows no part of it.
    """

    def __init__(self, *, redis_url: str, database_url: str, prefix: str = "bull") -> None:
        check_urls(redis_url=redis_url, database_url=database_url)
        self._redis_url = redis_url
        self._rows = NewRows(database_url.strip())
        self._prefix = prefix
        self._redis: PipelinedRedis | None = None
        self._producer: Producer | None = None
        self._begun: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def open(self, timeout: float = PATIENCE) -> None:
        """Connect to both servers.

        Args:
            timeout: seconds for which each of them is tried.

        Raises:
            RedisUnavailableError, DatabaseUnavailableError: it can't be reached.
        """
        self._redis = PipelinedRedis(self._redis_url)
        self._producer = Producer(self._redis, self._prefix)
        try:
            await self._redis.open(timeout)
            await self._rows.open(timeout)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Wait for running `schedule` calls, and disconnect. May be called twice."""
        if self._begun:
            await asyncio.wait(self._begun, timeout=CLOSE_PATIENCE)
        for begun in self._begun:
            begun.cancel()
        await self._rows.close()
        redis, self._redis = self._redis, None
        if redis is not None:
            await redis.aclose()

    async def schedule(
        self,
        task: TaskDefinition[P],
        payload: P | Mapping[str, object],
        *,
        delay_ms: int | None = None,
        user_id: str | None = None,
        correlation_id: str | None = None,
    ) -> str:
        """Add one job of a task, and its row; return the task's id.

        A caller that is cancelled does not stop this: the row and the job are added all the same.
        If the job can't be added, its row becomes `failed`.

        Args:
            task: whose queue, priority, attempts and backoff the job gets.
            payload: an instance of the task's payload type, or the object that it is in JSON.
            delay_ms: run it that many milliseconds later.
            user_id: whose task it is.
            correlation_id: passed on to the handler; generated if not given. A payload whose type
                names `correlationId` may bring it instead.

        Raises:
            PayloadError: the payload does not validate; nothing was written.
            RedisUnavailableError, RedisUnfitError: the job could not be added.
            DatabaseUnavailableError, DatabaseUnfitError: the row could not be inserted.
            WorkerError: the delay is out of range, or the scheduler is not open.
        """
        if self._redis is None:
            raise WorkerError("the scheduler is not open")
        options = job_options(task, delay_ms)
        data = job_data(task, payload, correlation_id)
        task.parse_payload(data)
        assert self._producer is not None
        job = self._producer.job(task.queue_name, data, options)
        begun = asyncio.create_task(self._schedule(job, _row(task, job, user_id)))
        self._begun.add(begun)
        begun.add_done_callback(self._end)
        await asyncio.shield(begun)
        return str(job.id)

    def _end(self, begun: asyncio.Task[None]) -> None:
        self._begun.discard(begun)
        if not begun.cancelled():
            begun.exception()  # Mark it as retrieved: the caller may have been cancelled.

    async def _schedule(self, job: Any, row: patches.Record) -> None:
        await self._reach_redis()
        await self._rows.insert(job.id, row)
        try:
            await self._add(job)
        except Exception as error:  # BullMQ raises errors without a class of their own.
            reason = f"the job could not be added: {error}"
            await self._withdraw(job, reason)
            if isinstance(error, RedisConnectionError) and not isinstance(
                error, CommandRefusedError
            ):
                raise RedisUnavailableError(reason) from error
            raise RedisUnfitError(reason) from error
        try:
            await self._rows.merge(job.id, {"externalId": job.id})
        except WorkerError as error:
            # The job is in its queue. A caller that got an error would schedule the task again.
            log.warning("external_id_not_recorded", task_id=job.id, reason=str(error))

    async def _reach_redis(self) -> None:
        assert self._redis is not None
        try:
            async with asyncio.timeout(PATIENCE):
                await self._redis.connected()
        except TimeoutError:
            reason = f"there is no connection to Redis for {PATIENCE:g} s"
            raise RedisUnavailableError(reason) from None

    async def _add(self, job: Any) -> None:
        """Add the job, and add it again when the connection breaks.

        A lost reply leaves open whether the job was added. Adding it again is safe: BullMQ adds an
        id once, and answers the second time with the job that exists.

        Raises:
            redis.exceptions.ConnectionError: the job was not added, or its fate is unknown.
            Exception: Redis or BullMQ refuses the job.
        """
        assert self._producer is not None
        deadline = asyncio.get_running_loop().time() + PATIENCE
        pauses = Pauses(RETRY_PAUSE, RETRY_PAUSE_MAX)
        while True:
            try:
                await self._producer.add(job)
            except RedisConnectionError:
                pause = pauses.take()
                if asyncio.get_running_loop().time() + pause > deadline:
                    raise
                await asyncio.sleep(pause)
            else:
                return

    async def _withdraw(self, job: Any, reason: str) -> None:
        """Mark the row failed, so that it does not stay `pending` without a job.

        The row is not deleted: the job may exist after all, and then needs its row.
        """
        log.error("job_not_added", queue=job.name, task_id=job.id, reason=reason)
        ended = now_ms()
        error = patches.error_record(reason, ended)
        patch = patches.failed_patch(now_ms=ended, attempt=0, error=error)
        try:
            await self._rows.merge_unless_started(job.id, patch)
        except WorkerError as failure:
            log.error("row_left_behind", task_id=job.id, reason=str(failure))


def _row(task: TaskDefinition[Any], job: Any, user_id: str | None) -> patches.Record:
    """Return the row as the API inserts it."""
    row = patches.unknown_job_row(
        task.queue_name, data=job.data, options=job.opts, timestamp=job.timestamp
    )
    if job.delay:
        row |= {"status": "delayed", "delayUntil": patches.iso(job.timestamp + job.delay)}
    return {**row, "userId": user_id}
