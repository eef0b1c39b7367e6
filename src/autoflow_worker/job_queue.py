"""One BullMQ queue, as a worker sees it: claim jobs, keep their locks, acknowledge them.

The only module that drives `bullmq.Worker`. Its Lua scripts, `Job` and `JobScheduler` are used as
they are; its own loop is not (docs/internals.md lists why). A `Worker` without a processor starts
nothing: the caller decides when to fetch, and `fetch_next` lets an acknowledgement bring the next
job in the same round trip.
"""

import asyncio
import base64
import enum
import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from bullmq import Job, Worker
from bullmq.error_code import ErrorCode
from bullmq.scripts import raw2NextJobData
from redis.exceptions import ResponseError

from autoflow_worker.completion import CompletionArguments
from autoflow_worker.redis_channel import REPLY_PATIENCE, Channel
from autoflow_worker.redis_client import PipelinedRedis
from autoflow_worker.storable import dump

MAX_STACKTRACES: Final = 20
"""Stack traces kept on a job, at most; the option `stackTraceLimit` may ask for fewer."""

# Is the job still ours? A lock that has expired is taken again if nobody has claimed the job since:
# `ats` counts the claims. Otherwise a pause of Redis would run again whatever ran then.
_HOLD: Final = """
local lock = redis.call('GET', KEYS[1])
if lock and lock ~= ARGV[1] then return 'lost' end
if not lock then
  if redis.call('EXISTS', KEYS[2]) == 0 then return 'gone' end
  if redis.call('HGET', KEYS[2], 'ats') ~= ARGV[3] then return 'lost' end
  if not redis.call('LPOS', KEYS[3], ARGV[2]) then return 'lost' end
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[4])
redis.call('SREM', KEYS[4], ARGV[2])
return 'ours'
"""

# Jobs in `active` whose lock begins with ARGV[1]: claimed by us, whatever became of the reply.
_HELD: Final = """
local held = {}
for _, id in ipairs(redis.call('LRANGE', KEYS[1], 0, -1)) do
  local lock = redis.call('GET', ARGV[2] .. id .. ':lock')
  if lock and string.sub(lock, 1, #ARGV[1]) == ARGV[1] then
    local fields = redis.pcall('HGETALL', ARGV[2] .. id)
    held[#held + 1] = {id, lock, fields.err and {} or fields}
  end
end
return held
"""

# The last resort for a job on which BullMQ's own script breaks: take it out of `active`, into
# `failed`, with its reason, whatever its other fields hold, and be it no hash at all.
_BURY: Final = """
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end
redis.call('SREM', KEYS[4], ARGV[2])
redis.call('LREM', KEYS[3], 0, ARGV[2])
redis.call('ZADD', KEYS[5], ARGV[4], ARGV[2])
redis.pcall('HSET', KEYS[2], 'failedReason', ARGV[3], 'finishedOn', ARGV[4])
redis.pcall('HDEL', KEYS[2], 'defa')
if type(redis.pcall('HINCRBY', KEYS[2], 'atm', 1)) == 'table' then
  redis.pcall('HSET', KEYS[2], 'atm', 1)
end
redis.call('XADD', KEYS[6], '*', 'event', 'failed', 'jobId', ARGV[2], 'failedReason', ARGV[3],
  'prev', 'active')
return 1
"""

_PUT_MARKER: Final = """
local left = redis.call('LLEN', KEYS[2]) + redis.call('ZCARD', KEYS[3])
if left + redis.call('ZCARD', KEYS[4]) > 0 then
  redis.call('ZADD', KEYS[1], 0, '0')
end
"""

# How a job scheduler repeats.
_REPEAT: Final = ("every", "pattern", "tz", "limit", "offset", "startDate", "endDate")

# Numbers as JavaScript prints them, other than plain digits.
_NUMBER: Final = re.compile(r"-?[0-9]{1,300}(\.[0-9]{1,300})?(e\+[0-9]{1,2})?")

_LOST: Final = frozenset(
    {
        ErrorCode.JobNotExist.value,
        ErrorCode.JobLockNotExist.value,
        ErrorCode.JobNotInState.value,
        ErrorCode.JobLockMismatch.value,
    }
)


class Hold(enum.Enum):
    """Whose a job is that was claimed here."""

    OURS = "ours"
    LOST = "lost"  # finished, moved, or claimed by another worker
    GONE = "gone"  # Redis knows it no more, so nobody else will ever tell its end


