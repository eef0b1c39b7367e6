"""One task's jobs: fetch, start, run, record, acknowledge.

Its slots each loop over one job after the other. Only one slot at a time fetches, so an
idle queue costs one blocked connection. A busy slot gets its next job with the acknowledgement of
the last. The order in a slot is the promise: PostgreSQL commits the row's outcome first, then
BullMQ is told. A crash in between runs the job again, and never leaves a row that lies.
"""

import asyncio
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, Final
from uuid import uuid4

import structlog
from redis.exceptions import RedisError

from autoflow_worker.broker.claim import Claim, LockLostError
from autoflow_worker.broker.job_queue import JobQueue
from autoflow_worker.broker.job_schedulers import NotAdvancedError
from autoflow_worker.errors import TaskBrokenError, WorkerError
from autoflow_worker.recording.recorder import StatusRecorder
from autoflow_worker.tasks.batches import check_batch
from autoflow_worker.tasks.definition import TaskDefinition
from autoflow_worker.worker.acknowledge import Acknowledger
from autoflow_worker.worker.attempt import Attempt, TaskSetup
from autoflow_worker.worker.breakages import MAX_BREAKAGES, Breakages
from autoflow_worker.worker.fetcher import Fetcher
from autoflow_worker.worker.hand_back import HandBack
from autoflow_worker.worker.handler import UNWIND_PATIENCE
from autoflow_worker.worker.history import JobHistory, OutcomeRefusedError
from autoflow_worker.worker.maintenance import Maintenance
from autoflow_worker.worker.runners import runner_for
from autoflow_worker.worker.running_jobs import running_jobs
from autoflow_worker.worker.threads import NoThreadError
from autoflow_worker.worker.time_limit import TimeLimit

log = structlog.get_logger(__name__)

DRAIN_DELAY: Final = 5.0
"""Seconds, BullMQ's `drainDelay`: an idle queue is asked for this often even without a marker."""

LIMIT_DELAY_MS: Final = 30_000
"""BullMQ's `maximumRateLimitDelay`, in ms: how long a rate limit is slept out at a time."""

CUT_OFF_PATIENCE: Final = UNWIND_PATIENCE + 0.2
"""Seconds at the deadline for handlers to clean up, and for their last outcomes to be recorded."""

MAX_CLAIMS_BROKEN: Final = 3
"""Claims of one job that broke their slots, after which the job counts as the cause."""


