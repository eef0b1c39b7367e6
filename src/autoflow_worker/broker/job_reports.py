"""A job's progress and log lines in Redis."""

import json
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final

from bullmq import Worker

from autoflow_worker.broker.claim import Claim
from autoflow_worker.broker.client import PipelinedRedis
from autoflow_worker.broker.script_guard import guarded

# BullMQ's own script `addLog`, for several lines at once. bullmq's `Job.log` does not look whether
# the job still exists, and would leave a key behind that nobody deletes.
_APPEND_LOGS: Final = """
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
for number = 2, #ARGV do redis.call('RPUSH', KEYS[2], ARGV[number]) end
if ARGV[1] ~= '' then redis.call('LTRIM', KEYS[2], -tonumber(ARGV[1]), -1) end
return 1
"""


class JobReports:
    """Writes what the handlers of one queue report."""

    def __init__(self, worker: Worker, redis: PipelinedRedis) -> None:
        self._keys = worker.keys
        self._report_progress = worker.scripts.commands["updateProgress"]
        self._append_logs = redis.register_script(guarded(_APPEND_LOGS))

    async def progress(self, claim: Claim, progress: str) -> None:
        """Store a job's progress, and tell `QueueEvents`; nothing happens if the job is gone.

        Args:
            progress: JSON text.

        Raises:
            redis.exceptions.RedisError: nobody knows whether it is stored.
        """
        keys = [self._keys[""] + claim.id, self._keys["events"], self._keys["meta"]]
        await self._report_progress(keys=keys, args=[claim.id, progress])

    async def logs(self, claim: Claim, lines: Sequence[str]) -> None:
        """Append lines to a job's log, and drop the oldest beyond the job's option `keepLogs`.

        Raises:
            redis.exceptions.RedisError: nobody knows whether they are stored.
        """
        key = self._keys[""] + claim.id
        keep = claim.options.get("keepLogs") or ""
        await self._append_logs(keys=[key, key + ":logs"], args=[keep, *lines])


def last_progress(claim: Claim) -> Any:
    """Return what an earlier attempt reported last; see `read_progress`."""
    return read_progress(progress_text(claim))


def progress_text(claim: Claim) -> str:
    """Return the job's progress as BullMQ keeps it, which should be JSON."""
    return claim.fields.get("progress", "0")


def read_progress(text: str) -> Any:
    """Return a job's progress from its text; None if there is nothing, or nothing legible.

    BullMQ's number 0, which a job has before any report, is nothing.
    """
    with suppress(ValueError, RecursionError):
        return json.loads(text) or None
    return None
