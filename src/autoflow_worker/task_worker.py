"""One task's jobs: fetch, start, run, record, acknowledge.

`concurrency` slots each loop over one job after the other. Only one slot at a time fetches, so an
idle queue costs one blocked connection; a busy slot gets its next job with the acknowledgement of
the last. The order in a slot is the promise: the row's terminal status is committed first, then
BullMQ is told. A crash in between runs the job again, and never leaves a row that lies.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, Final, TypeVar
from uuid import uuid4

import structlog
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError

from autoflow_worker import record
from autoflow_worker.errors import NotStorableError, PayloadError, WorkerError
from autoflow_worker.execution import UNWIND_PATIENCE, Outcome, execute
from autoflow_worker.failpoints import failpoint
from autoflow_worker.job_history import JobHistory
from autoflow_worker.job_queue import (
    ChildrenLeftError,
    Claim,
    Hold,
    JobQueue,
    LockLostError,
    MalformedJobError,
    Reply,
)
from autoflow_worker.retry import NoBackoffError, backoff_ms
from autoflow_worker.task import (
    DelayedError,
    TaskContext,
    TaskDefinition,
    UnrecoverableError,
    WaitingChildrenError,
)
from autoflow_worker.writes import Recorder, Verdict

log = structlog.get_logger(__name__)

DRAIN_DELAY: Final = 5.0
"""Seconds, BullMQ's `drainDelay`: an idle queue is asked for this often even without a marker."""

OUTAGE_PAUSE: Final = 0.05
"""Seconds before Redis is asked again after it failed; doubled up to `OUTAGE_PAUSE_MAX`."""

OUTAGE_PAUSE_MAX: Final = 1.0

STALLED_INTERVAL_MS: Final = 30_000
"""BullMQ's `stalledInterval`: how often a worker looks for jobs that a dead one left behind."""

CUT_OFF_PATIENCE: Final = UNWIND_PATIENCE + 0.2
"""Seconds at the deadline for handlers to clean up, and for what finishes then to be recorded."""

RECORD_HANDED_BACK: Final = 0.3
"""Seconds that recording `pending` may take at the deadline; the jobs are handed back anyway."""

# What a row was told of a job that BullMQ then refused to complete.
_TAKEN_BACK: Final = MappingProxyType({"completedAt": None, "result": None})

