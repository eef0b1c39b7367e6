"""The worker without PostgreSQL's part: `python -m bench.unrecorded` is `autoflow-worker`.

Everything is as always, but the recorder answers at once that a status is written.
"""

import asyncio

from autoflow_worker import cli, service
from autoflow_worker.recorder import StatusRecorder
from autoflow_worker.writes import Verdict, Write


class InstantRecorder(StatusRecorder):
    """Takes every write for written."""

    async def open(self, timeout: float) -> None:
        """There is nothing to connect to."""

    def deaths(self) -> list[asyncio.Task[None]]:
        return []

    def submit(self, write: Write) -> Write:
        write.settle(Verdict.WRITTEN)
        return write


if __name__ == "__main__":
    service.StatusRecorder = InstantRecorder  # type: ignore[attr-defined]
    cli.main()
