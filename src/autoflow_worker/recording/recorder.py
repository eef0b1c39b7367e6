"""Group commit of patches into the tasks table.

Patches that arrive while a statement runs go into the next one: an idle system has no added
latency, a busy one batches by itself, and there is no timer to tune. Each caller awaits the commit
of its own patch. While the recorder is open it gives up no patch. A patch that PostgreSQL does not
take now is tried again until PostgreSQL takes it, or until the caller withdraws it. A text that
PostgreSQL can never store is left out of its patch, if the rest is true without it.
"""

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Final

import psycopg
import structlog

from autoflow_worker.errors import PartDiedError
from autoflow_worker.outage import Reasons, Refusals, Silence
from autoflow_worker.recording.faults import Blame, blame, may_be_for_good, reason_of
from autoflow_worker.recording.lane import LARGE_BATCH, MAX_BATCH, SLOW_BATCH, Lane
from autoflow_worker.recording.pool import Pool
from autoflow_worker.recording.write import Verdict, Write

log = structlog.get_logger(__name__)

# Characters of patches in one statement, at most; a larger patch gets a statement of its own.
MAX_BATCH_SIZE: Final = 1_000_000

# Seconds that a handler waits for its row to say `active`; then it starts and the row follows.
START_PATIENCE: Final = 5.0

# Seconds until a write that was put off is tried again; doubled at each further try.
POSTPONED_PAUSE: Final = 0.5
POSTPONED_PAUSE_MAX: Final = 4.0

# Rows that are remembered as refused. The oldest makes room for one more.
MAX_REMEMBERED: Final = 1000


