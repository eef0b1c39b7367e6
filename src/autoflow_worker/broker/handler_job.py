"""``HandlerJob``: bullmq's ``Job`` with the methods of Node's that it lacks.

Names, arguments and results are those of BullMQ 6.7 for Node, and of 5.65 where 6 has dropped a
method; `tasks/job_handle` describes them. The scripts are BullMQ's own: the Python package has
their files, and calls none of them.
"""

import asyncio
import json
from collections.abc import Mapping
from functools import cache
from typing import Any, Final, Protocol, cast

from bullmq import Job, Worker
from bullmq.redis_connection import loadScript

from autoflow_worker.broker.client import PipelinedRedis
from autoflow_worker.broker.script_guard import guarded

MAX_SAFE_INTEGER: Final = 2**53 - 1
"""What Node writes as the number of jobs started, so that a rate limit is exceeded."""

# BullMQ puts no marker for a job that it moves to `prioritized`, so no idle worker would wake.
_WAKE: Final = """
if (tonumber(redis.call('HGET', ARGV[3], 'priority')) or 0) > 0 then
  redis.call('ZADD', KEYS[8], 0, '0')
end
"""
_PAGE: Final = {"cursor": 0, "count": 20}
_KINDS: Final = ("processed", "unprocessed", "ignored", "failed")


class Locked(Protocol):
    """What knows how long the job's lock is surely held.

    Attributes:
        locked_until: event loop time before which the lock can't have expired.
    """

    locked_until: float


def job_from(queue: Worker, fields: Mapping[str, str], job_id: str) -> "HandlerJob":
    """Make a job from its hash in Redis; raises whatever `Job.fromJSON` raises."""
    job = Job.fromJSON(queue, fields, job_id)
    # `fromJSON` always makes a plain `Job`; the two have the same attributes.
    job.__class__ = HandlerJob
    if "pb" in fields:
        job.processedBy = fields["pb"]
    return cast(HandlerJob, job)


