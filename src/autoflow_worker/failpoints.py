"""Places at which a test can have the worker's process killed.

`AUTOFLOW_FAILPOINT=after-commit:3` kills it by SIGKILL when it passes `after-commit` for the third
time. Without that variable, which is read once, passing costs a call of an empty function.
"""

import asyncio
import itertools
import os
import signal
from collections.abc import Callable
from typing import Final

POINTS: Final = (
    "after-claim",  # BullMQ says active, the row does not yet
    "before-active-row",
    "after-active-row",
    "handler-start",
    "handler-end",
    "batch-sent",  # PostgreSQL has a batch of patches, and will commit it to nobody's knowledge
    "in-batch",  # a batch is committed, and none of its callers knows
    "after-commit",  # an outcome is committed, and BullMQ is not told
    "before-ack",
    "after-ack",  # BullMQ is told, and has perhaps given the next job
)
"""In the order of a job's life."""


def _ignore(_point: str) -> None:
    pass


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _armed(spec: str) -> Callable[[str], None]:
    armed, _, number = spec.partition(":")
    if armed not in POINTS:
        raise ValueError(f"AUTOFLOW_FAILPOINT names none of {', '.join(POINTS)}: {spec!r}")
    passes = itertools.count(1)
    fatal = int(number or 1)

    def pass_by(point: str) -> None:
        if point != armed or next(passes) != fatal:
            return
        if point == "batch-sent":
            # The statement leaves before its sender gives the event loop back.
            asyncio.get_running_loop().call_soon(_kill)
        else:
            _kill()

    return pass_by


_spec = os.environ.get("AUTOFLOW_FAILPOINT")
failpoint: Final = _armed(_spec) if _spec else _ignore
"""Called with the name of a point when it is passed."""
