"""A task that writes the recorder's batches over one connection, one after the other."""

import asyncio
from typing import Final

import psycopg

from autoflow_worker.pauses import Pauses
from autoflow_worker.recording.batch import BatchWriter, Source
from autoflow_worker.recording.faults import CONFLICTS
from autoflow_worker.recording.pool import Checkout, Pool
from autoflow_worker.recording.write import Write

MAX_BATCH: Final = 500  # patches in one statement

# Patches that have to wait for a further connection to be used; fewer are cheaper in one batch.
LARGE_BATCH: Final = 100

# Seconds after which a batch counts as slow; then another lane takes the writes that wait.
SLOW_BATCH: Final = 0.02

RETRY_PAUSE: Final = 0.02  # seconds before the first retry of a failed batch; doubled from there
RETRY_PAUSE_MAX: Final = 2.0


class Lane:
    """A task that writes batches over one connection.

    Args:
        index: 0 is the first lane, which takes whatever waits; further lanes help.

    Attributes:
        task: ends only when the lane dies or is closed; None before `start`.
        began_at: when the current batch was taken, in the event loop's seconds.
    """

    def __init__(self, source: Source, pool: Pool, index: int) -> None:
        self._source = source
        self._checkout = Checkout(pool, source.silence)
        self._writer = BatchWriter(source, self._checkout)
        self._index = index
        self._work = asyncio.Event()
        self._at_least = 1
        self.is_idle = True
        self.began_at = 0.0
        self.task: asyncio.Task[None] | None = None

    @property
    def batch(self) -> list[Write]:
        """The writes that are being written."""
        return self._writer.batch

    def start(self) -> None:
        self.task = asyncio.get_running_loop().create_task(
            self._run(), name=f"status recorder {self._index}"
        )

    def wake(self, at_least: int = 1) -> None:
        """Let an idle lane write a batch, if so many writes wait by then."""
        self._at_least = at_least
        self.is_idle = False
        self._work.set()

    async def close(self) -> None:
        """Break off what runs, and disconnect."""
        if self.task is not None:
            self.task.cancel()
            await asyncio.wait({self.task})
        await self._checkout.close()

    async def _run(self) -> None:
        while True:
            await self._work.wait()
            self._work.clear()
            has_written = False
            if self._index == 0 or await self._can_help():
                has_written = await self._work_off()
            self.is_idle = True
            if self._index > 0:
                self._source.note_rest(has_written=has_written)

    async def _can_help(self) -> bool:
        """Connect before taking a batch, which another lane could write meanwhile."""
        try:
            await self._checkout.link()
        except (psycopg.Error, OSError):
            await asyncio.sleep(RETRY_PAUSE_MAX)
            return False
        return True

    async def _work_off(self) -> bool:
        """Write batches until there is none; whether there was one."""
        has_written = False
        while batch := self._source.take(self._at_least):
            self._writer.batch = batch
            self.began_at = asyncio.get_running_loop().time()
            await self._commit()
            self._writer.batch = []
            self._at_least = 1 if self._index == 0 else LARGE_BATCH
            has_written = True
        return has_written

    async def _commit(self) -> None:
        """Write the batch, however often it takes."""
        pauses = Pauses(RETRY_PAUSE, RETRY_PAUSE_MAX)
        while left := self._writer.left:
            try:
                await self._writer.write(left)
            except psycopg.errors.LockNotAvailable:
                continue  # The whole table is locked; the lock's timeout was the pause.
            except CONFLICTS:
                await pauses.sleep()
            except (psycopg.Error, OSError) as error:
                await self._checkout.replace()
                self._source.note_outage(error)
                await pauses.sleep()