class LockLostError(Exception):
    """The job is not this worker's any more."""


class ChildrenLeftError(Exception):
    """The job can't be completed: it has children that are unfinished or have failed."""


class MalformedJobError(Exception):
    """BullMQ's script can't work with what the job's fields hold."""


@dataclass(slots=True, eq=False)
class Claim:
    """A job that this worker holds.

    Attributes:
        job: bullmq's `Job`; of a malformed one, only what could be read.
        token: what the lock in Redis holds.
        locked_until: event loop time up to which the lock is surely ours.
        malformed: why the job's fields could not be read; None as a rule.
    """

    job: Job
    token: str
    locked_until: float
    malformed: str | None = None

    @property
    def id(self) -> str:
        return str(self.job.id)

    @property
    def attempt(self) -> int:
        """The number of this attempt, from 1; a counter that is none counts from there."""
        return min(max(int(self.job.attemptsMade), 0), 2**53 - 2) + 1

    @property
    def claimed_ms(self) -> int:
        """When it was claimed, in epoch ms by the claimer's clock; BullMQ's `processedOn`."""
        return int(self.job.processedOn)

    @property
    def max_attempts(self) -> int:
        return int(self.job.attempts)


@dataclass(frozen=True, slots=True)
class Reply:
    """What a fetch, or an acknowledgement that fetched, brought.

    Attributes:
        claim: the next job, if there was one.
        fetched: whether the queue was asked for one, so that the rest says something.
        limited_ms: the rate limit ends in so many ms; 0: there is none.
        delayed_until: epoch ms at which the next delayed job is due; 0: there is none.
    """

    claim: Claim | None = None
    fetched: bool = False
    limited_ms: int = 0
    delayed_until: int = 0


