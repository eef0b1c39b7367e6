"""Fetching jobs: one slot at a time fetches, and an idle queue costs one blocked connection."""

import asyncio
import math
from collections.abc import Awaitable, Collection
from typing import Any, Final

import structlog
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from autoflow_worker.broker.claim import Claim, Reply
from autoflow_worker.broker.job_queue import OUTAGE_PAUSE, OUTAGE_PAUSE_MAX, JobQueue
from autoflow_worker.clock import now_ms
from autoflow_worker.pauses import Pauses
from autoflow_worker.worker.breakages import Breakages
from autoflow_worker.worker.runner import Runner

log = structlog.get_logger(__name__)

MAX_BLOCK: Final = 10.0
"""Seconds that an idle queue blocks at most while a delayed job is known, as with Node."""


class Fetcher:
    """Fetches the jobs for the slots of one TaskWorker until it is stopped, unless it is quiet.

    Args:
        running: the claims that are held right now.
        runner: runs the task's handlers; no job is fetched while it has no room.
        breakages: how often in a row the task's slots broke; no job is fetched during their pause.
        drain_delay: seconds, BullMQ's `drainDelay`: a job without a marker waits no longer.
        limit_delay: seconds, BullMQ's `maximumRateLimitDelay`: a rate limited queue is asked this
            often for delayed jobs that are due, and whether the limit still holds.
        has_limiter: whether Redis tells this worker of a rate limit that a handler has set.
    """

    def __init__(
        self,
        queue: JobQueue,
        running: Collection[Claim],
        runner: Runner,
        breakages: Breakages,
        *,
        drain_delay: float,
        limit_delay: float,
        has_limiter: bool,
    ) -> None:
        self._queue = queue
        self._running = running
        self._drain_delay = drain_delay
        self._limit_delay = limit_delay
        self._has_limiter = has_limiter
        self._runner = runner
        self._breakages = breakages
        self._stop = asyncio.Event()
        self._awake = asyncio.Event()
        self._awake.set()
        self._wake = asyncio.Event()
        self._fetching = asyncio.Lock()
        self._tokens = 0
        self._drained = False
        self._delayed_until = 0
        self._limited_until = 0.0
        self._rests_until = 0.0

    def stop(self) -> None:
        """Fetch nothing more. May be called twice."""
        self._stop.set()
        self._wake.set()

    def set_quiet(self, quiet: bool) -> None:
        """Fetch nothing more while quiet. A fetch that Redis has by then may bring one job more."""
        if quiet:
            self._awake.clear()
            self._wake.set()
        else:
            self._awake.set()

    @property
    def is_stopping(self) -> bool:
        return self._stop.is_set()

    @property
    def is_quiet(self) -> bool:
        return not self._awake.is_set()

    @property
    def found_nothing(self) -> bool:
        """Whether the last fetch found the queue empty."""
        return self._drained

    @property
    def wants_more(self) -> bool:
        """Whether an acknowledgement is to fetch the next job."""
        return (
            self._runner.has_room
            and self._awake.is_set()
            and not (self._breakages.in_a_row or self._stop.is_set())
            and not (self._rests_until and self._limited_for > 0)
        )

    def rest(self, seconds: float) -> None:
        """Fetch nothing for so long, because a handler has let the queue rest.

        If Redis tells of the limit, it is asked after `limit_delay` whether the limit still holds.
        """
        if self._has_limiter:
            seconds = min(seconds, self._limit_delay)
        self._rests_until = asyncio.get_running_loop().time() + seconds
        self._wake.set()

    @property
    def _limited_for(self) -> float:
        """The seconds for which nothing is fetched because of a rate limit."""
        until = max(self._limited_until, self._rests_until)
        return until - asyncio.get_running_loop().time()

    async def next(self, owner: str) -> Claim | None:
        """Wait for a job and claim it; None when stopping.

        Args:
            owner: what the slot's tokens begin with.
        """
        async with self._fetching:
            pauses = Pauses(OUTAGE_PAUSE, OUTAGE_PAUSE_MAX)
            unsure = False
            refusal = ""
            while not self.is_stopping:
                try:
                    if unsure:
                        claim = await self.claimed_unawares(owner)
                        unsure = False
                    else:
                        await self._until_ready()
                        await self._until_work()
                        if self.is_stopping:
                            break
                        if self.is_quiet:
                            await self._until_awake()
                            continue
                        if self._rests_until and self._limited_for > 0:
                            continue  # A handler has let the queue rest meanwhile.
                        if not self._runner.has_room:
                            # A batch has begun meanwhile. Another worker may run the job at once.
                            await self._give_marker_away()
                            continue
                        if not self._queue.is_connected:
                            await self._until_stopped(self._queue.connected())
                            continue
                        self._tokens += 1
                        claim = self.take(await self._queue.fetch(f"{owner}{self._tokens}"))
                    if claim is not None:
                        return claim
                    pauses.restart()
                except RedisError as error:
                    if not isinstance(error, RedisConnectionError) and str(error) != refusal:
                        refusal = str(error)
                        log.error("fetch_refused", queue=self._queue.name, reason=refusal)
                    # Redis may have claimed a job, or given away a marker, in a reply that is lost.
                    unsure, self._drained = True, False
                    await self._until_stopped(pauses.sleep())
                    await self._until_stopped(self._queue.connected())
        return None

    async def _until_ready(self) -> None:
        """Wait until a job that is fetched can be run."""
        if self._breakages.in_a_row:
            await self._until_stopped(asyncio.sleep(self._breakages.pause))
        if not self._runner.has_room:
            await self._until_stopped(self._runner.room())

    async def _until_work(self) -> None:
        """Wait until a fetch may find a job."""
        now = asyncio.get_running_loop().time
        if (limited_for := self._limited_for) > 0:
            await self._until_stopped(asyncio.sleep(limited_for))
            self._rests_until = 0.0
            return
        due_at, fetch_at = self._delayed_until, math.inf
        while self._drained and now() < fetch_at and not (self.is_stopping or self.is_quiet):
            if self._rests_until:
                return
            due_in = (due_at - now_ms()) / 1000 if due_at else None
            if due_in is not None and due_in <= 0:
                return
            marked = await self._marker_before(due_in)
            if not marked:
                return
            due_at = min(marked, due_at or marked)
            # A producer of delayed jobs may put one such marker after the other.
            fetch_at = min(fetch_at, now() + MAX_BLOCK)

    async def _marker_before(self, due_in: float | None) -> int | None:
        """Wait for a marker, or for a delayed job that is due in so many seconds."""
        self._wake.clear()
        if due_in is None:
            # A marker can die with the worker that took it, and none is put when a limit or a pause
            # ends. So an idle queue is asked every `drainDelay`: by the fetch that follows a wait,
            # and by a look half-way, which costs less than a fetch and another wait.
            delay = self._drain_delay
            return await self._queue.marker.wait(2 * delay, self._wake, look_after=delay)
        # Redis ends a blocking read up to 0.1 s late, which is too late for a delayed job.
        timer = asyncio.get_running_loop().call_later(due_in, self._wake.set)
        try:
            return await self._queue.marker.wait(MAX_BLOCK, self._wake)
        finally:
            timer.cancel()

    async def _until_awake(self) -> None:
        """Wait as long as this is quiet."""
        await self._give_marker_away()
        await self._until_stopped(self._awake.wait())

    async def _give_marker_away(self) -> None:
        """Put back the marker that may have been taken; what it told is forgotten here."""
        await self._until_stopped(self._queue.insist(self._queue.marker.put_back))
        self._drained = False

    async def _until_stopped(self, waiting: Awaitable[Any]) -> None:
        """Await this, but no longer than until `stop`."""
        waited: asyncio.Future[Any] = asyncio.ensure_future(waiting)
        stopped: asyncio.Future[Any] = asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait([waited, stopped], return_when=asyncio.FIRST_COMPLETED)
            if waited.done():
                waited.result()
        finally:
            waited.cancel()
            stopped.cancel()

    def take(self, reply: Reply) -> Claim | None:
        """Note what a reply says of the queue, and return the job that it brought."""
        if reply.fetched:
            self._drained = reply.claim is None and not reply.limited_ms
            self._delayed_until = reply.delayed_until
            self._limited_until = (
                asyncio.get_running_loop().time() + min(reply.limited_ms / 1000, self._limit_delay)
                if reply.limited_ms
                else 0.0
            )
        return reply.claim

    async def claimed_unawares(self, owner: str) -> Claim | None:
        """Return the job that Redis claimed for this slot in a reply that was lost, if any."""
        known = [claim.id for claim in self._running if claim.token.startswith(owner)]
        return next(iter(await self._queue.adopt(owner, known)), None)
