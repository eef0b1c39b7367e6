"""The `reconcile` command: rows that are not finished against what BullMQ knows of their jobs.

For histories that the Node worker left behind, for tasks that the API retried while BullMQ still
kept their failed job, and after a disaster. `reconcile_plan` says what is done about a row.

Finished rows are not compared. BullMQ keeps the last few hundred finished jobs only, so that a
missing job says nothing about them; and a job that runs again writes its row by itself.
"""

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import Final

from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoPermissionError, RedisError, ResponseError

from autoflow_worker.broker.client import PipelinedRedis
from autoflow_worker.broker.kept_job import JobReader, KeptJob
from autoflow_worker.broker.producer import Producer
from autoflow_worker.broker.replies import CommandRefusedError
from autoflow_worker.encoding.failures import shorten_reason
from autoflow_worker.errors import RedisUnavailableError, RedisUnfitError
from autoflow_worker.operations.reconcile_plan import (
    Action,
    AddAgain,
    Leave,
    Lost,
    ReadTask,
    Retry,
    agrees,
    job_of,
    plan,
)
from autoflow_worker.operations.reconcile_report import Difference, Settling
from autoflow_worker.recording import patches
from autoflow_worker.recording.open_rows import OpenRows, Row, RowChangedError
from autoflow_worker.recording.table import CONNECT_TIMEOUT, connection_to, inspect_tasks_table

PAGE: Final = 500
"""Rows that are compared at once."""

SUSPECTS: Final = 10_000
"""Rows that differ, after which no more are looked for until it is known which ones last."""

SETTLING: Final = 1.0
"""Seconds until a difference is looked at again: a row and its job change one after the other."""

GONE: Final = "gone"
NOWHERE: Final = "nowhere"


class _JobMovedError(Exception):
    """The job is not as it was when it was compared with its row."""


async def reconcile(
    redis: PipelinedRedis,
    database_url: str,
    prefix: str,
    *,
    fix: bool = False,
    lost: Lost | None = None,
) -> AsyncGenerator[Difference, None]:
    """Compare every row that is not finished with its job, and settle what differs.

    Args:
        redis: an open client; the caller closes it.
        database_url: libpq's connection URL.
        prefix: BullMQ's key prefix.
        fix: whether to settle what differs, or to say only how that would be done.
        lost: what becomes of a row whose job is gone; None leaves it alone.

    Yields:
        The differences that last for `SETTLING` seconds, about by row id.

    Raises:
        RedisUnavailableError, RedisUnfitError: Redis goes away, or refuses to be asked.
        DatabaseUnavailableError, DatabaseUnfitError: the same of PostgreSQL.
    """
    if fix:
        await inspect_tasks_table(database_url)
    try:
        async with connection_to(database_url, CONNECT_TIMEOUT) as connection:
            await connection.set_autocommit(True)
            reconciler = _Reconciler(redis, OpenRows(connection), prefix, fix=fix, lost=lost)
            last: str | None = ""
            while last is not None:
                found, last = await reconciler.differing_after(last)
                # One at a time: a job's result may be large.
                for row, state in found:
                    difference = await reconciler.settle(row, state)
                    if difference is not None:
                        yield difference
    except CommandRefusedError as error:
        raise RedisUnfitError(f"Redis refuses what reconcile asks: {error}") from None
    except RedisConnectionError as error:
        raise RedisUnavailableError(f"Redis went away: {error}") from None
    except RedisError as error:
        raise RedisUnfitError(f"Redis refuses what reconcile asks: {error}") from None