class StatusRecorder:
    """Writes patches into the tasks table, many in one statement.

    Args:
        lanes: connections for writing, at most. The first is enough until `LARGE_BATCH` patches
            wait, or a batch takes longer than `SLOW_BATCH`.
        others: connections of the pool that are left to others.

    Attributes:
        pool: the process's connections to PostgreSQL.
        refusals: since when PostgreSQL refuses connections or rows.
        silence: is told when PostgreSQL hangs.
    """

    def __init__(self, url: str, *, lanes: int = 1, others: int = 0) -> None:
        self.pool = Pool(url, lanes + others)
        self.refusals = Refusals()
        self.silence = Silence("postgresql_silent", "postgresql_answers_again")
        self._lanes = [Lane(self, self.pool, index) for index in range(lanes)]
        self._waiting: deque[Write] = deque()
        self._postponed: set[Write] = set()
        self._due: deque[Write] = deque()
        self._due_comes_next = True
        self._refused_rows = RefusedRows()
        self._patrol: asyncio.TimerHandle | None = None
        self._helping: asyncio.TimerHandle | None = None
        self._outage_since: float | None = None
        self._reasons = Reasons()
        self._closed = False

    async def open(self, timeout: float) -> None:
        """Connect for the first time; raises as `Pool.open`."""
        await self.pool.open(timeout)
        for lane in self._lanes:
            lane.start()

    async def close(self, timeout: float) -> None:
        """Write what waits, for `timeout` seconds at most, and disconnect. May be called twice."""
        self._closed = True
        if left := self.outstanding:
            await asyncio.wait({write.settled for write in left}, timeout=timeout)
        for write in (left := self.outstanding):
            if not write.ready.done():
                write.release(Verdict.LATE)
            write.settled.cancel()
        if left:
            log.error("writes_given_up", rows=[write.row_id for write in left][:20])
        self._waiting.clear()
        self._due.clear()
        for timer in (self._patrol, self._helping):
            if timer is not None:
                timer.cancel()
        await asyncio.gather(*(lane.close() for lane in self._lanes))
        await self.pool.close()

    def deaths(self) -> list[asyncio.Task[None]]:
        """Return the lanes' tasks; one that ends has died."""
        return [lane.task for lane in self._lanes if lane.task is not None]

    def submit(self, write: Write) -> Write:
        """Put a write on its way; the caller awaits its `ready` or `settled`."""
        if self._closed:
            raise PartDiedError("the status recorder is closed")
        self._waiting.append(write)
        self.wake_lanes()
        if self._patrol is None and write.is_start:
            self._patrol = asyncio.get_running_loop().call_later(1.0, self._release_late)
        return write

    def withdraw(self, write: Write) -> None:
        """Give up a write that was put off; its `settled` says whether it was written first."""
        write.is_withdrawn = True
        # A statement that holds the write may be committed already, so its end is awaited.
        if not self.is_writing(write):
            self._postponed.discard(write)
            write.settle(Verdict.WITHDRAWN)
            self.wake_lanes()

    def is_writing(self, write: Write) -> bool:
        """Whether a lane has taken a write into its batch; a statement may hold it."""
        return any(write in lane.batch for lane in self._lanes)

    def take(self, at_least: int) -> list[Write]:
        """Return the next batch. A row is in one batch at a time, and once, so order is kept.

        A write that was put off is a batch of its own, because its statement may run until
        `statement_timeout`. Such batches take turns with the others.

        Args:
            at_least: return no batch if fewer writes wait.
        """
        if len(self._waiting) + len(self._due) < at_least:
            return []
        if self._due and self._due_comes_next:
            self._due_comes_next = False
            return [self._due.popleft()]
        busy = {write.row_id for lane in self._lanes for write in lane.batch}
        put_off = (*self._postponed, *self._due)
        busy.update(write.row_id for write in put_off if not write.settled.done())
        batch: dict[str, Write] = {}
        passed: list[Write] = []
        room = MAX_BATCH_SIZE
        while self._waiting and len(batch) < MAX_BATCH:
            write = self._waiting.popleft()
            room -= len(write.text)
            if batch and room < 0:
                self._waiting.appendleft(write)
                break
            if write.row_id in batch or write.row_id in busy:
                passed.append(write)
                continue
            batch[write.row_id] = write
        self._waiting.extendleft(reversed(passed))
        if self._due and not batch:
            return [self._due.popleft()]
        self._due_comes_next = True
        return list(batch.values())

    def postpone(self, write: Write) -> None:
        """Try a write again later, in a batch of its own; later writes of its row wait for it."""
        if write.is_withdrawn:
            write.settle(Verdict.WITHDRAWN)
            return
        write.put_off()
        self._postponed.add(write)
        doublings = min(write.times_put_off - 1, 10)
        pause = min(POSTPONED_PAUSE * 2**doublings, POSTPONED_PAUSE_MAX)
        asyncio.get_running_loop().call_later(pause, self._resume, write)

    def _resume(self, write: Write) -> None:
        self._postponed.discard(write)
        if not write.settled.done():
            write.is_put_off = False
            self._due.append(write)
        self.wake_lanes()

    def wake_lanes(self) -> None:
        """Set an idle lane to work, if writes wait."""
        if not (self._waiting or self._due):
            return
        # The first lane takes any number of writes. Further lanes help if many wait, or if the
        # batches that are being written are slow.
        for index, lane in enumerate(self._lanes):
            if lane.is_idle:
                lane.wake(1 if index == 0 else LARGE_BATCH)
                return
            if len(self._waiting) < LARGE_BATCH:
                break
        self._help_soon()

    def note_rest(self, *, has_written: bool) -> None:
        """A further lane has nothing more to write.

        Args:
            has_written: whether the lane wrote a batch. Writes that waited for the batch's rows can
                then be taken. A lane that wrote none must not be woken at once: all rows that wait
                are in other lanes' batches, so it would find none again, in an endless loop.
        """
        if has_written:
            self.wake_lanes()
        else:
            self._help_soon()

    def _help_soon(self) -> None:
        if self._helping is None and not self._closed and (self._waiting or self._due):
            self._helping = asyncio.get_running_loop().call_later(SLOW_BATCH, self._help)

    def _help(self) -> None:
        """Set one more lane to work if writes wait and each working lane has a slow batch."""
        self._helping = None
        if not (self._waiting or self._due) or self.is_away:
            return
        loop = asyncio.get_running_loop()
        working = [lane for lane in self._lanes if not lane.is_idle]
        idle = [lane for lane in self._lanes if lane.is_idle]
        if not (working and idle):
            return
        if all(loop.time() - lane.began_at >= SLOW_BATCH for lane in working):
            idle[0].wake()
        self._help_soon()

    @property
    def outstanding(self) -> list[Write]:
        """The writes that are neither written nor given up."""
        taken = [write for lane in self._lanes for write in lane.batch]
        everything = (*taken, *self._postponed, *self._due, *self._waiting)
        return [write for write in everything if not write.settled.done()]

    @property
    def is_away(self) -> bool:
        """Whether PostgreSQL is away, as far as the last statement told."""
        return self._outage_since is not None

    def _release_late(self) -> None:
        """Release the starts that have waited for `START_PATIENCE`."""
        loop = asyncio.get_running_loop()
        starts = [w for w in self.outstanding if w.is_start and not w.ready.done()]
        for write in starts:
            if loop.time() - write.created_at >= START_PATIENCE:
                write.release(Verdict.LATE)
        self._patrol = loop.call_later(1.0, self._release_late) if starts else None

    def note_refusal(self, write: Write, why: Exception | str) -> None:
        """Note that PostgreSQL refused a single write."""
        if isinstance(why, Exception) and may_be_for_good(why):
            self.refusals.note("rows")
        self._refused_rows.note(write, why)

    def note_outage(self, error: Exception) -> None:
        """Note that PostgreSQL is away; log each reason once."""
        if self._outage_since is None:
            self._outage_since = asyncio.get_running_loop().time()
        if self._reasons.is_new(reason := reason_of(error)):
            log.warning("postgresql_away", reason=reason)
        if may_be_for_good(error):
            self.refusals.note("connection")
        else:
            self.refusals.forget()  # It is an outage, which is waited out.

    def note_written(self, writes: Sequence[Write]) -> None:
        """Note that a statement was executed, and which writes it wrote."""
        self.refusals.over("connection")
        if writes:
            self.refusals.over("rows")
            self._refused_rows.note_written(writes)
        if self._outage_since is not None:
            away = asyncio.get_running_loop().time() - self._outage_since
            self._outage_since = None
            self._reasons.forget()
            log.warning("postgresql_back", after_s=round(away, 1), writes=len(self._waiting))
            self.wake_lanes()  # During the outage the lanes did not help each other.


