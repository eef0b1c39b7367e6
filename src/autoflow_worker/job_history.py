"""One attempt's entries in its job's row: the start, and the outcome."""

from collections.abc import Callable, Mapping
from typing import Any

from autoflow_worker.recorder import Recorder, Verdict, Write


class JobHistory:
    """Writes one attempt's story into its job's row.

    The row's `startedAt` tells attempts apart: an outcome is written only while the row still
    shows this attempt's own start. So whatever comes late, an older attempt never overwrites what
    a newer one wrote.

    Args:
        row_id: the row of the job (contract, section 4).
        queue: rows of other queues are left alone.
        new_row: makes the row of a job that has none; None: such a job gets no history.
    """

    __slots__ = ("_late", "_new_row", "_queue", "_recorded", "_recorder", "_row_id", "_started_at")

    def __init__(
        self,
        recorder: Recorder,
        row_id: str,
        queue: str,
        new_row: Callable[[], Mapping[str, Any]] | None,
    ) -> None:
        self._recorder = recorder
        self._row_id = row_id
        self._queue = queue
        self._new_row = new_row
        self._started_at: str | None = None
        self._late: Write | None = None
        self._recorded = True

    async def start(self, patch: Mapping[str, Any], text: str, *, force: bool = False) -> Verdict:
        """Record the start; with a limit to the wait, after which the write follows by itself.

        Args:
            force: also if the row shows a later start; the caller has made sure of its lock.
        """
        self._started_at = patch["startedAt"]
        since = None if force else self._started_at
        write = Write(self._row_id, self._queue, patch, text, since=since, new_row=self._new_row)
        verdict = await self._recorder.submit(write).ready
        if verdict is Verdict.LATE:
            self._late = write
        elif verdict is Verdict.MISSING:
            self._recorded = False
        return verdict

    async def finish(self, patch: Mapping[str, Any], text: str, *, force: bool = False) -> Verdict:
        """Record an outcome, however long it takes.

        Args:
            force: also if the row does not show this attempt's start; as above.
        """
        if self._late is not None:
            late, self._late = self._late, None
            self._recorded = await late.settled is not Verdict.MISSING
        if not self._recorded:
            return Verdict.MISSING
        fence = None if force else self._started_at
        new_row = self._new_row if self._started_at is None else None
        write = Write(self._row_id, self._queue, patch, text, fence=fence, new_row=new_row)
        return await self._recorder.submit(write).settled
