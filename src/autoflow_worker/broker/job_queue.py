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
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import Any, Final, TypeVar

from bullmq import Job
from bullmq.error_code import ErrorCode
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError

from autoflow_worker.broker.channel import REPLY_PATIENCE, Channel
from autoflow_worker.broker.claim import (
    MAX_DATA,
    ChildrenLeftError,
    Claim,
    Hold,
    LockLostError,
    MalformedJobError,
    Reply,
    is_utf8,
    read_claim,
)
from autoflow_worker.broker.client import PipelinedRedis
from autoflow_worker.broker.completion import CompletionArguments
from autoflow_worker.broker.official_worker import official_worker
from autoflow_worker.broker.script_guard import guard, guarded
from autoflow_worker.broker.scripts import (
    ADOPT,
    BURY,
    DROP,
    ELSEWHERE,
    HELD,
    HOLD,
    PUT_MARKER,
)
from autoflow_worker.encoding.results import dump

OUTAGE_PAUSE: Final = 0.05
"""Seconds before Redis is asked again after it failed; doubled up to `OUTAGE_PAUSE_MAX`."""

OUTAGE_PAUSE_MAX: Final = 1.0

MAX_STACKTRACES: Final = 20
"""Stack traces kept on a job, at most; the option `stackTraceLimit` may ask for fewer."""

