"""``run_task``: one attempt of a task's handler, as the worker makes it, without servers."""

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeVar, cast
from uuid import uuid4

from autoflow_worker.encoding.failures import reason_of
from autoflow_worker.encoding.results import dump, storable
from autoflow_worker.errors import NeedsServersError, NotStorableError, PayloadError
from autoflow_worker.recording import patches
from autoflow_worker.scheduling.jobs import job_data, job_options
from autoflow_worker.tasks.batches import BatchOptions
from autoflow_worker.tasks.context import TaskCancelledError, TaskContext
from autoflow_worker.tasks.definition import CORRELATION_ID, TaskDefinition
from autoflow_worker.tasks.exceptions import RateLimited, RateLimitError, RetryLater
from autoflow_worker.tasks.job_handle import JobHandle
from autoflow_worker.testing.job import StandInJob
from autoflow_worker.worker.attempt import MOVED, UnmovedJobError
from autoflow_worker.worker.batch_runner import BatchRunner
from autoflow_worker.worker.handler import LoopRunner, ThreadRunner
from autoflow_worker.worker.resources import Resources
from autoflow_worker.worker.retries import is_final, next_delay
from autoflow_worker.worker.returned import ReportedFailureError, output_of
from autoflow_worker.worker.runner import Outcome, Runner
from autoflow_worker.worker.time_limit import TimeLimit, Wait, end

P = TypeVar("P")

PATIENCE: Final = 30.0
"""Seconds for a lifespan to yield, and to end."""

