"""Runs a task's handlers in processes of their own: one for each slot.

A process has one job at a time, so whatever ends it costs one attempt. What can't be started is the
machine's fault, never a job's.
"""

import asyncio
import os
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Final, NamedTuple

import structlog

from autoflow_worker.broker.claim import Claim
from autoflow_worker.broker.job_reports import progress_text
from autoflow_worker.errors import TaskBrokenError, TaskListError
from autoflow_worker.logs.configure import log_level
from autoflow_worker.pauses import Pauses
from autoflow_worker.tasks.context import TaskCancelledError, TaskContext
from autoflow_worker.tasks.definition import TaskDefinition
from autoflow_worker.worker.child_process import ChildJob, ChildProcess
from autoflow_worker.worker.handler import UNWIND_PATIENCE
from autoflow_worker.worker.runner import Outcome
from autoflow_worker.worker.time_limit import TimeLimit, Wait

log = structlog.get_logger(__name__)

MAX_DEATHS: Final = 5
"""Processes in a row, of one slot, that ended before they had a job; then the task is broken."""

FIRST_PAUSE: Final = 0.5
LONGEST_PAUSE: Final = 8.0
"""Seconds between two such starts."""

QUIT_PATIENCE: Final = 1.0
"""Seconds for a process without a job to exit; then it is killed."""

MAX_SENDS: Final = 3
"""Processes that may die under one job before they take it."""

# Libraries that start a thread for each core, in each process, where these are not set.
_THREAD_VARIABLES: Final = (
    *("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"),
    *("NUMEXPR_NUM_THREADS", "RAYON_NUM_THREADS", "POLARS_MAX_THREADS"),
)


class JobLostError(Exception):
    """Processes died under a job before they took it."""


class Work(NamedTuple):
    """What a process needs of a job's hash, as the text that is in Redis."""

    data: str
    progress: str


