"""Group commit of patches into the tasks table.

Patches that arrive while a statement runs go into the next one: an idle system has no added
latency, a busy one batches by itself, and there is no timer to tune. Each caller awaits the commit
of its own patch. Nothing is given up while the recorder is open: what PostgreSQL can't take now is
tried again until it can; a patch that it will never take is replaced by a smaller, true one.

psycopg_pool is not used: its pause between attempts to reconnect grows to minutes, while what a
worker has to record must be in the table seconds after PostgreSQL is back.
"""

import asyncio
import contextlib
import enum
import os
import socket
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, Protocol

import orjson
import psycopg
import structlog
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from autoflow_worker.errors import DatabaseUnavailableError, PartDiedError
from autoflow_worker.failpoints import failpoint
from autoflow_worker.masking import mask_secrets
from autoflow_worker.storable import dump

log = structlog.get_logger(__name__)

MAX_BATCH: Final = 500
"""Patches in one statement, at most. A further connection is used when more than that wait."""

MAX_BATCH_SIZE: Final = 4_000_000
"""Characters of patches in one statement, at most; a larger patch gets a statement of its own."""

START_PATIENCE: Final = 5.0
"""Seconds that a handler waits for its row to say `active`; then it starts and the row follows."""

RETRY_PAUSE: Final = 0.1
"""Seconds before the second retry of a failed batch (the first is at once); doubled from there."""

RETRY_PAUSE_MAX: Final = 2.0
"""Seconds between two retries, at most."""

LOCK_TIMEOUT: Final = "50ms"
"""How long a batch waits for somebody else's lock before the locked rows are put off."""

POSTPONED_PAUSE: Final = 0.5
"""Seconds until a write that was put off is tried again, by itself."""

# A batch looks up each of its rows by primary key, whatever the planner believes of the table's
# size: a plan made for a small table would read all of a grown one for every batch.
_SESSION: Final = f"""
SET lock_timeout = '{LOCK_TIMEOUT}';
SET enable_seqscan = off; SET enable_hashjoin = off; SET enable_mergejoin = off
"""

_CONNECTION_DEFAULTS: Final = {
    "application_name": "autoflow-worker",
    "connect_timeout": 5,
    # A half-open connection is noticed by the kernel: a write is never cancelled half-way.
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
}

_REFUSED: Final = (
    psycopg.errors.InvalidPassword,
    psycopg.errors.InvalidAuthorizationSpecification,
    psycopg.errors.InvalidCatalogName,
)
# libpq's errors while connecting carry no SQLSTATE, only the server's words.
_WORDS_OF_REFUSAL: Final = (
    "authentication failed",
    "does not exist",
    "is not permitted to log in",
    "no password supplied",
    "pg_hba.conf",  # has no entry, or one that rejects
    "permission denied for database",
)


class UnencodableError(ValueError):
    """A text that is no text, such as half a surrogate pair, can't be sent to PostgreSQL."""


# Errors that the content of a patch caused: the same statement can never succeed.
_UNSTORABLE: Final = (
    UnencodableError,
    psycopg.DataError,
    psycopg.IntegrityError,
    psycopg.errors.ProgramLimitExceeded,
    psycopg.errors.StatementTooComplex,
    UnicodeError,
)

# Errors that one row may cause without its patch being to blame: by its triggers or policies, by
# damage, or because the statement took too long. The row may be written later, the others now.
_ROW_REFUSED: Final = (
    psycopg.errors.QueryCanceled,
    psycopg.errors.InsufficientPrivilege,
    psycopg.errors.PlpgsqlError,
    psycopg.errors.RaiseException,
    psycopg.errors.InternalError_,
    psycopg.errors.DataCorrupted,
)

_CONFLICTS: Final = (psycopg.errors.DeadlockDetected, psycopg.errors.SerializationFailure)

