"""One BullMQ queue, as a worker sees it: claim jobs, keep their locks, acknowledge them.

The only module that drives `bullmq.Worker`. Its Lua scripts, `Job` and `JobScheduler` are used as
they are; its own loop is not (docs/internals.md lists why). A `Worker` without a processor starts
nothing: the caller decides when to fetch, and `fetch_next` lets an acknowledgement bring the next
job in the same round trip.
"""

import asyncio
import base64
import json
import math
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, TypeVar

from bullmq import Job, Worker
from bullmq.error_code import ErrorCode
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError

from autoflow_worker.claim import (
    ChildrenLeftError,
    Claim,
    Hold,
    LockLostError,
    MalformedJobError,
    Reply,
    is_utf8,
    read_claim,
)
from autoflow_worker.completion import CompletionArguments
from autoflow_worker.queue_scripts import BURY, HELD, HOLD, PUT_MARKER
from autoflow_worker.redis_channel import REPLY_PATIENCE, Channel
from autoflow_worker.redis_client import PipelinedRedis
from autoflow_worker.storable import dump

OUTAGE_PAUSE: Final = 0.05
"""Seconds before Redis is asked again after it failed; doubled up to `OUTAGE_PAUSE_MAX`."""

OUTAGE_PAUSE_MAX: Final = 1.0

MAX_STACKTRACES: Final = 20
"""Stack traces kept on a job, at most; the option `stackTraceLimit` may ask for fewer."""

# How a job scheduler repeats.
_REPEAT: Final = ("every", "pattern", "tz", "limit", "offset", "startDate", "endDate")

_LOST: Final = frozenset(
    {
        ErrorCode.JobNotExist.value,
        ErrorCode.JobLockNotExist.value,
        ErrorCode.JobNotInState.value,
        ErrorCode.JobLockMismatch.value,
    }
)

_NO_JOB: Final = (None, None, 0, 0)

T = TypeVar("T")


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
        self._now = asyncio.get_running_loop().time
        self._redis = redis
        self._prefix = prefix
        self._options = options
        self._worker = Worker(name, None, {**options, "connection": redis, "prefix": prefix})
        self.lock_ms = int(self._worker.opts["lockDuration"])
        self._lock_s = self.lock_ms / 1000
        self._base = str(self._worker.keys[""])
        self._completion_arguments = CompletionArguments(self._worker.keys, self._worker.opts)
        self._blocking: Channel | None = None
        self._hold = redis.register_script(HOLD)
        self._held = redis.register_script(HELD)
        self._bury = redis.register_script(BURY)
        self._put_marker = redis.register_script(PUT_MARKER)

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
        return read_claim(self._worker, fields, job_id, token, asked_at + self._lock_s)

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
        until = self._now() + self._lock_s
        # BullMQ packs ids as UTF-8, and would refuse all of them for one that is not.
        ids = {claim.id: claim.token for claim in claims if is_utf8(claim.id)}
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
        until = self._now() + self._lock_s
        job_key, keys = self._base + claim.id, self._worker.keys
        answer = await self._hold(
            keys=[job_key + ":lock", job_key, keys["active"], keys["stalled"]],
            args=[claim.token, claim.id, claim.attempts_started, self.lock_ms],
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

    async def insist(self, ask: Callable[[], Awaitable[T]]) -> T:
        """Ask Redis, over every outage, for something that may be asked twice."""
        pause = OUTAGE_PAUSE
        while True:
            try:
                return await ask()
            except RedisConnectionError:
                await asyncio.sleep(pause)
                pause = min(pause * 2, OUTAGE_PAUSE_MAX)
                await self.connected()

    def is_surely_ours(self, claim: Claim) -> bool:
        """Whether its lock can't have expired yet."""
        return self._now() < claim.locked_until

    async def make_sure_of(self, claim: Claim) -> None:
        """Ask Redis, over every outage, whose the job is.

        Raises:
            LockLostError: another worker has it; nothing may be recorded for this attempt.
        """
        if await self.insist(lambda: self.holds(claim)) is Hold.LOST:
            raise LockLostError("its lock expired, and another worker took the job over")

    async def still_has(self, claim: Claim) -> bool:
        """Whether the job still is ours, asked over every outage."""
        return await self.insist(lambda: self.holds(claim)) is Hold.OURS

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

    def complete(self, claim: Claim, value: Any, *, fetch_next: bool) -> Awaitable[Reply]:
        """Move the job to completed.

        Args:
            value: the return value, storable as it is.

        Raises:
            ChildrenLeftError: it has unfinished or failed children, so BullMQ refuses.
        """
        keep = self._keep(claim, "removeOnComplete")
        keys, args = self._completion_arguments(
            claim, dump(value), keep, fetch_next=fetch_next, now_ms=_now_ms()
        )
        return self._acknowledge("moveToFinished", keys, args, claim)

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

    async def bury(self, claim: Claim, reason: str, stack_trace: str | None) -> None:
        """Move a job to failed on which BullMQ's own script breaks."""
        job_key, keys = self._base + claim.id, self._worker.keys
        names = ("active", "stalled", "failed", "events")
        await self._bury(
            keys=[job_key + ":lock", job_key, *(keys[name] for name in names)],
            args=[claim.token, claim.id, reason, _now_ms(), json.dumps([stack_trace or reason])],
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
            return self._read(_next_job_data(raw), claim.token, asked_at)
        code = int(raw or 0)
        if code in _LOST:
            raise LockLostError(ErrorCode(code).name)
        if code < 0:
            raise ChildrenLeftError(str(self._worker.scripts.finishedErrors({"code": code})))
        return Reply()

    def _keep(self, claim: Claim, option: str) -> Any:
        """The job's own word on what to keep of finished jobs; else the worker's, else all."""
        return claim.options.get(option, self._options.get(option, False))


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _next_job_data(raw: Sequence[Any]) -> tuple[dict[str, str] | None, str, Any, Any]:
    """As bullmq's `raw2NextJobData`, at a fraction of its cost."""
    fields, job_id, limited_ms, delayed_until = (*raw, None, None)[:4] if raw else _NO_JOB
    if not fields:
        return None, job_id, limited_ms, delayed_until
    pairs = iter(fields)
    return dict(zip(pairs, pairs, strict=True)), job_id, limited_ms, delayed_until


def _failure_fields(job: Job, reason: str, stack_trace: str | None) -> dict[str, str]:
    """The fields that Node writes beside a failure: the reason, and every attempt's stack."""
    limit = int(min(job.opts.get("stackTraceLimit", MAX_STACKTRACES), MAX_STACKTRACES))
    known = job.stacktrace if isinstance(job.stacktrace, list) else []
    traces = [*known, stack_trace or reason][-limit:] if limit > 0 else []
    return {"failedReason": reason, "stacktrace": json.dumps(traces)}
