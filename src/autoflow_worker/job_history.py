"""One attempt's entries in its job's row: the start, and the outcome."""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from autoflow_worker import record
from autoflow_worker.failpoints import failpoint
from autoflow_worker.writes import Recorder, Verdict, Write

NewRow = Callable[[], Mapping[str, Any]]


class JobHistory:
    """Writes one attempt's story into its job's row.

    The row's `startedAt` tells attempts apart: an outcome is written only while the row still
    shows this attempt's own start. So whatever comes late, an older attempt never overwrites what
    a newer one wrote. Where the row shows another start (a clock that goes wrong, an API that has
    reset the row, or a newer attempt), the job's lock decides.

    Args:
        row_id: the row of the job (contract, section 4).
        queue: rows of other queues are left alone.
        new_row: makes the row of a job that has none; None: such a job gets no history.
        make_sure_of_lock: asks Redis; raises if the job is not ours any more.
    """

    __slots__ = (
        "_late",
        "_make_sure_of_lock",
        "_new_row",
        "_queue",
        "_recorded",
        "_recorder",
        "_row_id",
        "_start",
    )

    def __init__(
        self,
        recorder: Recorder,
        row_id: str,
        queue: str,
        new_row: NewRow | None,
        make_sure_of_lock: Callable[[], Awaitable[None]],
    ) -> None:
        self._recorder = recorder
        self._row_id = row_id
        self._queue = queue
        self._new_row = new_row
        self._make_sure_of_lock = make_sure_of_lock
        self._start: Mapping[str, Any] | None = None
        self._late: Write | None = None
        self._recorded = True

    async def start(self, patch: Mapping[str, Any]) -> Verdict:
        """Record the start; with a limit to the wait, after which the write follows by itself.

        Raises:
            LockLostError: the job is not ours any more; nothing was written.
        """
        self._start = patch
        verdict = await self._write_start(patch, since=patch["startedAt"])
        if verdict is Verdict.CONTESTED:
            await self._make_sure_of_lock()
            verdict = await self._write_start(patch, since=None)
        return verdict

    async def _write_start(self, patch: Mapping[str, Any], since: str | None) -> Verdict:
        text = record.encode(dict(patch))
        write = Write(self._row_id, self._queue, patch, text, since=since, new_row=self._new_row)
        verdict = await self._recorder.submit(write).ready
        self._late = write if verdict is Verdict.LATE else None
        self._recorded = verdict is not Verdict.MISSING
        return verdict

    async def finish(self, patch: Mapping[str, Any]) -> Verdict:
        """Record an outcome, however long it takes.

        Raises:
            LockLostError: the job is not ours any more; nothing was written.
        """
        verdict = await self.follow(patch)
        if verdict is Verdict.CONTESTED:
            await self._make_sure_of_lock()
            # The row may know nothing of this attempt: a crash of PostgreSQL can lose a start.
            verdict = await self._write_outcome({**(self._start or {}), **patch}, fence=None)
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
        return await self._write_outcome(patch, fence)

    async def _write_outcome(self, patch: Mapping[str, Any], fence: str | None) -> Verdict:
        # A row that is gone after the start was deleted by the API, and stays deleted.
        new_row = self._new_row if self._start is None else None
        text = record.encode(dict(patch))
        write = Write(self._row_id, self._queue, patch, text, fence=fence, new_row=new_row)
        return await self._recorder.submit(write).settled
