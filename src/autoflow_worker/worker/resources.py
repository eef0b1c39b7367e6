"""What handlers share: each `lifespan` of the task list is entered once in a process."""

import asyncio
from collections.abc import Iterable
from typing import Any, Final

import structlog

from autoflow_worker.encoding.failures import reason_of, stack_trace_of
from autoflow_worker.errors import TaskListError
from autoflow_worker.tasks.definition import Lifespan

log = structlog.get_logger(__name__)

CANCEL_PATIENCE: Final = 0.1
"""Seconds that a lifespan has to end after it was cancelled."""


class Resources:
    """Enters lifespans before the first fetch, and leaves them after the drain.

    One asyncio task enters and leaves a lifespan, because cancel scopes, as anyio and `TaskGroup`
    have, must not be left by another task.
    """

    def __init__(self, lifespans: Iterable[Lifespan[Any] | None]) -> None:
        self._lifespans = dict.fromkeys(each for each in lifespans if each is not None)
        self._values: dict[Lifespan[Any], Any] = {}
        self._leave = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def open(self, timeout: float) -> None:
        """Enter the lifespans, in the order of the task list.

        Args:
            timeout: seconds for each of them.

        Raises:
            TaskListError: one raised, or did not yield in time.
        """
        for lifespan in self._lifespans:
            entered: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            task = asyncio.create_task(
                self._live(lifespan, entered), name=f"the lifespan {_name_of(lifespan)}"
            )
            self._tasks.append(task)
            await asyncio.wait({entered, task}, timeout=timeout, return_when="FIRST_COMPLETED")
            if entered.done():
                self._values[lifespan] = entered.result()
                continue
            if not task.done():
                fault = f"has not yielded after {timeout:g} s (WORKER_STARTUP_TIMEOUT)"
            elif not task.cancelled() and (error := task.exception()) is not None:
                log.error("lifespan_failed", reason=reason_of(error), stack=stack_trace_of(error))
                fault = f"raised {type(error).__name__}: {reason_of(error)}"
            else:
                fault = "ended without a yield"
            raise TaskListError(f"the lifespan {_name_of(lifespan)} {fault}")

    def of(self, lifespan: Lifespan[Any] | None) -> Any:
        """Return what a lifespan yielded; None without one."""
        return None if lifespan is None else self._values[lifespan]

    def deaths(self) -> list[asyncio.Task[None]]:
        """Return the tasks that never end before `close`."""
        return self._tasks

    async def close(self, timeout: float) -> None:
        """Leave the lifespans, and cut off those that take longer. May be called twice.

        Args:
            timeout: seconds for all of them.
        """
        self._leave.set()
        tasks, self._tasks = self._tasks, []
        if not tasks:
            return
        _, hanging = await asyncio.wait(tasks, timeout=timeout)
        for task in hanging:
            log.error("lifespan_cut_off", lifespan=task.get_name(), after_s=timeout)
            task.cancel()
        if hanging:
            await asyncio.wait(hanging, timeout=CANCEL_PATIENCE)
        for task in tasks:
            if task.done() and not task.cancelled() and (error := task.exception()) is not None:
                log.error("lifespan_failed", reason=reason_of(error), stack=stack_trace_of(error))

    async def _live(self, lifespan: Lifespan[Any], entered: asyncio.Future[Any]) -> None:
        async with lifespan() as value:
            entered.set_result(value)
            await self._leave.wait()


def _name_of(lifespan: Lifespan[Any]) -> str:
    return getattr(lifespan, "__qualname__", repr(lifespan))
