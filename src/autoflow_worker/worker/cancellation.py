"""Tells handlers that their tasks were cancelled while they run: their rows say so."""

import asyncio
from collections.abc import Sequence
from typing import Final

import structlog

from autoflow_worker.clock import now_ms
from autoflow_worker.recording.cancelled_rows import CancelledRows
from autoflow_worker.worker.task_worker import TaskWorker

log = structlog.get_logger(__name__)

INTERVAL: Final = 0.75
"""Seconds between two looks at the rows. A cancellation is to reach its handler in two seconds."""

MIN_AGE: Final = 0.5
"""Seconds for which an attempt runs before its row is looked at; most have ended by then."""


async def keep_cancelling(workers: Sequence[TaskWorker], rows: CancelledRows) -> None:
    """Cancel the attempts whose rows say `cancelled`, for ever.

    One query asks for all attempts of the process that are older than `MIN_AGE`. Without such
    attempts PostgreSQL is not asked. Disconnects when it is cancelled.
    """
    try:
        while True:
            await _cancel_once(workers, rows)
    finally:
        await rows.close()


async def _cancel_once(workers: Sequence[TaskWorker], rows: CancelledRows) -> None:
    await asyncio.sleep(INTERVAL)
    since = now_ms() - MIN_AGE * 1000
    attempts = [
        attempt
        for worker in workers
        for attempt in worker.attempts()
        if attempt.can_be_cancelled and attempt.claim.claimed_ms < since
    ]
    if not attempts:
        return
    cancelled = await rows.among({attempt.history.row_id for attempt in attempts})
    for attempt in attempts:
        # It may have ended while PostgreSQL was asked.
        if attempt.history.row_id in cancelled and attempt.can_be_cancelled:
            log.info("task_cancelled", queue=attempt.setup.queue.name, task_id=attempt.claim.id)
            attempt.cancel()
