"""One attempt at one job: start, run, record, acknowledge.

The order is the promise: PostgreSQL commits the row's outcome first, then BullMQ is told. A crash
in between runs the job again, and never leaves a row that lies.
"""

import asyncio
from collections.abc import Awaitable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final
from uuid import uuid4

import structlog

from autoflow_worker.broker.claim import ChildrenLeftError, Claim, Reply
from autoflow_worker.broker.job_queue import JobQueue
from autoflow_worker.broker.job_reports import last_progress
from autoflow_worker.broker.rate_limit import give_back
from autoflow_worker.clock import now_ms
from autoflow_worker.encoding.results import dump
from autoflow_worker.errors import NotStorableError, PayloadError
from autoflow_worker.recording import patches
from autoflow_worker.recording.write import Verdict
from autoflow_worker.tasks.context import TaskCancelledError, TaskContext
from autoflow_worker.tasks.definition import CORRELATION_ID, TaskDefinition
from autoflow_worker.tasks.exceptions import (
    DelayedError,
    RateLimited,
    RateLimitError,
    RetryLater,
    UnrecoverableError,
    WaitingChildrenError,
    WaitingError,
)
from autoflow_worker.tasks.job_handle import JobHandle
from autoflow_worker.worker.acknowledge import Acknowledger, Finish
from autoflow_worker.worker.fetcher import Fetcher
from autoflow_worker.worker.history import JobHistory
from autoflow_worker.worker.reports import Reports
from autoflow_worker.worker.retries import is_final, next_delay
from autoflow_worker.worker.returned import ReportedFailureError, output_of
from autoflow_worker.worker.runner import Outcome, Runner
from autoflow_worker.worker.time_limit import TimeLimit, Wait

log = structlog.get_logger(__name__)

MOVED: Final = (DelayedError, WaitingError, WaitingChildrenError)
"""What a handler raises that has moved its own job."""


_CANCELLED: Final = Finish("failedReason", "the task is cancelled")


class UnmovedJobError(Exception):
    """A handler raised that it had moved its job, and had not."""


@dataclass(slots=True, eq=False, repr=False)
class TaskSetup:
    """What all attempts of one task share."""

    task: TaskDefinition[Any]
    queue: JobQueue
    fetcher: Fetcher
    acknowledger: Acknowledger
    limit: TimeLimit
    runner: Runner
    loop: asyncio.AbstractEventLoop
    resources: Any = None


