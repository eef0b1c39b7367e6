"""The `reconcile` command: rows that are not terminal against what BullMQ knows of their jobs.

For histories that the Node worker left behind, and after a disaster. Nothing is guessed: a row is
only ever set to what BullMQ shows, and a job that is gone from Redis is reported.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import psycopg
from bullmq import Job, Queue
from psycopg.types.json import Jsonb

from autoflow_worker import record
from autoflow_worker.database import CONNECT_TIMEOUT, connection_to
from autoflow_worker.failure import shorten_stack_trace
from autoflow_worker.redis_client import PipelinedRedis

PAGE: Final = 500
"""Rows that are compared at once."""

SETTLING: Final = 1.0
"""Seconds until a difference is looked at again: a row and its job change one after the other."""

_OPEN_ROWS: Final = """
SELECT id, data->>'queueName', data->>'status', data->>'startedAt' FROM tasks
WHERE data->>'status' IN ('pending', 'active', 'delayed') AND id > %s ORDER BY id LIMIT %s
"""
_ROWS: Final = """
SELECT id, data->>'queueName', data->>'status', data->>'startedAt' FROM tasks WHERE id = ANY(%s)
"""
# Only while the row still is as it was compared: a worker may have written it since.
_FIX: Final = """
UPDATE tasks SET data = data || %s, updated_at = timezone('utc', now())
WHERE id = %s AND data->>'status' = %s AND data->>'startedAt' IS NOT DISTINCT FROM %s
"""
_STATUS_OF_STATE: Final[Mapping[str, str]] = {
    "waiting": "pending",
    "prioritized": "pending",
    "waiting-children": "pending",
    "paused": "pending",
    "delayed": "delayed",
    "active": "active",
    "completed": "completed",
    "failed": "failed",
}
GONE: Final = "gone"


@dataclass(frozen=True, slots=True)
class Difference:
    """A row whose status is not its job's state.

    Attributes:
        row_id: the row.
        queue: its queue.
        status: what the row says.
        state: what BullMQ says; `GONE` for a job that is not in Redis.
        started_at: the row's `startedAt`, as it was compared.
        patch: what BullMQ knows, for the row; None if the job is gone.
        fixed: whether the row was set right.
    """

    row_id: str
    queue: str
    status: str
    state: str
    started_at: str | None
    patch: Mapping[str, Any] | None
    fixed: bool = False


async def reconcile(
    redis: PipelinedRedis, database_url: str, prefix: str, *, fix: bool
) -> list[Difference]:
    """Compare every row that is not terminal with its job.

    Args:
        redis: an open client.
        database_url: libpq's connection URL.
        prefix: BullMQ's key prefix.
        fix: whether to write what BullMQ knows.

    Returns:
        The differences that lasted for `SETTLING` seconds, by row id.

    Raises:
        DatabaseUnavailableError: PostgreSQL can't be reached.
    """
    queues = _Queues(redis, prefix)
    found: list[Difference] = []
    async with connection_to(database_url, CONNECT_TIMEOUT) as connection:
        await connection.set_autocommit(True)
        async for rows in _open_rows(connection):
            suspects = await queues.compare(rows)
            if suspects:
                await asyncio.sleep(SETTLING)
                ids = [suspect.row_id for suspect in suspects]
                again = await (await connection.execute(_ROWS, (ids,))).fetchall()
                differences = await queues.compare(again)
                found += [await _fixed(connection, d) if fix else d for d in differences]
    return found


async def _open_rows(
    connection: psycopg.AsyncConnection[Any],
) -> AsyncIterator[list[tuple[str, str, str, str | None]]]:
    last = ""
    while rows := await (await connection.execute(_OPEN_ROWS, (last, PAGE))).fetchall():
        yield rows
        last = rows[-1][0]


async def _fixed(connection: psycopg.AsyncConnection[Any], difference: Difference) -> Difference:
    if difference.patch is None:
        return difference
    cursor = await connection.execute(
        _FIX,
        (Jsonb(difference.patch), difference.row_id, difference.status, difference.started_at),
    )
    return Difference(
        difference.row_id,
        difference.queue,
        difference.status,
        difference.state,
        difference.started_at,
        difference.patch,
        fixed=cursor.rowcount == 1,
    )


def report(differences: list[Difference]) -> str:
    """The differences as a table, and what to do about them in one line."""
    if not differences:
        return "every row that is not finished agrees with its job"
    lines = [("row", "queue", "the row says", "BullMQ says", "")]
    for one in differences:
        action = "fixed" if one.fixed else "left alone"
        lines.append((one.row_id, one.queue, one.status, one.state, action))
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    table = [
        "  ".join((*(cell.ljust(w) for cell, w in zip(line, widths, strict=False)), line[4]))
        for line in lines
    ]
    gone = sum(one.patch is None for one in differences)
    fixable = sum(one.patch is not None and not one.fixed for one in differences)
    summary = f"{len(differences)} rows differ"
    if fixable:
        summary += f"; {fixable} can be set right with --fix"
    if gone:
        summary += f"; {gone} jobs are gone from Redis, so nobody can tell their end"
    return "\n".join((*(line.rstrip() for line in table), summary))


class _Queues:
    """Asks BullMQ for the state of jobs."""

    def __init__(self, redis: PipelinedRedis, prefix: str) -> None:
        self._redis = redis
        self._prefix = prefix
        self._queues: dict[str, Queue] = {}

    async def compare(self, rows: list[tuple[str, str, str, str | None]]) -> list[Difference]:
        """The rows among these that differ from their jobs."""
        compared = await asyncio.gather(*(self._compare(*row) for row in rows))
        return [difference for difference in compared if difference is not None]

    async def _compare(
        self, row_id: str, queue: str, status: str, started_at: str | None
    ) -> Difference | None:
        if status not in ("pending", "active", "delayed"):  # finished while it settled
            return None
        state, job = GONE, None
        # A row "<queue>:<id>" is of a job with an integer id, or one whose id another row has.
        for job_id in (row_id, row_id.removeprefix(f"{queue}:")):
            job = await Job.fromId(self._queue(queue), job_id)
            if job is not None:
                state = await self._queue(queue).getJobState(job_id)
                break
        if job is None or state not in _STATUS_OF_STATE:
            return Difference(row_id, queue, status, GONE, started_at, None)
        if _STATUS_OF_STATE[state] == status:
            return None
        patch = await self._patch(self._queue(queue), job, state)
        return Difference(row_id, queue, status, state, started_at, patch)

    def _queue(self, name: str) -> Queue:
        if name not in self._queues:
            options = {"connection": self._redis, "prefix": self._prefix}
            self._queues[name] = Queue(name, options)
        return self._queues[name]

    async def _patch(self, queue: Queue, job: Job, state: str) -> Mapping[str, Any]:
        """What a worker would have written, from what BullMQ keeps of the job."""
        if state == "completed":
            patch = record.completed_patch(now_ms=job.finishedOn, result=_result(job))
            return {**patch, "attempts": job.attemptsMade}
        if state == "failed":
            return record.failed_patch(
                now_ms=job.finishedOn, attempt=job.attemptsMade, error=_error(job)
            )
        if state == "delayed":
            score = await self._redis.zscore(queue.keys["delayed"], job.id)
            # BullMQ keeps a counter in the lower 12 bits.
            return record.moved_to_delayed_patch(until_ms=int(score or 0) // 0x1000)
        if state == "active":
            return record.active_patch(now_ms=job.processedOn, attempt=job.attemptsMade + 1)
        return record.handed_back_patch()


def _result(job: Job) -> dict[str, Any]:
    value = job.returnvalue
    keys = {"success", "output", "duration"}
    if isinstance(value, dict) and value.get("success") is True and value.keys() <= keys:
        return record.success_result(value.get("output"), value.get("duration", 0))
    # Another producer's or an older worker's return value: the contract wants it as the output.
    return record.success_result(value, (job.finishedOn or 0) - (job.processedOn or 0))


def _error(job: Job) -> dict[str, Any]:
    error = record.error_record(job.failedReason or "BullMQ keeps no reason", job.finishedOn)
    traces = job.stacktrace if isinstance(job.stacktrace, list) else []
    if traces and isinstance(traces[-1], str):
        error["stackTrace"] = shorten_stack_trace(traces[-1])
    return error
