"""The whole worker: open everything, run, drain, close everything. Start reading here."""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Any, Final, TypeVar

import structlog
from redis.exceptions import ConnectionError as RedisConnectionError

from autoflow_worker.broker.client import PipelinedRedis
from autoflow_worker.broker.job_queue import JobQueue
from autoflow_worker.broker.requirements import RedisReport, examine_redis
from autoflow_worker.errors import (
    DatabaseRefusedError,
    DatabaseUnavailableError,
    DatabaseUnfitError,
    PartDiedError,
    RedisRefusedError,
    RedisUnavailableError,
    RedisUnfitError,
    WorkerError,
)
from autoflow_worker.outage import Refusals
from autoflow_worker.recording.recorder import StatusRecorder
from autoflow_worker.recording.table import CONNECT_TIMEOUT, inspect_tasks_table
from autoflow_worker.settings import Settings
from autoflow_worker.tasks.definition import TaskDefinition
from autoflow_worker.worker.running_jobs import running_jobs
from autoflow_worker.worker.task_worker import TaskWorker

log = structlog.get_logger(__name__)

EXIT_CLEAN: Final = 0
EXIT_HANDED_BACK: Final = 4

CLOSE_TIMEOUT: Final = 1.3
"""Seconds past the deadline for cutting off what runs, and handing it back."""

FLUSH_TIMEOUT: Final = 0.2
"""Seconds after that for what the recorder still has: nobody waits for it any more."""

OVERSEER_PATIENCE: Final = 0.2
"""Seconds for an overseer to leave the server that it examines."""

START_PAUSE: Final = 0.1
"""Seconds before a server that went away during the start is asked again."""

T = TypeVar("T")


