"""Writes for a recorder, and a spy on the statements that it sends."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import quote

from autoflow_worker.recording import patches
from autoflow_worker.recording.recorder import StatusRecorder
from autoflow_worker.recording.write import NewRow, Verdict, Write
from tests.support.database import Database

QUEUE = "a-queue"
NOON = 1_767_355_200_000  # 2026-01-02T12:00:00Z

# What was written, in order, by which transaction, and how durable that was. `hold` and `fail` make
# one row's update take its time, or fail so many times; a sequence is not rolled back.
SPY = """
CREATE SEQUENCE failures;
CREATE TABLE written (
  number serial, id text, status text, durable text, transaction bigint DEFAULT txid_current());
CREATE FUNCTION spy() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
  orders jsonb := OLD.data->'payload';
BEGIN
  IF orders ? 'hold' AND nextval('failures') <= (orders->>'times')::int THEN
    PERFORM pg_sleep((orders->>'hold')::float);
  END IF;
  IF orders ? 'fail' AND nextval('failures') <= (orders->>'times')::int THEN
    RAISE EXCEPTION 'as ordered' USING ERRCODE = orders->>'fail';
  END IF;
  INSERT INTO written (id, status, durable)
  VALUES (NEW.id, NEW.data->>'status', current_setting('synchronous_commit'));
  RETURN NEW;
END $$;
CREATE TRIGGER spy BEFORE UPDATE ON tasks FOR EACH ROW EXECUTE FUNCTION spy();
"""


def active(attempt: int = 1, at: int = NOON) -> dict[str, Any]:
    return patches.active_patch(now_ms=at, attempt=attempt)


def completed(output: object = None) -> dict[str, Any]:
    result = patches.success_result(output, duration_ms=7)
    return patches.completed_patch(now_ms=NOON, result=result)


def failed(reason: str = "no reason") -> dict[str, Any]:
    error = patches.error_record(reason, now_ms=NOON)
    return patches.failed_patch(now_ms=NOON, attempt=1, error=error)


def write(row_id: str, patch: Mapping[str, Any], text: str | None = None, **guards: Any) -> Write:
    queue = guards.pop("queue", QUEUE)
    return Write(row_id, queue, patch, text or patches.encode(dict(patch)), **guards)


def new(row: Mapping[str, Any]) -> NewRow:
    return NewRow(patches.encode(dict(row)), patches.encode({**row, "payload": {}}))


@asynccontextmanager
async def recording(url: str, connections: int = 1) -> AsyncIterator[StatusRecorder]:
    opened = StatusRecorder(url, lanes=connections)
    await opened.open(10)
    try:
        yield opened
    finally:
        await opened.close(60)


async def settled(*writes: Write) -> list[Verdict]:
    async with asyncio.timeout(150):
        await asyncio.gather(*(write.ready for write in writes))
        return list(await asyncio.gather(*(write.settled for write in writes)))


async def submit(opened: StatusRecorder, *writes: Write) -> list[Verdict]:
    return await settled(*(opened.submit(write) for write in writes))


async def spied(db: Database, what: str) -> list[Any]:
    return [row[0] for row in await db.fetch(f"SELECT {what} FROM written ORDER BY number")]


async def transactions(db: Database) -> int:
    """How many statements wrote rows."""
    return len(set(await spied(db, "transaction")))


def with_settings(url: str, **settings: str) -> str:
    """A URL whose sessions have these settings of PostgreSQL."""
    options = " ".join(f"-c {name}={value}" for name, value in settings.items())
    return f"{url}?options={quote(options)}"


def ids(count: int) -> list[str]:
    return [f"task-{number}" for number in range(count)]


async def insert_slow(db: Database) -> str:
    """A row whose first update takes half a second."""
    return await db.insert_task(QUEUE, {"hold": 0.5, "times": 1})


async def insert_many(db: Database, count: int) -> list[str]:
    await db.insert_tasks(QUEUE, {task_id: {} for task_id in ids(count)})
    return ids(count)
