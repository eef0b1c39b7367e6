"""Gathers the jobs of a batch task, and calls its handler once for many of them."""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import structlog

from autoflow_worker.broker.claim import Claim
from autoflow_worker.encoding.failures import reason_of
from autoflow_worker.tasks.batches import BatchContext, BatchItem, BatchOptions
from autoflow_worker.tasks.context import TaskCancelledError, TaskContext
from autoflow_worker.worker.handler import LoopRunner
from autoflow_worker.worker.runner import Outcome
from autoflow_worker.worker.time_limit import TimeLimit, Wait, end

log = structlog.get_logger(__name__)


@dataclass(slots=True, eq=False)
class _Entry:
    """One job, from when it waits for its batch until its attempt goes on."""

    item: BatchItem[Any]
    wait: Wait
    due: float
    batch: "_Batch | None" = None
    outcome: Outcome | None = None
    fault: Exception | None = None

    def resolve(self) -> None:
        end(self.wait.ended, None)


@dataclass(slots=True, eq=False)
class _Batch:
    """One call of the handler."""

    entries: Sequence[_Entry]
    open: int
    started: float = field(default_factory=time.perf_counter)
    task: asyncio.Task[None] | None = None

    def outcome(self, value: Any, error: BaseException | None) -> Outcome:
        return Outcome(value, error, round((time.perf_counter() - self.started) * 1000))


