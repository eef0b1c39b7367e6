"""In a process of handlers: one attempt, as its handler's `TaskContext` sees it."""

import asyncio
import threading
import time
from contextlib import suppress
from typing import Any, Final, NoReturn

from autoflow_worker.broker.job_reports import read_progress
from autoflow_worker.encoding.cleaner import clean_text
from autoflow_worker.encoding.results import dump, storable
from autoflow_worker.worker.child_link import Interrupts, WorkerLink
from autoflow_worker.worker.frames import Kind

INTERVAL: Final = 0.1
"""Seconds between two progress frames. A handler may report as often as it likes."""


class ChildAttempt:
    """Answers a `TaskContext` in a process of handlers.

    Args:
        number: the job's, in the frames of this process.
        head: of the job's frame: `deadline`, by `time.monotonic`, and `progress`, JSON text.
    """

    def __init__(
        self,
        number: int,
        head: dict[str, Any],
        link: WorkerLink,
        interrupts: Interrupts,
        loop: asyncio.AbstractEventLoop,
        *,
        resources: Any,
        is_stopping: bool,
    ) -> None:
        self.number = number
        self.resources = resources
        self.is_stopping = is_stopping
        self.is_cancelled = False
        self._deadline: float | None = head["deadline"]
        self._last_progress: str = head["progress"]
        self._link = link
        self._interrupts = interrupts
        self._loop = loop
        self._cancellation = asyncio.Event()
        self._lock = threading.RLock()
        self._progress: bytes | None = None
        self._next_report = 0.0
        self._timer: threading.Timer | None = None

    @property
    def job(self) -> NoReturn:
        raise RuntimeError(
            "ctx.job is not available in a process, which has no connection to Redis: use "
            "ctx.task_id, ctx.attempt, ctx.progress or ctx.log, or take run_in='process' away"
        )

    @property
    def last_progress(self) -> Any:
        return read_progress(self._last_progress)

    def time_left(self) -> float | None:
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    async def until_cancelled(self) -> None:
        await self._cancellation.wait()

    def cancel(self) -> None:
        """Note that the task is cancelled; from another thread."""
        self.is_cancelled = True
        with suppress(RuntimeError):  # The loop is closed.
            self._loop.call_soon_threadsafe(self._cancellation.set)

    def append_log(self, line: str) -> None:
        self._check_process()
        body = clean_text(str(line)).encode()
        self._link.send(Kind.LOG, {"job": self.number}, body)

    def report_progress(self, value: object) -> None:
        self._check_process()
        progress = dump(storable(value)).encode()
        with self._interrupts.held(), self._lock:
            self._progress = progress
            wait = self._next_report - time.monotonic()
            if wait <= 0:
                self._send_progress()
            elif self._timer is None:
                self._timer = threading.Timer(wait, self.flush)
                self._timer.daemon = True
                with suppress(RuntimeError):  # No thread can be started: `flush` sends it.
                    self._timer.start()

    def flush(self) -> None:
        """Send the newest progress."""
        with self._interrupts.held(), self._lock:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            self._send_progress()

    def _send_progress(self) -> None:
        progress, self._progress = self._progress, None
        if progress is not None:
            self._next_report = time.monotonic() + INTERVAL
            self._link.send(Kind.PROGRESS, {"job": self.number}, progress)

    def _check_process(self) -> None:
        if not self._link.is_ours:
            raise RuntimeError("a process that the handler forked can't report to the worker")
