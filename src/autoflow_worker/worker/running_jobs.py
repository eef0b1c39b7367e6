"""What a worker is doing right now: each running job, and the line at which it waits."""

import asyncio
import linecache
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any

from autoflow_worker.broker.claim import Claim
from autoflow_worker.clock import now_ms
from autoflow_worker.worker.handler import task_name


def running_jobs(queue: str, slots: Mapping[Claim, asyncio.Task[None]]) -> Iterator[dict[str, Any]]:
    """Describe each running job: its id, its seconds, and where its handler waits.

    The stack of a handler that is no `async def` is that of its thread, which is not shown. Such a
    job shows where its slot waits.
    """
    tasks = {task.get_name(): task for task in asyncio.all_tasks()}
    for claim, slot in slots.items():
        handler = tasks.get(task_name(queue, claim.id))
        frames = list(waiting_frames((handler or slot).get_coro()))
        if handler is not None:
            del frames[0]  # The coroutine that contains the handler.
        yield {
            "queue": queue,
            "task_id": claim.id,
            "attempt": claim.attempt,
            "seconds": round((now_ms() - claim.claimed_ms) / 1000, 1),
            "stack": [_place(frame) for frame in frames],
        }


def waiting_frames(awaitable: Any) -> Iterator[FrameType]:
    """Yield the frames of a coroutine that waits, and of what it waits for, innermost last."""
    while awaitable is not None:
        inner = None
        for kind, waits_for in (("cr", "await"), ("gi", "yieldfrom"), ("ag", "await")):
            frame = getattr(awaitable, f"{kind}_frame", None)
            if isinstance(frame, FrameType):
                yield frame
                inner = getattr(awaitable, f"{kind}_{waits_for}", None)
                break
        awaitable = inner


def _place(frame: FrameType) -> str:
    code = frame.f_code
    line = linecache.getline(code.co_filename, frame.f_lineno).strip()
    return f"{code.co_filename}:{frame.f_lineno} {code.co_qualname}: {line}"
