"""An attempt's progress and log lines on their way to Redis."""

import asyncio
from collections import deque
from contextlib import suppress
from typing import Final

import structlog
from redis.exceptions import RedisError

from autoflow_worker.broker.claim import Claim
from autoflow_worker.broker.job_reports import JobReports
from autoflow_worker.encoding.cleaner import clean_text
from autoflow_worker.encoding.results import dump, fragment

log = structlog.get_logger(__name__)

INTERVAL: Final = 0.1
"""Seconds between two reports of one attempt. A handler may report as often as it likes."""


class Reports:
    """Sends what one attempt reports: each log line, and the newest progress.

    A handler reports from any thread, and never waits for Redis. Reports that Redis refuses are
    dropped with a warning, because no status depends on them.
    """

    def __init__(self, claim: Claim, reports: JobReports, loop: asyncio.AbstractEventLoop) -> None:
        self._claim = claim
        self._reports = reports
        self._loop = loop
        self._progress: str | None = None
        self._lines: deque[str] = deque()
        self._is_due = False
        self._sending: asyncio.Task[None] | None = None
        self._closing = asyncio.Event()

    def progress(self, value: object) -> None:
        """Report progress.

        Raises:
            NotStorableError: the value can't be stored as JSON.
        """
        self._progress = dump(fragment(value))
        self._wake()

    def log(self, line: str) -> None:
        """Append a line to the job's log."""
        self._lines.append(clean_text(str(line)))
        self._wake()

    async def close(self) -> None:
        """Send what is left."""
        self._closing.set()
        if self._sending is not None:
            await self._sending
        await self._send()

    def _wake(self) -> None:
        if not self._is_due:
            self._is_due = True
            # RuntimeError: the event loop is closed, and a thread goes on without it.
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._start)

    def _start(self) -> None:
        if self._sending is None:
            self._sending = self._loop.create_task(self._send_while_due())

    async def _send_while_due(self) -> None:
        while self._is_due and not self._closing.is_set():
            await self._send()
            with suppress(TimeoutError):
                async with asyncio.timeout(INTERVAL):
                    await self._closing.wait()
        self._sending = None

    async def _send(self) -> None:
        self._is_due = False
        progress, self._progress = self._progress, None
        # A thread may append meanwhile.
        lines = [self._lines.popleft() for _ in range(len(self._lines))]
        try:
            if lines:
                await self._reports.logs(self._claim, lines)
            if progress is not None:
                await self._reports.progress(self._claim, progress)
        except RedisError as error:
            claim = self._claim
            log.warning("report_lost", queue=claim.queue.name, task_id=claim.id, reason=str(error))
