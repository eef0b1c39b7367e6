"""The jobs and locks that BullMQ holds, read straight from Redis."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis

from chaos.effects import Key

FINISHED = ("completed", "failed")
UNFINISHED = ("active", "wait", "paused", "prioritized", "delayed", "waiting-children", "stalled")


@dataclass
class BullJob:
    """A job's hash, and whether it is in completed, in failed, in both or in neither."""

    states: list[str]
    fields: dict[str, str]

    @property
    def attempts(self) -> int:
        return int(self.fields.get("atm", 0))

    @property
    def return_value(self) -> Any:
        return json.loads(self.fields.get("returnvalue", "null"))

    @property
    def stack_traces(self) -> list[str]:
        traces: list[str] = json.loads(self.fields.get("stacktrace", "[]"))
        return traces


async def left_over(client: Redis, prefix: str, queues: Iterable[str]) -> dict[str, list[str]]:
    """Return the ids in each list and set where no job may stay, by the key's name."""
    left: dict[str, list[str]] = {}
    for queue in queues:
        for name in UNFINISHED:
            key = f"{prefix}:{queue}:{name}"
            if ids := await _members(client, key):
                left[key] = ids
    return left


async def locks(client: Redis, prefix: str) -> list[str]:
    """Return the keys of all locks."""
    return [key async for key in client.scan_iter(f"{prefix}:*:lock", count=1000)]


async def read_jobs(client: Redis, prefix: str, keys: Sequence[Key]) -> dict[Key, BullJob]:
    """Return these jobs as BullMQ has them; jobs that it does not know have no fields."""
    states: dict[Key, list[str]] = {key: [] for key in keys}
    for queue in {queue for queue, _ in keys}:
        for state in FINISHED:
            for job_id in await _members(client, f"{prefix}:{queue}:{state}"):
                states.setdefault((queue, job_id), []).append(state)
    fields: list[dict[str, str]] = []
    every = list(states)
    for start in range(0, len(every), 500):
        async with client.pipeline(transaction=False) as pipeline:
            for queue, job_id in every[start : start + 500]:
                pipeline.hgetall(f"{prefix}:{queue}:{job_id}")
            fields += await pipeline.execute()
    return {key: BullJob(states[key], found) for key, found in zip(every, fields, strict=True)}


async def _members(client: Redis, key: str) -> list[str]:
    found: Any = []
    match await client.type(key):
        case "list":
            found = await client.lrange(key, 0, -1)
        case "zset":
            found = await client.zrange(key, 0, -1)
        case "set":
            found = await client.smembers(key)
    # Older versions of BullMQ keep a marker in these lists.
    return [member for member in found if not member.startswith("0:")]