# `data || patch` merges at the top level and keeps the API's other keys. The conditions are the
# rules that no write may break: another queue's row is not ours; `since`: a start never goes
# behind a later start; `fence`: an outcome goes only into the row that still shows its own start;
# a cancelled task stays cancelled, unless its work was done after all (`settles`).
_UPDATE: Final = """
UPDATE tasks AS t
SET data = t.data || p.patch, updated_at = timezone('utc', now())
FROM json_to_recordset(%s::json)
     AS p(id text, queue text, patch jsonb, since text, fence text, settles boolean){relaxed}
WHERE t.id = p.id
  AND jsonb_typeof(t.data) = 'object'
  AND coalesce(t.data->>'queueName', p.queue) = p.queue
  AND (p.since IS NULL OR coalesce(t.data->>'startedAt', '') <= p.since COLLATE "C")
  AND (p.fence IS NULL OR t.data->>'startedAt' = p.fence)
  AND (p.settles OR t.data->>'status' IS DISTINCT FROM 'cancelled')
RETURNING t.id
"""
_DURABLE_UPDATE: Final = _UPDATE.format(relaxed="")
# A start that a crash of PostgreSQL loses is made good by its outcome, so it needn't wait for the
# disk. Set inside the statement, it holds for this one transaction and needs no round trip.
_RELAXED_UPDATE: Final = (
    "WITH relaxed AS MATERIALIZED"
    " (SELECT set_config('synchronous_commit', 'off', true) AS value)\n"
    + _UPDATE.format(relaxed=" JOIN relaxed ON relaxed.value = 'off'")
)
_INSERT: Final = """
INSERT INTO tasks (id, data, created_at, updated_at)
SELECT p.id, p.data, timezone('utc', now()), timezone('utc', now())
FROM json_to_recordset(%s::json) AS p(id text, data jsonb)
ON CONFLICT (id) DO NOTHING
"""
_LOCKED: Final = """
WITH free AS MATERIALIZED (
  SELECT id FROM tasks WHERE id = ANY(%(ids)s) FOR NO KEY UPDATE SKIP LOCKED)
SELECT id FROM tasks WHERE id = ANY(%(ids)s) EXCEPT SELECT id FROM free
"""
_LOOK: Final = """
SELECT id, jsonb_typeof(data), data->>'queueName', data->>'status', data->>'startedAt'
FROM tasks WHERE id = ANY(%s)
"""


class Verdict(enum.Enum):
    """What became of a write."""

    WRITTEN = "written"
    LATE = "late"  # not yet: PostgreSQL is away, the write follows
    CANCELLED = "cancelled"  # the row says so, and still does
    CONTESTED = "contested"  # the row shows another start than this attempt's
    MISSING = "missing"  # there is no row, and none is wanted
    UNSTORABLE = "unstorable"  # not even the smallest true patch can be stored


class Write:
    """One patch on its way into one row.

    Attributes:
        ready: the verdict, or `Verdict.LATE` where a start was waited for long enough.
        settled: the verdict, however long it takes; the same future unless `ready` was LATE.
        alone: it was put off before, so it must not hold up others.
        puzzled: it was not written once, and nothing in its row says why.
        is_smallest: it holds nothing more that could be left out.
    """

    __slots__ = (
        "alone",
        "created_at",
        "fence",
        "is_smallest",
        "is_start",
        "new_row",
        "patch",
        "puzzled",
        "queue",
        "ready",
        "row_id",
        "settled",
        "since",
        "text",
    )

    def __init__(
        self,
        row_id: str,
        queue: str,
        patch: Mapping[str, Any],
        text: str,
        *,
        since: str | None = None,
        fence: str | None = None,
        new_row: Callable[[], Mapping[str, Any]] | None = None,
    ) -> None:
        loop = asyncio.get_running_loop()
        self.row_id = row_id
        self.queue = queue
        self.patch = patch
        self.text = text
        self.since = since
        self.fence = fence
        self.new_row = new_row
        self.is_start = patch.get("status") == "active"
        self.alone = False
        self.puzzled = False
        self.is_smallest = False
        self.created_at = loop.time()
        self.ready: asyncio.Future[Verdict] = loop.create_future()
        self.settled = self.ready

    def settle(self, verdict: Verdict) -> None:
        if not self.settled.done():
            self.settled.set_result(verdict)

    def release(self) -> None:
        """Let the caller go on; the write stays on its way."""
        if self.settled is self.ready and not self.ready.done():
            self.settled = asyncio.get_running_loop().create_future()
            self.ready.set_result(Verdict.LATE)

    def as_parameter(self) -> dict[str, Any]:
        return {
            "id": self.row_id,
            "queue": self.queue,
            "patch": orjson.Fragment(self.text),
            "since": self.since,
            "fence": self.fence,
            "settles": self.patch.get("status") == "completed",
        }


class Recorder(Protocol):
    """What a TaskWorker needs of whoever keeps the statuses."""

    def submit(self, write: Write) -> Write:
        """Put a write on its way; the caller awaits its `ready` or `settled`."""
        ...