BREAKAGES: Final = "autoflowBroke"
"""The field of a job that counts the claims which broke their slots; BullMQ knows nothing of it."""

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
        max_data: bytes of a job's `data`, at most; a job with more is refused unparsed.

    Raises:
        LibraryMismatchError: the installed bullmq differs from the one that this package knows.
    """

    def __init__(
        self,
        name: str,
        redis: PipelinedRedis,
        prefix: str,
        options: Mapping[str, Any],
        *,
        max_data: int = MAX_DATA,
    ) -> None:
        self.name = name
        self._now = asyncio.get_running_loop().time
        self._redis = redis
        self._prefix = prefix
        self._options = options
        self._worker = official_worker(name, redis, prefix, options)
        self.lock_ms = int(self._worker.opts["lockDuration"])
        self._lock_s = self.lock_ms / 1000
        self._max_data = max_data
        self._base = str(self._worker.keys[""])
        self._elsewhere = [self._worker.keys[name] for name in ELSEWHERE]
        self._careful_finish = self._guard_scripts()
        self._simple_finish = self._worker.scripts.commands["moveToFinished"]
        self._completion_arguments = CompletionArguments(self._worker.keys, self._worker.opts)
        self._blocking: Channel | None = None
        self._hold = redis.register_script(guarded(HOLD))
        self._held = redis.register_script(guarded(HELD))
        self._adopt = redis.register_script(guarded(ADOPT))
        self._bury = redis.register_script(guarded(BURY))
        self._drop = redis.register_script(guarded(DROP))
        self._put_marker = redis.register_script(guarded(PUT_MARKER))

    def _guard_scripts(self) -> Callable[..., Awaitable[Any]]:
        """Put each of BullMQ's scripts behind its guard.

        Returns:
            The script that finishes a job, behind a check of everything that it may call: for the
            few jobs whose end changes other jobs, which nothing could put right afterwards.
        """
        commands = self._worker.scripts.commands
        finish = commands["moveToFinished"].script
        guard(commands, self._redis.register_script)
        return self._redis.register_script(guarded(finish))

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

    async def held(self, token_prefix: str) -> list[tuple[str, str]]:
        """Id and token of the active jobs whose lock was taken with such a token."""
        active = self._worker.keys["active"]
        found = await self._held(keys=[active], args=[token_prefix, self._base])
        return [(job_id, token) for job_id, token in found]

    async def adopt(self, token_prefix: str, known: Collection[str]) -> list[Claim]:
        """Claim what was claimed with such a token already, in a reply that never came.

        Args:
            known: ids of the jobs that this worker knows to be its own.
        """
        asked_at = self._now()
        active = self._worker.keys["active"]
        args: list[str | int] = [token_prefix, self._base, _now_ms(), *known]
        found = await self._adopt(keys=[active], args=args)
        return [
            self._claim(dict(zip(fields[::2], fields[1::2], strict=True)), job_id, lock, asked_at)
            for job_id, lock, fields in found
        ]

    def _read(self, data: Sequence[Any], token: str, asked_at: float) -> Reply:
        fields, job_id, limited_ms, delayed_until = data
        claim = self._claim(fields, job_id, token, asked_at) if fields else None
        return Reply(claim, True, int(limited_ms or 0), int(delayed_until or 0))

    def _claim(self, fields: Mapping[str, str], job_id: str, token: str, asked_at: float) -> Claim:
        until = asked_at + self._lock_s
        return read_claim(self._worker, fields, job_id, token, until, max_data=self._max_data)

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
        started, made = claim.attempts_started, claim.attempts_made
        answer = await self._hold(
            keys=[*self._keys_of(claim.id), *self._elsewhere],
            args=[claim.token, claim.id, started, self.lock_ms, made],
        )
        if answer == Hold.OURS.value:
            claim.locked_until = until
        return Hold(answer)

    def _keys_of(self, job_id: str) -> list[str]:
        """The lock, the job, and the two keys that name a job as long as it is held."""
        keys, job_key = self._worker.keys, self._base + job_id
        return [job_key + ":lock", job_key, keys["active"], keys["stalled"]]

    async def is_finished(self, claim: Claim) -> bool:
        """Whether the job is in completed or failed."""
        return await self._worker.scripts.getState(claim.id) in ("completed", "failed")

    async def due_at(self, claim: Claim) -> int | None:
        """When a delayed job is due, in epoch ms; None if it is not delayed."""
        score = await self._redis.zscore(self._worker.keys["delayed"], claim.id)
        return None if score is None else int(score) // 0x1000  # BullMQ adds a counter's 12 bits

    @property
    def is_connected(self) -> bool:
        """Whether a command that is sent now leaves now."""
        return self._redis.shared.link is not None

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
        if await self.whose(claim) is Hold.LOST:
            raise LockLostError("its lock expired, and another worker took the job over")

    async def still_has(self, claim: Claim) -> bool:
        """Whether the job still is ours, asked over every outage."""
        return await self.whose(claim) is Hold.OURS

    async def whose(self, claim: Claim) -> Hold:
        """As `holds`, asked over every outage."""
        return await self.insist(lambda: self.holds(claim))

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
        return self._finish(keys, args, claim)

    async def fail(
        self, claim: Claim, reason: str, stack_trace: str | None, *, fetch_next: bool
    ) -> Reply:
        """Move the job to failed, for good."""
        keep = self._keep(claim, "removeOnFail")
        fields = _failure_fields(claim.job, reason, stack_trace)
        keys, args = self._worker.scripts.moveToFailedArgs(
            claim.job, reason, keep, claim.token, fetch_next, fields
        )
        return await self._finish(keys, args, claim)

    async def delay(
        self,
        claim: Claim,
        until_ms: int,
        reason: str,
        stack_trace: str | None,
        *,
        fetch_next: bool,
    ) -> Reply:
        """Move the job to delayed: it failed, and its next attempt is due at `until_ms`."""
        # BullMQ gives this time to the next job as its claim's, which tells attempts apart.
        now_ms = _now_ms()
        options = {
            "fieldsToUpdate": _failure_fields(claim.job, reason, stack_trace),
            "fetchNext": fetch_next,
            "workerOpts": self._worker.opts,
        }
        keys, args = self._worker.scripts.moveToDelayedArgs(
            claim.id, now_ms, claim.token, max(0, until_ms - now_ms), options
        )
        return await self._acknowledge("moveToDelayed", keys, args, claim.token)

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
        return await self._acknowledge("retryJob", keys, args, claim.token)

    async def hand_back(self, job_id: str, token: str, until_ms: int = 0) -> None:
        """Give a job back without using up its attempt.

        Args:
            until_ms: when it is to run again, in epoch ms; at once, if that is past.
        """
        now_ms = _now_ms()
        keys, args = self._worker.scripts.moveToDelayedArgs(
            job_id, now_ms, token, max(0, until_ms - now_ms), {"skipAttempt": True}
        )
        await self._acknowledge("moveToDelayed", keys, args, token)

    async def count_breakage(self, claim: Claim) -> int:
        """Count, in the job itself, that a claim of it broke its slot; how many did so far."""
        return int(await self._redis.hincrby(self._base + claim.id, BREAKAGES, 1))

    async def bury(self, claim: Claim, field: str, value: str, stack_trace: str | None) -> bool:
        """Finish a job on which BullMQ's own script breaks.

        Args:
            field: `returnvalue` completes it, `failedReason` fails it.
            value: what the field gets.
            stack_trace: of a failure.

        Returns:
            False if the job is not ours any more; then nothing was done.
        """
        state = "completed" if field == "returnvalue" else "failed"
        ends = self._worker.keys[state], self._worker.keys["events"]
        keys = [*self._keys_of(claim.id), *ends, *self._elsewhere]
        args: list[str | int] = [claim.token, claim.id, state, _now_ms(), field, value]
        if state == "failed":
            args.append(json.dumps([stack_trace or value]))
        return bool(await self._bury(keys=keys, args=args))

    async def drop(self, claim: Claim) -> None:
        """Forget a job that has no data left."""
        await self._drop(keys=self._keys_of(claim.id), args=[claim.token, claim.id])

    def _finish(self, keys: list[str], args: list[Any], claim: Claim) -> Awaitable[Reply]:
        is_simple = claim.is_plain or not claim.has_dependents
        script = self._simple_finish if is_simple else self._careful_finish
        return self._run(script, keys, args, claim.token)

    def _acknowledge(
        self, command: str, keys: list[str], args: list[Any], token: str
    ) -> Awaitable[Reply]:
        return self._run(self._worker.scripts.commands[command], keys, args, token)

    async def _run(
        self, script: Callable[..., Awaitable[Any]], keys: list[str], args: list[Any], token: str
    ) -> Reply:
        asked_at = self._now()
        try:
            raw = await script(keys=keys, args=args)
        except ResponseError as error:
            raise MalformedJobError(str(error)) from error
        if isinstance(raw, list):
            return self._read(_next_job_data(raw), token, asked_at)
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