T = TypeVar("T")


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
        self._tokens = 0
        self._running: dict[Claim, JobHistory] = {}
        self._stop = asyncio.Event()
        self._closed = False
        self._wake = asyncio.Event()
        self._fetching = asyncio.Lock()
        self._drained = False
        self._delayed_until = 0
        self._limited_until = 0.0
        self._slots: list[asyncio.Task[None]] = []
        self._keepers: list[asyncio.Task[None]] = []

    # -- life ------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the slots, the renewal of locks and the search for stalled jobs."""
        name = self.task.queue_name
        create = asyncio.get_running_loop().create_task
        self._keepers = [
            create(self._keep_locks(), name=f"the lock renewal of {name}"),
            create(self._watch_stalled(), name=f"the stalled check of {name}"),
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
        self._stop.set()
        self._wake.set()

    @property
    def _stopping(self) -> bool:
        return self._stop.is_set()

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
                    await self._insist(self._hand_back_all)
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
        held = await self._queue.held(self._id)
        histories = {claim.id: history for claim, history in self._running.items()}
        patch = record.handed_back_patch()
        writes = [histories[claim.id].follow(patch) for claim in held if claim.id in histories]
        try:
            async with asyncio.timeout(RECORD_HANDED_BACK):
                await asyncio.gather(*writes)
        except TimeoutError:
            log.warning("handed_back_jobs_not_recorded", queue=self.task.queue_name)
        for claim in held:
            await self._hand_back(claim)
        await self._queue.put_marker_back()

    async def _hand_back(self, claim: Claim) -> None:
        try:
            await self._queue.hand_back(claim)
            log.info("job_handed_back", queue=self.task.queue_name, task_id=claim.id)
        except (LockLostError, MalformedJobError, ChildrenLeftError) as error:
            reason = str(error)
            log.warning("job_lost", queue=self.task.queue_name, task_id=claim.id, reason=reason)

    # -- slots -----------------------------------------------------------------------------------

    async def _slot(self, index: int) -> None:
        owner = f"{self._id}:{index}:"
        claim: Claim | None = None
        while not self._stopping:
            claim = await self._next(owner)
            while claim is not None and not self._stopping:
                claim = await self._attempt(claim, owner)
        if claim is not None:
            await self._insist(lambda: self._hand_back(claim))

    async def _next(self, owner: str) -> Claim | None:
        """Wait for a job and claim it; None when stopping."""
        async with self._fetching:
            pause = OUTAGE_PAUSE
            unsure = False
            while not self._stopping:
                try:
                    if unsure:
                        claim = await self._claimed_unawares(owner)
                        unsure = False
                    else:
                        await self._await_work()
                        if self._stopping:
                            break
                        self._tokens += 1
                        claim = self._take(await self._queue.fetch(f"{owner}{self._tokens}"))
                    if claim is not None:
                        return claim
                    pause = OUTAGE_PAUSE
                except RedisError as error:
                    if not isinstance(error, RedisConnectionError):
                        log.error("fetch_refused", queue=self._queue.name, reason=str(error))
                    # A job may have been claimed, or a marker taken, and only the reply lost.
                    unsure, self._drained = True, False
                    await self._until_stopped(asyncio.sleep(pause))
                    await self._until_stopped(self._queue.connected())
                    pause = min(pause * 2, OUTAGE_PAUSE_MAX)
        return None

    async def _await_work(self) -> None:
        """Return when a fetch may bring a job."""
        loop = asyncio.get_running_loop()
        limited = self._limited_until - loop.time()
        if limited > 0:
            await self._until_stopped(asyncio.sleep(limited))
            return
        if not self._drained:
            return
        due_in = (self._delayed_until - _now_ms()) / 1000 if self._delayed_until else None
        if due_in is not None and due_in <= 0:
            return
        if self._stopping:
            return
        self._wake.clear()
        # The server ends a blocking read up to 0.1 s late; the next delayed job can't wait so long.
        timer = None if due_in is None else loop.call_later(due_in, self._wake.set)
        try:
            await self._queue.wait_for_marker(self._block_seconds, self._wake)
        finally:
            if timer is not None:
                timer.cancel()

    @property
    def _block_seconds(self) -> float:
        # A fetch follows each blocking read, even one in vain: a marker can die with the worker
        # that took it. So long, these two and the stalled check are one command per `drainDelay`.
        return 2.5 * float(self.task.worker_options.get("drainDelay", DRAIN_DELAY))

    async def _until_stopped(self, waiting: Awaitable[Any]) -> None:
        """Await this, but no longer than until `stop`."""
        waited: asyncio.Future[Any] = asyncio.ensure_future(waiting)
        stopped: asyncio.Future[Any] = asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait([waited, stopped], return_when=asyncio.FIRST_COMPLETED)
        finally:
            waited.cancel()
            stopped.cancel()

    def _take(self, reply: Reply) -> Claim | None:
        """Note what a reply says of the queue; its job."""
        if reply.fetched:
            self._drained = reply.claim is None and not reply.limited_ms
            self._delayed_until = reply.delayed_until
            self._limited_until = (
                asyncio.get_running_loop().time() + reply.limited_ms / 1000
                if reply.limited_ms
                else 0.0
            )
        return reply.claim

    async def _claimed_unawares(self, owner: str) -> Claim | None:
        """A job that Redis gave to this slot in a reply that got lost."""
        known = {claim.id for claim in self._running}
        held = await self._queue.held(owner)
        return next((claim for claim in held if claim.id not in known), None)

    # -- one job ---------------------------------------------------------------------------------

    async def _attempt(self, claim: Claim, owner: str) -> Claim | None:
        """Run one job to its acknowledgement; the job that the acknowledgement brought."""
        # Not taken out when this is cancelled: `close` hands back what is left.
        history = self._running[claim] = self._history_of(claim)
        failpoint("after-claim")
        following = None
        try:
            following = self._take(await self._process(claim, history, owner))
        except LockLostError as error:
            log.warning("job_lost", queue=self._queue.name, task_id=claim.id, reason=str(error))
        except WorkerError:
            raise
        except Exception as error:
            # Whatever a hostile job made of this code, it costs that job, and not its neighbours.
            log.exception("job_broke_its_slot", queue=self._queue.name, task_id=claim.id)
            await self._bury(claim, history, error)
        del self._running[claim]
        return following

    def _history_of(self, claim: Claim) -> JobHistory:
        queue = self.task.queue_name
        row_id = record.row_id(queue, claim.id)
        new_row = None
        if self._record_unknown_jobs:
            new_row = partial(record.unknown_job_row, queue, claim.job)
        make_sure = partial(self._make_sure_of_lock, claim, ask=True)
        return JobHistory(self._recorder, row_id, queue, new_row, make_sure)

    async def _process(self, claim: Claim, history: JobHistory, owner: str) -> Reply:
        job = claim.job
        # The process may have stood still since it asked for the job.
        await self._make_sure_of_lock(claim)
        if job.repeatJobKey:
            await self._advance_scheduler(claim)
        if never := claim.malformed or job.deferredFailure:
            return await self._fail(claim, history, owner, UnrecoverableError(never))
        data = job.data
        correlation_id = None
        if isinstance(data, dict):
            data = dict(data)
            correlation_id = data.pop("correlationId", None)
        try:
            payload = self.task.parse_payload(data)
        except PayloadError as error:
            return await self._fail(claim, history, owner, error)
        failpoint("before-active-row")
        # Not the time of the write: it tells claims apart, and a stale one must look stale.
        started = record.active_patch(now_ms=claim.claimed_ms, attempt=claim.attempt)
        verdict = await history.start(started)
        failpoint("after-active-row")
        if verdict is Verdict.CANCELLED:
            send = partial(self._queue.fail, claim, "the task is cancelled", None)
            return await self._acknowledge(claim, owner, send)
        await self._make_sure_of_lock(claim)
        failpoint("handler-start")
        outcome = await execute(self.task, payload, self._context(claim, correlation_id))
        failpoint("handler-end")
        await self._make_sure_of_lock(claim)
        if isinstance(outcome.error, DelayedError | WaitingChildrenError):
            return await self._moved(claim, history, owner, outcome.error)
        if outcome.error is not None:
            return await self._fail(claim, history, owner, outcome.error)
        return await self._complete(claim, history, owner, outcome)

    def _context(self, claim: Claim, correlation_id: object) -> TaskContext:
        return TaskContext(
            task_id=claim.id,
            correlation_id=correlation_id if isinstance(correlation_id, str) else str(uuid4()),
            queue_name=self.task.queue_name,
            attempt=claim.attempt,
            max_attempts=claim.max_attempts,
            job=claim.job,
        )

    async def _complete(
        self, claim: Claim, history: JobHistory, owner: str, outcome: Outcome
    ) -> Reply:
        try:
            result = record.success_result(outcome.value, outcome.duration_ms)
        except NotStorableError as error:
            return await self._fail(claim, history, owner, error)
        patch = record.completed_patch(now_ms=_now_ms(), result=result)
        await history.finish(patch)
        try:
            return await self._acknowledge(
                claim, owner, partial(self._queue.complete, claim, result)
            )
        except ChildrenLeftError as error:
            return await self._fail(claim, history, owner, error, instead=_TAKEN_BACK)

    async def _fail(
        self,
        claim: Claim,
        history: JobHistory,
        owner: str,
        error: BaseException,
        *,
        instead: Mapping[str, None] = MappingProxyType({}),
    ) -> Reply:
        """Record and acknowledge a failure: for good, or with another attempt to come."""
        now_ms = _now_ms()
        delay_ms, why_not = await self._next_delay(claim, error)
        failure = record.error_record(error, now_ms=now_ms)
        if why_not:
            failure["reason"] = f"{failure['reason']} (no retry: {why_not})"
        if delay_ms is None:
            patch = record.failed_patch(now_ms=now_ms, attempt=claim.attempt, error=failure)
        elif delay_ms > 0:
            patch = record.delayed_patch(
                until_ms=now_ms + delay_ms, attempt=claim.attempt, error=failure
            )
        else:
            patch = record.pending_patch(attempt=claim.attempt, error=failure)
        if await history.finish({**patch, **instead}) is Verdict.CANCELLED:
            delay_ms = None  # A cancelled task never runs again.
        told = (failure["reason"], failure.get("stackTrace"))
        log.info(
            "job_failed",
            queue=self._queue.name,
            task_id=claim.id,
            attempt=claim.attempt,
            retry_in_ms=delay_ms,
            reason=failure["reason"],
        )
        if delay_ms is None:
            return await self._acknowledge(claim, owner, partial(self._queue.fail, claim, *told))
        if delay_ms > 0:
            send = partial(self._queue.delay, claim, now_ms, delay_ms, *told)
            return await self._acknowledge(claim, owner, send)
        send = partial(self._queue.retry, claim, *told)
        return await self._acknowledge(claim, owner, send)

    async def _next_delay(
        self, claim: Claim, error: BaseException
    ) -> tuple[int | None, str | None]:
        """ms until the next attempt, None for no further one; and why not, if it isn't plain."""
        never = (UnrecoverableError, PayloadError, NotStorableError)
        if isinstance(error, never) or claim.attempt >= claim.max_attempts or claim.job.discarded:
            return None, None
        settings = self.task.worker_options.get("settings", {})
        try:
            delay_ms = await backoff_ms(
                claim.job.opts.get("backoff"),
                claim.attempt,
                error=error,
                job=claim.job,
                strategy=settings.get("backoffStrategy"),
            )
        except NoBackoffError as reason:
            return None, str(reason)
        except Exception as reason:
            return None, f"the backoff strategy raised {type(reason).__name__}"
        return delay_ms, None

    async def _moved(
        self, claim: Claim, history: JobHistory, owner: str, error: BaseException
    ) -> Reply:
        """The handler says that it moved its own job; the row follows."""
        if await self._insist(lambda: self._queue.holds(claim)) is Hold.OURS:
            reason = UnmovedJobError(f"the handler raised {type(error).__name__} without moving")
            reason.__cause__ = error
            return await self._fail(claim, history, owner, reason)
        if isinstance(error, WaitingChildrenError):
            patch = record.waiting_children_patch()
        else:
            due = await self._insist(lambda: self._queue.due_at(claim))
            if due is None:  # It is due already, and has been picked up again.
                return Reply()
            patch = record.moved_to_delayed_patch(until_ms=due)
        await history.follow(patch)
        return Reply()

    async def _acknowledge(
        self, claim: Claim, owner: str, send: Callable[..., Awaitable[Reply]]
    ) -> Reply:
        """Tell BullMQ the outcome, which PostgreSQL has committed."""
        pause = OUTAGE_PAUSE
        while True:
            try:
                failpoint("before-ack")
                reply = await send(fetch_next=not self._stopping)
            except MalformedJobError as error:
                await self._bury(claim, self._running[claim], error)
                # It may have been the next job that the script broke on, after claiming it.
                return Reply(await self._insist(lambda: self._claimed_unawares(owner)))
            except LockLostError:
                # The lock may have expired while this waited for Redis to come back.
                if await self._insist(lambda: self._queue.holds(claim)) is not Hold.OURS:
                    raise
            except RedisConnectionError:
                await asyncio.sleep(pause)
                pause = min(pause * 2, OUTAGE_PAUSE_MAX)
                if await self._insist(lambda: self._queue.holds(claim)) is not Hold.OURS:
                    # The reply was lost, not the acknowledgement: it may have brought a job.
                    found = await self._insist(lambda: self._claimed_unawares(owner))
                    return Reply(found)
            else:
                failpoint("after-ack")
                return reply

    async def _bury(self, claim: Claim, history: JobHistory, error: Exception) -> None:
        """Fail a job for good on which BullMQ's scripts, or this code, broke."""
        now_ms = _now_ms()
        try:
            if await self._insist(lambda: self._queue.is_finished(claim)):
                return
            failure = record.error_record(error, now_ms=now_ms)
            patch = record.failed_patch(now_ms=now_ms, attempt=claim.attempt, error=failure)
            await history.finish({**patch, **_TAKEN_BACK})
            await self._insist(lambda: self._queue.bury(claim, failure["reason"]))
        except RedisError as refusal:
            # Then it is not this job that is broken, but its queue.
            queue, reason = self._queue.name, str(refusal)
            log.error("job_not_buried", queue=queue, task_id=claim.id, reason=reason)

    async def _advance_scheduler(self, claim: Claim) -> None:
        try:
            await self._insist(lambda: self._queue.advance_scheduler(claim))
        except Exception as error:
            # The job itself is sound, and runs; as with Node, only its successor is missing.
            log.error(
                "job_scheduler_not_advanced",
                queue=self._queue.name,
                scheduler=claim.job.repeatJobKey,
                reason=str(error),
            )

    # -- locks -----------------------------------------------------------------------------------

    async def _make_sure_of_lock(self, claim: Claim, *, ask: bool = False) -> None:
        """Ask Redis whether the job still is ours, if its lock may have expired.

        Raises:
            LockLostError: another worker has it; nothing may be recorded for this attempt.
        """
        surely_ours = asyncio.get_running_loop().time() < claim.locked_until
        if surely_ours and not ask:
            return
        if await self._insist(lambda: self._queue.holds(claim)) is Hold.LOST:
            raise LockLostError("its lock expired, and another worker took the job over")

    @property
    def _renew_every(self) -> float:
        option: float = self.task.worker_options.get("lockRenewTime", self._queue.lock_ms / 2)
        return option / 1000

    async def _keep_locks(self) -> None:
        lock, renew = self._queue.lock_ms / 1000, self._renew_every
        while True:
            await asyncio.sleep(renew / 2)
            soon = asyncio.get_running_loop().time() + lock - renew / 2
            due = [claim for claim in self._running if claim.locked_until < soon]
            await self._insist(partial(self._queue.extend, due))

    async def _watch_stalled(self) -> None:
        interval = self.task.worker_options.get("stalledInterval", STALLED_INTERVAL_MS) / 1000
        while True:
            await self._queue.connected()
            if (left := self._calm_in()) > 0:
                await asyncio.sleep(min(left, OUTAGE_PAUSE_MAX))
                continue
            try:
                # Our own are renewed last of all: a server that hung takes commands in their order.
                await self._queue.extend(list(self._running))
                if self._calm_in() > 0:
                    continue  # It has waited for the connection.
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

    async def _insist(self, ask: Callable[[], Awaitable[T]]) -> T:
        """Ask Redis, over every outage, for something that may be asked twice."""
        pause = OUTAGE_PAUSE
        while True:
            try:
                return await ask()
            except RedisConnectionError:
                await asyncio.sleep(pause)
                pause = min(pause * 2, OUTAGE_PAUSE_MAX)
                await self._queue.connected()


class UnmovedJobError(Exception):
    """A handler says that it moved its job, and did not."""


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
