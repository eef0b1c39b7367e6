"""The `reconcile` command: compare the rows that are not finished with their jobs in BullMQ.

It settles what the Node worker left behind, tasks that the API retried while BullMQ still kept
their failed job, jobs that a pause lost (contract, section 9), and what a disaster left.
`reconcile_plan` decides what to do about a row.

It does not compare finished rows. BullMQ keeps only the last few hundred finished jobs, so a
missing job says nothing about its row; and a job that runs again writes its row itself.
"""

import asyncio
import textwrap
from collections import Counter
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from enum import Enum
from typing import Final

from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoPermissionError, RedisError, ResponseError

from autoflow_worker.broker.client import PipelinedRedis
from autoflow_worker.broker.kept_job import JobReader, KeptJob
from autoflow_worker.broker.producer import Producer
from autoflow_worker.broker.replies import CommandRefusedError
from autoflow_worker.clock import now_ms
from autoflow_worker.encoding.failures import shorten_reason
from autoflow_worker.errors import RedisUnavailableError, RedisUnfitError
from autoflow_worker.operations.reconcile_plan import (
    Action,
    AddAgain,
    Leave,
    Lost,
    PutBack,
    ReadTask,
    Retry,
    agrees,
    job_of,
    plan,
)
from autoflow_worker.recording import patches
from autoflow_worker.recording.open_rows import OpenRows, Row, RowChangedError
from autoflow_worker.recording.pool import CONNECT_TIMEOUT
from autoflow_worker.recording.table import connection_to, inspect_tasks_table

PAGE: Final = 500
"""Rows that one query reads."""

SUSPECTS: Final = 10_000
"""Differing rows that are collected before they are looked at a second time."""

SETTLING: Final = 1.0
"""Seconds between the two looks. A row and its job change one after the other, not together."""


HEADER: Final = f"{'row':21}  {'it says':7}  {'BullMQ says':16}  queue: what is done"


class Settling(Enum):
    """What became of a difference."""

    DONE = "settled"
    POSSIBLE = "can be settled with --fix"
    LEFT = "left"


@dataclass(frozen=True, slots=True)
class Difference:
    """A row whose status is not its job's state.

    Attributes:
        state: the job's state, by the name of BullMQ's list or set; "gone" for a missing job.
        what: what became of the difference, in words.
    """

    row_id: str
    queue: str
    status: str
    state: str
    settling: Settling
    what: str

    def line(self, width: int | None) -> str:
        """Write it as one line without control characters, or wrapped at `width` columns."""
        text = f"{self.row_id:21}  {self.status:7}  {self.state:16}  {self.queue}: {self.what}"
        # A queue's name may contain a terminal's escape sequence.
        text = "".join(char if char.isprintable() else "\ufffd" for char in text)
        if width is None or len(text) <= width:
            return text
        return textwrap.fill(text, width, subsequent_indent="    ", break_on_hyphens=False)


