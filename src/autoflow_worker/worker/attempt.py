"""One job's way through the worker: start, run, record, acknowledge.

The order is the promise: the row's terminal status is committed first, then BullMQ is told. A crash
in between runs the job again, and never leaves a row that lies.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, NamedTuple
from uuid import uuid4

import structlog
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from autoflow_worker.broker.backoff import NoBackoffError, backoff_ms
from autoflow_worker.broker.claim import (
    ChildrenLeftError,
    Claim,
    Hold,
    LockLostError,
    MalformedJobError,
    Reply,
)
from autoflow_worker.broker.job_queue import OUTAGE_PAUSE, OUTAGE_PAUSE_MAX, JobQueue
from autoflow_worker.encoding.results import dump
from autoflow_worker.errors import NotStorableError, PayloadError
from autoflow_worker.recording import patches
from autoflow_worker.recording.write import Verdict
from autoflow_worker.tasks.definition import (
    DelayedError,
    TaskContext,
    TaskDefinition,
    UnrecoverableError,
    WaitingChildrenError,
)
from autoflow_worker.worker.fetcher import Fetcher
from autoflow_worker.worker.handler import Outcome, TimeLimit, execute
from autoflow_worker.worker.history import JobHistory, OutcomeRefusedError
from autoflow_worker.worker.threads import HandlerThreads

log = structlog.get_logger(__name__)


class UnmovedJobError(Exception):
    """A handler says that it moved its job, and did not."""


class Finish(NamedTuple):
    """The end of a job as its row has it, for BullMQ.

    Attributes:
        field: `returnvalue` of a completed job, `failedReason` of a failed one.
        value: what the field holds.
        stack_trace: of a failure.
    """

    field: str
    value: str
    stack_trace: str | None = None


class Attempt:
    """One attempt at one job.

    Args:
        task: the job's task.
        queue: its queue.
        fetcher: says whether an acknowledgement is to bring the next job.
        limit: the task's time limit.
        threads: the task's threads.
        claim: the job.
        history: its row.
        owner: the beginning of the slot's tokens, by which Redis knows its jobs.
    """

    __slots__ = (
        "_claim",
        "_fetcher",
        "_history",
        "_limit",
        "_owner",
        "_queue",
        "_task",
        "_threads",
    )

    def __init__(
        self,
        task: TaskDefinition[Any],
        queue: JobQueue,
        fetcher: Fetcher,
        limit: TimeLimit,
        threads: HandlerThreads,
        *,
        claim: Claim,
        history: JobHistory,
        owner: str,
    ) -> None:
        self._task = task
        self._queue = queue
        self._fetcher = fetcher
        self._limit = limit
        self._threads = threads
        self._claim = claim
        self._history = history
        self._owner = owner

    async def run(self) -> Reply:
        """Take the job from its claim to its acknowledgement; what that brought.

        Raises:
            LockLostError: another worker has the job; nothing was recorded for this attempt.
        """
        queue, claim = self._queue, self._claim
        if not queue.is_surely_ours(claim):
            # The process has stood still since it asked for the job.
            await queue.make_sure_of(claim)
        if claim.scheduler:
            await self._advance_scheduler(claim.scheduler)
        if claim.never:
            return await self._fail(UnrecoverableError(claim.never))
        data = claim.data
        correlation_id = None
        if isinstance(data, dict):
            data = dict(data)
            correlation_id = data.pop("correlationId", None)
        try:
            payload = self._task.parse_payload(data)
        except PayloadError as error:
            return await self._fail(error)
        verdict = await self._history.start()
        if verdict is Verdict.CANCELLED:
            return await self._acknowledge_failure(Finish("failedReason", "the task is cancelled"))
        if not queue.is_surely_ours(claim):
            await queue.make_sure_of(claim)
        outcome = await execute(
            self._task, payload, self._context(correlation_id), self._limit, self._threads
        )
        if not queue.is_surely_ours(claim):
            await queue.make_sure_of(claim)
        if isinstance(outcome.error, DelayedError | WaitingChildrenError):
            return await self._moved(outcome.error)
        if outcome.error is not None:
            return await self._fail(outcome.error)
        return await self._complete(outcome)

    def _context(self, correlation_id: object) -> TaskContext:
        claim = self._claim
        return TaskContext(
            task_id=claim.id,
            correlation_id=correlation_id if isinstance(correlation_id, str) else str(uuid4()),
            queue_name=self._queue.name,
            attempt=claim.attempt,
            max_attempts=claim.max_attempts,
            make_job=lambda: claim.job,
        )

    async def _complete(self, outcome: Outcome) -> Reply:
        try:
            result = patches.encoded_result(outcome.value, outcome.duration_ms)
        except NotStorableError as error:
            return await self._fail(error)
        await self._history.complete(result)
        send = partial(self._queue.complete, self._claim, result)
        try:
            return await self._acknowledge(send, lambda: Finish("returnvalue", dump(result)))
        except ChildrenLeftError as error:
            return await self._fail(error)

    async def _fail(self, error: BaseException) -> Reply:
        """Record and acknowledge a failure: for good, or with another attempt to come."""
        now_ms = _now_ms()
        delay_ms, why_not = await self._next_delay(error)
        failure = patches.error_record(error, now_ms=now_ms)
        if why_not:
            failure["reason"] = f"{failure['reason']} (no retry: {why_not})"
        if delay_ms is None:
            patch = patches.failed_patch(now_ms=now_ms, attempt=self._claim.attempt, error=failure)
        elif delay_ms > 0:
            patch = patches.delayed_patch(
                until_ms=now_ms + delay_ms, attempt=self._claim.attempt, error=failure
            )
        else:
            patch = patches.pending_patch(attempt=self._claim.attempt, error=failure)
        verdict = await self._history.finish(patch)
        if verdict is Verdict.FINISHED:
            return await self._forget()
        if verdict is Verdict.CANCELLED:
            delay_ms = None  # A cancelled task never runs again.
        told = (failure["reason"], failure.get("stackTrace"))
        log.info(
            "job_failed",
            queue=self._queue.name,
            task_id=self._claim.id,
            attempt=self._claim.attempt,
            retry_in_ms=delay_ms,
            reason=failure["reason"],
        )
        if delay_ms is None:
            return await self._acknowledge_failure(Finish("failedReason", *told))
        if delay_ms > 0:
            send = partial(self._queue.delay, self._claim, now_ms + delay_ms, *told)
            return await self._acknowledge(send)
        send = partial(self._queue.retry, self._claim, *told)
        return await self._acknowledge(send)

    async def _forget(self) -> Reply:
        """Drop a job whose data Redis has lost, and whose end its row tells."""
        await self._queue.insist(lambda: self._queue.drop(self._claim))
        log.warning("finished_job_dropped", queue=self._queue.name, task_id=self._claim.id)
        return Reply()

    async def _next_delay(self, error: BaseException) -> tuple[int | None, str | None]:
        """ms until the next attempt, None for no further one; and why not, if it isn't plain."""
        never = (UnrecoverableError, PayloadError, NotStorableError)
        claim = self._claim
        if isinstance(error, never) or claim.attempt >= claim.max_attempts or claim.job.discarded:
            return None, None
        settings = self._task.worker_options.get("settings", {})
        try:
            delay_ms = await backoff_ms(
                self._claim.job.opts.get("backoff"),
                self._claim.attempt,
                error=error,
                job=self._claim.job,
                strategy=settings.get("backoffStrategy"),
            )
        except NoBackoffError as reason:
            return None, str(reason)
        except BaseException as reason:
            if isinstance(reason, asyncio.CancelledError) and _is_being_cancelled():
                raise
            # As a handler, it can raise anything, SystemExit among it, and costs its job only.
            return None, f"the backoff strategy raised {type(reason).__name__}"
        return delay_ms, None

    async def _moved(self, error: BaseException) -> Reply:
        """The handler says that it moved its own job; the row follows."""
        if await self._queue.still_has(self._claim):
            reason = UnmovedJobError(f"the handler raised {type(error).__name__} without moving")
            reason.__cause__ = error
            return await self._fail(reason)
        if isinstance(error, WaitingChildrenError):
            patch = patches.waiting_children_patch()
        else:
            due = await self._queue.insist(lambda: self._queue.due_at(self._claim))
            if due is None:  # It is due already, and has been picked up again.
                return Reply()
            patch = patches.moved_to_delayed_patch(until_ms=due)
        await self._history.follow(patch)
        return Reply()

    async def _acknowledge_failure(self, finish: Finish) -> Reply:
        send = partial(self._queue.fail, self._claim, finish.value, finish.stack_trace)
        return await self._acknowledge(send, lambda: finish)

    async def _acknowledge(
        self,
        send: Callable[..., Awaitable[Reply]],
        finish: Callable[[], Finish] | None = None,
    ) -> Reply:
        """Tell BullMQ the outcome, which PostgreSQL has committed.

        Args:
            send: runs BullMQ's script.
            finish: what the row says, if the job ends with it; made where the script breaks.
        """
        pause = OUTAGE_PAUSE
        while True:
            if not self._queue.is_connected:
                # A command takes the time at which it is made for the time of the next claim.
                await self._queue.connected()
            try:
                reply = await send(fetch_next=self._fetcher.wants_more)
            except MalformedJobError as error:
                await self.bury(error, None if finish is None else finish())
                # It may have been the next job that the script broke on, after claiming it.
                return Reply(await self._claimed_unawares())
            except LockLostError:
                # The lock may have expired while this waited for Redis to come back.
                if (hold := await self._queue.whose(self._claim)) is Hold.GONE:
                    await self._queue.insist(lambda: self._queue.drop(self._claim))
                if hold is not Hold.OURS:
                    raise
            except RedisConnectionError:
                await asyncio.sleep(pause)
                pause = min(pause * 2, OUTAGE_PAUSE_MAX)
                if not await self._queue.still_has(self._claim):
                    # The reply was lost, not the acknowledgement: it may have brought a job.
                    return Reply(await self._claimed_unawares())
            else:
                return reply

    async def _claimed_unawares(self) -> Claim | None:
        return await self._queue.insist(lambda: self._fetcher.claimed_unawares(self._owner))

    async def bury(self, error: Exception, finish: Finish | None = None) -> None:
        """Finish a job on which BullMQ's scripts break, or which breaks this code.

        Args:
            error: what broke.
            finish: the end that its row has already; the job fails for the error if not given.

        Raises:
            LockLostError: another worker has the job.
        """
        queue = self._queue
        try:
            if await queue.insist(lambda: queue.is_finished(self._claim)):
                return
            if finish is None:
                finish = await self._record_burial(error)
            if not await queue.insist(partial(queue.bury, self._claim, *finish)):
                raise LockLostError("another worker took the job over")
            log.error("job_buried", queue=queue.name, task_id=self._claim.id, reason=str(error))
        except (RedisError, OutcomeRefusedError) as refusal:
            # Then it is not this job that is broken, but its queue, or its row. It comes again.
            reason = str(refusal)
            log.error("job_not_buried", queue=queue.name, task_id=self._claim.id, reason=reason)

    async def _record_burial(self, error: Exception) -> Finish:
        now_ms = _now_ms()
        failure = patches.error_record(error, now_ms=now_ms)
        patch = patches.failed_patch(now_ms=now_ms, attempt=self._claim.attempt, error=failure)
        await self._history.finish(patch)
        return Finish("failedReason", failure["reason"], failure.get("stackTrace"))

    async def _advance_scheduler(self, scheduler: str) -> None:
        try:
            await self._queue.insist(lambda: self._queue.advance_scheduler(self._claim))
        except Exception as error:
            # The job itself is sound, and runs; as with Node, only its successor is missing.
            log.error(
                "job_scheduler_not_advanced",
                queue=self._queue.name,
                scheduler=scheduler,
                reason=str(error),
            )


def _is_being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