@dataclass(slots=True, eq=False, repr=False)
class Attempt:
    """One attempt at one job; also what its handler's `TaskContext` asks.

    Attributes:
        is_cancelled: whether its handler was told that the task is cancelled.
    """

    setup: TaskSetup
    claim: Claim
    history: JobHistory
    is_cancelled: bool = field(default=False, init=False)
    _wait: Wait | None = field(default=None, init=False)
    _reports: Reports | None = field(default=None, init=False)
    _cancellation: asyncio.Event | None = field(default=None, init=False)

    async def run(self) -> Reply:
        """Take the job from its claim to its acknowledgement; return the acknowledgement's reply.

        Raises:
            LockLostError: another worker has the job; nothing was recorded for this attempt.
            NotAdvancedError: its job scheduler can't produce the next job; nothing was done.
            OutcomeRefusedError: PostgreSQL refuses the outcome, and the slot can't wait for it.
        """
        setup, claim = self.setup, self.claim
        queue, runner = setup.queue, setup.runner
        if not queue.is_surely_ours(claim):
            # This process has stood still since it asked for the job.
            await queue.make_sure_of(claim)
        if claim.scheduler:
            await queue.insist(lambda: queue.schedulers.advance(claim))
        if claim.never:
            return await self._fail(UnrecoverableError(claim.never))
        try:
            payload = runner.payload(claim)
        except PayloadError as error:
            return await self._fail(error)
        verdict = await self.history.start()
        if verdict is Verdict.CANCELLED:
            return await self._acknowledge_failure(_CANCELLED)
        if not queue.is_surely_ours(claim):
            await queue.make_sure_of(claim)
        outcome = await self._execute(payload)
        if not (queue.is_surely_ours(claim) or isinstance(outcome.error, MOVED)):
            await queue.make_sure_of(claim)
        return await self._settled(outcome)

    def _settled(self, outcome: Outcome) -> Awaitable[Reply]:
        """Record and acknowledge what came of the handler."""
        error = outcome.error
        if error is None:
            return self._complete(outcome)
        if isinstance(error, MOVED):
            return self._moved(error)
        if isinstance(error, RateLimitError):
            return self._limited(error)
        if isinstance(error, RetryLater):
            return self._later(error.delay_ms)
        return self._fail(error)

    async def _execute(self, payload: Any) -> Outcome:
        """Run the handler, and send what it reported last."""
        setup, claim = self.setup, self.claim
        data = claim.data
        correlation_id = data.get(CORRELATION_ID) if isinstance(data, dict) else None
        context: TaskContext[Any] = TaskContext(
            running=self,
            task_id=claim.id,
            correlation_id=correlation_id if isinstance(correlation_id, str) else str(uuid4()),
            queue_name=setup.queue.name,
            attempt=claim.attempt,
            max_attempts=claim.max_attempts,
        )
        self._wait = wait = setup.limit.start()
        try:
            outcome = await setup.runner.run(payload, context, wait)
        finally:
            setup.limit.remove(wait)
        if self._reports is not None:
            await self._reports.close()
        return outcome

    # -- what the handler's context asks ---------------------------------------------------------

    @property
    def job(self) -> JobHandle:
        return self.claim.job_of_handler()

    @property
    def resources(self) -> Any:
        return self.setup.resources

    @property
    def is_stopping(self) -> bool:
        return self.setup.fetcher.is_stopping

    @property
    def last_progress(self) -> Any:
        return last_progress(self.claim)

    def time_left(self) -> float | None:
        return None if self._wait is None else self._wait.time_left()

    def report_progress(self, value: object) -> None:
        self._get_reports().progress(value)

    def append_log(self, line: str) -> None:
        self._get_reports().log(line)

    def _get_reports(self) -> Reports:
        if self._reports is None:
            self._reports = Reports(self.claim, self.setup.queue.reports, self.setup.loop)
        return self._reports

    async def until_cancelled(self) -> None:
        if self._cancellation is None:
            self._cancellation = asyncio.Event()
        if not self.is_cancelled:
            await self._cancellation.wait()

    @property
    def can_be_cancelled(self) -> bool:
        """Whether its handler runs, and was not told yet that the task is cancelled."""
        return not self.is_cancelled and self._wait is not None and not self._wait.ended.done()

    def cancel(self) -> None:
        """Tell the handler that the task is cancelled, and end it if it can be interrupted."""
        self.is_cancelled = True
        if self._cancellation is not None:
            self._cancellation.set()
        if self._wait is not None and self.setup.runner.interrupts:
            self._wait.end(TaskCancelledError("the task is cancelled"))

    # -- outcomes --------------------------------------------------------------------------------

    async def _complete(self, outcome: Outcome) -> Reply:
        try:
            output, duration_ms = output_of(outcome.value, outcome.duration_ms)
            result = patches.encoded_result(output, duration_ms)
        except (ReportedFailureError, NotStorableError) as error:
            return await self._fail(error)
        await self.history.complete(result)
        send = partial(self.setup.queue.complete, self.claim, result)
        try:
            return await self.setup.acknowledger.tell(
                self.claim, self.history, send, lambda: Finish("returnvalue", dump(result))
            )
        except ChildrenLeftError as error:
            return await self._fail(error)

    async def _fail(self, error: BaseException) -> Reply:
        """Record and acknowledge a failure: for good, or with another attempt to come."""
        now = now_ms()
        delay_ms, why_not = await self._next_delay(error)
        failure = patches.error_record(error, now_ms=now)
        if why_not:
            failure["reason"] = f"{failure['reason']} (no retry: {why_not})"
        if delay_ms is None:
            patch = patches.failed_patch(now_ms=now, attempt=self.claim.attempt, error=failure)
        elif delay_ms > 0:
            patch = patches.delayed_patch(
                until_ms=now + delay_ms, attempt=self.claim.attempt, error=failure
            )
        else:
            patch = patches.pending_patch(attempt=self.claim.attempt, error=failure)
        verdict = await self.history.finish(patch)
        if verdict is Verdict.FINISHED:
            # Redis has lost the job's data.
            await self.setup.queue.insist(lambda: self.setup.queue.drop(self.claim))
            log.warning("finished_job_dropped", queue=self.setup.queue.name, task_id=self.claim.id)
            return Reply()
        if verdict is Verdict.CANCELLED:
            delay_ms = None  # A cancelled task never runs again.
        told = (failure["reason"], failure.get("stackTrace"))
        log.info(
            "job_failed",
            queue=self.setup.queue.name,
            task_id=self.claim.id,
            attempt=self.claim.attempt,
            retry_in_ms=delay_ms,
            reason=failure["reason"],
        )
        if delay_ms is None:
            return await self._acknowledge_failure(Finish("failedReason", *told))
        if delay_ms > 0:
            send = partial(self.setup.queue.delay, self.claim, now + delay_ms, *told)
        else:
            send = partial(self.setup.queue.retry, self.claim, *told)
        return await self.setup.acknowledger.tell(self.claim, self.history, send)

    async def _next_delay(self, error: BaseException) -> tuple[int | None, str | None]:
        """Return the ms until the next attempt, or None, and why there is none if not obvious."""
        claim = self.claim
        if is_final(error, claim.attempt, claim.max_attempts) or claim.job.discarded:
            return None, None
        settings = self.setup.task.worker_options.get("settings", {})
        return await next_delay(
            error,
            claim.job.opts.get("backoff"),
            claim.attempt,
            job=claim.job,
            strategy=settings.get("backoffStrategy"),
        )

    async def _moved(self, error: BaseException) -> Reply:
        """Record where the handler says that it moved its own job."""
        if await self.setup.queue.still_has(self.claim):
            reason = UnmovedJobError(f"the handler raised {type(error).__name__} without moving")
            reason.__cause__ = error
            return await self._fail(reason)
        if isinstance(error, WaitingError | WaitingChildrenError):
            patch = patches.handed_back_patch()
        else:
            due = await self.setup.queue.insist(lambda: self.setup.queue.due_at(self.claim))
            if due is None:  # The job was due at once, and has been fetched again.
                return Reply()
            patch = patches.moved_to_delayed_patch(until_ms=due)
        await self.history.follow(patch)
        return Reply()

    async def _later(self, delay_ms: int) -> Reply:
        """Delay the job because its handler asks for it; the attempt is not used up."""
        until_ms = now_ms() + delay_ms
        patch = patches.handed_back_patch()
        if delay_ms:
            patch = patches.moved_to_delayed_patch(until_ms=until_ms)
        if await self.history.finish(patch) is Verdict.CANCELLED:
            return await self._acknowledge_failure(_CANCELLED)
        send = partial(self.setup.queue.postpone, self.claim, until_ms)
        return await self.setup.acknowledger.tell(self.claim, self.history, send)

    async def _limited(self, error: RateLimitError) -> Reply:
        """Give the job back to its queue, which rests."""
        if isinstance(error, RateLimited):
            job, rest_ms = self.claim.job_of_handler(), error.rest_ms
            await self.setup.queue.insist(lambda: job.rateLimit(rest_ms))
            # Before the job goes back: its marker wakes another slot of this task.
            self.setup.fetcher.rest(rest_ms / 1000)
        if await self.history.finish(patches.handed_back_patch()) is Verdict.CANCELLED:
            return await self._acknowledge_failure(_CANCELLED)
        send = partial(give_back, self.claim)
        reply = await self.setup.acknowledger.tell(self.claim, self.history, send)
        if reply.limited_ms:
            self.setup.fetcher.rest(reply.limited_ms / 1000)
        return reply

    async def _acknowledge_failure(self, finish: Finish) -> Reply:
        send = partial(self.setup.queue.fail, self.claim, finish.value, finish.stack_trace)
        return await self.setup.acknowledger.tell(self.claim, self.history, send, lambda: finish)
