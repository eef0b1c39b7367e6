"""What the log says of rows that PostgreSQL does not take: once, and when they are written."""

import asyncio
from collections.abc import Sequence
from typing import Final

import structlog

from autoflow_worker.recording.faults import Blame, blame, facts_of
from autoflow_worker.recording.write import Write

log = structlog.get_logger(__name__)

MAX_REMEMBERED: Final = 1000
"""Rows that are remembered as refused; the oldest is forgotten for one more, and said again."""


class RefusedRows:
    """Remembers which rows were refused, so that each is said once, however often it is tried."""

    def __init__(self) -> None:
        # Since when, by row, and by the status that was to be written: a start may well be written
        # while the outcome is refused.
        self._rows: dict[str, dict[object, float]] = {}

    def note(self, write: Write, why: Exception | str) -> None:
        """Say that a row was refused, if that is news.

        Never with DETAIL, which lists all columns of the row.

        Args:
            why: the error; or a reason in words.
        """
        known = self._rows.get(write.row_id)
        if known is None:
            if len(self._rows) >= MAX_REMEMBERED:
                del self._rows[next(iter(self._rows))]
            known = self._rows[write.row_id] = {}
            _say(write, why)
        known.setdefault(write.patch.get("status"), asyncio.get_running_loop().time())

    def note_written(self, writes: Sequence[Write]) -> None:
        """Say which of these rows had been refused before."""
        if not self._rows:
            return
        for write in writes:
            known = self._rows.get(write.row_id, {})
            since = known.pop(write.patch.get("status"), None)
            if since is not None and not known:
                del self._rows[write.row_id]
                refused_s = asyncio.get_running_loop().time() - since
                log.warning("row_written_at_last", row=write.row_id, after_s=round(refused_s, 1))


def _say(write: Write, why: Exception | str) -> None:
    if isinstance(why, str):
        log.error("row_refused", row=write.row_id, reason=why)
    else:
        traceback = {"exc_info": why} if blame(why) is Blame.CODE else {}
        log.error("row_refused", row=write.row_id, **facts_of(why), **traceback)
