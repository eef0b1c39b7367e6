"""What goes on beside the slots: locks are renewed, and dead workers' jobs are found."""

import asyncio
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any, Final

import structlog
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError

from autoflow_worker.broker.claim import Claim
from autoflow_worker.broker.job_queue import OUTAGE_PAUSE_MAX, JobQueue

log = structlog.get_logger(__name__)

STALLED_INTERVAL_MS: Final = 30_000
"""BullMQ's `stalledInterval`: how often a worker looks for jobs that a dead one left behind."""


class Maintenance:
    """The endless loops of one TaskWorker that are not slots.

    Args:
        queue: the queue.
        running: the claims that are held right now.
        options: BullMQ worker options.
    """

    def __init__(
        self, queue: JobQueue, running: Collection[Claim], options: Mapping[str, Any]
    ) -> None:
        self._queue = queue
        self._running = running
        self._options = options

    @property
    def _renew_every(self) -> float:
        option: float = self._options.get("lockRenewTime", self._queue.lock_ms / 2)
        return option / 1000

    async def keep_locks(self) -> None:
        lock, renew = self._queue.lock_ms / 1000, self._renew_every
        while True:
            await asyncio.sleep(renew / 2)
            soon = asyncio.get_running_loop().time() + lock - renew / 2
            due = [claim for claim in self._running if claim.locked_until < soon]
            await self._queue.insist(partial(self._queue.extend, due))

    async def watch_stalled(self) -> None:
        interval = self._options.get("stalledInterval", STALLED_INTERVAL_MS) / 1000
        now = asyncio.get_running_loop().time
        while True:
            await self._queue.connected()
            if (left := self._calm_in()) > 0:
                await asyncio.sleep(min(left, OUTAGE_PAUSE_MAX))
                continue
            try:
                # Our own are renewed last of all: a server that hung takes commands in their order.
                began = now()
                await self._queue.extend(list(self._running))
                if self._calm_in() > 0 or now() - began > self._renew_every:
                    continue  # It has waited for the connection, or this process stood still.
                stalled = await self._queue.check_stalled()
            except RedisConnectionError:
                await asyncio.sleep(OUTAGE_PAUSE_MAX)
                continue
            except ResponseError as error:
                # A job that is no hash breaks BullMQ's script; it has taken that job out by then.
                log.error("stalled_check_refused", queue=self._queue.name, reason=str(error))
                stalled = []
            for job_id in stalled:
                log.warning("job_stalled", queue=self._queue.name, task_id=job_id)
            await asyncio.sleep(interval)

    def _calm_in(self) -> float:
        """Seconds until everybody has had the time to renew what expired during an outage.

        Locks expire then, and the jobs run on: they are not stalled.
        """
        calm_at = self._queue.up_since + self._renew_every + 2 * OUTAGE_PAUSE_MAX
        return calm_at - asyncio.get_running_loop().time()
