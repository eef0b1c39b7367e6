"""One BullMQ queue, as a worker sees it: claim jobs, keep their locks, acknowledge them.

BullMQ's Lua scripts and `Job` are used as they are; the loop of its `Worker` is not
(docs/internals.md lists why). A `Worker` without a processor starts nothing: the caller decides
when to fetch. With `fetch_next`, an acknowledgement brings the next job in the same round trip.
"""

import asyncio
import base64
import json
import math
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, Final, TypeVar

from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError

from autoflow_worker.broker import scripts
from autoflow_worker.broker.claim import (
    Claim,
    Hold,
    LockLostError,
    MalformedJobError,
    Reply,
)
from autoflow_worker.broker.client import PipelinedRedis
from autoflow_worker.broker.job_fields import MAX_DATA, failure_fields, is_utf8, read_claim
from autoflow_worker.broker.job_reports import JobReports
from autoflow_worker.broker.job_schedulers import JobSchedulers
from autoflow_worker.broker.marker import Marker
from autoflow_worker.broker.official_worker import official_worker
from autoflow_worker.broker.paused_lists import JOIN
from autoflow_worker.broker.refusals import refusal
from autoflow_worker.broker.script_guard import guard, guarded
from autoflow_worker.clock import now_ms
from autoflow_worker.encoding.results import dump
from autoflow_worker.pauses import Pauses

OUTAGE_PAUSE: Final = 0.05
"""Seconds before Redis is asked again after it failed; doubled up to `OUTAGE_PAUSE_MAX`."""

OUTAGE_PAUSE_MAX: Final = 1.0

# The keys of `JOIN`.
_PAUSED_LISTS: Final = ("meta", "wait", "paused")

T = TypeVar("T")


