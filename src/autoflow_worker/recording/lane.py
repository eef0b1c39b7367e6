"""One connection to PostgreSQL, and the task that writes batches over it."""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, Protocol

import orjson
import psycopg
import structlog
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from autoflow_worker.encoding.masking import mask_secrets
from autoflow_worker.errors import DatabaseUnavailableError, PartDiedError
from autoflow_worker.outage import Silence
from autoflow_worker.recording.link import PostgresLink
from autoflow_worker.recording.statements import (
    CONFLICTS,
    CONNECTION_DEFAULTS,
    INSERT,
    LOCKED,
    LOOK,
    SESSION,
    TABLE_LOCKED,
    UPDATE_MANY,
    UPDATE_MANY_RELAXED,
    UPDATE_ONE,
    UPDATE_ONE_RELAXED,
    Blame,
    UnencodableError,
    blame,
    is_refusal,
    reason_of,
)
from autoflow_worker.recording.write import NewRow, Verdict, Write

log = structlog.get_logger(__name__)

MAX_BATCH: Final = 500
"""Patches in one statement, at most."""

LARGE_BATCH: Final = 100
"""Patches that have to wait for a further connection to be used; fewer are cheaper in one batch."""

SLOW_BATCH: Final = 0.02
"""Seconds after which a batch counts as slow, by its rows' size or a lock: others needn't wait."""

RETRY_PAUSE: Final = 0.1
"""Seconds before the second retry of a failed batch (the first is at once); doubled from there."""

RETRY_PAUSE_MAX: Final = 2.0
"""Seconds between two retries, at most."""

MAX_SUSPECTS: Final = 5
"""Writes that this code may break on with none written in between; then the code is to blame."""

_LEFT_ROW: Final = "PostgreSQL leaves the row as it is: a trigger or a policy"
_NO_NEW_ROW: Final = "PostgreSQL makes no row: a trigger or a policy"


class Source(Protocol):
    """Where a lane gets its batches, and tells how it goes: the recorder.

    Attributes:
        silence: is told when a connection hangs.
    """

    silence: Silence

    def take(self, at_least: int) -> list[Write]:
        """The next batch, if at least so many writes wait."""
        ...

    def postpone(self, write: Write) -> None:
        """Try a write again in a while, by itself."""
        ...

    def note_refusal(self, write: Write, why: Exception | str) -> None:
        """PostgreSQL does not take a write."""
        ...

    def note_rest(self, *, has_written: bool) -> None:
        """A further lane has nothing more to write."""
        ...

    def note_outage(self, error: Exception) -> None:
        """PostgreSQL could not be reached, or gave up."""
        ...

    def note_written(self, writes: Sequence[Write]) -> None:
        """A statement was executed, and has written these."""
        ...


