"""One task's jobs: fetch, start, run, record, acknowledge.

`concurrency` slots each loop over one job after the other. Only one slot at a time fetches, so an
idle queue costs one blocked connection; a busy slot gets its next job with the acknowledgement of
the last. The order in a slot is the promise: the row's terminal status is committed first, then
BullMQ is told. A crash in between runs the job again, and never leaves a row that lies.
"""

import asyncio
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, Final
from uuid import uuid4

import structlog
from redis.exceptions import RedisError

from autoflow_worker.broker.claim import (
    ChildrenLeftError,
    Claim,
    LockLostError,
    MalformedJobError,
)
from autoflow_worker.broker.job_queue import JobQueue
from autoflow_worker.errors import TaskBrokenError, WorkerError
from autoflow_worker.recording import patches
from autoflow_worker.recording.write import Recorder
from autoflow_worker.tasks.definition import TaskDefinition
from autoflow_worker.worker.attempt import Attempt
from autoflow_worker.worker.breakages import MAX_BREAKAGES, Breakages
from autoflow_worker.worker.fetcher import Fetcher
from autoflow_worker.worker.handler import UNWIND_PATIENCE, TimeLimit
from autoflow_worker.worker.held_outcomes import HeldOutcomes
from autoflow_worker.worker.history import JobHistory, OutcomeRefusedError
from autoflow_worker.worker.maintenance import Maintenance
from autoflow_worker.worker.threads import HandlerThreads, NoThreadError

log = structlog.get_logger(__name__)

DRAIN_DELAY: Final = 5.0
"""Seconds, BullMQ's `drainDelay`: an idle queue is asked for this often even without a marker."""

CUT_OFF_PATIENCE: Final = UNWIND_PATIENCE + 0.2
"""Seconds at the deadline for handlers to clean up, and for what finishes then to be recorded."""

RECORD_BROKEN: Final = 5.0
"""Seconds that recording `pending` may take where an attempt broke; its job goes back anyway."""

MAX_CLAIMS_BROKEN: Final = 3
"""Claims of one job that broke their slots, after which the job counts as the cause."""

RECORD_HANDED_BACK: Final = 0.3
"""Seconds that recording `pending` may take at the deadline; the jobs are handed back anyway."""

RERUN_DELAY: Final = 5.0
"""Seconds until a job runs again whose outcome PostgreSQL refused; doubled with each claim."""

RERUN_DELAY_MAX: Final = 60.0