class StatusRecorder:
    """Writes patches into the tasks table, many in one statement.

    Args:
        url: libpq's connection URL.
        max_connections: connections at most; one serves until more than `MAX_BATCH` patches wait.
    """

    def __init__(self, url: str, *, max_connections: int = 1) -> None:
        options: dict[str, Any] = {**_CONNECTION_DEFAULTS, **conninfo_to_dict(url)}
        self._conninfo = make_conninfo("", **options)
        self._lanes = [_Lane(self, index) for index in range(max_connections)]
        self._waiting: deque[Write] = deque()
        self._postponed: set[Write] = set()
        self._patrol: asyncio.TimerHandle | None = None
        self._outage_since: float | None = None
        self._closed = False

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
                    await self._lanes[0].connection()
            except TimeoutError:
                raise DatabaseUnavailableError(
                    f"PostgreSQL can't be reached within {timeout:g} s: it gives no answer"
                ) from None
            except psycopg.Error as error:
                reason = mask_secrets(str(error).strip())
                if isinstance(error, _REFUSED) or _is_refusal(reason):
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
        for lane in self._lanes:
            lane.start()

    async def close(self, timeout: float) -> None:
        """Write what waits, for `timeout` seconds at most, and disconnect. May be called twice."""
        self._closed = True
        if left := self._outstanding():
            await asyncio.wait({write.settled for write in left}, timeout=timeout)
        for write in (left := self._outstanding()):
            write.release()
            write.settled.cancel()
        if left:
            log.error("writes_given_up", rows=[write.row_id for write in left][:20])
        self._waiting.clear()
        if self._patrol is not None:
            self._patrol.cancel()
        await asyncio.gather(*(lane.close() for lane in self._lanes))

    def deaths(self) -> list[asyncio.Task[None]]:
        """The tasks that never end while the recorder works."""
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

    def take(self, at_least: int) -> list[Write]:
        """The next batch: no row twice in it, or in two batches at once, so that order is kept.

        Args:
            at_least: writes that have to wait for it to be worth a batch.
        """
        if len(self._waiting) < at_least:
            return []
        busy = {write.row_id for lane in self._lanes for write in lane.batch}
        busy.update(write.row_id for write in self._postponed)
        batch: dict[str, Write] = {}
        passed: list[Write] = []
        room = MAX_BATCH_SIZE
        while self._waiting and len(batch) < MAX_BATCH:
            write = self._waiting.popleft()
            room -= len(write.text)
            if batch and (write.alone or room < 0):
                self._waiting.appendleft(write)
                break
            if write.row_id in batch or write.row_id in busy:
                passed.append(write)
                continue
            batch[write.row_id] = write
            if write.alone:
                break
        self._waiting.extendleft(reversed(passed))
        return list(batch.values())

    def postpone(self, write: Write) -> None:
        """Try a write again in a while, by itself; later writes of its row stay behind it."""
        write.alone = True
        self._postponed.add(write)
        asyncio.get_running_loop().call_later(POSTPONED_PAUSE, self._resume, write)

    def _resume(self, write: Write) -> None:
        self._postponed.discard(write)
        if not write.settled.done():
            self._waiting.appendleft(write)
        self.wake_lanes()

    def wake_lanes(self) -> None:
        """Set the lanes to work, if there is some."""
        if not self._waiting:
            return
        # The first lane takes what there is; the others help when a batch is full.
        for lane in self._lanes:
            if lane.idle.is_set():
                lane.wake()
                return
            if len(self._waiting) < MAX_BATCH:
                return

    def _outstanding(self) -> list[Write]:
        taken = [write for lane in self._lanes for write in lane.batch]
        everything = (*taken, *self._postponed, *self._waiting)
        return [write for write in everything if not write.settled.done()]

    def _release_late(self) -> None:
        """Let starts go on that have waited for `START_PATIENCE`."""
        loop = asyncio.get_running_loop()
        starts = [write for write in self._outstanding() if write.is_start]
        for write in starts:
            if loop.time() - write.created_at >= START_PATIENCE:
                write.release()
        self._patrol = loop.call_later(1.0, self._release_late) if starts else None

    async def connect(self) -> psycopg.AsyncConnection[Any]:
        connection = await psycopg.AsyncConnection.connect(
            self._conninfo, autocommit=True, prepare_threshold=0
        )
        try:
            await connection.execute(_SESSION, prepare=False)
        except BaseException:
            await connection.close()
            raise
        return connection

    def note_outage(self, error: Exception) -> None:
        if self._outage_since is None:
            self._outage_since = asyncio.get_running_loop().time()
            log.warning("postgresql_away", reason=mask_secrets(str(error).strip()))

    def note_success(self) -> None:
        if self._outage_since is not None:
            away = asyncio.get_running_loop().time() - self._outage_since
            self._outage_since = None
            log.warning("postgresql_back", after_s=round(away, 1), writes=len(self._waiting))