class JobQueue:
    """The queue's operations, each of them one round trip.

    Args:
        name: the queue.
        redis: the shared client; the caller closes it.
        prefix: BullMQ's key prefix.
        options: BullMQ worker options.
    """

    def __init__(
        self, name: str, redis: PipelinedRedis, prefix: str, options: Mapping[str, Any]
    ) -> None:
        self.name = name
        self._redis = redis
        self._prefix = prefix
        self._options = options
        self._worker = Worker(name, None, {**options, "connection": redis, "prefix": prefix})
        self._base = str(self._worker.keys[""])
        self._completion_arguments = CompletionArguments(self._worker.keys, self._worker.opts)
        self._blocking: Channel | None = None
        self._hold = redis.register_script(_HOLD)
        self._held = redis.register_script(_HELD)
        self._bury = redis.register_script(_BURY)
        self._put_marker = redis.register_script(_PUT_MARKER)

    async def open(self, timeout: float) -> None:
        """Open the queue's own connection, named so that Node's `getWorkers()` sees the worker.

        Raises:
            RedisUnavailableError: Redis was not reached within `timeout` seconds.
        """
        # Node looks for "<prefix>:<base64 of the queue>", with ":w:<name>" for a named worker.
        client_name = f"{self._prefix}:{base64.b64encode(self.name.encode()).decode()}"
        if "name" in self._options:
            client_name += f":w:{self._options['name']}"
        self._blocking = await self._redis.open_blocking_channel(client_name, timeout)

    @property
    def lock_ms(self) -> int:
        return int(self._worker.opts["lockDuration"])

    # -- fetching --------------------------------------------------------------------------------

    async def fetch(self, token: str) -> Reply:
        """Claim the next job, if there is one.

        Raises:
            redis.exceptions.ConnectionError: perhaps claimed all the same; ask `held`.
        """
        asked_at = self._now()
        data = await self._worker.scripts.moveToActive(token, self._worker.opts)
        return self._read(data, token, asked_at)

    async def wait_for_marker(self, seconds: float, wake: asyncio.Event) -> bool:
        """Block until BullMQ's marker says that there is work.

        Args:
            seconds: how long, at most.
            wake: ends the wait early. CLIENT UNBLOCK lets the server itself say whether a marker
                was taken in that instant; just dropping the wait could lose one.

        Returns:
            Whether a marker was taken. Whoever took one has to fetch, or to put it back.
        """
        assert self._blocking is not None, "open() comes first"
        command = ("BZPOPMIN", self._worker.keys["marker"], round(seconds, 3))
        patience = seconds + REPLY_PATIENCE
        reading = asyncio.ensure_future(self._blocking.execute(command, patience=patience))
        waking = asyncio.ensure_future(wake.wait())
        try:
            await asyncio.wait({reading, waking}, return_when=asyncio.FIRST_COMPLETED)
            while not reading.done():
                # Repeated, because it may overtake the blocking command on its way to the server.
                await self._redis.execute_command("CLIENT UNBLOCK", self._blocking.client_id)
                await asyncio.wait({reading}, timeout=0.02)
            return reading.result() is not None
        finally:
            waking.cancel()
            reading.cancel()

    async def put_marker_back(self) -> None:
        """Wake another worker, if there is work that a marker taken here was meant for."""
        keys = self._worker.keys
        await self._put_marker(
            keys=[keys[name] for name in ("marker", "wait", "prioritized", "delayed")]
        )

    async def held(self, token_prefix: str) -> list[Claim]:
        """The active jobs whose lock was taken with such a token, whatever became of the reply."""
        asked_at = self._now()
        active = self._worker.keys["active"]
        found = await self._held(keys=[active], args=[token_prefix, self._base])
        return [
            self._claim(dict(zip(fields[::2], fields[1::2], strict=True)), job_id, lock, asked_at)
            for job_id, lock, fields in found
        ]

    def _read(self, data: Sequence[Any], token: str, asked_at: float) -> Reply:
        fields, job_id, limited_ms, delayed_until = data
        claim = self._claim(fields, job_id, token, asked_at) if fields else None
        return Reply(claim, True, int(limited_ms or 0), int(delayed_until or 0))

    def _claim(self, fields: Mapping[str, str], job_id: str, token: str, asked_at: float) -> Claim:
        malformed = None
        try:
            job = Job.fromJSON(self._worker, _with_whole_numbers(fields), job_id)
            _check_fields(fields, job)
        except MalformedJobError as error:
            malformed = f"the job can't be read: {error}"
            job = self._stand_in(fields, job_id)
        except Exception as error:
            # Whatever the fields hold, the job is claimed: it has to end, and in words.
            malformed = f"the job can't be read: {type(error).__name__}: {error}"
            job = self._stand_in(fields, job_id)
        job.token = token
        return Claim(job, token, asked_at + self.lock_ms / 1000, malformed)

    def _stand_in(self, fields: Mapping[str, str], job_id: str) -> Job:
        job = Job(self._worker, fields.get("name") or self.name, {}, {"attempts": 1}, job_id)
        job.attemptsMade = _whole(fields.get("atm"))
        job.attemptsStarted = _whole(fields.get("ats"))
        job.repeatJobKey = fields.get("rjk")
        job.timestamp = _whole(fields.get("timestamp"))
        return job

    async def advance_scheduler(self, claim: Claim) -> None:
        """Let the job scheduler that produced this job produce its next one.

        May be repeated: BullMQ checks that this job is the scheduler's latest.
        """
        job, options = claim.job, claim.job.opts
        if claim.malformed:
            options = await self._options_of_scheduler(job.repeatJobKey)
        await self._worker.jobScheduler.upsertJobScheduler(
            job.repeatJobKey,
            options.get("repeat"),
            job.name,
            job.data,
            options,
            override=False,
            producer_id=job.id,
        )

    async def _options_of_scheduler(self, name: str) -> dict[str, Any]:
        """The options of a scheduler's next job, where those of its latest can't be read."""
        scheduler = await self._worker.jobScheduler.getScheduler(name) or {}
        repeat = {option: scheduler[option] for option in _REPEAT if option in scheduler}
        template = scheduler.get("template", {}).get("opts")
        options = template if isinstance(template, dict) else {}
        return {**options, "repeat": {**repeat, "count": scheduler.get("iterationCount", 0)}}

    # -- locks -----------------------------------------------------------------------------------

    async def extend(self, claims: Sequence[Claim]) -> None:
        """Renew the locks of these jobs.

        A lock that is lost keeps its `locked_until`, so that its loss is noticed then.
        """
        until = self._now() + self.lock_ms / 1000
        # BullMQ packs ids as UTF-8, and would refuse all of them for one that is not.
        ids = {claim.id: claim.token for claim in claims if _is_utf8(claim.id)}
        failed: set[str] = set()
        if ids:
            failed.update(
                await self._worker.scripts.extendJobLocks([*ids], [*ids.values()], self.lock_ms)
            )
        for claim in claims:
            if claim.id in ids and claim.id not in failed:
                claim.locked_until = until
            else:
                await self.holds(claim)

    async def holds(self, claim: Claim) -> Hold:
        """Whose the job is now; an expired lock that nobody wanted is taken again."""
        until = self._now() + self.lock_ms / 1000
        job_key, keys = self._base + claim.id, self._worker.keys
        answer = await self._hold(
            keys=[job_key + ":lock", job_key, keys["active"], keys["stalled"]],
            args=[claim.token, claim.id, claim.job.attemptsStarted, self.lock_ms],
        )
        if answer == Hold.OURS.value:
            claim.locked_until = until
        return Hold(answer)

    async def is_finished(self, claim: Claim) -> bool:
        """Whether the job is in completed or failed."""
        return await self._worker.scripts.getState(claim.id) in ("completed", "failed")

    async def due_at(self, claim: Claim) -> int | None:
        """When a delayed job is due, in epoch ms; None if it is not delayed."""
        score = await self._redis.zscore(self._worker.keys["delayed"], claim.id)
        return None if score is None else int(score) // 0x1000  # BullMQ adds a counter's 12 bits

    async def connected(self) -> None:
        """Wait until Redis is there, however long it takes."""
        await self._redis.connected()

    @property
    def up_since(self) -> float:
        """Event loop time from which Redis was there; -inf: always; inf: it is not."""
        return self._redis.restored_at if self._redis.is_connected else math.inf

    async def check_stalled(self) -> list[str]:
        """Put back what a dead worker left in `active`; the ids of these jobs."""
        options = self._worker.opts
        stalled = await self._worker.scripts.moveStalledJobsToWait(
            options["maxStalledCount"], options["stalledInterval"]
        )
        return list(stalled)

    # -- acknowledging ---------------------------------------------------------------------------
    #
    # Each of these raises LockLostError if the job is not ours any more, MalformedJobError if
    # BullMQ's script breaks on the job, and redis-py's ConnectionError if the reply was lost: then
    # nobody knows whether it was done, and `holds` tells.

    async def complete(self, claim: Claim, value: Any, *, fetch_next: bool) -> Reply:
        """Move the job to completed.

        Args:
            value: the return value, storable as it is.

        Raises:
            ChildrenLeftError: it has unfinished or failed children, so BullMQ refuses.
        """
        keep = self._keep(claim, "removeOnComplete")
        keys, args = self._completion_arguments(
            claim.job,
            dump(value),
            keep,
            token=claim.token,
            fetch_next=fetch_next,
            now_ms=_now_ms(),
        )
        return await self._acknowledge("moveToFinished", keys, args, claim)

    async def fail(
        self, claim: Claim, reason: str, stack_trace: str | None, *, fetch_next: bool
    ) -> Reply:
        """Move the job to failed, for good."""
        keep = self._keep(claim, "removeOnFail")
        fields = _failure_fields(claim.job, reason, stack_trace)
        keys, args = self._worker.scripts.moveToFailedArgs(
            claim.job, reason, keep, claim.token, fetch_next, fields
        )
        return await self._acknowledge("moveToFinished", keys, args, claim)

    async def delay(
        self,
        claim: Claim,
        now_ms: int,
        delay_ms: int,
        reason: str,
        stack_trace: str | None,
        *,
        fetch_next: bool,
    ) -> Reply:
        """Move the job to delayed: it failed, and its next attempt is due after the backoff."""
        options = {
            "fieldsToUpdate": _failure_fields(claim.job, reason, stack_trace),
            "fetchNext": fetch_next,
            "workerOpts": self._worker.opts,
        }
        keys, args = self._worker.scripts.moveToDelayedArgs(
            claim.id, now_ms, claim.token, delay_ms, options
        )
        return await self._acknowledge("moveToDelayed", keys, args, claim)

    async def retry(
        self,
        claim: Claim,
        reason: str,
        stack_trace: str | None,
        *,
        fetch_next: bool,  # noqa: ARG002 - BullMQ's script for this fetches nothing
    ) -> Reply:
        """Put the job back to be run again at once: it failed."""
        options = {"fieldsToUpdate": _failure_fields(claim.job, reason, stack_trace)}
        keys, args = self._worker.scripts.retryJobArgs(
            claim.id, bool(claim.job.opts.get("lifo")), claim.token, options
        )
        return await self._acknowledge("retryJob", keys, args, claim)

    async def hand_back(self, claim: Claim) -> None:
        """Give the job back to be run again at once, without using up its attempt."""
        keys, args = self._worker.scripts.moveToDelayedArgs(
            claim.id, _now_ms(), claim.token, 0, {"skipAttempt": True}
        )
        await self._acknowledge("moveToDelayed", keys, args, claim)

    async def bury(self, claim: Claim, reason: str) -> None:
        """Move a job to failed on which BullMQ's own script breaks."""
        job_key, keys = self._base + claim.id, self._worker.keys
        names = ("active", "stalled", "failed", "events")
        await self._bury(
            keys=[job_key + ":lock", job_key, *(keys[name] for name in names)],
            args=[claim.token, claim.id, reason, _now_ms()],
        )

    async def _acknowledge(
        self, command: str, keys: list[str], args: list[Any], claim: Claim
    ) -> Reply:
        asked_at = self._now()
        try:
            raw = await self._worker.scripts.commands[command](keys=keys, args=args)
        except ResponseError as error:
            raise MalformedJobError(str(error)) from error
        if isinstance(raw, list):
            return self._read(raw2NextJobData(raw), claim.token, asked_at)
        code = int(raw or 0)
        if code in _LOST:
            raise LockLostError(ErrorCode(code).name)
        if code < 0:
            raise ChildrenLeftError(str(self._worker.scripts.finishedErrors({"code": code})))
        return Reply()

    def _keep(self, claim: Claim, option: str) -> Any:
        """The job's own word on what to keep of finished jobs; else the worker's, else all."""
        return claim.job.opts.get(option, self._options.get(option, False))

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _failure_fields(job: Job, reason: str, stack_trace: str | None) -> dict[str, str]:
    """The fields that Node writes beside a failure: the reason, and every attempt's stack."""
    limit = int(min(job.opts.get("stackTraceLimit", MAX_STACKTRACES), MAX_STACKTRACES))
    known = job.stacktrace if isinstance(job.stacktrace, list) else []
    traces = [*known, stack_trace or reason][-limit:] if limit > 0 else []
    return {"failedReason": reason, "stacktrace": json.dumps(traces)}


