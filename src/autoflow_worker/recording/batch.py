"""Writing one batch: its statements, and a way on for each write that PostgreSQL does not take.

A batch that fails as a whole is halved until the write that it fails on is alone. So one bad write
costs itself, and a few statements more.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, Protocol

import orjson
import psycopg
import structlog

from autoflow_worker.errors import PartDiedError
from autoflow_worker.outage import Silence
from autoflow_worker.recording.faults import Blame, blame, reason_of
from autoflow_worker.recording.pool import Checkout
from autoflow_worker.recording.statements import (
    INSERT,
    LOCKED,
    LOOK,
    TABLE_LOCKED,
    UPDATE_MANY,
    UPDATE_MANY_RELAXED,
    UPDATE_ONE,
    UPDATE_ONE_RELAXED,
)
from autoflow_worker.recording.write import NewRow, Verdict, Write

log = structlog.get_logger(__name__)

# Writes in a row that this code may break over; then the code is to blame, and the lane ends.
MAX_SUSPECTS: Final = 5
_LEFT_ROW: Final = "PostgreSQL leaves the row as it is: a trigger or a policy"
_NO_NEW_ROW: Final = "PostgreSQL makes no row: a trigger or a policy"


class Source(Protocol):
    """What writers need of the recorder: it gives batches, and is told what becomes of them."""

    silence: Silence

    def take(self, at_least: int) -> list[Write]: ...
    def postpone(self, write: Write) -> None: ...
    def note_refusal(self, write: Write, why: Exception | str) -> None: ...
    def note_written(self, writes: Sequence[Write]) -> None: ...
    def note_rest(self, *, has_written: bool) -> None: ...
    def note_outage(self, error: Exception) -> None: ...


class BatchWriter:
    """Writes batches over one connection.

    Attributes:
        batch: the writes that are being written; a write that is put off leaves it.
    """

    def __init__(self, source: Source, checkout: Checkout) -> None:
        self._source = source
        self._checkout = checkout
        self.batch: list[Write] = []
        self._suspects: set[tuple[str, object]] = set()

    @property
    def left(self) -> list[Write]:
        """The writes of the batch that still have to be written."""
        return _unsettled(self.batch)

    async def write(self, writes: Sequence[Write]) -> None:
        """Write these. A write that PostgreSQL does not take is found by halving and put off."""
        if not writes:
            return
        try:
            await self._send(writes)
        except psycopg.errors.LockNotAvailable as error:
            left = _unsettled(writes)
            free = await self._without_locked(left)
            if len(free) < len(left):
                await self.write(free)
            elif await (await self._checkout.link()).execute(TABLE_LOCKED):
                raise
            else:  # another session may be about to insert one of the rows
                await self._write_halves(left, error)
        except PartDiedError:
            raise
        except Exception as error:
            whose = blame(error)
            if whose is Blame.SERVER:
                raise
            if whose is Blame.CODE:
                await self._checkout.replace()  # It may have left a statement half done.
            await self._write_halves(_unsettled(writes), error)

    async def _send(self, writes: Sequence[Write]) -> None:
        """Write these in one statement; settle or put off each write that its row does not take."""
        if writes[0].times_put_off:
            writes = await self._without_locked(writes)
            if not writes:
                return
        new = [
            {"id": write.row_id, "data": orjson.Fragment(write.new_row.text)}
            for write in writes
            if write.new_row is not None
        ]
        if new:
            await (await self._checkout.link()).execute(INSERT, _as_json(new))
        left = await self._update(writes)
        written = [w for w in writes if w.row_id not in left] if left else writes
        for write in written:
            write.settle(Verdict.WRITTEN)
        if written:
            self._suspects.clear()
        self._source.note_written(written)
        if left:
            await self._explain([*left.values()])

    async def _write_halves(self, writes: Sequence[Write], error: Exception) -> None:
        """Write what failed together in two halves; make a single write smaller, or put it off."""
        if len(writes) > 1:
            middle = len(writes) // 2
            await self.write(writes[:middle])
            await self.write(writes[middle:])
        elif writes and blame(error) is Blame.CONTENT and not writes[0].is_smallest:
            await self._write_smallest(writes[0], error)
        elif writes:
            self._refuse(writes[0], error)

    async def _without_locked(self, writes: Sequence[Write]) -> list[Write]:
        """Put off the writes whose rows another session has locked, and return the others."""
        link = await self._checkout.link()
        rows = await link.execute(LOCKED, _as_json([write.row_id for write in writes]))
        locked = {row[0] for row in rows}
        for write in writes:
            if write.row_id in locked:
                if not write.times_put_off:
                    log.warning("row_locked", row=write.row_id)
                self._put_off(write)
        return [write for write in writes if write.row_id not in locked]

    def _refuse(self, write: Write, why: Exception | str) -> None:
        """Put off a write. If this code broke over it, that is its fault while others succeed.

        Raises:
            PartDiedError: this code broke over `MAX_SUSPECTS` writes in a row.
        """
        if isinstance(why, Exception) and blame(why) is Blame.CODE:
            self._suspects.add((write.row_id, write.patch.get("status")))
            if len(self._suspects) >= MAX_SUSPECTS:
                raise PartDiedError(f"no row can be written: {reason_of(why)}") from why
        self._source.note_refusal(write, why)
        self._put_off(write)

    def _put_off(self, write: Write) -> None:
        self.batch.remove(write)
        self._source.postpone(write)

    async def _update(self, writes: Sequence[Write]) -> dict[str, Write]:
        """Send the UPDATE, and return the writes that their rows did not take, by row id."""
        relaxed = all(write.is_start for write in writes)
        if len(writes) == 1:
            statement = UPDATE_ONE_RELAXED if relaxed else UPDATE_ONE
            parameters = writes[0].as_parameters()
        else:
            statement = UPDATE_MANY_RELAXED if relaxed else UPDATE_MANY
            parameters = [_as_json([write.as_json() for write in writes])]
        link = await self._checkout.link()
        rows = await link.execute(statement, *parameters)
        if len(rows) == len(writes):  # no row is in a batch twice
            return {}
        written = {row[0] for row in rows}
        return {write.row_id: write for write in writes if write.row_id not in written}

    async def _write_smallest(self, write: Write, error: Exception) -> None:
        """Write a patch without its texts. If that is refused too, the patch stays whole."""
        whole = write.text, write.new_row
        try:
            write.text = orjson.dumps(_smallest_patch(write.patch)).decode()
        except Exception as broken:
            self._refuse(write, broken)
            return
        write.is_smallest = True
        if write.new_row is not None:
            write.new_row = NewRow(write.new_row.smallest, write.new_row.smallest)
        try:
            await self.write([write])
        finally:
            if not write.settled.done():
                write.is_smallest = False
                write.text, write.new_row = whole
        if _is_written(write):
            log.error("unstorable_patch", row=write.row_id, reason=reason_of(error))

    async def _explain(self, writes: Sequence[Write]) -> None:
        """Look at rows that did not take their writes, and settle or refuse each write."""
        link = await self._checkout.link()
        found = await link.execute(LOOK, _as_json([write.row_id for write in writes]))
        rows = {row[0]: row[1:] for row in found}
        again: list[Write] = []
        for write in writes:
            row = rows.get(write.row_id)
            verdict = Verdict.MISSING if row is None else _verdict(write, *row)
            if verdict is not None and (row is not None or write.new_row is None):
                write.settle(verdict)
            elif not write.puzzled:  # the row may have changed between the two statements
                write.puzzled = True
                again.append(write)
            else:
                self._refuse(write, _NO_NEW_ROW if row is None else _LEFT_ROW)
        await self.write(again)


def _unsettled(writes: Iterable[Write]) -> list[Write]:
    return [write for write in writes if not (write.settled.done() or write.is_put_off)]


def _is_written(write: Write) -> bool:
    settled = write.settled
    return settled.done() and not settled.cancelled() and settled.result() is Verdict.WRITTEN


def _verdict(
    write: Write, kind: str | None, queue: str | None, status: str | None, started_at: str | None
) -> Verdict | None:
    """Why a row did not take a write, by what the row shows; None if it shows no reason."""
    if kind != "object":
        log.error("row_is_not_an_object", row=write.row_id, kind=kind)
        return Verdict.UNUSABLE
    if queue is not None and queue != write.queue:
        return Verdict.FOREIGN
    if status == "cancelled" and not write.settles:
        return Verdict.CANCELLED
    if write.unfinished and status in ("completed", "failed"):
        return Verdict.FINISHED
    is_behind = write.since is not None and (started_at or "") > write.since
    if is_behind or (write.fence is not None and started_at != write.fence):
        return Verdict.CONTESTED
    return None


def _as_json(rows: Sequence[object]) -> bytes:
    try:
        return orjson.dumps(rows)
    except TypeError as error:  # which is how orjson refuses what it can't encode
        raise UnicodeError(str(error)) from error


def _smallest_patch(patch: Mapping[str, Any]) -> dict[str, Any]:
    """Return a patch without the texts that can't be stored."""
    smaller = dict(patch)
    if isinstance(result := patch.get("result"), Mapping):
        smaller["result"] = {key: result[key] for key in ("success", "duration")}
    if isinstance(error := patch.get("error"), Mapping):
        smaller["error"] = {
            "success": False,
            "reason": "the reason can't be stored in PostgreSQL",
            "lastAttemptAt": error["lastAttemptAt"],
        }
    return smaller