class _Lane:
    """One connection and the task that writes batches over it."""

    def __init__(self, recorder: StatusRecorder, index: int) -> None:
        self._recorder = recorder
        self._index = index
        self._connection: psycopg.AsyncConnection[Any] | None = None
        self._work = asyncio.Event()
        self.idle = asyncio.Event()
        self.idle.set()
        self.batch: list[Write] = []
        self.task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self.task = asyncio.get_running_loop().create_task(
            self._run(), name=f"status recorder {self._index}"
        )

    def wake(self) -> None:
        self.idle.clear()
        self._work.set()

    async def close(self) -> None:
        if self.batch and self._connection is not None and not self._connection.closed:
            # psycopg would ask a server that may be away, for seconds, to cancel the statement.
            duplicate = socket.socket(fileno=os.dup(self._connection.fileno()))
            with duplicate, contextlib.suppress(OSError):
                duplicate.shutdown(socket.SHUT_RDWR)
            # The writes are given up, so the lane ends with its statement; unless it is dead.
            idle = asyncio.ensure_future(self.idle.wait())
            ends = {idle} if self.task is None else {idle, self.task}
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            idle.cancel()
        if self.task is not None:
            self.task.cancel()
            await asyncio.wait({self.task})
        await self._disconnect()

    async def connection(self) -> psycopg.AsyncConnection[Any]:
        if self._connection is None:
            self._connection = await self._recorder.connect()
        return self._connection

    async def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()

    async def _run(self) -> None:
        while True:
            await self._work.wait()
            self._work.clear()
            # One turn of the loop lets everything that is ready now into the same batch.
            await asyncio.sleep(0)
            while batch := self._recorder.take(1 if self._index == 0 else MAX_BATCH):
                self.batch = batch
                await self._commit()
                self.batch = []
            self.idle.set()
            if self._index > 0:
                # What had to wait for a row in this lane's batch, the first lane can take now.
                self._recorder.wake_lanes()

    async def _commit(self) -> None:
        """Write the batch, however often it takes."""
        pause = 0.0
        while left := _unsettled(self.batch):
            try:
                if left[0].alone:
                    left = await self._without_locked(left)
                await self._write(left)
            except psycopg.errors.LockNotAvailable:
                continue  # The whole table is locked; the lock's timeout was the pause.
            except _CONFLICTS:
                await asyncio.sleep(pause)
                pause = min(max(pause * 2, RETRY_PAUSE), RETRY_PAUSE_MAX)
            except (psycopg.Error, OSError) as error:
                await self._disconnect()
                self._recorder.note_outage(error)
                await asyncio.sleep(pause)
                pause = min(max(pause * 2, RETRY_PAUSE), RETRY_PAUSE_MAX)
            else:
                self._recorder.note_success()

    async def _write(self, writes: Sequence[Write]) -> None:
        """Write these; a bad one among them is found by halving, so the others are not held up."""
        if not writes:
            return
        try:
            written = await self._update(writes)
            failpoint("in-batch")
            refused = [write for write in writes if write.row_id not in written]
            for write in writes:
                if write.row_id in written:
                    write.settle(Verdict.WRITTEN)
            if refused:
                await self._explain(refused)
        except psycopg.errors.LockNotAvailable as error:
            left = _unsettled(writes)
            free = await self._without_locked(left)
            if len(free) < len(left):
                await self._write(free)
            else:  # somebody may be about to insert one of the rows
                await self._write_halves(left, error)
        except (*_UNSTORABLE, *_ROW_REFUSED) as error:
            await self._write_halves(_unsettled(writes), error)

    async def _write_halves(self, writes: Sequence[Write], error: Exception) -> None:
        """Write what failed as a whole; one that fails by itself is made smaller, or put off."""
        if len(writes) > 1:
            middle = len(writes) // 2
            await self._write(writes[:middle])
            await self._write(writes[middle:])
        elif writes and isinstance(error, _UNSTORABLE):
            await self._write_smallest(writes[0], error)
        elif writes:
            self._put_off(writes[0], str(error))

    async def _without_locked(self, writes: Sequence[Write]) -> list[Write]:
        """Put off the writes whose rows somebody has locked; the others."""
        connection = await self.connection()
        cursor = await connection.execute(_LOCKED, {"ids": [write.row_id for write in writes]})
        locked = {row[0] for row in await cursor.fetchall()}
        for write in writes:
            if write.row_id in locked:
                self._put_off(write, "somebody has locked the row")
        return [write for write in writes if write.row_id not in locked]

    def _put_off(self, write: Write, reason: str) -> None:
        if not write.alone:
            log.warning("write_put_off", row=write.row_id, reason=mask_secrets(reason.strip()))
        self.batch.remove(write)
        self._recorder.postpone(write)

    async def _update(self, writes: Sequence[Write]) -> set[str]:
        statement = _RELAXED_UPDATE if all(w.is_start for w in writes) else _DURABLE_UPDATE
        parameter = _encode([write.as_parameter() for write in writes])
        connection = await self.connection()
        failpoint("batch-sent")
        cursor = await connection.execute(statement, (parameter,))
        return {row[0] for row in await cursor.fetchall()}

    async def _write_smallest(self, write: Write, error: Exception) -> None:
        if write.is_smallest:
            write.settle(Verdict.UNSTORABLE)
            return
        log.error("unstorable_patch", row=write.row_id, reason=mask_secrets(str(error).strip()))
        write.is_smallest = True
        write.patch = _smallest_patch(write.patch)
        write.text = orjson.dumps(write.patch).decode()
        write.new_row = None if write.new_row is None else _smallest_row(write.new_row)
        await self._write([write])

    async def _explain(self, writes: Sequence[Write]) -> None:
        """Find out why rows were not written: each reason has its own way on."""
        connection = await self.connection()
        cursor = await connection.execute(_LOOK, ([write.row_id for write in writes],))
        rows = {row[0]: row[1:] for row in await cursor.fetchall()}
        again: list[Write] = []
        missing: list[Write] = []
        for write in writes:
            kind, queue, status, started_at = rows.get(write.row_id, (None, None, None, None))
            if kind is None and write.new_row:
                missing.append(write)
            elif kind is None:
                write.settle(Verdict.MISSING)
            elif kind != "object":
                log.error("row_is_not_an_object", row=write.row_id, kind=kind)
                write.settle(Verdict.MISSING)
            elif queue is not None and queue != write.queue:
                # Another queue's task has this id: this job's history gets a row of its own.
                write.row_id = f"{write.queue}:{write.row_id}"
                again.append(write)
            elif status == "cancelled" and write.patch.get("status") != "completed":
                write.settle(Verdict.CANCELLED)
            elif (write.since is not None and (started_at or "") > write.since) or (
                write.fence is not None and started_at != write.fence
            ):
                write.settle(Verdict.CONTESTED)
            elif not write.puzzled:  # the row may have changed between the two statements
                write.puzzled = True
                again.append(write)
            else:
                self._put_off(write, "PostgreSQL leaves the row as it is, a trigger or a policy")
        if missing:
            await self._insert(missing)
            again += missing
        if again:
            await self._write(again)

    async def _insert(self, writes: Sequence[Write]) -> None:
        """Create rows for jobs that have none; the write itself follows."""
        rows = [
            # Not by orjson at once: a payload may hold integers beyond its 64 bits.
            {"id": write.row_id, "data": orjson.Fragment(dump(dict(write.new_row())))}
            for write in writes
            if write.new_row
        ]
        connection = await self.connection()
        await connection.execute(_INSERT, (_encode(rows),))


def _unsettled(writes: Iterable[Write]) -> list[Write]:
    return [write for write in writes if not write.settled.done()]


def _encode(rows: Sequence[Mapping[str, Any]]) -> str:
    try:
        return orjson.dumps(rows).decode()
    except TypeError as error:  # which is how orjson refuses what it can't encode
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


def _smallest_row(new_row: Callable[[], Mapping[str, Any]]) -> Callable[[], Mapping[str, Any]]:
    return lambda: {**new_row(), "payload": {}}


def _is_refusal(reason: str) -> bool:
    return any(words in reason for words in _WORDS_OF_REFUSAL)
