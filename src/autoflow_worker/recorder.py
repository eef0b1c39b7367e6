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
from collections.abc import Callable, Mapping, Sequence
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

START_PATIENCE: Final = 5.0
"""Seconds that a handler waits for its row to say `active`; then it starts and the row follows."""

RETRY_PAUSE: Final = 0.1
"""Seconds before the second retry of a failed batch (the first is at once); doubled from there."""

RETRY_PAUSE_MAX: Final = 2.0
"""Seconds between two retries, at most."""

LOCK_TIMEOUT: Final = "200ms"
"""How long a batch waits for somebody else's lock before it is split around the locked row."""

LOCKED_PAUSE: Final = 0.5
"""Seconds until a write whose row is locked by somebody else is tried again, by itself."""

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

# Errors that the content of a patch caused: the same statement can never succeed.
_UNSTORABLE: Final = (
    psycopg.DataError,
    psycopg.IntegrityError,
    psycopg.errors.ProgramLimitExceeded,
    psycopg.errors.StatementTooComplex,
    UnicodeError,
)

# The statement as a whole took too long; parts of it may not.
_TOO_SLOW: Final = (psycopg.errors.LockNotAvailable, psycopg.errors.QueryCanceled)

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
  AND (p.since IS NULL OR coalesce(t.data->>'startedAt', '') <= p.since)
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
        alone: its row is locked by somebody, so it must not hold up others.
    """

    __slots__ = (
        "alone",
        "created_at",
        "fence",
        "is_start",
        "new_row",
        "patch",
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
                await self._lanes[0].connection()
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
        self._wake_lanes()
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
        batch: dict[str, Write] = {}
        postponed: list[Write] = []
        while self._waiting and len(batch) < MAX_BATCH:
            write = self._waiting.popleft()
            if write.row_id in batch or write.row_id in busy or (write.alone and batch):
                postponed.append(write)
            else:
                batch[write.row_id] = write
                if write.alone:
                    break
        self._waiting.extendleft(reversed(postponed))
        return list(batch.values())

    def postpone(self, write: Write) -> None:
        """Try a write again in a while, by itself: somebody else holds its row."""
        write.alone = True
        self._postponed.add(write)
        asyncio.get_running_loop().call_later(LOCKED_PAUSE, self._resume, write)

    def _resume(self, write: Write) -> None:
        self._postponed.discard(write)
        if not write.settled.done():
            self._waiting.append(write)
            self._wake_lanes()

    def _wake_lanes(self) -> None:
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
        await connection.execute(_SESSION, prepare=False)
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
            with socket.socket(fileno=os.dup(self._connection.fileno())) as connected:
                with contextlib.suppress(OSError):
                    connected.shutdown(socket.SHUT_RDWR)
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

    async def _commit(self) -> None:
        """Write the batch, however often it takes."""
        pause = 0.0
        while left := [write for write in self.batch if not write.settled.done()]:
            try:
                await self._write(left)
            except (psycopg.Error, OSError) as error:
                await self._disconnect()
                self._recorder.note_outage(error)
                await asyncio.sleep(pause)
                pause = min(max(pause * 2, RETRY_PAUSE), RETRY_PAUSE_MAX)
            else:
                self._recorder.note_success()

    async def _write(self, writes: Sequence[Write]) -> None:
        """Write these; a bad one among them is found by halving, so the others are not held up."""
        try:
            written = await self._update(writes)
            failpoint("in-batch")
            refused = [write for write in writes if write.row_id not in written]
            for write in writes:
                if write.row_id in written:
                    write.settle(Verdict.WRITTEN)
            if refused:
                await self._explain(refused)
        except (*_UNSTORABLE, *_TOO_SLOW) as error:
            if len(writes) > 1:
                middle = len(writes) // 2
                await self._write(writes[:middle])
                await self._write(writes[middle:])
            elif isinstance(error, _TOO_SLOW):
                self.batch.remove(writes[0])
                self._recorder.postpone(writes[0])
            else:
                await self._write_smallest(writes[0], error)

    async def _update(self, writes: Sequence[Write]) -> set[str]:
        statement = _RELAXED_UPDATE if all(w.is_start for w in writes) else _DURABLE_UPDATE
        parameter = orjson.dumps([write.as_parameter() for write in writes])
        connection = await self.connection()
        failpoint("batch-sent")
        cursor = await connection.execute(statement, (parameter.decode(),))
        return {row[0] for row in await cursor.fetchall()}

    async def _write_smallest(self, write: Write, error: Exception) -> None:
        log.error("unstorable_patch", row=write.row_id, reason=mask_secrets(str(error).strip()))
        smaller = _smallest_patch(write.patch)
        if smaller == write.patch:
            write.settle(Verdict.UNSTORABLE)
            return
        write.patch, write.text = smaller, orjson.dumps(smaller).decode()
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
            else:  # the row changed between the two statements
                again.append(write)
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
        await connection.execute(_INSERT, (orjson.dumps(rows).decode(),))


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
    # libpq's errors while connecting carry no SQLSTATE, only the server's words.
    return "authentication failed" in reason or "does not exist" in reason