def _check_fields(fields: Mapping[str, str], job: Job) -> None:
    """Refuse what BullMQ's scripts would break on half-way, with the job in no list at all."""
    if "name" not in fields:
        raise MalformedJobError("its fields are gone from Redis")
    if "parent" in fields and not isinstance(json.loads(fields["parent"]), dict):
        raise MalformedJobError("its parent is no object")
    for option in ("attempts", "stackTraceLimit"):
        value = job.opts.get(option, 0)
        if value is None:  # as JavaScript producers say that they say nothing
            del job.opts[option]
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 2**53:
            raise MalformedJobError(f"its option {option} is no number")
    job.attempts = max(int(job.opts.get("attempts", 1)), 1)
    for option in ("removeOnComplete", "removeOnFail"):
        if not _says_what_to_keep(job.opts.get(option)):
            raise MalformedJobError(f"its option {option} says nothing that can be followed")
    if not _is_utf8(job.id):
        raise MalformedJobError("its id is not UTF-8")


def _says_what_to_keep(option: object) -> bool:
    if isinstance(option, Mapping):
        numbers = [option.get(key) for key in ("age", "count", "limit")]
        return all(n is None or (isinstance(n, int | float) and abs(n) < 2**53) for n in numbers)
    return option is None or (isinstance(option, int) and abs(option) < 2**53)


def _is_utf8(text: str) -> bool:
    # Bytes outside UTF-8 come from Redis as lone surrogates.
    return text.isascii() or not any("\ud800" <= char <= "\udfff" for char in text)


def _with_whole_numbers(fields: Mapping[str, str]) -> Mapping[str, str]:
    """The fields without the fractions that JavaScript lets pass in times and priorities."""
    for name in ("timestamp", "delay", "priority"):
        text = fields.get(name, "0")
        if not text.isdigit() and _NUMBER.fullmatch(text):
            fields = {**fields, name: str(int(float(text)))}
    return fields


def _whole(text: str | None) -> int:
    try:
        return int(text or 0)
    except ValueError:
        return 0
