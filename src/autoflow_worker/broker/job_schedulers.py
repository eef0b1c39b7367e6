"""Produce the next job of a job scheduler, when its latest one is claimed.

As `JobScheduler` of BullMQ 6.7 does in Node, and for legacy repeatable jobs (`add(..., {repeat})`)
as `Repeat` of 5.65 does; `JobScheduler` of the Python package has other rules for cron patterns.
"""

import asyncio
import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any, Final

from bullmq import Job, Worker
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError

from autoflow_worker.broker import cron
from autoflow_worker.broker.claim import Claim
from autoflow_worker.broker.client import PipelinedRedis
from autoflow_worker.broker.job_fields import is_utf8
from autoflow_worker.broker.script_guard import guarded
from autoflow_worker.broker.zones import zone_of
from autoflow_worker.clock import now_ms

RepeatStrategy = Callable[[int, dict[str, Any], str], Any]
"""BullMQ's `settings.repeatStrategy(millis, repeat_options, job_name)`, sync or async."""

# A legacy repeatable has its data in its jobs only, and the script that makes a scheduler's next
# job takes the data from the scheduler: 5.65 puts it there, too. `ic` says that it is a scheduler.
_KEEP_DATA: Final = """
do
  local scheduler = KEYS[1] .. ':' .. ARGV[2]
  if ARGV[3] ~= '{}' and redis.call('ZSCORE', KEYS[1], ARGV[2])
    and redis.call('HEXISTS', scheduler, 'ic') == 0
    and redis.call('HEXISTS', scheduler, 'data') == 0
  then redis.call('HSET', scheduler, 'data', ARGV[3]) end
end
"""

# BullMQ 5.65's `updateRepeatableJobMillis`: write the next time of the first of these keys that is
# known, and return that key.
_UPDATE_REPEATABLE: Final = """
for number = 2, #ARGV do
  if redis.call('ZSCORE', KEYS[1], ARGV[number]) then
    redis.call('ZADD', KEYS[1], ARGV[1], ARGV[number])
    return ARGV[number]
  end
end
return ''
"""

# The fields of a job scheduler that say when it produces a job.
_REPEAT: Final = ("every", "pattern", "tz", "limit", "offset", "startDate", "endDate")


class NotAdvancedError(Exception):
    """A job scheduler can't produce its next job: its options say no time."""

    def __init__(self, reason: str, pattern: object = None) -> None:
        super().__init__(reason)
        self.pattern = pattern


