"""Compare each row with what BullMQ holds of its job in Redis."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis

Row = Mapping[str, Any]

STATUS_OF = {
    "wait": "pending",
    "paused": "pending",
    "prioritized": "pending",
    "waiting-children": "pending",
    "active": "active",
    "delayed": "delayed",
    "completed": "completed",
    "failed": "failed",
}


@dataclass
class BullJob:
    """A job as BullMQ holds it.

    Attributes:
        states: the lists and sets that hold the job; exactly one in a sound queue.
        fields: its hash.
        locked: whether its lock exists.
    """

    states: list[str]
    fields: dict[str, str]
    locked: bool

    @property
    def status(self) -> str:
        """The API's status for its state; "" if it is in no state or in several."""
        return STATUS_OF[self.states[0]] if len(self.states) == 1 else ""


async def bull_jobs(client: Redis, prefix: str, queue: str) -> dict[str, BullJob]:
    """Return every job of a queue, by id."""
    base = f"{prefix}:{queue}:"
    jobs: dict[str, BullJob] = {}
    for state in STATUS_OF:
        key = base + state
        is_list = await client.type(key) == "list"
        ids: Any = await (client.lrange(key, 0, -1) if is_list else client.zrange(key, 0, -1))
        for job_id in ids:
            jobs.setdefault(job_id, BullJob([], {}, False)).states.append(state)
    async with client.pipeline(transaction=False) as pipeline:
        for job_id in jobs:
            pipeline.hgetall(base + job_id)
            pipeline.exists(f"{base}{job_id}:lock")
        found = await pipeline.execute() if jobs else []
    for job, fields, locked in zip(jobs.values(), found[::2], found[1::2], strict=True):
        job.fields, job.locked = fields, bool(locked)
    return jobs


def differences(rows: Mapping[str, Row], jobs: Mapping[str, BullJob]) -> list[str]:
    """Return how rows and jobs differ. A row has its job's id."""
    found = [f"{job_id} has no row" for job_id in jobs.keys() - rows.keys()]
    found += [f"{row_id} has no job" for row_id in rows.keys() - jobs.keys()]
    for job_id in jobs.keys() & rows.keys():
        found += [f"{job_id}: {what}" for what in _of_one(rows[job_id], jobs[job_id])]
    return found


def _of_one(row: Row, job: BullJob) -> Iterator[str]:
    if row["status"] != job.status:
        yield f"its row says {row['status']}, BullMQ {job.states}"
        return
    if job.locked != (job.status == "active"):
        yield f"{job.states}, and {'locked' if job.locked else 'not locked'}"
    made = int(job.fields.get("atm", 0))
    if row["attempts"] != made + (job.status == "active"):
        yield f"its row says {row['attempts']} attempts, BullMQ {made} made"
    if job.status == "completed":
        if row["result"] != json.loads(job.fields["returnvalue"]):
            yield f"its row's result is {row['result']}, BullMQ's {job.fields['returnvalue']}"
        if row["error"] is not None or row["failedAt"] is not None or not row["completedAt"]:
            yield "its row is not that of a completed job"
    if job.status == "failed":
        error = row["error"] or {}
        if error.get("reason") != job.fields["failedReason"]:
            yield f"its row's reason is {error.get('reason')}, BullMQ's {job.fields}"
        traces = json.loads(job.fields.get("stacktrace", "[]"))
        if error.get("stackTrace", error.get("reason")) != (traces or [None])[-1]:
            yield f"its row's stack trace is not BullMQ's last: {error} {traces[-1:]}"
        if row["result"] is not None or row["completedAt"] is not None or not row["failedAt"]:
            yield "its row is not that of a failed job"