class HandlerJob(Job):  # type: ignore[misc]  # bullmq has no types
    """What a handler gets as `ctx.job`.

    Attributes:
        lock: is told of `extendLock`; None for a job that no handler has.
        processedBy: the name of the worker that claimed it last; None if that has none.
    """

    lock: Locked | None = None
    processedBy: str | None = None
    parentKey: str | None

    @property
    def queueName(self) -> str:
        return str(self.queue.name)

    @property
    def prefix(self) -> str:
        return str(self.queue.prefix)

    @property
    def deduplicationId(self) -> str | None:
        return cast("str | None", self.deduplication_id)

    @property
    def _redis(self) -> PipelinedRedis:
        return cast(PipelinedRedis, self.queue.client)

    def _key(self, suffix: str = "") -> str:
        return f"{self.queue.keys['']}{self.id}{suffix}"

    async def _run(
        self, script: str, keys: list[str], args: list[Any], before: str = "", **about: Any
    ) -> Any:
        """Run one of BullMQ's scripts that the Python package does not register.

        Args:
            script: the name of its file.
            before: Lua of our own that runs first.
            about: what the words of a refusal name.

        Raises:
            TypeError: the script refuses; the words are BullMQ's.
        """
        reply = await self._redis.register_script(_script(script, before))(keys=keys, args=args)
        if isinstance(reply, int) and reply < 0:
            command = script.partition("-")[0]
            told = {"code": reply, "jobId": self.id, "command": command, **about}
            raise self.queue.scripts.finishedErrors(told)
        return reply

    async def log(self, logRow: str) -> int:
        """As `Job.log`, in one round trip, and refused for a job that is gone, as in Node."""
        args = [self.id, logRow, self.opts.get("keepLogs") or ""]
        return int(await self._run("addLog-2", [self._key(), self._key(":logs")], args))

    async def clearLogs(self, keepLogs: int = 0) -> None:
        if keepLogs:
            await self._redis.ltrim(self._key(":logs"), -keepLogs, -1)
        else:
            await self._redis.delete(self._key(":logs"))

    # -- moves -----------------------------------------------------------------------------------

    async def moveToWait(self, token: str) -> int:
        keys = self.queue.keys
        names = ("active", "wait", "stalled", "paused", "meta", "limiter", "prioritized")
        return int(
            await self._run(
                "moveJobFromActiveToWait-9",
                [keys[name] for name in (*names, "marker", "events")],
                [self.id, token, self._key()],
                before=_WAKE,
                state="active",
            )
        )

    async def moveToWaitingChildren(
        self, token: str, opts: Mapping[str, Any] | None = None
    ) -> bool:
        return bool(await super().moveToWaitingChildren(token, opts or {}))

    async def rateLimit(self, expireTimeMs: int) -> None:
        await self._redis.set(self.queue.keys["limiter"], MAX_SAFE_INTEGER, px=int(expireTimeMs))

    async def extendLock(self, token: str, duration: int) -> int:
        until = asyncio.get_running_loop().time() + duration / 1000
        if self.lock is not None:
            # The reply may be lost, and the lock may be held for a shorter time from now on.
            self.lock.locked_until = min(self.lock.locked_until, until)
        extended = int(await self.queue.scripts.extendLock(self.id, token, duration))
        if extended and self.lock is not None:
            self.lock.locked_until = until
        return extended

    def discard(self) -> None:
        self.discarded = True

    async def removeDeduplicationKey(self) -> bool:
        if not self.deduplication_id:
            return False
        key = f"{self.queue.keys['']}de:{self.deduplication_id}"
        return int(await self._run("removeDeduplicationKey-1", [key], [self.id])) > 0

    # -- children --------------------------------------------------------------------------------

    async def getIgnoredChildrenFailures(self) -> dict[str, str]:
        return cast("dict[str, str]", await self._redis.hgetall(self._key(":failed")))

    async def getFailedChildrenValues(self) -> dict[str, str]:
        return await self.getIgnoredChildrenFailures()

    async def getDependencies(self, opts: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """As in Node. There, a page of `failed` after the first is always empty, and not here."""
        pages = {kind: {**_PAGE, **opts[kind]} for kind in _KINDS if opts and _asks(opts, kind)}
        if not pages:
            processed, unprocessed, ignored, failed = await asyncio.gather(
                self._redis.hgetall(self._key(":processed")),
                self._redis.smembers(self._key(":dependencies")),
                self._redis.hgetall(self._key(":failed")),
                self._redis.zrange(self._key(":unsuccessful"), 0, -1),
            )
            return {
                "processed": _parsed(processed),
                "unprocessed": list(unprocessed),
                "failed": failed,
                "ignored": ignored,
            }
        found = await asyncio.gather(*(self._page(kind, **page) for kind, page in pages.items()))
        children: dict[str, Any] = {}
        for kind, (cursor, values) in zip(pages, found, strict=True):
            children[kind] = _parsed(values) if kind == "processed" else values
            children[f"next{kind.capitalize()}Cursor"] = int(cursor)
        return children

    async def _page(self, kind: str, cursor: int, count: int) -> tuple[int, Any]:
        """Return the next cursor, and the children."""
        if kind == "failed":
            end = cursor + count
            return end, await self._redis.zrange(self._key(":unsuccessful"), cursor, end - 1)
        if kind == "unprocessed":
            return await self._redis.sscan(self._key(":dependencies"), cursor, count=count)
        key = self._key(":processed" if kind == "processed" else ":failed")
        return await self._redis.hscan(key, cursor, count=count)

    async def getDependenciesCount(self, opts: Mapping[str, Any] | None = None) -> dict[str, int]:
        kinds = [kind for kind, asked in (opts or {}).items() if asked] or list(_KINDS)
        suffixes = (":processed", ":dependencies", ":failed", ":unsuccessful")
        keys = [self._key(suffix) for suffix in suffixes]
        counts = await self._run("getDependencyCounts-4", keys, kinds)
        return dict(zip(kinds, counts, strict=True))

    async def removeUnprocessedChildren(self) -> None:
        keys = [self._key(), self.queue.keys["meta"]]
        await self._run("removeUnprocessedChildren-2", keys, [self.queue.keys[""], self.id])

    async def removeChildDependency(self) -> bool:
        parent = self.parentKey
        args = [self._key(), parent or ""]
        keys = [self.queue.keys[""]]
        if await self._run("removeChildDependency-1", keys, args, parentKey=parent):
            return False
        self.parent, self.parentKey = None, None
        return True


@cache
def _script(name: str, before: str) -> str:
    return guarded(before + loadScript(f"{name}.lua"))


def _asks(opts: Mapping[str, Any], kind: str) -> bool:
    """Whether JavaScript takes an option as given; an empty object is."""
    return opts.get(kind, False) not in (None, False)


def _parsed(values: Mapping[Any, Any]) -> dict[str, Any]:
    return {key: json.loads(value) for key, value in values.items()}