class JobSchedulers:
    """The job schedulers and legacy repeatables of one queue.

    Args:
        worker: bullmq's `Worker` of the queue.
        strategy: the task's own way to find the next time of a pattern; None for BullMQ's.

    It changes one of the worker's scripts, so it is made before the scripts are guarded.
    """

    def __init__(
        self, worker: Worker, redis: PipelinedRedis, strategy: RepeatStrategy | None
    ) -> None:
        self._worker = worker
        self._redis = redis
        self._strategy = strategy
        self._repeat: str = worker.keys["repeat"]
        commands = worker.scripts.commands
        update = _KEEP_DATA + commands["updateJobScheduler"].script
        commands["updateJobScheduler"] = redis.register_script(update)
        self._update_repeatable = redis.register_script(guarded(_UPDATE_REPEATABLE))

    async def advance(self, claim: Claim) -> None:
        """Produce the job that follows this one.

        It may be called again for a job: only the latest job of a scheduler has a successor.

        Raises:
            NotAdvancedError: the scheduler's options, or the task's strategy, give no time.
            redis.exceptions.ConnectionError: it may have been produced all the same.
        """
        key = claim.scheduler
        if key is None or not is_utf8(key):  # No producer makes a scheduler of such a name.
            return
        try:
            await self._advance(claim, key)
        except RedisConnectionError:
            raise
        except Exception as error:
            # Whatever producers left in the scheduler's keys, its job is sound.
            if not await self._is_latest(claim, key):
                return  # It has a successor already, or nothing follows it any more.
            if isinstance(error, NotAdvancedError):
                raise
            raise NotAdvancedError(f"{type(error).__name__}: {error}") from error

    async def _advance(self, claim: Claim, key: str) -> None:
        options = claim.job.opts
        if claim.malformed or not isinstance(options.get("repeat"), dict):
            options = await self._stored_options(key)
        if key.count(":") > 1 and not await self._is_scheduler(key):
            await self._advance_repeatable(claim, key, options)
        else:
            await self._advance_scheduler(claim, key, options)

    async def _is_scheduler(self, key: str) -> bool:
        """Tell a job scheduler from a legacy repeatable, as BullMQ 6.7 does."""
        return bool(await self._redis.hexists(f"{self._repeat}:{key}", "ic"))

    async def _is_latest(self, claim: Claim, key: str) -> bool:
        try:
            due = await self._redis.zscore(self._repeat, key)
        except ResponseError:  # The key holds something else, so there is no scheduler.
            return False
        if due is None:
            return False
        millis = int(due)
        return claim.id in (f"repeat:{key}:{millis}", _repeatable_id(claim, key, millis))

    async def _stored_options(self, key: str) -> dict[str, Any]:
        """Return the options of a scheduler's next job, where its latest job can't be read."""
        scheduler = await self._worker.jobScheduler.getScheduler(key) or {}
        repeat = {name: scheduler[name] for name in _REPEAT if scheduler.get(name) is not None}
        template = scheduler.get("template", {}).get("opts")
        options = template if isinstance(template, dict) else {}
        return {**options, "repeat": {**repeat, "count": scheduler.get("iterationCount", 0)}}

    # -- job schedulers --------------------------------------------------------------------------

    async def _advance_scheduler(self, claim: Claim, key: str, options: Mapping[str, Any]) -> None:
        """`JobScheduler.upsertJobScheduler` of BullMQ 6.7, as its worker calls it."""
        repeat = dict(options["repeat"])
        every, pattern = repeat.get("every"), repeat.get("pattern")
        if bool(pattern) == bool(every):
            raise NotAdvancedError("it needs either a pattern or every", pattern)
        now, count = now_ms(), _count(repeat)
        if count is None or _has_ended(repeat, now):
            return
        next_ms = None
        if pattern:
            earliest = max(now, options.get("prevMillis") or 0)
            next_ms = await self._next_ms(earliest, repeat, claim.job.name)
            if not next_ms:
                return
            next_ms = max(next_ms, earliest)
        # BullMQ's script sets the id and the delay, and the time of a scheduler with `every`.
        following = {
            **options,
            "delay": 0,
            "timestamp": now,
            "prevMillis": next_ms,
            "repeatJobKey": key,
            "repeat": {
                **{name: value for name, value in repeat.items() if name != "immediately"},
                "offset": repeat.get("offset") or None if every else None,
                "count": count,
                "startDate": _date_ms(repeat, "startDate"),
                "endDate": _date_ms(repeat, "endDate"),
            },
        }
        await self._worker.scripts.updateJobSchedulerNextMillis(
            key,
            "" if next_ms is None else next_ms,
            claim.fields.get("data", "{}"),
            following,
            claim.id,
        )

    # -- legacy repeatables ----------------------------------------------------------------------

    async def _advance_repeatable(self, claim: Claim, key: str, options: Mapping[str, Any]) -> None:
        """`Repeat.updateRepeatableJob` of BullMQ 5.65, as its worker calls it."""
        repeat = dict(options["repeat"])
        repeat.setdefault("pattern", repeat.pop("cron", None))
        now, count = now_ms(), _count(repeat)
        if count is None or _has_ended(repeat, now):
            return
        earliest = max(now, options.get("prevMillis") or 0)
        name = claim.job.name
        next_ms = await self._next_ms(earliest, repeat, name)
        if not next_ms:
            return
        new_key = repeat.get("key") or _md5(_concatenated(name, repeat))
        found = await self._update_repeatable(keys=[self._repeat], args=[next_ms, new_key, key])
        if not found:  # It has been removed.
            return
        job_id = _repeatable_id(claim, found, next_ms)
        following = {
            **{name: value for name, value in options.items() if name != "repeatJobKey"},
            "jobId": job_id,
            "delay": max(0, next_ms + (repeat.get("offset") or 0) - now),
            "timestamp": now,
            "prevMillis": next_ms,
            "repeat": {
                **{name: value for name, value in repeat.items() if name != "immediately"},
                "count": count,
            },
        }
        job = Job(self._worker, name, claim.job.data, following, job_id)
        job.repeatJobKey = found
        await self._worker.scripts.addJob(job)

    # -- the next time ---------------------------------------------------------------------------

    async def _next_ms(self, after_ms: int, repeat: dict[str, Any], name: str) -> int | None:
        """Return the next time in epoch ms; None or 0 if there is none."""
        try:
            if self._strategy is None:
                return _default_strategy(after_ms, repeat)
            found = self._strategy(after_ms, repeat, name)
            if inspect.isawaitable(found):
                found = await found
            return None if found is None else _whole(found)
        except BaseException as error:
            slot = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and slot and slot.cancelling():
                raise
            # A strategy is a task author's code: it may raise `SystemExit`.
            reason = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
            raise NotAdvancedError(reason, repeat.get("pattern")) from error


def _whole(found: object) -> int:
    """Check what a task's strategy returned."""
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise TypeError(f"the repeat strategy returned {type(found).__name__}, not a number")
    return int(found)


def _default_strategy(after_ms: int, repeat: Mapping[str, Any]) -> int | None:
    """BullMQ's `getNextMillis`."""
    every = repeat.get("every")
    if not every:
        return cron.next_ms(after_ms, repeat)
    if repeat.get("pattern"):
        raise ValueError("both pattern and every are given")
    return int(after_ms // every * every + every)


def _count(repeat: Mapping[str, Any]) -> int | None:
    """Return the number of the next iteration, or None if its limit is reached."""
    count = int(repeat.get("count") or 0) + 1
    limit = repeat.get("limit")
    return None if isinstance(limit, int | float) and count > limit else count


def _has_ended(repeat: Mapping[str, Any], now: int) -> bool:
    end = _date_ms(repeat, "endDate")
    return end is not None and now > end


def _date_ms(repeat: Mapping[str, Any], name: str) -> int | None:
    try:
        return cron.date_ms(repeat.get(name), name, zone_of(None))
    except ValueError:  # The strategy says so, if it needs the date.
        return None


# -- the keys of legacy repeatables ----------------------------------------------------------------


def _repeatable_id(claim: Claim, key: str, millis: int) -> str:
    """Return the id of a repeatable's job that is due then; `getRepeatJobKey` of BullMQ 5.65."""
    if key.count(":") > 1:
        data = claim.job.data
        own_id = (isinstance(data, dict) and data.get("id")) or ""
        text = own_id if isinstance(own_id, str) else json.dumps(own_id)
        key = _md5(f"{claim.job.name}{text}{_md5(key)}")
    return f"repeat:{key}:{millis}"


def _concatenated(name: str, repeat: Mapping[str, Any]) -> str:
    end = _date_ms(repeat, "endDate")
    parts = [
        *(name, repeat.get("jobId") or "", "" if end is None else end, repeat.get("tz") or ""),
        repeat.get("pattern") or repeat.get("every"),
    ]
    return ":".join(map(str, parts))


def _md5(text: str) -> str:
    digest = hashlib.md5(text.encode("utf-8", "surrogateescape"), usedforsecurity=False)
    return digest.hexdigest()
