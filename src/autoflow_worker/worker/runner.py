"""How a task runs its handler: in the event loop, in threads, or in processes."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from autoflow_worker.broker.claim import Claim
from autoflow_worker.tasks.context import TaskContext
from autoflow_worker.worker.time_limit import Wait


@dataclass(slots=True)
class Outcome:
    """What an attempt came to: a value, or an error, and how long the handler ran."""

    value: Any
    error: BaseException | None
    duration_ms: int


class Runner(Protocol):
    """One task's way to run its handler. A `TaskWorker` owns it, from `open` to `close`.

    Attributes:
        has_room: whether a job that is fetched now can be run at once.
        interrupts: whether a running handler can be ended; a thread can't.
    """

    @property
    def has_room(self) -> bool: ...
    @property
    def interrupts(self) -> bool: ...

    async def room(self) -> None:
        """Wait until a further job may be taken."""

    def payload(self, claim: Claim) -> Any:
        """Return what `run` takes as the payload.

        Raises:
            PayloadError: the data does not validate.
        """

    async def run(self, payload: Any, context: TaskContext, wait: Wait) -> Outcome:
        """Call the handler once, and wait for its end.

        Cancelling this coroutine cancels the handler.

        Args:
            wait: ends when the handler has ended, or when it is to be ended.

        Raises:
            asyncio.CancelledError: this coroutine was cancelled, and the handler did not return.
            Exception: the machine or the worker is at fault, and the handler was not called.
        """

    async def open(self, timeout: float) -> None:
        """Get ready, within so many seconds, before the first job is fetched.

        Raises:
            WorkerError: it can't get ready.
        """

    def stop(self) -> None:
        """Tell running handlers that the worker is stopping. May be called twice."""

    async def close(self, timeout: float) -> None:
        """Leave nothing behind, within so many seconds; no handler runs. May be called twice."""

    def deaths(self) -> Sequence[asyncio.Task[Any]]:
        """Return the tasks that never end before `close`."""