class TaskWorker:
    """Runs the jobs of one task.

    Args:
        task: the task.
        queue: its queue; opened by the caller, and closed with the shared Redis client.
        recorder: keeps the statuses.
        concurrency: slots.
        record_unknown_jobs: whether a job without a row gets one (contract, section 4).
    """

    def __init__(
        self,
        task: TaskDefinition[Any],
        queue: JobQueue,
        recorder: Recorder,
        *,
        concurrency: int,
        record_unknown_jobs: bool = True,
    ) -> None:
        self.task = task
        self._queue = queue
        self._recorder = recorder
        self._concurrency = concurrency
        self._record_unknown_jobs = record_unknown_jobs
        self._id = uuid4().hex
        self._running: dict[Claim, JobHistory] = {}
        # The other slots go on working, whatever rows PostgreSQL refuses.
        self._held_outcomes = HeldOutcomes(concurrency // 2)
        self._closed = False
        self._threads = HandlerThreads(task.queue_name, limit=concurrency)
        self._breakages = Breakages()
        self._fetcher = Fetcher(
            queue,
            self._running,
            task.worker_options.get("drainDelay", DRAIN_DELAY),
            self._threads,
            self._breakages,
        )
        self._limit = TimeLimit(task.options.timeout_ms)
        self._slots: list[asyncio.Task[None]] = []
        self._keepers: list[asyncio.Task[None]] = []

    @property
    def slots(self) -> Sequence[asyncio.Task[None]]:
        """One task for each place; it waits for, or has, one job at a time."""
        return self._slots

    @property
    def is_idle(self) -> bool:
        """Whether no slot has a job, and the queue has none to give."""
        return self._fetcher.found_nothing and not self._running

    @property
    def is_stopping(self) -> bool:
        """Whether it fetches nothing more."""
        return self._fetcher.is_stopping

    # -- life ------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the slots, the renewal of locks and the search for stalled jobs."""
        name = self.task.queue_name
        create = asyncio.get_running_loop().create_task
        keepers = Maintenance(self._queue, self._running, self.task.worker_options)
        self._keepers = [
            create(keepers.keep_locks(), name=f"the lock renewal of {name}"),
            create(keepers.watch_stalled(), name=f"the stalled check of {name}"),
        ]
        self._slots = [
            create(self._slot(index), name=f"slot {index} of {name}")
            for index in range(self._concurrency)
        ]

    def deaths(self) -> list[asyncio.Task[None]]:
        """The tasks that never end before `stop`."""
        return [*self._keepers, *self._slots]

    def stop(self) -> None:
        """Fetch nothing more; what runs goes on. May be called twice."""
        self._fetcher.stop()

    async def drained(self) -> None:
        """Wait until every slot has ended; locks are renewed until then."""
        if self._slots:
            await asyncio.wait(self._slots)

    async def close(self, timeout: float) -> int:
        """Cancel what still runs, and hand back whatever this worker holds. May be called twice.

        Args:
            timeout: seconds for all of it.

        Returns:
            How many jobs were cut off.
        """
        deadline = asyncio.get_running_loop().time() + timeout
        self.stop()
        await self._cut_off_slots()
        cut_off = len(self._running)
        if not self._closed:
            self._closed = True
            try:
                async with asyncio.timeout_at(deadline):
                    await self._queue.insist(self._hand_back_all)
            except (TimeoutError, RedisError) as error:
                # Nothing is lost: another worker finds these jobs stalled, and runs them.
                reason = str(error) or "Redis did not answer in time"
                log.error("jobs_not_handed_back", queue=self.task.queue_name, reason=reason)
        for keeper in self._keepers:
            keeper.cancel()
        if self._keepers:
            await asyncio.wait(self._keepers)
        self._running.clear()
        return cut_off

    async def _cut_off_slots(self) -> None:
        left = set(self._slots)
        while left:
            for slot in left:
                slot.cancel()
            # A handler that finished all the same takes the first cancellation with it: its outcome
            # may be recorded, but by no server that is away.
            left = (await asyncio.wait(left, timeout=CUT_OFF_PATIENCE))[1]

    async def _hand_back_all(self) -> None:
        """Hand back what Redis says is ours: also what came with a reply that nobody awaited."""
        held = dict(await self._queue.held(self._id))
        patch = patches.handed_back_patch()
        writes = [
            history.follow(patch) for claim, history in self._running.items() if claim.id in held
        ]
        try:
            async with asyncio.timeout(RECORD_HANDED_BACK):
                await asyncio.gather(*writes)
        except TimeoutError:
            log.warning("handed_back_jobs_not_recorded", queue=self.task.queue_name)
        await asyncio.gather(*(self._hand_back(*job) for job in held.items()))
        await self._queue.marker.put_back()

    async def _hand_back(self, job_id: str, token: str, until_ms: int = 0) -> None:
        try:
            await self._queue.hand_back(job_id, token, until_ms)
            log.info("job_handed_back", queue=self.task.queue_name, task_id=job_id)
        except (LockLostError, MalformedJobError, ChildrenLeftError) as error:
            reason = str(error)
            log.warning("job_lost", queue=self.task.queue_name, task_id=job_id, reason=reason)

    # -- slots -----------------------------------------------------------------------------------

    async def _slot(self, index: int) -> None:
        owner = f"{self._id}:{index}:"
        claim: Claim | None = None
        while not self._fetcher.is_stopping:
            claim = await self._fetcher.next(owner)
            while claim is not None and not self._fetcher.is_stopping:
                claim = await self._attempt(claim, owner)
        if claim is not None:
            await self._queue.insist(partial(self._hand_back, claim.id, claim.token))

    async def _attempt(self, claim: Claim, owner: str) -> Claim | None:
        """Run one job to its acknowledgement; the job that the acknowledgement brought."""
        # Not taken out when this is cancelled: `close` hands back what is left.
        history = self._running[claim] = JobHistory(
            self._recorder,
            self._queue,
            claim,
            self._held_outcomes,
            record_unknown_jobs=self._record_unknown_jobs,
        )
        run = Attempt(
            self.task,
            self._queue,
            self._fetcher,
            self._limit,
            self._threads,
            claim=claim,
            history=history,
            owner=owner,
        )
        following = None
        try:
            following = self._fetcher.take(await run.run())
            if self._breakages.in_a_row:
                self._breakages.end()
        except LockLostError as error:
            self._note_loss(claim, error)
        except OutcomeRefusedError as error:
            await self._run_again_later(claim, history, str(error))
        except WorkerError:
            raise
        except Exception as error:
            log.exception("attempt_broken", queue=self._queue.name, task_id=claim.id)
            self._breakages.note(error)
            await self._settle_broken(claim, run, history, error)
            if self._breakages.too_many:
                del self._running[claim]
                raise TaskBrokenError(self._why_broken()) from None
        del self._running[claim]
        return following

    def _note_loss(self, claim: Claim, error: LockLostError) -> None:
        log.warning("job_lost", queue=self._queue.name, task_id=claim.id, reason=str(error))

    async def _settle_broken(
        self, claim: Claim, run: Attempt, history: JobHistory, error: Exception
    ) -> None:
        """Hand a job back whose attempt this worker could not carry to its end.

        The machine has no thread or no memory, or this code is wrong. Only a job that breaks its
        slot claim after claim, whoever claims it, is taken to be the cause itself; but no job
        causes a lack of threads.
        """
        is_suspect = not isinstance(error, NoThreadError)
        try:
            if is_suspect and await self._breakages_of(claim) >= MAX_CLAIMS_BROKEN:
                self._breakages.end()
                await run.bury(error)
                return
            async with asyncio.timeout(RECORD_BROKEN):
                await history.follow(patches.handed_back_patch())
        except LockLostError as loss:
            self._note_loss(claim, loss)
            return
        except TimeoutError:  # The job's next start makes its row right.
            log.warning("handed_back_jobs_not_recorded", queue=self.task.queue_name)
        await self._queue.insist(partial(self._hand_back, claim.id, claim.token))

    def _why_broken(self) -> str:
        error = self._breakages.last
        return (
            f"the task {self.task.queue_name!r} broke {MAX_BREAKAGES} times in a row, without one "
            f"success: {type(error).__name__}: {error}"
        )

    async def _breakages_of(self, claim: Claim) -> int:
        try:
            return await self._queue.insist(lambda: self._queue.count_breakage(claim))
        except RedisError:  # It is no hash, so nothing can be counted in it.
            return MAX_CLAIMS_BROKEN

    async def _run_again_later(self, claim: Claim, history: JobHistory, reason: str) -> None:
        """Hand a job back whose work was done and can't be told: it has to be done again."""
        delay_s = min(RERUN_DELAY * 2 ** min(claim.attempts_started - 1, 10), RERUN_DELAY_MAX)
        log.error(
            "job_runs_again",
            queue=self._queue.name,
            task_id=claim.id,
            delay_s=delay_s,
            reason=reason,
        )
        until_ms = time.time_ns() // 1_000_000 + int(delay_s * 1000)
        await history.run_again(until_ms)
        await self._queue.insist(partial(self._hand_back, claim.id, claim.token, until_ms))