class TaskWorker:
    """Runs the jobs of one task.

    Args:
        queue: the task's; opened by the caller, and closed with the shared Redis client.
        concurrency: calls of the handler at once; WORKER_CONCURRENCY unless the task says it.
        record_unknown_jobs: whether a job without a row gets one (contract, section 4).
        tasks_config: the name by which the handlers' processes import the task list.

    Attributes:
        jobs_taken: how many jobs its slots have had.
    """

    def __init__(
        self,
        task: TaskDefinition[Any],
        queue: JobQueue,
        recorder: StatusRecorder,
        *,
        concurrency: int,
        record_unknown_jobs: bool = True,
        tasks_config: str = "",
    ) -> None:
        self.task = task
        self._queue = queue
        self._recorder = recorder
        self._slot_count = check_batch(task.queue_name, task.batch, concurrency)
        self._record_unknown_jobs = record_unknown_jobs
        self.jobs_taken = 0
        self._id = uuid4().hex
        self._running: dict[Claim, Attempt] = {}
        # The other slots go on working, whatever rows PostgreSQL refuses.
        self._held_outcomes = asyncio.Semaphore(self._slot_count // 2)
        self._closed = False
        # A batch has one limit for all of its attempts, which its runner keeps.
        limit = TimeLimit(None if task.batch else task.options.timeout_ms)
        self._runner = runner_for(task, concurrency, limit, tasks_config)
        self._breakages = Breakages()
        self._fetcher = Fetcher(
            queue,
            self._running,
            self._runner,
            self._breakages,
            drain_delay=task.worker_options.get("drainDelay", DRAIN_DELAY),
            limit_delay=task.worker_options.get("maximumRateLimitDelay", LIMIT_DELAY_MS) / 1000,
            has_limiter="limiter" in task.worker_options,
        )
        self._acknowledger = Acknowledger(queue, self._fetcher)
        self._hand_back = HandBack(queue)
        self._setup = TaskSetup(
            task,
            queue,
            self._fetcher,
            self._acknowledger,
            limit,
            self._runner,
            asyncio.get_running_loop(),
        )
        self._slots: list[asyncio.Task[None]] = []
        self._keepers: list[asyncio.Task[None]] = []

    @property
    def slots(self) -> Sequence[asyncio.Task[None]]:
        """One asyncio task for each slot, which waits for a job, or has one."""
        return self._slots

    @property
    def is_idle(self) -> bool:
        """Whether no slot has a job, and the queue has none to give. A quiet one never is."""
        return self._fetcher.found_nothing and not (self._running or self.is_quiet)

    @property
    def is_busy(self) -> bool:
        """Whether a slot has a job."""
        return bool(self._running)

    @property
    def is_quiet(self) -> bool:
        """Whether it fetches nothing until it is told to."""
        return self._fetcher.is_quiet

    @property
    def is_stopping(self) -> bool:
        """Whether it fetches nothing more."""
        return self._fetcher.is_stopping

    def attempts(self) -> Iterable[Attempt]:
        """Return the attempts that have begun and not ended."""
        return self._running.values()

    def running_jobs(self) -> Iterable[dict[str, Any]]:
        """Describe what runs, for the log."""
        # A job's token tells its slot: see `_slot`.
        slots = {claim: self._slots[int(claim.token.split(":")[1])] for claim in self._running}
        return running_jobs(self._queue.name, slots)

    # -- life ------------------------------------------------------------------------------------

    async def open(self, timeout: float) -> None:
        """Get ready to run handlers, within so many seconds.

        Raises:
            WorkerError: it can't get ready.
        """
        await self._runner.open(timeout)

    def start(self, resources: Any = None) -> None:
        """Start the slots, the renewal of locks and the check for stalled jobs.

        Args:
            resources: what the task's lifespan yielded.
        """
        self._setup.resources = resources
        name = self.task.queue_name
        create = asyncio.get_running_loop().create_task
        maintenance = Maintenance(self._queue, self._running, self.task.worker_options)
        self._keepers = [
            create(maintenance.keep_locks(), name=f"the lock renewal of {name}"),
            create(maintenance.watch_stalled(), name=f"the stalled check of {name}"),
        ]
        self._slots = [
            create(self._slot(index), name=f"slot {index} of {name}")
            for index in range(self._slot_count)
        ]

    def deaths(self) -> list[asyncio.Task[None]]:
        """Return the tasks that never end before `stop`."""
        return [*self._keepers, *self._slots, *self._runner.deaths()]

    def set_quiet(self, quiet: bool) -> None:
        """Fetch nothing more while quiet; what runs goes on, with its locks renewed."""
        self._fetcher.set_quiet(quiet)

    def stop(self) -> None:
        """Fetch nothing more; what runs goes on. May be called twice."""
        self._fetcher.stop()
        self._runner.stop()

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
            histories = [attempt.history for attempt in self._running.values()]
            hand_back = partial(self._hand_back.everything, self._id, histories)
            try:
                async with asyncio.timeout_at(deadline):
                    await self._queue.insist(hand_back)
            except (TimeoutError, RedisError) as error:
                # Nothing is lost: another worker finds these jobs stalled, and runs them.
                reason = str(error) or "Redis did not answer in time"
                log.error("jobs_not_handed_back", queue=self.task.queue_name, reason=reason)
        await self._runner.close(deadline - asyncio.get_running_loop().time())
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
            # A handler that returns all the same takes the first cancellation with it. Its outcome
            # may be recorded, unless a server is away; then the next cancellation ends the slot.
            left = (await asyncio.wait(left, timeout=CUT_OFF_PATIENCE))[1]

    # -- slots -----------------------------------------------------------------------------------

    async def _slot(self, index: int) -> None:
        owner = f"{self._id}:{index}:"
        claim: Claim | None = None
        while not self._fetcher.is_stopping:
            claim = await self._fetcher.next(owner)
            while claim is not None and not self._fetcher.is_stopping:
                claim = await self._attempt(claim)
        if claim is not None:
            await self._hand_back.job(claim)

    async def _attempt(self, claim: Claim) -> Claim | None:
        """Run one job to its acknowledgement; return the job that the acknowledgement fetched."""
        self.jobs_taken += 1
        # The entry stays if this is cancelled: `close` hands back what is left.
        history = JobHistory(
            self._recorder,
            self._queue,
            claim,
            self._held_outcomes,
            record_unknown_jobs=self._record_unknown_jobs,
        )
        attempt = self._running[claim] = Attempt(self._setup, claim, history)
        following = None
        try:
            following = self._fetcher.take(await attempt.run())
            if self._breakages.in_a_row:
                self._breakages.end()
        except LockLostError as error:
            self._log_loss(claim, error)
        except OutcomeRefusedError as error:
            await self._hand_back.unrecorded(claim, history, str(error))
        except NotAdvancedError as error:
            await self._hand_back.unadvanced(claim, history, error)
        except WorkerError:
            raise
        except Exception as error:
            log.exception("attempt_broken", queue=self._queue.name, task_id=claim.id)
            self._breakages.note()
            await self._settle_broken(claim, history, error)
            if self._breakages.too_many:
                del self._running[claim]
                raise TaskBrokenError(
                    f"the task {self.task.queue_name!r} broke {MAX_BREAKAGES} times in a row, "
                    f"without one success: {type(error).__name__}: {error}"
                ) from None
        del self._running[claim]
        return following

    async def _settle_broken(self, claim: Claim, history: JobHistory, error: Exception) -> None:
        """Hand back a job whose attempt broke, or bury it if it is the cause.

        The machine has no thread or no memory, or this code is wrong. A job is taken to be the
        cause only if it breaks its slot claim after claim, whoever claims it. A lack of threads is
        never the job's fault.
        """
        try:
            if (
                not isinstance(error, NoThreadError)
                and await self._count_breakage(claim) >= MAX_CLAIMS_BROKEN
            ):
                self._breakages.end()
                await self._acknowledger.bury(claim, history, error)
            else:
                await self._hand_back.broken(claim, history)
        except LockLostError as loss:
            self._log_loss(claim, loss)

    async def _count_breakage(self, claim: Claim) -> int:
        try:
            return await self._queue.insist(lambda: self._queue.count_breakage(claim))
        except RedisError:  # The job is no hash, so nothing can be counted in it.
            return MAX_CLAIMS_BROKEN

    def _log_loss(self, claim: Claim, error: LockLostError) -> None:
        log.warning("job_lost", queue=self._queue.name, task_id=claim.id, reason=str(error))