class RefusedRows:
    """Logs each row that PostgreSQL refuses: once for all tries, and once when it is written."""

    def __init__(self) -> None:
        # Since when, by row and by the status of the patch: PostgreSQL may take a start and refuse
        # the outcome.
        self._rows: dict[str, dict[object, float]] = {}

    def note(self, write: Write, why: Exception | str) -> None:
        """Log that a row was refused, unless that is known.

        Args:
            why: the error, whose DETAIL is left out, as it lists all columns of the row; or words.
        """
        known = self._rows.get(write.row_id)
        if known is None:
            if len(self._rows) >= MAX_REMEMBERED:
                del self._rows[next(iter(self._rows))]
            known = self._rows[write.row_id] = {}
            log.error("row_refused", row=write.row_id, **_facts_of(why))
        known.setdefault(write.patch.get("status"), asyncio.get_running_loop().time())

    def note_written(self, writes: Sequence[Write]) -> None:
        """Log which of these rows had been refused before."""
        if not self._rows:
            return
        for write in writes:
            known = self._rows.get(write.row_id, {})
            since = known.pop(write.patch.get("status"), None)
            if since is not None and not known:
                del self._rows[write.row_id]
                refused_s = asyncio.get_running_loop().time() - since
                log.warning("row_written_at_last", row=write.row_id, after_s=round(refused_s, 1))


def _facts_of(why: Exception | str) -> dict[str, object]:
    if isinstance(why, str):
        return {"reason": why}
    facts: dict[str, object] = {"reason": reason_of(why)}
    if isinstance(why, psycopg.Error):
        facts |= {"sqlstate": why.sqlstate, "constraint": why.diag.constraint_name}
    elif blame(why) is Blame.CODE:
        facts["exc_info"] = why
    return facts