class Lane:
    """One connection and the task that writes batches over it."""

    def __init__(self, source: Source, url: str, index: int) -> None:
        self._source = source
        options: dict[str, Any] = {**CONNECTION_DEFAULTS, **conninfo_to_dict(url)}
        self._conninfo = make_conninfo("", **(options | {"client_encoding": "UTF8"}))
        self._index = index
        self._link: PostgresLink | None = None
        self._work = asyncio.Event()
        self.idle = asyncio.Event()
        self.idle.set()
        self.batch: list[Write] = []
        self.began_at = 0.0
        self._at_least = 1
        self._suspects: set[tuple[str, object]] = set()
        self.task: asyncio.Task[None] | None = None

    async def open(self, timeout: float) -> None:
        """Connect for the first time.

        Args:
            timeout: seconds to keep trying.

        Raises:
            DatabaseUnavailableError: not reached in time, a wrong password, or no such database.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        pause = RETRY_PAUSE
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    await self.link()
            except TimeoutError:
                raise DatabaseUnavailableError(
                    f"PostgreSQL can't be reached within {timeout:g} s: it gives no answer"
                ) from None
            except psycopg.Error as error:
                reason = mask_secrets(str(error).strip())
                if is_refusal(error):
                    raise DatabaseUnavailableError(
                        f"PostgreSQL refuses the connection: {reason}"
                    ) from None
                if loop.time() + pause > deadline:
                    raise DatabaseUnavailableError(
                        f"PostgreSQL can't be reached within {timeout:g} s: {reason}"
                    ) from None
                await asyncio.sleep(pause)
                pause = min(pause * 2, RETRY_PAUSE_MAX)
            else:
                break

    def start(self) -> None:
        self.task = asyncio.get_running_loop().create_task(
            self._run(), name=f"status recorder {self._index}"
        )

    def wake(self, at_least: int = 1) -> None:
        """Let an idle lane write a batch, if so many writes wait by then."""
        self._at_least = at_least
        self.idle.clear()
        self._work.set()

    async def close(self) -> None:
        if self.batch and self._link is not None:
            self._link.abort()
            # The writes are given up, so the lane ends with its statement; unless it is dead.
            idle = asyncio.ensure_future(self.idle.wait())
            ends = {idle} if self.task is None else {idle, self.task}
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            idle.cancel()
        if self.task is not None:
            self.task.cancel()
            await asyncio.wait({self.task})
        await self._disconnect()

    async def link(self) -> PostgresLink:
        if self._link is None:
            self._link = await _connect(self._conninfo, self._source.silence)
        return self._link

    async def _disconnect(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            await link.close()

    async def _run(self) -> None:
        while True:
            await self._work.wait()
            self._work.clear()
            has_written = False
            if self._index == 0 or await self._can_help():
                has_written = await self._work_off()
            self.idle.set()
            if self._index > 0:
                self._source.note_rest(has_written=has_written)

    async def _can_help(self) -> bool:
        """Connect before taking anything: it would wait here while another lane could write it."""
        try:
            await self.link()
        except (psycopg.Error, OSError):
            await asyncio.sleep(RETRY_PAUSE_MAX)
            return False
        return True

    async def _work_off(self) -> bool:
        """Write batches until there is none; whether there was one."""
        has_written = False
        while batch := self._source.take(self._at_least):
            self.batch = batch
            self.began_at = asyncio.get_running_loop().time()
            await self._commit()
            self.batch = []
            self._at_least = 1 if self._index == 0 else LARGE_BATCH
            has_written = True
        return has_written

    async def _commit(self) -> None:
        """Write the batch, however often it takes."""
        pause = 0.0
        while left := _unsettled(self.batch):
            try:
                await self._write(left)
            except psycopg.errors.LockNotAvailable:
                continue  # The whole table is locked; the lock's timeout was the pause.
            except CONFLICTS:
                await asyncio.sleep(pause)
                pause = min(max(pause * 2, RETRY_PAUSE), RETRY_PAUSE_MAX)
            except (psycopg.Error, OSError) as error:
                await self._disconnect()
                self._source.note_outage(error)
                await asyncio.sleep(pause)
                pause = min(max(pause * 2, RETRY_PAUSE), RETRY_PAUSE_MAX)

    async def _write(self, writes: Sequence[Write]) -> None:
        """Write these; a bad one among them is found by halving, so the others are not held up."""
        if not writes:
            return
        try:
            await self._send(writes)
        except psycopg.errors.LockNotAvailable as error:
            left = _unsettled(writes)
            free = await self._without_locked(left)
            if len(free) < len(left):
                await self._write(free)
            elif await (await self.link()).execute(TABLE_LOCKED):
                raise
            else:  # somebody may be about to insert one of the rows
                await self._write_halves(left, error)
        except PartDiedError:
            raise
        except Exception as error:
            whose = blame(error)
            if whose is Blame.SERVER:
                raise
            if whose is Blame.CODE:
                await self._disconnect()  # Nobody knows what it left half done.
            await self._write_halves(_unsettled(writes), error)

    async def _send(self, writes: Sequence[Write]) -> None:
        """Write these, all or none; each that its row does not take is settled or put off."""
        if writes[0].times_put_off:
            writes = await self._without_locked(writes)
            if not writes:
                return
        if new := [write for write in writes if write.new_row is not None]:
            await self._insert(new)
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
        """Write what failed as a whole; one that fails by itself is made smaller, or put off."""
        if len(writes) > 1:
            middle = len(writes) // 2
            await self._write(writes[:middle])
            await self._write(writes[middle:])
            return
        for write in writes:
            whose = blame(error)
            if whose is Blame.CONTENT and not write.is_smallest:
                await self._write_smallest(write, error)
                continue
            if whose is Blame.CODE:
                self._suspect(write, error)
            self._refuse(write, error)

    def _suspect(self, write: Write, error: Exception) -> None:
        """Note that this code broke over a write: its own trouble, as long as others are written.

        Raises:
            PartDiedError: it breaks over every write.
        """
        self._suspects.add((write.row_id, write.patch.get("status")))
        if len(self._suspects) >= MAX_SUSPECTS:
            raise PartDiedError(f"no row can be written: {reason_of(error)}") from error

    async def _without_locked(self, writes: Sequence[Write]) -> list[Write]:
        """Put off the writes whose rows somebody has locked; the others."""
        link = await self.link()
        rows = await link.execute(LOCKED, _as_json([write.row_id for write in writes]))
        locked = {row[0] for row in rows}
        for write in writes:
            if write.row_id in locked:
                if not write.times_put_off:
                    log.warning("row_locked", row=write.row_id)
                self._put_off(write)
        return [write for write in writes if write.row_id not in locked]

    def _refuse(self, write: Write, why: Exception | str) -> None:
        self._source.note_refusal(write, why)
        self._put_off(write)

    def _put_off(self, write: Write) -> None:
        self.batch.remove(write)
        self._source.postpone(write)

    async def _update(self, writes: Sequence[Write]) -> dict[str, Write]:
        """Write these; those whose rows did not take them, by their rows' ids."""
        relaxed = all(write.is_start for write in writes)
        if len(writes) == 1:
            statement = UPDATE_ONE_RELAXED if relaxed else UPDATE_ONE
            parameters = _encoded(writes[0])
        else:
            statement = UPDATE_MANY_RELAXED if relaxed else UPDATE_MANY
            parameters = [_as_json([write.as_json() for write in writes])]
        link = await self.link()
        rows = await link.execute(statement, *parameters)
        if len(rows) == len(writes):  # no row is in a batch twice
            return {}
        written = {row[0] for row in rows}
        return {write.row_id: write for write in writes if write.row_id not in written}

    async def _write_smallest(self, write: Write, error: Exception) -> None:
        """Write what still is true of a patch; one that is refused all the same stays whole."""
        whole = write.text, write.new_row
        try:
            write.text = orjson.dumps(_smallest_patch(write.patch)).decode()
        except Exception as broken:
            self._suspect(write, broken)
            self._refuse(write, broken)
            return
        write.is_smallest = True
        if write.new_row is not None:
            write.new_row = NewRow(write.new_row.smallest, write.new_row.smallest)
        try:
            await self._write([write])
        finally:
            if not write.settled.done():
                write.is_smallest = False
                write.text, write.new_row = whole
        if _is_written(write):
            log.error("unstorable_patch", row=write.row_id, reason=reason_of(error))

    async def _explain(self, writes: Sequence[Write]) -> None:
        """Find out why rows were not written: each reason has its own way on."""
        link = await self.link()
        found = await link.execute(LOOK, _as_json([write.row_id for write in writes]))
        rows = {row[0]: row[1:] for row in found}
        again: list[Write] = []
        for write in writes:
            kind, queue, status, started_at = rows.get(write.row_id, (None, None, None, None))
            if kind is None and write.new_row is None:
                write.settle(Verdict.MISSING)
            elif kind not in (None, "object"):
                log.error("row_is_not_an_object", row=write.row_id, kind=kind)
                write.settle(Verdict.UNUSABLE)
            elif queue is not None and queue != write.queue:
                write.settle(Verdict.FOREIGN)
            elif status == "cancelled" and write.patch.get("status") != "completed":
                write.settle(Verdict.CANCELLED)
            elif write.unfinished and status in ("completed", "failed"):
                write.settle(Verdict.FINISHED)
            elif kind is not None and (
                (write.since is not None and (started_at or "") > write.since)
                or (write.fence is not None and started_at != write.fence)
            ):
                write.settle(Verdict.CONTESTED)
            elif not write.puzzled:  # the row may have changed between the two statements
                write.puzzled = True
                again.append(write)
            else:
                self._refuse(write, _NO_NEW_ROW if kind is None else _LEFT_ROW)
        await self._write(again)

    async def _insert(self, writes: Sequence[Write]) -> None:
        """Make the rows that are not there; the writes themselves follow."""
        rows = [
            {"id": write.row_id, "data": orjson.Fragment(write.new_row.text)}
            for write in writes
            if write.new_row is not None
        ]
        link = await self.link()
        await link.execute(INSERT, _as_json(rows))


async def _connect(conninfo: str, silence: Silence) -> PostgresLink:
    link = PostgresLink(await psycopg.AsyncConnection.connect(conninfo, autocommit=True), silence)
    try:
        # Not by psycopg: cancelled at a server that hangs, it would ask that for seconds to stop.
        await link.execute(SESSION)
    except BaseException:
        await link.close()
        raise
    return link


def _unsettled(writes: Iterable[Write]) -> list[Write]:
    return [write for write in writes if not (write.settled.done() or write.is_put_off)]


def _is_written(write: Write) -> bool:
    settled = write.settled
    return settled.done() and not settled.cancelled() and settled.result() is Verdict.WRITTEN


def _as_json(rows: Sequence[object]) -> bytes:
    try:
        return orjson.dumps(rows)
    except TypeError as error:  # which is how orjson refuses what it can't encode
        raise UnencodableError(str(error)) from error


def _encoded(write: Write) -> list[bytes | None]:
    try:
        return write.as_parameters()
    except UnicodeEncodeError as error:
        raise UnencodableError(str(error)) from error


def _smallest_patch(patch: Mapping[str, Any]) -> dict[str, Any]:
    """What still is true of a patch whose texts can't be stored."""
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