class JobQueue:
    """The queue's operations, each of them one round trip.

    Args:
        redis: the shared client; the caller closes it.
        prefix: BullMQ's key prefix.
        options: BullMQ worker options.
        max_data: bytes of a job's `data`, at most; a job with more is refused unparsed.

    Attributes:
        lock_ms: for how long a lock is taken or renewed.
        marker: wakes a worker of an idle queue.
        schedulers: make the next job of a job scheduler.
        reports: writes what handlers report.

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
        self._options = options
        self._worker = official_worker(name, redis, prefix, options)
        self.lock_ms = int(self._worker.opts["lockDuration"])
        self._lock_s = self.lock_ms / 1000
        max_started = options.get("maxStartedAttempts")
        self._read_claim = partial(
            read_claim, self._worker, max_data=max_data, max_started=max_started
        )
        keys: Mapping[str, str] = self._worker.keys
        self._base = keys[""]
        self._elsewhere = [keys[name] for name in scripts.ELSEWHERE]
        self._scripts = self._worker.scripts
        commands = self._scripts.commands
        # The end of a few jobs changes other jobs. Nothing could repair these if the script broke
        # off, so it checks all of its commands.
        self._careful_finish = redis.register_script(guarded(commands["moveToFinished"].script))
        strategy = options.get("settings", {}).get("repeatStrategy")
        self.schedulers = JobSchedulers(self._worker, redis, strategy)
        guard(commands, redis.register_script)
        self._simple_finish = commands["moveToFinished"]
        self._claim_arguments = scripts.ClaimArguments(keys, self._worker.opts)
        self._completion_arguments = scripts.CompletionArguments(keys, self._worker.opts)
        self.marker = Marker(redis, keys)
        self.reports = JobReports(self._worker, redis)
        # Node's `getWorkers()` finds a queue's workers by the names of their connections.
        self._client_name = f"{prefix}:{base64.b64encode(name.encode()).decode()}"
        if (worker_name := options.get("name")) is not None:
            self._client_name += f":w:{worker_name}"
        self._hold = redis.register_script(guarded(scripts.HOLD))
        self._held = redis.register_script(guarded(scripts.HELD))
        self._adopt = redis.register_script(guarded(scripts.ADOPT))
        self._bury = redis.register_script(guarded(scripts.BURY))
        self._drop = redis.register_script(guarded(scripts.DROP))
        self._join = redis.register_script(guarded(JOIN))

    async def open(self, timeout: float) -> None:
        """Open the connection that reads the marker; see `Channel.open`."""
        await self.marker.open(self._client_name, timeout)

    # -- the connection --------------------------------------------------------------------------

    @property
    def is_connected(self) -> bool:
        """Whether a command that is sent now leaves now."""
        return self._redis.is_connected

    async def connected(self) -> None:
        await self._redis.connected()

    @property
    def up_since(self) -> float:
        """Event loop time at which the last outage ended; -inf for none, inf if it goes on."""
        return self._redis.shared.restored_at if self.is_connected else math.inf

    async def insist(self, ask: Callable[[], Awaitable[T]]) -> T:
        """Ask Redis until it answers, perhaps more than once, however long an outage lasts."""
        pauses = Pauses(OUTAGE_PAUSE, OUTAGE_PAUSE_MAX)
        while True:
            try:
                return await ask()
            except RedisConnectionError:
                await pauses.sleep()
                await self.connected()

    # -- fetching --------------------------------------------------------------------------------

    async def fetch(self, token: str) -> Reply:
        """Claim the next job, if there is one.

        Raises:
            redis.exceptions.ConnectionError: a job may have been claimed all the same, which
                `adopt` tells.
        """
        asked_at = self._now()
        keys, args = self._claim_arguments(token, now_ms=now_ms())
        reply = await self._scripts.commands["moveToActive"](keys=keys, args=args)
        return self._read(reply, token, asked_at)

    async def held(self, token_prefix: str) -> dict[str, str]:
        """Return the tokens of the active jobs whose lock has such a token, by the jobs' ids."""
        active = self._worker.keys["active"]
        return dict(await self._held(keys=[active], args=[token_prefix, self._base]))

    async def adopt(self, token_prefix: str, known: Collection[str]) -> list[Claim]:
        """Return the jobs claimed with such a token in a reply that was lost: none of `known`."""
        asked_at = self._now()
        active = self._worker.keys["active"]
        args: list[str | int] = [token_prefix, self._base, now_ms(), *known]
        found = await self._adopt(keys=[active], args=args)
        return [self._claim(fields, job_id, token, asked_at) for job_id, token, fields in found]

    def _read(self, reply: Sequence[Any], token: str, asked_at: float) -> Reply:
        """Read the reply of a script that may have claimed a job."""
        # A reply may be shorter, or empty.
        fields, job_id, limited_ms, delayed_until = (*reply, None, None, None, None)[:4]
        claim = self._claim(fields, job_id, token, asked_at) if fields else None
        return Reply(claim, True, int(limited_ms or 0), int(delayed_until or 0))

    def _claim(
        self, fields: Mapping[str, str] | list[str], job_id: str, token: str, asked_at: float
    ) -> Claim:
        if isinstance(fields, list):  # as scripts return a hash
            pairs = iter(fields)
            fields = dict(zip(pairs, pairs, strict=True))
        return self._read_claim(fields, job_id, token, asked_at + self._lock_s)

    # -- locks -----------------------------------------------------------------------------------

    async def extend(self, claims: Sequence[Claim]) -> None:
        """Renew the locks of these jobs.

        A claim whose lock is lost keeps its `locked_until`, so its slot notices the loss then.
        """
        until = self._now() + self._lock_s
        # BullMQ packs the ids as UTF-8, which fails for all of them if one is not UTF-8.
        ids = {claim.id: claim.token for claim in claims if is_utf8(claim.id)}
        failed: set[str] = set()
        if ids:
            failed.update(await self._scripts.extendJobLocks([*ids], [*ids.values()], self.lock_ms))
        for claim in claims:
            if claim.id in ids and claim.id not in failed:
                claim.locked_until = until
            else:
                await self.holds(claim)

    async def holds(self, claim: Claim) -> Hold:
        """Return who holds the job. Take an expired lock again, if no worker has taken it since."""
        until = self._now() + self._lock_s
        started, made = claim.attempts_started, claim.attempts_made
        answer = await self._hold(
            keys=[*self._keys_of(claim.id), *self._elsewhere],
            args=[claim.token, claim.id, started, self.lock_ms, made],
        )
        if answer == Hold.OURS.value:
            claim.locked_until = until
        return Hold(answer)

    async def whose(self, claim: Claim) -> Hold:
        """As `holds`, asked until Redis answers."""
        return await self.insist(lambda: self.holds(claim))

    async def still_has(self, claim: Claim) -> bool:
        """Whether this worker still holds the job, asked until Redis answers."""
        return await self.whose(claim) is Hold.OURS

    async def make_sure_of(self, claim: Claim) -> None:
        """Raise LockLostError if another worker has the job; asked until Redis answers."""
        if await self.whose(claim) is Hold.LOST:
            raise LockLostError("its lock expired, and another worker took the job over")

    def is_surely_ours(self, claim: Claim) -> bool:
        """Whether its lock can't have expired yet."""
        return self._now() < claim.locked_until

    def _keys_of(self, job_id: str) -> list[str]:
        """Return the lock, the job, and the two keys that list a job while it is held."""
        keys, job_key = self._worker.keys, self._base + job_id
        return [job_key + ":lock", job_key, keys["active"], keys["stalled"]]

    async def is_finished(self, claim: Claim) -> bool:
        """Whether the job is in completed or failed."""
        return await self._scripts.getState(claim.id) in ("completed", "failed")

    async def due_at(self, claim: Claim) -> int | None:
        """Return when a delayed job is due, in epoch ms; None if it is not delayed."""
        score = await self._redis.zscore(self._worker.keys["delayed"], claim.id)
        return None if score is None else int(score) // 0x1000  # The lower 12 bits are a counter.

    async def check_stalled(self) -> list[str]:
        """Put back the active jobs whose worker is dead; return their ids."""
        limits = [self._worker.opts[name] for name in ("maxStalledCount", "stalledInterval")]
        return list(await self._scripts.moveStalledJobsToWait(*limits))

    async def join_paused(self) -> int:
        """Join the two lists of a paused queue, if both have jobs; return how many were moved."""
        return int(await self._join(keys=[self._worker.keys[name] for name in _PAUSED_LISTS]))

    # -- acknowledging ---------------------------------------------------------------------------
    #
    # Each of these raises LockLostError if this worker does not hold the job any more, and
    # MalformedJobError if BullMQ's script breaks on the job. After redis-py's ConnectionError,
    # nobody knows whether the script ran; `holds` tells.

    def complete(self, claim: Claim, value: Any, *, fetch_next: bool) -> Awaitable[Reply]:
        """Move the job to completed, with a storable return value.

        Raises:
            ChildrenLeftError: it has unfinished or failed children.
        """
        keep = self._keep(claim, "removeOnComplete")
        keys, args = self._completion_arguments(
            claim, dump(value), keep, fetch_next=fetch_next, now_ms=now_ms()
        )
        return self._finish(keys, args, claim)

    async def fail(
        self, claim: Claim, reason: str, stack_trace: str | None, *, fetch_next: bool
    ) -> Reply:
        """Move the job to failed, for good."""
        keep = self._keep(claim, "removeOnFail")
        fields = failure_fields(claim.job, reason, stack_trace)
        keys, args = self._scripts.moveToFailedArgs(
            claim.job, reason, keep, claim.token, fetch_next, fields
        )
        args[-2] = self._completion_arguments.packed(claim, keep)
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
        options = {
            "fieldsToUpdate": failure_fields(claim.job, reason, stack_trace),
            "fetchNext": fetch_next,
            "workerOpts": self._worker.opts,
        }
        return await self._move_to_delayed(claim.id, claim.token, until_ms, options)

    async def retry(
        self,
        claim: Claim,
        reason: str,
        stack_trace: str | None,
        *,
        fetch_next: bool,  # noqa: ARG002 - BullMQ's script retryJob fetches nothing
    ) -> Reply:
        """Move the job back to its queue: it failed, and its next attempt is due now."""
        options = {"fieldsToUpdate": failure_fields(claim.job, reason, stack_trace)}
        keys, args = self._scripts.retryJobArgs(
            claim.id, bool(claim.job.opts.get("lifo")), claim.token, options
        )
        return await self._run(self._scripts.commands["retryJob"], keys, args, claim.token)

    async def postpone(self, claim: Claim, until_ms: int, *, fetch_next: bool) -> Reply:
        """Move the job to delayed until `until_ms`, without using up its attempt."""
        options = {"skipAttempt": True, "fetchNext": fetch_next, "workerOpts": self._worker.opts}
        return await self._move_to_delayed(claim.id, claim.token, until_ms, options)

    async def hand_back(self, job_id: str, token: str, until_ms: int = 0) -> None:
        """Give a job back without using up its attempt; it is due at `until_ms`, or now."""
        await self._move_to_delayed(job_id, token, until_ms, {"skipAttempt": True})

    async def _move_to_delayed(
        self, job_id: str, token: str, until_ms: int, options: Mapping[str, Any]
    ) -> Reply:
        now = now_ms()  # BullMQ writes it into the next job as the time of its claim.
        delay = max(0, until_ms - now)
        keys, args = self._scripts.moveToDelayedArgs(job_id, now, token, delay, options)
        if options.get("fetchNext"):
            args[-1] = self._claim_arguments.packed(token)
        return await self._run(self._scripts.commands["moveToDelayed"], keys, args, token)

    async def count_breakage(self, claim: Claim) -> int:
        """Count in a field of our own a claim that broke its slot; return how many there are."""
        return int(await self._redis.hincrby(self._base + claim.id, "autoflowBroke", 1))

    async def bury(self, claim: Claim, field: str, value: str, stack_trace: str | None) -> bool:
        """Finish a job on which BullMQ's own script breaks.

        Args:
            field: `returnvalue` completes it, `failedReason` fails it.
            value: the field's value.
            stack_trace: of a failure.

        Returns:
            False, and nothing was done, if this worker does not hold the job any more.
        """
        state = "completed" if field == "returnvalue" else "failed"
        ends = self._worker.keys[state], self._worker.keys["events"]
        keys = [*self._keys_of(claim.id), *ends, *self._elsewhere]
        args: list[str | int] = [claim.token, claim.id, state, now_ms(), field, value]
        if state == "failed":
            args.append(json.dumps([stack_trace or value]))
        return bool(await self._bury(keys=keys, args=args))

    async def drop(self, claim: Claim) -> None:
        """Delete a job that has no data left."""
        await self._drop(keys=self._keys_of(claim.id), args=[claim.token, claim.id])

    def _finish(self, keys: list[str], args: list[Any], claim: Claim) -> Awaitable[Reply]:
        script = self._careful_finish if claim.has_dependents else self._simple_finish
        return self._run(script, keys, args, claim.token)

    async def _run(
        self, script: Callable[..., Awaitable[Any]], keys: list[str], args: list[Any], token: str
    ) -> Reply:
        asked_at = self._now()
        try:
            raw = await script(keys=keys, args=args)
        except ResponseError as error:
            raise MalformedJobError(str(error)) from error
        if isinstance(raw, list):
            return self._read(raw, token, asked_at)
        code = int(raw or 0)
        if code < 0:
            # Only moveToFinished refuses for another reason than the lock; it has the id first.
            raise refusal(self._scripts, code, args[0], "moveToFinished")
        return Reply()

    def _keep(self, claim: Claim, option: str) -> Any:
        """Return which finished jobs to keep: the job's option, else the worker's, else all."""
        return claim.options.get(option, self._options.get(option, False))