class _Reconciler:
    def __init__(
        self,
        redis: PipelinedRedis,
        rows: OpenRows,
        prefix: str,
        *,
        fix: bool,
        lost: Lost | None,
    ) -> None:
        self._rows = rows
        self._producer = Producer(redis, prefix)
        self._jobs = JobReader(redis, prefix)
        self._fix = fix
        self._lost: Lost | None = lost

    async def differing_after(self, last: str) -> tuple[list[tuple[Row, str]], str | None]:
        """The next rows that differ from their jobs, and did not change for `SETTLING` seconds.

        A row that somebody has written meanwhile is left to whoever it was: what is true of it
        now, may be about to be written to the other side.

        Args:
            last: the id up to which all rows were compared.

        Returns:
            The rows, each with its job's state at the first look; and the id up to which all are
            compared now, None if these are all.
        """
        suspects: dict[str, tuple[str, str]] = {}
        rows: list[Row] = []
        while len(suspects) < SUSPECTS and (rows := await self._rows.after(last, PAGE)):
            last = rows[-1].id
            jobs = await asyncio.gather(*(self._look(row, fields=False) for row in rows))
            for row, job in zip(rows, jobs, strict=True):
                if job is None or not agrees(row, job, _now_ms()):
                    suspects[row.id] = row.version, _state(job)
        if not suspects:
            return [], None
        await asyncio.sleep(SETTLING)
        found: list[tuple[Row, str]] = []
        for row in await self._rows.these(list(suspects)):
            version, state = suspects[row.id]
            if row.version == version:
                found.append((row, state))
        return found, last if rows else None

    async def settle(self, row: Row, state: str) -> Difference | None:
        """Settle one row's difference, or say how; None if there is none any more.

        Args:
            state: the job's, at the first look. A job that has moved since has somebody at work on
                it, who is about to write the row.
        """
        job = await self._look(row, fields=True)
        if _state(job) != state or (job is not None and agrees(row, job, _now_ms())):
            return None
        try:
            action = await self._plan(row, job)
            if self._fix:
                action = await self._do(row, action)
            else:
                await self._rows.make_sure(row)
        except (RowChangedError, _JobMovedError):
            return None
        return self._difference(row, job, action)

    async def _look(self, row: Row, *, fields: bool) -> KeptJob | None:
        """The row's job; None if the row names no queue."""
        if not row.queue:
            return None
        ids = patches.job_ids_of(row.queue, row.id)
        looks = [await self._jobs.look(row.queue, job_id, fields=fields) for job_id in ids]
        return next((job for job in looks if job.exists or job.fault), looks[0])

    async def _plan(self, row: Row, job: KeptJob | None) -> Action:
        if job is None:
            return Leave("the row names no queue")
        action = plan(row, job, lost=self._lost, now_ms=_now_ms())
        if not isinstance(action, ReadTask):
            return action
        return job_of(row, await self._rows.task(row), _now_ms())

    async def _do(self, row: Row, action: Action) -> Action:
        """Settle a difference; a `Leave` says what stood in the way.

        Raises:
            RowChangedError, _JobMovedError: nothing was done.
        """
        if isinstance(action, Leave):
            await self._rows.make_sure(row)
            return action
        if isinstance(action, Retry):
            await self._rows.make_sure(row)
            return await self._retry(row, action)
        refusal = await self._rows.write(row, action.patch)
        if refusal is not None:
            return Leave(refusal)
        # After the row: a crash in between leaves a row without a job, as it was.
        return await self._add(row, action) if isinstance(action, AddAgain) else action

    async def _retry(self, row: Row, action: Retry) -> Action:
        try:
            if not await self._producer.retry_failed(str(row.queue), action.job.id):
                raise _JobMovedError
        except ResponseError as error:
            return _broken(error)
        return action

    async def _add(self, row: Row, action: AddAgain) -> Action:
        job = self._producer.job(str(row.queue), action.data, action.options)
        try:
            await self._producer.add(job)
        except ResponseError as error:
            return _broken(error)
        return action

    def _difference(self, row: Row, job: KeptJob | None, action: Action) -> Difference:
        if isinstance(action, Leave):
            settling = Settling.LEFT
            what = f"{'left' if self._fix else 'would leave'}: {action.reason}"
        elif self._fix:
            settling, what = Settling.DONE, action.past
        else:
            settling, what = Settling.POSSIBLE, f"would {action.infinitive}"
        return Difference(row.id, row.queue or "-", row.status, _state(job), settling, what)


def _broken(error: ResponseError) -> Leave:
    """What a script of BullMQ's met in the job's fields, or in its queue's keys.

    Raises:
        NoPermissionError: it met nothing, but was not allowed to look.
    """
    if isinstance(error, NoPermissionError):
        raise error
    return Leave(f"BullMQ's script breaks on the job: {shorten_reason(str(error))}")


def _state(job: KeptJob | None) -> str:
    if job is None:
        return "-"
    if job.fault is not None:
        return "unreadable"
    if not job.exists:
        return GONE
    return job.state or NOWHERE


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