class BatchRunner:
    """Runs the handler of a batch task. Each job's attempt waits here for the outcome of its item.

    A batch begins when it is full, or when its first job has waited for `wait_ms`, and a place is
    free. While no place is free the task fetches nothing, so jobs wait in their queue, where other
    workers find them.

    Args:
        runner: calls the handler with a batch's items.
        limit: the time limit of one call.
        concurrency: places, for a batch each.
    """

    # As with a thread, the work on one item can't be ended by itself.
    interrupts = False

    def __init__(
        self, runner: LoopRunner, options: BatchOptions, limit: TimeLimit, *, concurrency: int
    ) -> None:
        self._runner = runner
        self._size = options.size
        self._wait = options.wait_ms / 1000
        self._concurrency = concurrency
        self._limit = limit
        self._waiting: deque[_Entry] = deque()
        self._batches: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._is_stopping = False
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()

    @property
    def has_room(self) -> bool:
        return len(self._batches) < self._concurrency and self._runner.has_room

    async def room(self) -> None:
        """Wait until a further job may be taken."""
        while not self.has_room:
            if not self._runner.has_room:
                await self._runner.room()
            else:
                await asyncio.wait(self._batches, return_when=asyncio.FIRST_COMPLETED)

    def payload(self, claim: Claim) -> Any:
        """Return the validated payload; see `Runner`."""
        return self._runner.payload(claim)

    async def run(self, payload: Any, context: TaskContext, wait: Wait) -> Outcome:
        """Have the job handled in a batch, and wait for the outcome of its item; see `Runner`.

        If this is cancelled, so is the batch, unless the item is settled. What the handler settles
        or returns then still counts.
        """
        entry = _Entry(BatchItem(payload, context), wait, self._loop.time() + self._wait)
        self._waiting.append(entry)
        self._begin_due()
        try:
            await wait.ended
        except asyncio.CancelledError:
            if entry.batch is None:
                self._waiting.remove(entry)
            elif entry.outcome is None and (batch := entry.batch.task) is not None:
                if not batch.cancelling():
                    batch.cancel()
                await asyncio.wait({batch})
            if entry.outcome is None:
                raise
            # Finished work is not done again.
        if entry.fault is not None:
            raise entry.fault
        assert entry.outcome is not None
        return entry.outcome

    async def open(self, timeout: float) -> None:
        """Get ready; see `Runner`."""
        await self._runner.open(timeout)

    def stop(self) -> None:
        """Wait for no further jobs: those that are here begin at once."""
        self._is_stopping = True
        self._runner.stop()
        self._begin_due()

    async def close(self, timeout: float) -> None:
        """Cancel handlers that outlive their slots, and close the runner."""
        for batch in self._batches:
            batch.cancel()
        if self._batches:
            await asyncio.wait(self._batches, timeout=timeout)
        if self._timer is not None:
            self._timer.cancel()
        await self._runner.close(timeout)

    def deaths(self) -> Sequence[asyncio.Task[Any]]:
        return self._runner.deaths()

    # -- batches ---------------------------------------------------------------------------------

    def _begin_due(self) -> None:
        """Begin the batches that are full or have waited for long enough, while there are places.

        If one begins later, by its time alone, a timer is set.
        """
        while self._waiting and len(self._batches) < self._concurrency:
            due = self._waiting[0].due
            if not (
                self._is_stopping or len(self._waiting) >= self._size or due <= self._loop.time()
            ):
                if self._timer is None:
                    self._timer = self._loop.call_at(due, self._on_timer)
                return
            count = min(self._size, len(self._waiting))
            self._begin([self._waiting.popleft() for _ in range(count)])

    def _on_timer(self) -> None:
        self._timer = None
        self._begin_due()

    def _begin(self, entries: Sequence[_Entry]) -> None:
        """Call the handler for these jobs, without those that were cancelled while they waited."""
        batch = _Batch([entry for entry in entries if not entry.item.ctx.cancelled], 0)
        for entry in entries:
            entry.batch = batch
            if entry.item.ctx.cancelled:
                entry.outcome = batch.outcome(None, _cancelled())
                entry.resolve()
        if not batch.entries:
            return
        batch.open = len(batch.entries)
        batch.task = self._loop.create_task(self._run(batch))
        self._batches.add(batch.task)
        batch.task.add_done_callback(self._batch_ended)

    async def _run(self, batch: _Batch) -> None:
        """Call the handler, and give each item that it has not settled its outcome."""
        wait = self._limit.start()
        for entry in batch.entries:
            entry.wait.deadline = wait.deadline
            entry.item.begin(partial(self._note_settled, entry))
        items = [entry.item for entry in batch.entries]
        outcome: Outcome | None = None
        fault: Exception | None = None
        try:
            outcome = await self._runner.run(items, BatchContext(items), wait)
        except Exception as error:
            fault = error
        finally:
            # Cancelled, a batch has no outcome: its open jobs are handed back.
            self._limit.remove(wait)
            self._end(batch, outcome, fault)

    def _batch_ended(self, batch: asyncio.Task[None]) -> None:
        self._batches.discard(batch)
        self._begin_due()

    def _end(self, batch: _Batch, outcome: Outcome | None, fault: Exception | None) -> None:
        open_items = 0
        for entry in batch.entries:
            settlement = entry.item.end()
            if settlement is None:
                open_items += 1
                entry.fault = fault
                if outcome is not None:
                    error = _cancelled() if entry.item.ctx.cancelled else outcome.error
                    entry.outcome = batch.outcome(None, error)
            elif entry.outcome is None:
                entry.outcome = batch.outcome(*settlement)
            if entry.outcome is not None or fault is not None:
                entry.resolve()
        if outcome is None:
            return
        facts = BatchContext([entry.item for entry in batch.entries]).log_fields()
        if outcome.error is not None and not open_items:
            log.error("batch_failed_after_its_items", reason=reason_of(outcome.error), **facts)
        elif outcome.value is not None:
            log.warning("batch_result_ignored", type=type(outcome.value).__name__, **facts)

    # -- settlements -----------------------------------------------------------------------------

    def _note_settled(self, entry: _Entry) -> None:
        """Let an item's attempt go on; called in any thread."""
        if threading.get_ident() == self._thread:
            self._settled(entry)
        else:
            # RuntimeError: the event loop is closed, and a thread goes on without it.
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._settled, entry)

    def _settled(self, entry: _Entry) -> None:
        batch, settlement = entry.batch, entry.item.settlement
        if entry.outcome is not None or batch is None or settlement is None:
            return
        entry.outcome = batch.outcome(*settlement)
        batch.open -= 1
        # The last one stays until the handler has ended, so a handler that runs always has a slot:
        # the worker does not take itself for idle, and a drain waits for it.
        if batch.open:
            entry.resolve()


def _cancelled() -> TaskCancelledError:
    return TaskCancelledError("the task is cancelled")