class ProcessRunner:
    """Runs the handlers of one task in processes.

    Args:
        tasks_config: the name by which the processes import the task list; the caller has made
            sure of it by `check_importable`.
        concurrency: the task's slots.
        limit: the time limit of the task's attempts.
    """

    interrupts = True

    def __init__(
        self, task: TaskDefinition[Any], tasks_config: str, concurrency: int, limit: TimeLimit
    ) -> None:
        self._queue = task.queue_name
        self._concurrency = concurrency
        self._limit = limit
        self._init = {
            "tasks_config": tasks_config,
            "queue": task.queue_name,
            "path": sys.path,
            "log_level": log_level(),
            "patience": 0.0,
        }
        self._environment = _environment(concurrency)
        self._is_open = False
        self._patience = 0.0
        self._keepers: list[asyncio.Task[None]] = []
        self._children: set[ChildProcess] = set()
        self._idle: list[ChildProcess] = []
        self._waiting: deque[asyncio.Future[ChildProcess]] = deque()
        self._room = asyncio.Event()
        self._is_stopping = False
        self._last_reason = "none was started in time"

    # -- life -------------------------------------------------------------------------------------

    async def open(self, timeout: float) -> None:
        """Start the processes, and wait until each is ready.

        Raises:
            TaskListError: the task list's code, or the task's lifespan, raised in one of them.
            TaskBrokenError: some did not get ready within so many seconds, or ended before.
        """
        self._init["patience"] = self._patience = timeout
        self._keepers = [
            asyncio.create_task(self._keep(), name=f"process {place} of {self._queue}")
            for place in range(self._concurrency)
        ]
        try:
            async with asyncio.timeout(timeout):
                while len(self._idle) < self._concurrency:
                    self._room.clear()
                    arrived = asyncio.ensure_future(self._room.wait())
                    try:
                        await asyncio.wait(
                            [arrived, *self._keepers], return_when=asyncio.FIRST_COMPLETED
                        )
                    finally:
                        arrived.cancel()
                    for keeper in self._keepers:
                        if keeper.done():
                            keeper.result()
        except TimeoutError:
            raise TaskBrokenError(
                f"the task {self._queue!r}: the processes of its handlers were not ready within "
                f"{timeout:g} s: {self._last_reason}"
            ) from None
        self._is_open = True

    async def _keep(self) -> None:
        """Have one process, for ever: start it, and start another one when it has ended."""
        pauses = Pauses(FIRST_PAUSE, LONGEST_PAUSE)
        deaths = 0
        while True:
            child = ChildProcess(self._queue, self._init, self._environment)
            reason = await self._life(child)
            if not reason:
                deaths = 0
                pauses.restart()
                continue
            if child.init_failed and not self._is_open:
                raise TaskListError(f"the task {self._queue!r}, in its process: {reason}")
            deaths += 1
            self._last_reason = reason
            log.error(
                "handler_process_not_ready", queue=self._queue, reason=reason, in_a_row=deaths
            )
            if deaths == MAX_DEATHS:
                raise TaskBrokenError(
                    f"the task {self._queue!r}: {deaths} processes in a row ended before they "
                    f"had a job: {reason}"
                )
            await pauses.sleep()

    async def _life(self, child: ChildProcess) -> str:
        """Take a process from its start to its end; return why it had no job, "" if it had one."""
        self._children.add(child)
        try:
            try:
                await child.start()
            except (OSError, MemoryError, RuntimeError) as error:
                child.kill()
                return f"it can't be started: {error}"
            try:
                async with asyncio.timeout(self._patience):
                    reason = await asyncio.shield(child.ready)
            except TimeoutError:
                child.kill("it was not ready in time")
                reason = "it was not ready in time"
            if reason is not None:
                await asyncio.wait({child.gone})
                return reason
            if self._is_stopping:
                child.stop()
            self._give(child)
            await asyncio.wait({child.gone})
            if child.jobs == 0:
                return child.reason
            if not child.was_told_to_end:
                log.warning("handler_process_died", queue=self._queue, reason=child.reason)
            return ""
        finally:
            if child.gone.done() or child.pid is None:
                self._children.discard(child)
            if child in self._idle:
                self._idle.remove(child)

    def stop(self) -> None:
        """Tell running handlers that the worker is stopping. May be called twice."""
        if not self._is_stopping:
            self._is_stopping = True
            for child in self._children:
                child.stop()

    async def close(self, timeout: float) -> None:
        """Have the processes exit, and kill those that don't. May be called twice."""
        for keeper in self._keepers:
            keeper.cancel()
        if self._keepers:
            await asyncio.wait(self._keepers)
            for keeper in self._keepers:
                if not keeper.cancelled():
                    keeper.exception()  # `open` has raised one; Python warns of the others.
        children = [child for child in self._children if not child.gone.done()]
        self._children.clear()
        if not children:
            return
        patience = min(QUIT_PATIENCE, max(timeout, 0))
        for child in children:
            child.quit(0.8 * patience)
        gone = [child.gone for child in children]
        await asyncio.wait(gone, timeout=patience)
        for child in children:
            child.kill()
        await asyncio.wait(gone, timeout=UNWIND_PATIENCE)

    def deaths(self) -> Sequence[asyncio.Task[Any]]:
        return self._keepers

    # -- processes without a job ------------------------------------------------------------------

    @property
    def has_room(self) -> bool:
        return bool(self._idle)

    async def room(self) -> None:
        """Wait until a process has no job."""
        while not self._idle:
            self._room.clear()
            await self._room.wait()

    def _give(self, child: ChildProcess) -> None:
        """Let a job have this process, if it can take one."""
        if not child.is_usable:
            return
        while self._waiting:
            waiting = self._waiting.popleft()
            if not waiting.done():
                waiting.set_result(child)
                return
        self._idle.append(child)
        self._room.set()

    async def _free_child(self, wait: Wait) -> ChildProcess | None:
        """Wait for a process that is usable; None if the attempt is to end before.

        Starting a process takes a second, which is not the handler's.
        """
        self._limit.remove(wait)
        given: asyncio.Future[ChildProcess] = asyncio.get_running_loop().create_future()
        self._waiting.append(given)
        child = None
        try:
            ends: list[asyncio.Future[Any]] = [given, wait.ended]
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if not wait.ended.done():
                child = given.result()
                self._limit.restart(wait)
        finally:
            if child is None and given.done():
                self._give(given.result())
            given.cancel()
        return child

    # -- a job ------------------------------------------------------------------------------------

    def payload(self, claim: Claim) -> Work:
        """Return the job's text: the process parses and validates it."""
        return Work(claim.fields.get("data", "{}"), progress_text(claim))

    async def run(self, payload: Work, context: TaskContext[Any], wait: Wait) -> Outcome:
        """Run the handler in a process; see `Runner`.

        A handler that is to end is told so. If it has not ended after `UNWIND_PATIENCE`, its
        process is killed, with all that it started.

        Raises:
            JobLostError: processes died under the job before they took it.
        """
        body = payload.data.encode(errors="surrogatepass")
        for _ in range(MAX_SENDS):
            child = self._idle.pop() if self._idle else await self._free_child(wait)
            if child is None:
                return Outcome(None, wait.ended.result(), 0)
            if not child.is_usable:
                continue
            head = {
                "deadline": None if wait.time_left() is None else wait.deadline,
                "progress": payload.progress,
            }
            job = child.run(body, head, context, wait)
            try:
                outcome = await self._outcome(child, job, wait)
            finally:
                self._give(child)
            if outcome is not None:
                return outcome
            # The process had died before the job reached it.
            wait.go_on()
        raise JobLostError("processes died before they took the job")

    async def _outcome(self, child: ChildProcess, job: ChildJob, wait: Wait) -> Outcome | None:
        try:
            error = await wait.ended
        except asyncio.CancelledError:
            await self._end(child, job, is_cancelled=False)
            if job.outcome is None or job.outcome.error is not None:
                raise
            return job.outcome  # Finished work is not done again.
        if error is None:
            return job.outcome
        await self._end(child, job, is_cancelled=isinstance(error, TaskCancelledError))
        return job.ended_by(error)

    async def _end(self, child: ChildProcess, job: ChildJob, *, is_cancelled: bool) -> None:
        """Have a handler end, and kill its process if it does not."""
        child.cancel(job, is_cancelled=is_cancelled)
        try:
            await asyncio.wait({job.settled}, timeout=UNWIND_PATIENCE)
        finally:
            if not job.settled.done():
                log.error("handler_killed", queue=self._queue, task_id=job.context.task_id)
                child.kill()


def _environment(children: int) -> Mapping[str, str]:
    threads = str(max(1, _cores() // children))
    return {**dict.fromkeys(_THREAD_VARIABLES, threads), **os.environ}


def _cores() -> int:
    with suppress(AttributeError):  # not on Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