OutcomeName = Literal["completed", "retry", "failed", "cancelled", "retry_later", "rate_limited"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskRun:
    """What one attempt came to.

    Attributes:
        outcome: ``"completed"``; ``"retry"``: it failed, and another attempt follows;
            ``"failed"``: for good; ``"cancelled"``: the task was, and its handler did not return;
            ``"retry_later"`` and ``"rate_limited"``: the handler asked for it.
        task_id: the job's id.
        attempt: the number of this attempt.
        duration_ms: how long the handler ran.
        output: what the handler returned, as both stores have it: decoded from JSON.
        error: the reason that its row gets; ``None`` unless it failed or was cancelled.
        exception: what the handler raised, or what ended it; ``None`` if it completed.
        retry_in_ms: milliseconds until the job runs again; ``None`` if it does not.
        progress: each value that was reported, as stored. Redis gets the last one, and some others.
        logs: each line of ``ctx.log``.
    """

    outcome: OutcomeName
    task_id: str
    attempt: int
    duration_ms: float
    output: Any = None
    error: str | None = None
    exception: BaseException | None = None
    retry_in_ms: int | None = None
    progress: list[Any]
    logs: list[str]


async def run_task(
    task: TaskDefinition[P],
    payload: P | Mapping[str, object],
    *,
    attempt: int = 1,
    max_attempts: int | None = None,
    resources: object = None,
    task_id: str | None = None,
    correlation_id: str | None = None,
    last_progress: object = None,
    timeout_ms: int | None = None,
    cancel_after: float | None = None,
    stopping: bool = False,
) -> TaskRun:
    """Run a task's handler once, as the worker does, and return what came of it.

    The payload is encoded and validated, the time limit and the task's ``around`` hold, a sync
    handler runs in a thread, and the result is encoded as for both stores. Neither Redis nor
    PostgreSQL is needed. The handler of a batch task gets a batch of this one job. A handler with
    ``run_in="process"`` runs in this process, so that it can have fakes as its resources.

    Args:
        task: as ``define_task`` returns it.
        payload: an instance of the task's payload type, or the object that it is in JSON.
        attempt: the number of this attempt; with the last one, a failure is final.
        max_attempts: how often the job runs at most; ``None``: the task's own.
        resources: ``ctx.resources``. Without them the task's ``lifespan`` is entered.
        task_id: generated if not given.
        correlation_id: generated if not given.
        last_progress: ``ctx.last_progress``, what an earlier attempt reported.
        timeout_ms: a time limit for this run in milliseconds; ``None``: the task's own.
        cancel_after: seconds after which the task is cancelled.
        stopping: ``ctx.stopping``.

    Raises:
        PayloadError: the payload is no JSON object, so it could never be scheduled. One that does
            not validate is no error here: its run is ``failed``.
        TaskListError: the task's ``lifespan`` raised.
        NeedsServersError: the handler used a part of ``ctx.job`` that needs a real job.
        ValueError: the number of the attempt is not from 1 to ``max_attempts``.
    """
    max_attempts = task.options.max_attempts if max_attempts is None else max_attempts
    if not 1 <= attempt <= max_attempts:
        raise ValueError(f"attempt must be from 1 to {max_attempts}, not {attempt}")
    options = {**job_options(task, delay_ms=0), "attempts": max_attempts}
    options["jobId"] = task_id or options["jobId"]
    job = StandInJob(
        task.queue_name, job_data(task, payload, correlation_id), options, attempt=attempt
    )
    lifespans = Resources([task.lifespan] if resources is None else [])
    try:
        await lifespans.open(PATIENCE)
        if resources is None:
            resources = lifespans.of(task.lifespan)
        running = _Attempt(job, resources, stopping, storable(last_progress))
        limit_ms = task.options.timeout_ms if timeout_ms is None else timeout_ms
        outcome = await _execute(task, running, limit_ms, cancel_after)
    finally:
        await lifespans.close(PATIENCE)
    if isinstance(outcome.error, NeedsServersError):
        raise outcome.error
    if isinstance(outcome.error, MOVED):
        name = type(outcome.error).__name__
        outcome.error = UnmovedJobError(f"the handler raised {name} without moving")
    return await _settled(running, outcome)


@dataclass(slots=True, eq=False)
class _Attempt:
    """What the handler's `TaskContext` asks; see `RunningAttempt`."""

    stand_in: StandInJob
    resources: Any
    is_stopping: bool
    last_progress: Any
    is_cancelled: bool = False
    wait: Wait | None = None
    cancellation: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def job(self) -> JobHandle:
        return cast(JobHandle, self.stand_in)

    def time_left(self) -> float | None:
        return None if self.wait is None else self.wait.time_left()

    def report_progress(self, value: object) -> None:
        self.stand_in.report(value)

    def append_log(self, line: str) -> None:
        self.stand_in.append(line)

    async def until_cancelled(self) -> None:
        await self.cancellation.wait()

    def cancel(self, runner: Runner) -> None:
        self.is_cancelled = True
        self.cancellation.set()
        if runner.interrupts and self.wait is not None:
            end(self.wait.ended, TaskCancelledError("the task is cancelled"))


async def _execute(
    task: TaskDefinition[Any], running: _Attempt, limit_ms: int | None, cancel_after: float | None
) -> Outcome:
    """Run the handler, as `worker/attempt` does."""
    job = running.stand_in
    # The thread of a handler that overruns its limit stays behind: two, so that one is not all.
    calls = LoopRunner(task) if task.is_async else ThreadRunner(task, concurrency=2)
    runner: Runner = calls
    limit = TimeLimit(limit_ms)
    if task.batch is not None:
        runner = BatchRunner(calls, BatchOptions(size=1), limit, concurrency=1)
        limit = TimeLimit(None)  # The batch keeps it for its items.
    cancelling: asyncio.TimerHandle | None = None
    try:
        try:
            payload = task.parse_payload(job.data)
        except PayloadError as error:
            return Outcome(None, error, 0)
        correlation_id = job.data[CORRELATION_ID]
        context: TaskContext[Any] = TaskContext(
            running=running,
            task_id=job.id,
            correlation_id=correlation_id if isinstance(correlation_id, str) else str(uuid4()),
            queue_name=task.queue_name,
            attempt=job.attemptsStarted,
            max_attempts=job.opts["attempts"],
        )
        running.wait = wait = limit.start()
        if cancel_after is not None:
            loop = asyncio.get_running_loop()
            cancelling = loop.call_later(cancel_after, running.cancel, runner)
        try:
            return await runner.run(payload, context, wait)
        finally:
            limit.remove(wait)
    finally:
        if cancelling is not None:
            cancelling.cancel()
        await runner.close(PATIENCE)


async def _settled(running: _Attempt, outcome: Outcome) -> TaskRun:
    """Return what the worker would record."""
    job, error = running.stand_in, outcome.error
    ended: dict[str, Any] = {
        "duration_ms": outcome.duration_ms,
        "progress": job.reports,
        "logs": job.logs,
        "task_id": job.id,
        "attempt": job.attemptsStarted,
    }
    if error is None:
        try:
            output, duration_ms = output_of(outcome.value, outcome.duration_ms)
            result = json.loads(dump(patches.encoded_result(output, duration_ms)))
        except (ReportedFailureError, NotStorableError) as refusal:
            error = refusal
        else:
            ended |= {"output": result["output"], "duration_ms": result["duration"]}
            return TaskRun(outcome="completed", **ended)
    ended |= {"exception": error}
    if running.is_cancelled:
        return TaskRun(outcome="cancelled", error=reason_of(error), **ended)
    if isinstance(error, RateLimitError):
        rest_ms = error.rest_ms if isinstance(error, RateLimited) else 0
        return TaskRun(outcome="rate_limited", retry_in_ms=rest_ms, **ended)
    if isinstance(error, RetryLater):
        return TaskRun(outcome="retry_later", retry_in_ms=error.delay_ms, **ended)
    delay_ms: int | None = None
    if not (is_final(error, job.attemptsStarted, job.opts["attempts"]) or job.discarded):
        delay_ms, _ = await next_delay(error, job.opts["backoff"], job.attemptsStarted)
    return TaskRun(
        outcome="failed" if delay_ms is None else "retry",
        error=reason_of(error),
        retry_in_ms=delay_ms,
        **ended,
    )
