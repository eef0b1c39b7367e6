"""Log rows that PostgreSQL refuses: once when they are refused, and once when they are written."""

import asyncio
from collections.abc import Sequence
from typing import Final

import structlog

from autoflow_worker.recording.faults import Blame, blame, facts_of
from autoflow_worker.recording.write import Write

log = structlog.get_logger(__name__)

MAX_REMEMBERED: Final = 1000
"""Rows that are remembered as refused. The oldest makes room for one more."""


class RefusedRows:
    """Remembers which rows were refused, so that each is logged once for all its tries."""

    def __init__(self) -> None:
        # Since when, by row and by the status of the patch: PostgreSQL may take a start and refuse
        # the outcome.
        self._rows: dict[str, dict[object, float]] = {}

    def note(self, write: Write, why: Exception | str) -> None:
        """Log that a row was refused, unless that is known.

        The error's DETAIL is left out, because it lists all columns of the row.

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
        """Log which of these rows had been refused before."""
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
