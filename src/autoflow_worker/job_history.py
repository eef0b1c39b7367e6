"""One attempt's entries in its job's row: the start, and the outcome."""

import time
from collections.abc import Awaitable, Mapping
from typing import Any, Protocol

from autoflow_worker import record
from autoflow_worker.claim import Claim
from autoflow_worker.failpoints import failpoint
from autoflow_worker.writes import Recorder, Verdict, Write


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
        record_unknown_jobs: whether a job without a row gets one (contract, section 4), or no
            history.
    """

    __slots__ = (
        "_claim",
        "_late",
        "_queue",
        "_record_unknown_jobs",
        "_recorded",
        "_recorder",
        "_row_id",
        "_start",
    )

    def __init__(
        self, recorder: Recorder, queue: Locks, claim: Claim, *, record_unknown_jobs: bool
    ) -> None:
        self._recorder = recorder
        self._queue = queue
        self._claim = claim
        self._row_id = record.row_id(queue.name, claim.id)
        self._record_unknown_jobs = record_unknown_jobs
        self._start: Mapping[str, Any] | None = None
        self._late: Write | None = None
        self._recorded = True

    def _unknown_row(self) -> Mapping[str, Any]:
        return record.unknown_job_row(self._queue.name, self._claim.job)

    async def start(self) -> Verdict:
        """Record the start; with a limit to the wait, after which the write follows by itself.

        Raises:
            LockLostError: the job is not ours any more; nothing was written.
        """
        # Not the time of the write: it tells claims apart, and a stale one must look stale.
        patch = record.active_patch(now_ms=self._claim.claimed_ms, attempt=self._claim.attempt)
        self._start = patch
        write = self._submit(patch, may_insert=True, since=patch["startedAt"])
        verdict = await write.ready
        if verdict is Verdict.CONTESTED:
            await self._queue.make_sure_of(self._claim)
            write = self._submit(patch, may_insert=True)
            verdict = await write.ready
        self._late = write if verdict is Verdict.LATE else None
        self._recorded = verdict is not Verdict.MISSING
        return verdict

    def complete(self, result: record.Record) -> Awaitable[Verdict]:
        """Record that the handler returned; see `finish`."""
        now_ms = time.time_ns() // 1_000_000
        return self.finish(record.completed_patch(now_ms=now_ms, result=result))

    async def finish(self, patch: Mapping[str, Any]) -> Verdict:
        """Record an outcome, however long it takes.

        Raises:
            LockLostError: the job is not ours any more; nothing was written.
        """
        verdict = await self.follow(patch)
        if verdict is Verdict.CONTESTED:
            await self._queue.make_sure_of(self._claim)
            # The row may know nothing of this attempt: a crash of PostgreSQL can lose a start.
            patch = {**(self._start or {}), **patch}
            verdict = await self._submit(patch, may_insert=self._start is None).settled
        failpoint("after-commit")
        return verdict

    async def follow(self, patch: Mapping[str, Any]) -> Verdict:
        """Record what became of a job that is not held any more: a newer attempt goes first."""
        if self._late is not None:
            late, self._late = self._late, None
            self._recorded = await late.settled is not Verdict.MISSING
        if not self._recorded:
            return Verdict.MISSING
        fence = None if self._start is None else self._start["startedAt"]
        # A row that is gone after the start was deleted by the API, and stays deleted.
        return await self._submit(patch, may_insert=self._start is None, fence=fence).settled

    def _submit(
        self,
        patch: Mapping[str, Any],
        *,
        may_insert: bool,
        since: str | None = None,
        fence: str | None = None,
    ) -> Write:
        write = Write(
            self._row_id,
            self._queue.name,
            patch,
            record.encode(dict(patch)),
            since=since,
            fence=fence,
            new_row=self._unknown_row if may_insert and self._record_unknown_jobs else None,
        )
        return self._recorder.submit(write)