class WorkerService:
    """One TaskWorker for each task; one Redis client, one recorder and one shutdown for all.

    Args:
        settings: checked settings.
        tasks: at least one; no two of one queue.

    Attributes:
        workers: one for each task; none before the servers are reached.
        recorder: what all of them record statuses with; None before PostgreSQL is examined.
    """

    def __init__(self, settings: Settings, tasks: Sequence[TaskDefinition[Any]]) -> None:
        self._settings = settings
        self._tasks = tasks
        self._redis: PipelinedRedis | None = None
        self.recorder: StatusRecorder | None = None
        self.workers: list[TaskWorker] = []
        self._failure: asyncio.Future[None] | None = None
        self._overseers: list[asyncio.Task[None]] = []

    @property
    def is_working(self) -> bool:
        """Whether every task takes jobs, or did so before the stop."""
        return bool(self._overseers)

    async def run(self, stop: asyncio.Event, abort: asyncio.Event) -> int:
        """Work until `stop` is set; `abort` cuts the drain short.

        Returns:
            0 if every job that had been fetched was finished, 4 if some were handed back.

        Raises:
            WorkerError: it could not start, or a part of it died; everything is closed then.
        """
        self._failure = asyncio.get_running_loop().create_future()
        try:
            if not await self._open_unless(stop):
                self._raise_dead([])
                return EXIT_CLEAN
            self._start()
            await self._watch(stop)
            cut_off = await self._drain(abort)
        finally:
            await self._close()
        self._raise_dead([])
        return EXIT_HANDED_BACK if cut_off else EXIT_CLEAN

    def fail(self, error: BaseException) -> None:
        """Close everything, as when a part has died: foreign code ended the event loop.

        Has an effect once `run` runs, which then raises `PartDiedError`.
        """
        if self._failure is not None and not self._failure.done():
            self._failure.set_exception(error)
            self._failure.exception()  # Whether or not somebody waits for it.

    def tell(self) -> None:
        """Log what runs."""
        jobs = [
            job
            for worker in self.workers
            for job in running_jobs(worker.task.queue_name, worker.slots)
        ]
        log.warning("running", jobs=len(jobs), asyncio_tasks=len(asyncio.all_tasks()))
        for job in jobs:
            log.warning("running_job", **job)

    async def _open_unless(self, stop: asyncio.Event) -> bool:
        """Connect to everything; give it up, and return False, when it is to stop already."""
        opening: asyncio.Future[Any] = asyncio.ensure_future(self._open())
        stopping: asyncio.Future[Any] = asyncio.ensure_future(stop.wait())
        try:
            waited_for = [opening, stopping, *([self._failure] if self._failure else [])]
            await asyncio.wait(waited_for, return_when=asyncio.FIRST_COMPLETED)
            if opening.done():
                opening.result()
            return opening.done()
        finally:
            stopping.cancel()
            opening.cancel()
            await asyncio.wait([opening])

    async def _open(self) -> None:
        """Connect to everything; all or none."""
        settings, timeout = self._settings, self._settings.worker_startup_timeout
        # Before the recorder connects: it sets session options, which a pooler would hand on.
        await _persist(self._examine_database, timeout)
        self.recorder = StatusRecorder(
            settings.database_url.get_secret_value(), max_connections=settings.database_pool_max
        )
        await self.recorder.open(timeout)
        self.recorder.refusals.patience = timeout
        self._redis = redis = PipelinedRedis(settings.redis_url.get_secret_value())
        await redis.open(timeout)
        redis.refusals.patience = timeout
        report = await _persist(lambda: self._examine_redis(redis), timeout)
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
                )
            )

    async def _examine_database(self) -> None:
        """Find out whether statuses can be recorded, as `check` does."""
        settings = self._settings
        await inspect_tasks_table(
            settings.database_url.get_secret_value(),
            queue=self._tasks[0].queue_name,
            new_rows=settings.record_unknown_jobs,
            patience=min(CONNECT_TIMEOUT, settings.worker_startup_timeout),
        )

    async def _examine_redis(self, redis: PipelinedRedis) -> RedisReport:
        """Find out whether jobs can be run, as `check` does."""
        queues = [task.queue_name for task in self._tasks]
        return await examine_redis(redis, self._settings.bullmq_prefix, queues)

    def _start(self) -> None:
        assert self._redis is not None
        assert self.recorder is not None
        for worker in self.workers:
            worker.start()
        oversee, create = self._oversee, asyncio.create_task
        self._overseers = [
            create(oversee(self.recorder.refusals, self._examine_database)),
            create(oversee(self._redis.refusals, self._examine_redis_anew)),
        ]
        log.info("worker_started", queues=[worker.task.queue_name for worker in self.workers])

    async def _watch(self, stop: asyncio.Event) -> None:
        """Wait until it is time to stop; a dead part is noticed by its end.

        Raises:
            PartDiedError: a part ended unasked.
            WorkerError: a server refuses for good what the worker needs.
        """
        assert self._failure is not None
        stopping: asyncio.Future[Any] = asyncio.ensure_future(stop.wait())
        parts = self._parts()
        try:
            await asyncio.wait(
                [stopping, self._failure, *parts], return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            stopping.cancel()
        self._raise_dead(parts)

    def _parts(self) -> list[asyncio.Future[Any]]:
        """What never ends while the service works."""
        assert self._redis is not None
        assert self.recorder is not None
        parts: list[asyncio.Future[Any]] = [*self.recorder.deaths(), *self._redis.deaths()]
        parts += [part for worker in self.workers for part in worker.deaths()]
        return [*parts, *self._overseers]

    def _raise_dead(self, parts: Collection[asyncio.Future[Any]]) -> None:
        if self._failure is not None and self._failure.done():
            error = self._failure.exception()
            reason = f"{type(error).__name__}: {error}".removesuffix(": ")
            raise PartDiedError(
                f"code outside of any job ended the event loop by {reason}; a callback that a "
                "handler left there, as a rule. The log has the traceback"
            )
        for part in parts:
            if part in self._overseers and part.done() and not part.cancelled():
                part.result()  # It says by its error that a server refuses for good.
            if part.done():
                raise PartDiedError(f"{_name_of(part)} ended unasked: {_reason_of(part)}")

    async def _oversee(self, refusals: Refusals, examine: Callable[[], Awaitable[Any]]) -> None:
        """End with an error when a server refuses for good; an outage is waited out.

        Raises:
            WorkerError: the server refuses at a check what it has refused for long.
        """
        while True:
            await refusals.lasting.wait()
            try:
                await examine()
            except (
                DatabaseRefusedError,
                DatabaseUnfitError,
                RedisRefusedError,
                RedisUnfitError,
            ) as error:
                raise type(error)(f"refused for {refusals.patience:g} s: {error}") from None
            except (DatabaseUnavailableError, RedisUnavailableError, RedisConnectionError):
                pass
            refusals.forget()

    async def _examine_redis_anew(self) -> None:
        """As `_examine_redis`, over a new connection: it is ours that may be refused."""
        redis = PipelinedRedis(self._settings.redis_url.get_secret_value())
        try:
            await redis.open(CONNECT_TIMEOUT)
            await self._examine_redis(redis)
        finally:
            await redis.aclose()

    async def _drain(self, abort: asyncio.Event) -> int:
        """Let what runs finish, until the deadline or `abort`; then cut it off.

        Returns:
            How many jobs were cut off.
        """
        log.info("worker_stopping", grace_s=self._settings.worker_shutdown_grace)
        for worker in self.workers:
            worker.stop()
        aborted: asyncio.Future[Any] = asyncio.ensure_future(abort.wait())
        drained: asyncio.Future[Any] = asyncio.ensure_future(self._drained())
        died = self._first_death()
        try:
            await asyncio.wait(
                [aborted, drained, died],
                timeout=self._settings.worker_shutdown_grace,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if died.done():
                self._raise_dead([died.result()])
            if not drained.done():
                log.warning("drain_cut_short", aborted=abort.is_set())
        finally:
            aborted.cancel()
            drained.cancel()
            await asyncio.wait([drained])
        return await self._close_workers()

    def _first_death(self) -> asyncio.Future[asyncio.Future[Any]]:
        """The first part that fails while the slots end, one after the other, as they should."""
        assert self._failure is not None
        first: asyncio.Future[asyncio.Future[Any]] = asyncio.get_running_loop().create_future()

        def notice(part: asyncio.Future[Any]) -> None:
            if not first.done() and (part.cancelled() or part.exception() is not None):
                first.set_result(part)

        for part in (self._failure, *self._parts()):
            part.add_done_callback(notice)
        return first

    async def _drained(self) -> None:
        await asyncio.gather(*(worker.drained() for worker in self.workers))

    async def _close_workers(self) -> int:
        """Stop every TaskWorker and hand back what they hold. May be called twice."""
        closing = (worker.close(CLOSE_TIMEOUT) for worker in self.workers)
        return sum(await asyncio.gather(*closing))

    async def _close(self) -> None:
        """Close in the order of need: the recorder serves the workers, Redis serves both."""
        for overseer in self._overseers:
            overseer.cancel()
        await self._close_workers()
        if self._overseers:
            # One that is examining a server which hangs is not waited for any longer.
            await asyncio.wait(self._overseers, timeout=OVERSEER_PATIENCE)
        if self.recorder is not None:
            await self.recorder.close(FLUSH_TIMEOUT)
        if self._redis is not None:
            await self._redis.aclose()
        log.info("worker_stopped")


async def _persist(ask: Callable[[], Awaitable[T]], timeout: float) -> T:
    """Ask a server; one that is away may come in time.

    Raises:
        WorkerError: it did not, within `timeout` seconds, or it is not fit.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout
    while True:
        try:
            return await ask()
        except (DatabaseRefusedError, RedisRefusedError):
            raise
        except (RedisConnectionError, DatabaseUnavailableError) as error:
            if loop.time() > deadline:
                if isinstance(error, DatabaseUnavailableError):
                    reason = f"{error} (waited {timeout:g} s)"
                    raise DatabaseUnavailableError(reason) from None
                raise RedisUnavailableError(f"Redis went away: {error}") from error
        await asyncio.sleep(START_PAUSE)


def _name_of(part: asyncio.Future[Any]) -> str:
    return part.get_name() if isinstance(part, asyncio.Task) else "the connection to Redis"


def _reason_of(part: asyncio.Future[Any]) -> str:
    if part.cancelled():
        return "it was cancelled"
    error = part.exception()
    if isinstance(error, WorkerError):
        return str(error)
    return "without an error" if error is None else f"{type(error).__name__}: {error}"
