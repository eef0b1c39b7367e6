"""One attempt's entries in its job's row: the start, and the outcome."""

import asyncio
import time
from collections.abc import Awaitable, Mapping
from typing import Any, Final, Protocol

import structlog

from autoflow_worker.broker.claim import Claim
from autoflow_worker.recording import patches
from autoflow_worker.recording.write import NewRow, Recorder, Verdict, Write
from autoflow_worker.worker.held_outcomes import HeldOutcomes

log = structlog.get_logger(__name__)

REFUSAL_PATIENCE: Final = 5.0
"""Seconds that a slot waits with an outcome that PostgreSQL refuses while too many others do."""

RERUN_PATIENCE: Final = 1.0
"""Seconds that recording a job as delayed may take before it is handed back all the same."""


class OutcomeRefusedError(Exception):
    """PostgreSQL refuses the outcome, and the slot is needed: the work has to be done again."""


class Locks(Protocol):
    """What a history needs of the job's queue."""

    @property
    def name(self) -> str: ...

    async def make_sure_of(self, claim: Claim) -> None:
        """Ask Redis whose the job is; raise if it is not ours any more."""
        ...


class JobHistory:
    """Writes one attempt's story into its job's row.

    The row's `startedAt` tells attempts apart: an outcome is written only while the row still
    shows this attempt's own start. So whatever comes late, an older attempt never overwrites what
    a newer one wrote. Where the row shows another start (a clock that goes wrong, an API that has
    reset the row, or a newer attempt), the job's lock decides.

    Args:
        queue: the job's; rows of other queues are left alone.
        claim: the attempt.
        held: how many slots may wait with outcomes that PostgreSQL refuses.
        record_unknown_jobs: whether a job without a row gets one (contract, section 4), or no
            history.
    """

    __slots__ = (
        "_claim",
        "_held",
        "_is_redirected",
        "_late",
        "_may_be_new",
        "_new_row",
        "_queue",
        "_record_unknown_jobs",
        "_recorded",
        "_recorder",
        "_row_id",
        "_start",
    )

    def __init__(
        self,
        recorder: Recorder,
        queue: Locks,
        claim: Claim,
        held: HeldOutcomes,
        *,
        record_unknown_jobs: bool,
    ) -> None:
        self._recorder = recorder
        self._queue = queue
        self._claim = claim
        self._held = held
        self._row_id = patches.row_id(queue.name, claim.id)
        self._record_unknown_jobs = record_unknown_jobs
        self._new_row: NewRow | None = None
        self._may_be_new = True
        self._is_redirected = False
        self._start: Mapping[str, Any] | None = None
        self._late: Write | None = None
        self._recorded = True

    async def start(self) -> Verdict:
        """Record the start; with a limit to the wait, after which the write follows by itself.

        Raises:
            LockLostError: the job is not ours any more; nothing was written.
        """
        # Not the time of the write: it tells claims apart, and a stale one must look stale.
        claim = self._claim
        patch = self._start = patches.active_patch(
            now_ms=claim.claimed_ms, attempt=claim.attempt, again=claim.attempts_started > 1
        )
        since: str | None = patch["startedAt"]
        while True:
            write = self._submit(patch, since=since)
            verdict = await write.ready
            if verdict is Verdict.WRITTEN:
                self._may_be_new, self._new_row = False, None
                return verdict
            if verdict is Verdict.CONTESTED:
                await self._queue.make_sure_of(self._claim)
                since = None
            elif not self._finds_its_row(verdict):
                break
        if verdict is Verdict.LATE:
            self._late = write
            if self._may_make_row:
                write.new_row = self._made_row()
        else:
            self._note_start(verdict)
        return verdict

    def complete(self, result: patches.Record) -> Awaitable[Verdict]:
        """Record that the handler returned; see `finish`."""
        now_ms = time.time_ns() // 1_000_000
        return self.finish(patches.completed_patch(now_ms=now_ms, result=result))

    async def finish(self, patch: Mapping[str, Any]) -> Verdict:
        """Record an outcome, however long it takes.

        Raises:
            LockLostError: the job is not ours any more; nothing was written.
            OutcomeRefusedError: PostgreSQL refuses it, and so many others that this slot can't wait
                any longer; nothing was written.
        """
        verdict = await self._tell(patch)
        if verdict is Verdict.CONTESTED:
            await self._queue.make_sure_of(self._claim)
            # The row may know nothing of this attempt: a crash of PostgreSQL can lose a start.
            verdict = await self._persist(self._submit({**(self._start or {}), **patch}))
        return verdict

    async def follow(self, patch: Mapping[str, Any]) -> Verdict:
        """Record what became of a job that is not held any more: a newer attempt goes first."""
        try:
            return await self._tell(patch)
        except OutcomeRefusedError as error:
            log.error("move_not_recorded", row=self._row_id, reason=str(error))
            return Verdict.WITHDRAWN

    async def run_again(self, until_ms: int) -> None:
        """Record that the job runs again at a time, if PostgreSQL takes that soon."""
        try:
            async with asyncio.timeout(RERUN_PATIENCE):
                await self.follow(patches.moved_to_delayed_patch(until_ms=until_ms))
        except TimeoutError:
            log.warning("rerun_not_recorded", row=self._row_id)

    async def _tell(self, patch: Mapping[str, Any]) -> Verdict:
        """Record a patch behind this attempt's own start."""
        if self._late is not None:
            await self._catch_up(self._late)
        if not self._recorded:
            return Verdict.MISSING
        fence = None if self._start is None else self._start["startedAt"]
        while True:
            write = self._submit(patch, fence=fence)
            verdict = await write.settled
            if verdict is Verdict.PUT_OFF:
                verdict = await self._hold(write)
            if verdict is Verdict.WRITTEN or not self._finds_its_row(verdict):
                return verdict

    async def _catch_up(self, late: Write) -> None:
        """Wait for a start that the handler did not wait for."""
        self._late = None
        verdict = await self._persist(late)
        while self._finds_its_row(verdict):
            verdict = await self._persist(self._submit(self._start or {}))
        self._note_start(verdict)

    def _note_start(self, verdict: Verdict) -> None:
        # A row that is gone after the start was deleted by the API, and stays deleted.
        self._may_be_new = False
        self._new_row = None
        self._recorded = verdict is not Verdict.MISSING and verdict is not Verdict.UNUSABLE
        if verdict is Verdict.MISSING and self._record_unknown_jobs:
            log.info("job_without_row", queue=self._queue.name, task_id=self._claim.id)

    def _finds_its_row(self, verdict: Verdict) -> bool:
        """Whether a write that found no row of this job may be sent again, and will find one."""
        if verdict is Verdict.FOREIGN:
            # Another queue's task has this id: this job's history gets a row of its own.
            self._row_id = patches.own_row_id(self._queue.name, self._row_id)
            self._is_redirected = True
            return True
        if verdict is Verdict.MISSING and self._new_row is None and self._may_make_row:
            self._new_row = self._made_row()
            return True
        return False

    @property
    def _may_make_row(self) -> bool:
        """Whether a row that is missing was never there, and is wanted (contract, section 4).

        The API makes a task's row before its job, and any other job gets one with its first
        attempt. So one that is missing later was deleted, and stays deleted. The first attempt may
        take several claims: a worker that died after its claim may not have made the row.
        """
        claim = self._claim
        return (
            self._record_unknown_jobs
            and self._may_be_new
            and claim.attempt == 1
            and (self._is_redirected or not patches.is_task_of_api(claim.id, claim.options))
        )

    def _made_row(self) -> NewRow:
        claim = self._claim
        row = patches.unknown_job_row(
            self._queue.name, data=claim.data, options=claim.options, timestamp=claim.timestamp
        )
        return NewRow(patches.encode(row), patches.encode({**row, "payload": {}}))

    async def _persist(self, write: Write) -> Verdict:
        """Wait until an outcome, or a late start before it, is settled; see `finish`."""
        verdict = Verdict.PUT_OFF if write.times_put_off else await write.settled
        return await self._hold(write) if verdict is Verdict.PUT_OFF else verdict

    async def _hold(self, write: Write) -> Verdict:
        """Wait with a write that was put off, if there is room for that, else not for long.

        Raises:
            OutcomeRefusedError: it was withdrawn.
        """
        is_held = self._held.enter()
        if not is_held:
            try:
                await asyncio.wait({write.settled}, timeout=REFUSAL_PATIENCE)
            except asyncio.CancelledError:
                write.settled.cancel()
                raise
            if not write.settled.done():
                is_held = self._held.enter()
                if not is_held:
                    self._recorder.withdraw(write)
        try:
            verdict = await write.settled
        finally:
            if is_held:
                self._held.leave()
        if verdict is Verdict.WITHDRAWN:
            raise OutcomeRefusedError("PostgreSQL refuses the row; the log says why")
        return verdict

    def _submit(
        self, patch: Mapping[str, Any], *, since: str | None = None, fence: str | None = None
    ) -> Write:
        write = Write(
            self._row_id,
            self._queue.name,
            patch,
            patches.encode(dict(patch)),
            since=since,
            fence=fence,
            unfinished=self._claim.is_bare,
            new_row=self._new_row,
        )
        return self._recorder.submit(write)
