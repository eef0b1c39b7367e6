"""The whole worker: open everything, start, wait, drain, close everything. Start reading here."""

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, Final

import structlog

from autoflow_worker.broker.client import PipelinedRedis
from autoflow_worker.broker.job_queue import JobQueue
from autoflow_worker.errors import PartDiedError, WorkerError
from autoflow_worker.operations.oversight import Oversight, oversee, persist
from autoflow_worker.process.supervised import Report, Supervision
from autoflow_worker.recording.cancelled_rows import CancelledRows
from autoflow_worker.recording.recorder import StatusRecorder
from autoflow_worker.settings import Settings
from autoflow_worker.tasks.definition import Lifespan, TaskDefinition
from autoflow_worker.tasks.loader import check_importable
from autoflow_worker.worker.cancellation import keep_cancelling
from autoflow_worker.worker.lifetime import (
    check_recycle_memory,
    until_idle,
    until_retired,
    until_worn,
)
from autoflow_worker.worker.resources import Resources
from autoflow_worker.worker.task_worker import TaskWorker

log = structlog.get_logger(__name__)

EXIT_CLEAN: Final = 0
EXIT_HANDED_BACK: Final = 4

CLOSE_TIMEOUT: Final = 1.3
"""Seconds past the deadline for cancelling what runs, and handing it back."""

LEAVE_PATIENCE: Final = 0.2
"""Seconds for the lifespans to end, where the deadline leaves them less."""

FLUSH_TIMEOUT: Final = 0.2
"""Seconds after that for the writes that the recorder still has; no slot waits for them."""

OVERSEER_PATIENCE: Final = 0.2
"""Seconds for an overseer to leave the server that it asks."""

Part = asyncio.Future[Any]


