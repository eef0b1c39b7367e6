"""The points of a job's life at which a worker's process can be killed.

The worker itself knows nothing of them: `arm` wraps the methods that stand at such a point.
"""

import asyncio
import itertools
import os
import signal
from collections.abc import Callable
from typing import Any, Final, Literal, NamedTuple

from autoflow_worker.broker.job_queue import JobQueue
from autoflow_worker.recording.batch import BatchWriter
from autoflow_worker.worker.attempt import Attempt
from autoflow_worker.worker.handler import LoopRunner
from autoflow_worker.worker.history import JobHistory

VARIABLE: Final = "CHAOS_CRASH_POINT"
"""`after-commit:3` has the process die when it passes `after-commit` for the third time."""


class CrashPoint(NamedTuple):
    """A point before or after a call.

    Attributes:
        when: before the call, or after it has returned without an error.
        owner: the class that has the methods.
        names: of the methods.
    """

    when: Literal["before", "after"]
    owner: type[Any]
    names: tuple[str, ...]


ACKNOWLEDGEMENTS: Final = ("complete", "fail", "delay", "retry", "postpone")

CRASH_POINTS: Final = {
    # BullMQ says active, the row does not yet.
    "after-claim": CrashPoint("before", Attempt, ("run",)),
    "before-active-row": CrashPoint("before", JobHistory, ("start",)),
    "after-active-row": CrashPoint("after", JobHistory, ("start",)),
    "handler-start": CrashPoint("before", LoopRunner, ("run",)),
    "handler-end": CrashPoint("after", LoopRunner, ("run",)),
    # PostgreSQL has a batch of patches; nobody will learn of its commit.
    "batch-sent": CrashPoint("before", BatchWriter, ("_update",)),
    # A batch is committed, and none of its callers knows.
    "in-batch": CrashPoint("after", BatchWriter, ("_update",)),
    # An outcome is committed, and BullMQ is not told.
    "after-commit": CrashPoint("after", JobHistory, ("finish",)),
    "before-ack": CrashPoint("before", JobQueue, ACKNOWLEDGEMENTS),
    # BullMQ is told, and has perhaps given the next job.
    "after-ack": CrashPoint("after", JobQueue, ACKNOWLEDGEMENTS),
}
"""In the order of a job's life."""


def arm(spec: str) -> None:
    """Have this process killed by SIGKILL when it passes a point.

    Args:
        spec: the point, and after a colon the number of the pass; the first one, if not given.

    Raises:
        ValueError: there is no such point.
    """
    name, _, number = spec.partition(":")
    if name not in CRASH_POINTS:
        raise ValueError(f"{spec!r} names none of {', '.join(CRASH_POINTS)}")
    passes = itertools.count(1)
    fatal = int(number or 1)

    def pass_by() -> None:
        if next(passes) != fatal:
            return
        if name == "batch-sent":
            # The statement leaves before its sender gives the event loop back.
            asyncio.get_running_loop().call_soon(_kill)
        else:
            _kill()

    when, owner, names = CRASH_POINTS[name]
    wrap = _before if when == "before" else _after
    for function in names:
        setattr(owner, function, wrap(getattr(owner, function), pass_by))


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _before(original: Callable[..., Any], pass_by: Callable[[], None]) -> Callable[..., Any]:
    def patched(*args: Any, **kwargs: Any) -> Any:
        pass_by()
        return original(*args, **kwargs)

    return patched


def _after(original: Callable[..., Any], pass_by: Callable[[], None]) -> Callable[..., Any]:
    async def patched(*args: Any, **kwargs: Any) -> Any:
        result = await original(*args, **kwargs)
        pass_by()
        return result

    return patched
