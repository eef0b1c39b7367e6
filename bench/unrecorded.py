"""The worker without PostgreSQL's part: `python -m bench.unrecorded` is `autoflow-worker`.

Everything is as always, but nothing is written about a job, and nobody waits for it.
"""

import asyncio
from typing import Any

from autoflow_worker import cli, service
from autoflow_worker.recording.recorder import StatusRecorder
from autoflow_worker.recording.write import Verdict
from autoflow_worker.worker import task_worker


class NoRecorder(StatusRecorder):
    """Connects to nothing."""

    async def open(self, timeout: float) -> None:
        pass

    def deaths(self) -> list[asyncio.Task[None]]:
        return []


class NoHistory:
    """Treats every outcome as written."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    async def start(self) -> Verdict:
        return Verdict.WRITTEN

    async def finish(self, _patch: Any) -> Verdict:
        return Verdict.WRITTEN

    complete = follow = finish


if __name__ == "__main__":
    service.StatusRecorder = NoRecorder  # type: ignore[attr-defined]
    task_worker.JobHistory = NoHistory  # type: ignore[attr-defined, assignment]
    cli.main()
