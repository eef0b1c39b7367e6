"""The producing side: a row and its job, as the API makes them (contract, section 5)."""

import asyncio
import secrets
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Final, Self, TypeVar
from uuid import uuid4

import structlog
from pydantic_core import to_jsonable_python
from redis.exceptions import ConnectionError as RedisConnectionError

from autoflow_worker.broker.backoff import MAX_DELAY_MS
from autoflow_worker.broker.client import PipelinedRedis
from autoflow_worker.broker.producer import KEPT_COMPLETED, KEPT_FAILED, Producer
from autoflow_worker.broker.replies import CommandRefusedError
from autoflow_worker.encoding.results import storable
from autoflow_worker.errors import (
    PayloadError,
    RedisUnavailableError,
    RedisUnfitError,
    WorkerError,
)
from autoflow_worker.recording import patches
from autoflow_worker.recording.new_rows import PATIENCE, RETRY_PAUSE, NewRows
from autoflow_worker.settings import check_urls
from autoflow_worker.tasks.definition import PRIORITIES, TaskDefinition

log = structlog.get_logger(__name__)

CLOSE_PATIENCE: Final = 6 * PATIENCE
"""Seconds that closing waits for schedules that were begun; no step of one takes that long."""

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

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
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
        """Finish what was begun, and disconnect. May be called twice."""
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

        Once begun it is carried to its end: a caller that is cancelled meanwhile leaves a task
        that runs. If the job can't be added, its row becomes `failed`.

        Args:
            task: whose queue, priority, attempts and backoff the job gets.
            payload: an instance of the task's payload type, or the object that it is in JSON.
            delay_ms: run it that many milliseconds later.
            user_id: whose task it is.
            correlation_id: passed on to the handler; generated if not given.

        Raises:
            PayloadError: the payload does not validate; nothing was written.
            RedisUnavailableError, RedisUnfitError: the job could not be added.
            DatabaseUnavailableError, DatabaseUnfitError: the row could not be inserted.
            WorkerError: the delay makes no sense, or this is not open.
        """
        if self._redis is None:
            raise WorkerError("the scheduler is not open")
        delay_ms = delay_ms or 0
        if not 0 <= delay_ms <= MAX_DELAY_MS:
            raise WorkerError(f"delay_ms must be from 0 to {MAX_DELAY_MS}, not {delay_ms}")
        data = _payload_object(task, payload)
        job = self._job(task, {**data, "correlationId": correlation_id or str(uuid4())}, delay_ms)
        begun = asyncio.create_task(self._schedule(job, _row(task, job, user_id)))
        self._begun.add(begun)
        begun.add_done_callback(self._end)
        await asyncio.shield(begun)
        return str(job.id)

    def _end(self, begun: asyncio.Task[None]) -> None:
        self._begun.discard(begun)
        if not begun.cancelled():
            begun.exception()  # Asked for, so that asyncio doesn't complain if the caller has gone.

    def _job(self, task: TaskDefinition[Any], data: dict[str, Any], delay_ms: int) -> Any:
        options: dict[str, Any] = {
            "jobId": secrets.token_urlsafe(16)[:21],  # The alphabet and length of the API's nanoid.
            "priority": PRIORITIES[task.options.priority],
            "attempts": task.options.max_attempts,
            "backoff": {"type": "exponential", "delay": task.options.backoff_ms},
            "delay": delay_ms,
            "removeOnComplete": KEPT_COMPLETED,
            "removeOnFail": KEPT_FAILED,
        }
        assert self._producer is not None
        return self._producer.job(task.queue_name, data, options)

    async def _schedule(self, job: Any, row: patches.Record) -> None:
        await self._reach_redis()
        await self._rows.insert(job.id, row)
        try:
            await self._add(job)
        except Exception as error:  # BullMQ's own errors are of no class of their own.
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
            # The task is scheduled, and runs: who was told otherwise would schedule it again.
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
        """Add the job, over a connection that breaks.

        A reply that gets lost leaves open whether the job was added, so it is added again: BullMQ
        takes an id once, and answers the second time with the job that is there.

        Raises:
            redis.exceptions.ConnectionError: not added, or nobody knows.
            Exception: the server, or BullMQ, refuses it.
        """
        assert self._producer is not None
        deadline = asyncio.get_running_loop().time() + PATIENCE
        pause = RETRY_PAUSE
        while True:
            try:
                await self._producer.add(job)
            except RedisConnectionError:
                if asyncio.get_running_loop().time() + pause > deadline:
                    raise
                await asyncio.sleep(pause)
                pause *= 2
            else:
                return

    async def _withdraw(self, job: Any, reason: str) -> None:
        """Mark the row failed: it must not wait for ever for a job that does not exist.

        Not deleted, because the job may exist: then the row is there for it to write into.
        """
        log.error("job_not_added", queue=job.name, task_id=job.id, reason=reason)
        now_ms = time.time() * 1000
        error = patches.error_record(reason, now_ms)
        patch = patches.failed_patch(now_ms=now_ms, attempt=0, error=error)
        try:
            await self._rows.merge_unless_started(job.id, patch)
        except WorkerError as failure:
            log.error("row_left_behind", task_id=job.id, reason=str(failure))


def _payload_object(task: TaskDefinition[Any], payload: object) -> dict[str, Any]:
    """Return the payload as the JSON object that it travels as.

    Raises:
        PayloadError: it is none, or does not validate.
    """
    try:
        # By alias and without computed fields: as the worker's validation wants it back.
        data = storable(to_jsonable_python(payload, by_alias=True, round_trip=True))
    except Exception as error:
        reason = f"payload can't be written as JSON: {error}"
        raise PayloadError(reason) from error
    if not isinstance(data, dict):
        raise PayloadError(f"payload is no JSON object, but a {type(payload).__name__}")
    if "correlationId" in data:
        raise PayloadError("correlationId is no field of a payload: pass correlation_id=")
    task.parse_payload(dict(data))
    return data


def _row(task: TaskDefinition[Any], job: Any, user_id: str | None) -> patches.Record:
    """Return the row as the API inserts it: as for a job that came without one, and its user."""
    row = patches.unknown_job_row(
        task.queue_name, data=job.data, options=job.opts, timestamp=job.timestamp
    )
    if job.delay:
        row |= {"status": "delayed", "delayUntil": patches.iso(job.timestamp + job.delay)}
    return {**row, "userId": user_id}