class WorkerService:
    """One TaskWorker for each task; one Redis client, one recorder and one shutdown for all.

    Args:
        settings: checked settings.
        tasks: at least one; no two of one queue.
        idle_limit: seconds without a job after which the worker ends; ``None``: none.
        supervision: what hears that the worker works; ``None``: nobody.

    Raises:
        TaskListError: a task runs in processes, which would not find it in TASKS_CONFIG.

    Attributes:
        workers: one for each task; none before the servers are reached.
        recorder: what all of them record statuses with; None before PostgreSQL is examined.
    """

    def __init__(
        self,
        settings: Settings,
        tasks: Sequence[TaskDefinition[Any]],
        *,
        idle_limit: float | None = None,
        supervision: Supervision | None = None,
    ) -> None:
        for task in tasks:
            if task.options.run_in == "process":
                check_importable(settings.tasks_config, task)
        self._settings = settings
        self._tasks = tasks
        self._idle_limit = idle_limit
        self._supervision = supervision
        self._oversight = Oversight(settings, [task.queue_name for task in tasks])
        self._redis: PipelinedRedis | None = None
        self.recorder: StatusRecorder | None = None
        self.workers: list[TaskWorker] = []
        self._overseers: list[asyncio.Task[None]] = []
        self._resources = Resources(map(_own_lifespan, tasks))
        self._leave_by = 0.0
        self._parts: list[Part] = []
        self._failure: WorkerError | None = None
        self._failed = asyncio.Event()
        self._is_quiet = False
        self._is_closing = False

    async def run(self, stop: asyncio.Event, abort: asyncio.Event) -> int:
        """Work until `stop` is set; `abort` cuts the drain short.

        Returns:
            0 if every job that had been fetched was finished, 4 if some were handed back.

        Raises:
            WorkerError: it could not start, or a part of it died; everything is closed then.
        """
        handed_back = 0
        try:
            if await self._until(stop, self._connect()):
                self._start()
                await self._until(stop, *self._own_ends())
                handed_back = await self._drain(abort)
        finally:
            await self._close()
        self._raise_failure()
        return EXIT_HANDED_BACK if handed_back else EXIT_CLEAN

    @property
    def is_working(self) -> bool:
        """Whether every task takes jobs, or did so before the stop."""
        return bool(self._parts)

    def fail(self, error: BaseException) -> None:
        """Close everything because foreign code ended the event loop by this error.

        `run` then raises `PartDiedError`, as if a part of it had died.
        """
        reason = f"{type(error).__name__}: {error}".removesuffix(": ")
        self._fail(
            PartDiedError(
                f"code outside of any job ended the event loop by {reason}; a callback that a "
                "handler left there, as a rule. The log has the traceback"
            )
        )

    def be_quiet(self) -> None:
        """Fetch nothing more until `wake`; what runs goes on, and so does the worker."""
        self._set_quiet(True)

    def wake(self) -> None:
        """Fetch again after `be_quiet`."""
        self._set_quiet(False)

    def _set_quiet(self, quiet: bool) -> None:
        if quiet != self._is_quiet:
            self._is_quiet = quiet
            log.info("worker_quiet" if quiet else "worker_awake")
            for worker in self.workers:
                worker.set_quiet(quiet)

    def tell(self) -> None:
        """Log what runs."""
        jobs = [job for worker in self.workers for job in worker.running_jobs()]
        log.warning("running", jobs=len(jobs), asyncio_tasks=len(asyncio.all_tasks()))
        for job in jobs:
            log.warning("running_job", **job)

    # -- open ------------------------------------------------------------------------------------

    async def _connect(self) -> None:
        settings, timeout = self._settings, self._settings.worker_startup_timeout
        # Before the recorder connects, because a pooler would give its session options to others.
        await persist(self._oversight.examine_database, timeout)
        self.recorder = StatusRecorder(
            settings.database_url.get_secret_value(),
            lanes=settings.database_pool_max - 1,
            others=1,  # for the look at cancelled rows
        )
        await self.recorder.open(timeout)
        self.recorder.refusals.patience = timeout
        self._redis = redis = PipelinedRedis(settings.redis_url.get_secret_value())
        await redis.open(timeout)
        redis.refusals.patience = timeout
        report = await persist(lambda: self._oversight.examine_redis(redis), timeout)
        for warning in report.warnings:
            log.warning("redis_unfit", reason=warning)
        for task in self._tasks:
            queue = JobQueue(
                task.queue_name,
                self._redis,
                settings.bullmq_prefix,
                task.worker_options,
                max_data=settings.max_payload_bytes,
            )
            await queue.open(timeout)
            self.workers.append(
                TaskWorker(
                    task,
                    queue,
                    self.recorder,
                    concurrency=task.options.concurrency or settings.worker_concurrency,
                    record_unknown_jobs=settings.record_unknown_jobs,
                    tasks_config=settings.tasks_config,
                )
            )
        await self._resources.open(timeout)
        await asyncio.gather(*(worker.open(timeout) for worker in self.workers))
        if settings.worker_recycle_memory is not None:
            check_recycle_memory(settings.worker_recycle_memory)

    # -- start -----------------------------------------------------------------------------------

    def _start(self) -> None:
        assert self._redis is not None
        assert self.recorder is not None
        for worker in self.workers:
            worker.set_quiet(self._is_quiet)
            worker.start(self._resources.of(_own_lifespan(worker.task)))
        self._overseers = [
            asyncio.create_task(oversee(refusals, examine))
            for refusals, examine in (
                (self.recorder.refusals, self._oversight.examine_database),
                (self._redis.refusals, self._oversight.examine_redis_anew),
            )
        ]
        rows = CancelledRows(self.recorder.pool, self.recorder.silence)
        self._overseers.append(
            asyncio.create_task(
                keep_cancelling(self.workers, rows), name="the look at cancelled rows"
            )
        )
        self._parts += [*self.recorder.deaths(), *self._redis.deaths(), *self._overseers]
        self._parts += [part for worker in self.workers for part in worker.deaths()]
        self._parts += self._resources.deaths()
        for part in self._parts:
            part.add_done_callback(self._note_end)
        log.info("worker_started", queues=[worker.task.queue_name for worker in self.workers])
        if self._supervision is not None:
            self._supervision.report(Report.READY)

    def _own_ends(self) -> list[Coroutine[Any, Any, None]]:
        """Return what ends the worker without a signal."""
        ends = []
        if self._idle_limit is not None:
            ends.append(self._idle(self._idle_limit))
        if self._supervision is not None and self._settings.needs_supervisor:
            ends.append(self._worn(self._supervision))
        return ends

    async def _worn(self, supervision: Supervision) -> None:
        """Have the supervisor replace this process when it is worn, and end when it is retired."""
        settings = self._settings
        worn = await until_worn(
            self.workers, settings.worker_recycle_jobs, settings.worker_recycle_memory
        )
        log.info("worker_worn", **worn)
        supervision.report(Report.WORN)
        await until_retired(self.workers)

    async def _idle(self, seconds: float) -> None:
        await until_idle(self.workers, seconds)
        log.info("worker_idle", seconds=seconds)

    # -- failures --------------------------------------------------------------------------------

    def _fail(self, error: WorkerError) -> None:
        """Have `run` raise this; the first error counts."""
        self._failure = self._failure or error
        self._failed.set()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _note_end(self, part: Part) -> None:
        """Fail because a part has ended; only slots that drain end by themselves."""
        error = None if part.cancelled() else part.exception()
        if self._is_closing:
            return
        if part in self._overseers and isinstance(error, WorkerError):
            self._fail(error)
        elif part.cancelled() or error or not self.workers[0].is_stopping:
            self._fail(PartDiedError(f"{_name_of(part)} ended unasked: {_reason_of(part)}"))

    async def _until(
        self,
        event: asyncio.Event,
        *work: Coroutine[Any, Any, None],
        timeout: float | None = None,
    ) -> bool:
        """Wait until the work is done, the event is set or the time is over; cancel the work then.

        Args:
            timeout: seconds; for ever, if not given.

        Returns:
            Whether the work is done.

        Raises:
            WorkerError: a part died, or a server refuses for good what the worker needs.
        """
        working = [asyncio.ensure_future(each) for each in work]
        others = [asyncio.ensure_future(each.wait()) for each in (event, self._failed)]
        try:
            await asyncio.wait(
                [*working, *others], timeout=timeout, return_when=asyncio.FIRST_COMPLETED
            )
            done = [each for each in working if each.done()]
        finally:
            for each in (*working, *others):
                each.cancel()
            if working:
                await asyncio.wait(working)
        for each in done:
            each.result()
        self._raise_failure()
        return bool(done)

    # -- drain and close -------------------------------------------------------------------------

    async def _drain(self, abort: asyncio.Event) -> int:
        """Let what runs finish, until the deadline or `abort`; then cut it off.

        Returns:
            How many jobs were cut off.
        """
        grace = self._settings.worker_shutdown_grace
        log.info("worker_stopping", grace_s=grace)
        self._leave_by = asyncio.get_running_loop().time() + grace
        for worker in self.workers:
            worker.stop()
        if not await self._until(abort, self._drained(), timeout=grace):
            log.warning("drain_cut_short", aborted=abort.is_set())
        self._is_closing = True
        return await self._close_workers()

    async def _drained(self) -> None:
        await asyncio.gather(*(worker.drained() for worker in self.workers))

    async def _close_workers(self) -> int:
        """Stop every TaskWorker and hand back what they hold. May be called twice."""
        closing = (worker.close(CLOSE_TIMEOUT) for worker in self.workers)
        return sum(await asyncio.gather(*closing))

    async def _close(self) -> None:
        """Close in the order of need: the recorder serves the workers, Redis serves both."""
        self._is_closing = True
        for overseer in self._overseers:
            overseer.cancel()
        await self._close_workers()
        left = self._leave_by - asyncio.get_running_loop().time()
        await self._resources.close(max(left, LEAVE_PATIENCE))
        if self._overseers:
            # An overseer that examines a server which hangs is not waited for any longer.
            await asyncio.wait(self._overseers, timeout=OVERSEER_PATIENCE)
        if self.recorder is not None:
            await self.recorder.close(FLUSH_TIMEOUT)
        if self._redis is not None:
            await self._redis.aclose()
        log.info("worker_stopped")


def _own_lifespan(task: TaskDefinition[Any]) -> Lifespan[Any] | None:
    """Return the lifespan that this process enters; each process of handlers enters its own."""
    return task.lifespan if task.options.run_in is None else None


def _name_of(part: Part) -> str:
    return part.get_name() if isinstance(part, asyncio.Task) else "the connection to Redis"


def _reason_of(part: Part) -> str:
    if part.cancelled():
        return "it was cancelled"
    error = part.exception()
    if isinstance(error, WorkerError):
        return str(error)
    return "without an error" if error is None else f"{type(error).__name__}: {error}"
