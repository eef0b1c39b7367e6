"""What a worker is doing right now, read from the frames of its slots: it costs jobs nothing."""

import asyncio
import linecache
import time
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any

from autoflow_worker.broker.claim import Claim
from autoflow_worker.worker.attempt import Attempt
from autoflow_worker.worker.handler import execute


def running_jobs(queue: str, slots: Iterable[asyncio.Task[None]]) -> Iterator[dict[str, Any]]:
    """Describe the job of each slot that has one: its id, its seconds, where its handler waits.

    The stack of a handler that is no `async def` is that of its thread, and not told here.
    """
    now_ms = time.time_ns() // 1_000_000
    for slot in slots:
        frames = list(waiting_frames(slot.get_coro()))
        locals_of = {frame.f_code: frame.f_locals for frame in frames}
        run = locals_of.get(Attempt.run.__code__)
        claim = run and run.get("claim")
        if not isinstance(claim, Claim):
            continue
        handler = locals_of.get(execute.__code__, {}).get("handler")
        if isinstance(handler, asyncio.Task):
            frames = list(waiting_frames(handler.get_coro()))[1:]
        yield {
            "queue": queue,
            "task_id": claim.id,
            "attempt": claim.attempt,
            "seconds": round((now_ms - claim.claimed_ms) / 1000, 1),
            "stack": [_place(frame) for frame in frames],
        }


def waiting_frames(awaitable: Any) -> Iterator[FrameType]:
    """The frames of a coroutine that waits, and of what it waits for; the innermost last."""
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
