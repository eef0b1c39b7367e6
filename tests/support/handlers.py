"""Handlers that tests share, and a task of one."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from autoflow_worker import TaskContext, TaskDefinition, TaskOptions, define_task

Json = dict[str, Any]
QUEUE = "users-send-welcome-email"
Handler = Callable[[Any, TaskContext], Awaitable[object]]


class Gate:
    """A handler that waits until it is opened, and then returns or raises."""

    def __init__(self, outcome: object = None) -> None:
        self.outcome = outcome
        self.opened = asyncio.Event()
        self.contexts: list[TaskContext] = []

    async def __call__(self, payload: Json, ctx: TaskContext) -> object:
        self.contexts.append(ctx)
        await self.opened.wait()
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


class MustNotRun:
    """A handler that must not run. An assertion inside of a handler would not reach the test."""

    def __init__(self) -> None:
        self.ran = False

    async def __call__(self, payload: Json, ctx: TaskContext) -> None:
        self.ran = True


async def hang(payload: Json, ctx: TaskContext) -> None:
    await asyncio.Event().wait()


def task(
    handler: Handler,
    queue: str = QUEUE,
    *,
    worker_options: Any = None,
    **options: Any,
) -> TaskDefinition[Any]:
    return define_task(queue, handler, TaskOptions(**options), worker_options=worker_options)