def summary(counts: Counter[Settling]) -> str:
    """Say in a sentence how many differences there were, and what became of them."""
    total = counts.total()
    if not total:
        return "every row that is not finished agrees with its job"
    texts = [f"{counts[settling]:,} {settling.value}" for settling in Settling if counts[settling]]
    rows = "1 row differs" if total == 1 else f"{total:,} rows differ"
    return f"{rows}: {', '.join(texts)}"


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
        fix: True settles the differences; False only says how to settle them.
        lost: what to do about a row whose job is gone; None leaves the row alone.

    Yields:
        The differences that last for `SETTLING` seconds, roughly ordered by row id.

    Raises:
        RedisUnavailableError, RedisUnfitError: Redis goes away, or refuses a command.
        DatabaseUnavailableError, DatabaseUnfitError: PostgreSQL goes away, or refuses a statement.
    """
    if fix:
        await inspect_tasks_table(database_url)
    try:
        async with connection_to(database_url, CONNECT_TIMEOUT, autocommit=True) as connection:
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
        raise RedisUnfitError(f"Redis refuses a command of reconcile: {error}") from None
    except RedisConnectionError as error:
        raise RedisUnavailableError(f"Redis went away: {error}") from None
    except RedisError as error:
        raise RedisUnfitError(f"Redis refuses a command of reconcile: {error}") from None


class _Reconciler:
    def __init__(
        self, redis: PipelinedRedis, rows: OpenRows, prefix: str, *, fix: bool, lost: Lost | None
    ) -> None:
        self._rows = rows
        self._producer = Producer(redis, prefix)
        self._jobs = JobReader(redis, prefix)
        self._fix = fix
        self._lost: Lost | None = lost

    async def differing_after(self, last: str) -> tuple[list[tuple[Row, str]], str | None]:
        """Find the next rows that differ from their jobs and do not change for `SETTLING` seconds.

        A row that changes in that time is left out. Whoever wrote it may be about to write the
        same to its job.

        Args:
            last: all rows up to this id have been compared.

        Returns:
            The rows, each with its job's state at the first look; and the id up to which all rows
            have now been compared, None if no row is left.
        """
        suspects: dict[str, tuple[str, str]] = {}
        rows: list[Row] = []
        while len(suspects) < SUSPECTS and (rows := await self._rows.after(last, PAGE)):
            last = rows[-1].id
            jobs = await asyncio.gather(*(self._look(row, fields=False) for row in rows))
            for row, job in zip(rows, jobs, strict=True):
                if job is None or not agrees(row, job, now_ms()):
                    suspects[row.id] = row.version, _state(job)
        if not suspects:
            return [], None
        await asyncio.sleep(SETTLING)
        found = [
            (row, suspects[row.id][1])
            for row in await self._rows.these(list(suspects))
            if row.version == suspects[row.id][0]
        ]
        return found, last if rows else None

    async def settle(self, row: Row, state: str) -> Difference | None:
        """Settle one row's difference, or say how to; None if it is gone.

        Args:
            state: the job's state at the first look. If it has changed, a worker is at work on the
                job and about to write the row.
        """
        job = await self._look(row, fields=True)
        if _state(job) != state or (job is not None and agrees(row, job, now_ms())):
            return None
        try:
            action = await self._plan(row, job)
            if not self._fix:
                await self._rows.make_sure(row)
                return self._difference(row, job, action)
            done = await self._do(row, action)
            return None if done is None else self._difference(row, job, done)
        except RowChangedError:
            return None

    async def _look(self, row: Row, *, fields: bool) -> KeptJob | None:
        """Look the row's job up; None if the row names no queue."""
        if not row.queue:
            return None
        ids = patches.job_ids_of(row.queue, row.id)
        looks = [await self._jobs.look(row.queue, job_id, fields=fields) for job_id in ids]
        return next((job for job in looks if job.exists or job.fault), looks[0])

    async def _plan(self, row: Row, job: KeptJob | None) -> Action:
        if job is None:
            return Leave("the row names no queue")
        action = plan(row, job, lost=self._lost, now_ms=now_ms())
        if not isinstance(action, ReadTask):
            return action
        return job_of(row, await self._rows.task(row), now_ms())

    async def _do(self, row: Row, action: Action) -> Action | None:
        """Settle a difference, and return what was done; a `Leave` says what prevented it.

        Nothing was done if the job has moved, which is None, or at a `RowChangedError`.
        """
        if isinstance(action, Leave | Retry):
            await self._rows.make_sure(row)
        elif refusal := await self._rows.write(row, action.patch):
            return Leave(refusal)
        try:
            if isinstance(action, Retry):
                if not await self._producer.retry_failed(str(row.queue), action.job.id):
                    return None
            elif isinstance(action, PutBack):
                if not await self._producer.put_back(str(row.queue), action.job.id):
                    return None
            elif isinstance(action, AddAgain):
                # After the row. A crash in between leaves a row without a job, as before.
                job = self._producer.job(str(row.queue), action.data, action.options)
                await self._producer.add(job)
        except NoPermissionError:
            raise
        except ResponseError as error:
            return Leave(f"BullMQ's script breaks on the job: {shorten_reason(str(error))}")
        return action

    def _difference(self, row: Row, job: KeptJob | None, action: Action) -> Difference:
        if isinstance(action, Leave):
            verb = "left" if self._fix else "would leave"
            settling, what = Settling.LEFT, f"{verb}: {action.reason}"
        elif self._fix:
            settling, what = Settling.DONE, action.past
        else:
            settling, what = Settling.POSSIBLE, f"would {action.infinitive}"
        return Difference(row.id, row.queue or "-", row.status, _state(job), settling, what)


def _state(job: KeptJob | None) -> str:
    if job is None:
        return "-"
    if job.fault is not None:
        return "unreadable"
    if not job.exists:
        return "gone"
    return job.state or "nowhere"
