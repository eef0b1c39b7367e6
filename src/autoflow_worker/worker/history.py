"""One attempt's entries in its job's row: the start, and the outcome."""

import asyncio
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import structlog

from autoflow_worker.broker.claim import Claim
from autoflow_worker.broker.job_queue import JobQueue
from autoflow_worker.clock import now_ms
from autoflow_worker.recording import patches
from autoflow_worker.recording.recorder import StatusRecorder
from autoflow_worker.recording.write import NewRow, Verdict, Write

log = structlog.get_logger(__name__)

REFUSAL_PATIENCE: Final = 5.0
"""Seconds that a slot waits with a refused outcome while too many others do."""

RERUN_PATIENCE: Final = 1.0
"""Seconds that recording a job as delayed may take; then the job is handed back all the same."""


class OutcomeRefusedError(Exception):
    """PostgreSQL refuses an outcome, and too many slots wait with theirs: the job runs again."""


@dataclass(slots=True, eq=False, repr=False)
class JobHistory:
    """Records the start and the outcome of one attempt in its job's row.

    The row's `startedAt` tells attempts apart: an outcome is written only while the row shows this
    attempt's own start. So a late write of an older attempt never overwrites a newer attempt's. If
    the row shows another start, the job's lock decides: a clock may be wrong, the API may have
    reset the row, or there is a newer attempt.
    """

    recorder: StatusRecorder
    queue: JobQueue
    claim: Claim
    held: asyncio.Semaphore
    """The slots that may yet wait with outcomes that PostgreSQL refuses."""
    record_unknown_jobs: bool = field(kw_only=True)
    """Whether a job without a row gets one (contract, section 4)."""
    row_id: str = field(init=False)
    _new_row: NewRow | None = field(default=None, init=False)
    _may_be_new: bool = field(default=True, init=False)
    _is_redirected: bool = field(default=False, init=False)
    _start: Mapping[str, Any] | None = field(default=None, init=False)
    _late: Write | None = field(default=None, init=False)
    _recorded: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        self.row_id = patches.row_id(self.queue.name, self.claim.id)

    async def start(self) -> Verdict:
        """Record the start, and wait for its commit, within the recorder's `START_PATIENCE`.

        Returns:
            `Verdict.LATE` if the wait is over first; the recorder goes on with the write.

        Raises:
            LockLostError: the job is not ours any more; nothing was written.
        """
        # The time of the claim, not of the write: it tells claims apart, and a late write of an
        # older claim must look old.
        claim = self.claim
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
                await self.queue.make_sure_of(self.claim)
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
        return self.finish(patches.completed_patch(now_ms=now_ms(), result=result))

    async def finish(self, patch: Mapping[str, Any]) -> Verdict:
        """Record an outcome, however long it takes.

        Raises:
            LockLostError: the job is not ours any more; nothing was written.
            OutcomeRefusedError: PostgreSQL refuses it, and too many slots wait with refused
                outcomes; nothing was written.
        """
        verdict = await self._tell(patch)
        if verdict is Verdict.CONTESTED:
            await self.queue.make_sure_of(self.claim)
            # PostgreSQL may have lost this attempt's start in a crash, so write it along.
            verdict = await self._persist(self._submit({**(self._start or {}), **patch}))
        return verdict

    async def follow(self, patch: Mapping[str, Any]) -> Verdict:
        """Record an outcome, unless a newer attempt has already written to the row."""
        try:
            return await self._tell(patch)
        except OutcomeRefusedError as error:
            log.error("move_not_recorded", row=self.row_id, reason=str(error))
            return Verdict.WITHDRAWN

    async def run_again(self, until_ms: int) -> None:
        """Record when the job runs again, or give that up after `RERUN_PATIENCE`."""
        try:
            async with asyncio.timeout(RERUN_PATIENCE):
                await self.follow(patches.moved_to_delayed_patch(until_ms=until_ms))
        except TimeoutError:
            log.warning("rerun_not_recorded", row=self.row_id)

    async def _tell(self, patch: Mapping[str, Any]) -> Verdict:
        """Record a patch after this attempt's own start."""
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
        """Wait for the start, if the handler started before its commit."""
        self._late = None
        verdict = await self._persist(late)
        while self._finds_its_row(verdict):
            verdict = await self._persist(self._submit(self._start or {}))
        self._note_start(verdict)

    def _note_start(self, verdict: Verdict) -> None:
        # If the row is missing from here on, the API has deleted it, and it stays deleted.
        self._may_be_new = False
        self._new_row = None
        self._recorded = verdict is not Verdict.MISSING and verdict is not Verdict.UNUSABLE
        if verdict is Verdict.MISSING and self.record_unknown_jobs:
            log.info("job_without_row", queue=self.queue.name, task_id=self.claim.id)

    def _finds_its_row(self, verdict: Verdict) -> bool:
        """Prepare to send a write again that found no row of this job; False if there is none."""
        if verdict is Verdict.FOREIGN:
            # Another queue's task has this id, so this job gets a row of its own.
            self.row_id = patches.own_row_id(self.queue.name, self.row_id)
            self._is_redirected = True
            return True
        if verdict is Verdict.MISSING and self._new_row is None and self._may_make_row:
            self._new_row = self._made_row()
            return True
        return False

    @property
    def _may_make_row(self) -> bool:
        """Whether a missing row was never there, and is to be made (contract, section 4).

        The API makes a task's row before its job, and any other job gets its row with its first
        attempt. So a row that is missing later was deleted, and stays deleted. The first attempt
        may take several claims: a worker that died after its claim may not have made the row.
        """
        claim = self.claim
        return (
            self.record_unknown_jobs
            and self._may_be_new
            and claim.attempt == 1
            and (self._is_redirected or not patches.is_task_of_api(claim.id, claim.options))
        )

    def _made_row(self) -> NewRow:
        claim = self.claim
        row = patches.unknown_job_row(
            self.queue.name, data=claim.data, options=claim.options, timestamp=claim.timestamp
        )
        return NewRow(patches.encode(row), patches.encode({**row, "payload": {}}))

    async def _persist(self, write: Write) -> Verdict:
        """Wait until a write is settled; see `finish`."""
        verdict = Verdict.PUT_OFF if write.times_put_off else await write.settled
        return await self._hold(write) if verdict is Verdict.PUT_OFF else verdict

    async def _hold(self, write: Write) -> Verdict:
        """Wait with a write that was put off; without room for that, for `REFUSAL_PATIENCE` only.

        Raises:
            OutcomeRefusedError: the write was withdrawn.
        """
        if self.held.locked():
            try:
                await asyncio.wait({write.settled}, timeout=REFUSAL_PATIENCE)
            except asyncio.CancelledError:
                write.settled.cancel()
                raise
        if self.held.locked():
            if not write.settled.done():
                self.recorder.withdraw(write)
            verdict = await write.settled
        else:
            async with self.held:
                verdict = await write.settled
        if verdict is Verdict.WITHDRAWN:
            raise OutcomeRefusedError("PostgreSQL refuses the row; the log says why")
        return verdict

    def _submit(
        self, patch: Mapping[str, Any], *, since: str | None = None, fence: str | None = None
    ) -> Write:
        write = Write(
            self.row_id,
            self.queue.name,
            patch,
            patches.encode(dict(patch)),
            since=since,
            fence=fence,
            unfinished=self.claim.is_bare,
            new_row=self._new_row,
        )
        return self.recorder.submit(write)
