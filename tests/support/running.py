"""Run a `WorkerService` inside the test's own process."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Any, Protocol

from autoflow_worker import TaskDefinition
from autoflow_worker.service import WorkerService
from autoflow_worker.settings import Settings
from tests.support.until import PATIENCE, until

Tasks = Sequence[TaskDefinition[Any]]


def end_part(name: str) -> None:
    """Cancel the part of the service with this name, as if it died."""
    [part] = [task for task in asyncio.all_tasks() if task.get_name() == name]
    part.cancel()


class Running:
    """A running worker, made by `running()`.

    Attributes:
        service: the service itself.
        exit_code: the service's exit code; None while it runs.
    """

    def __init__(self, service: WorkerService) -> None:
        self.service = service
        self.exit_code: int | None = None
        self.stopping = asyncio.Event()
        self.aborting = asyncio.Event()
        self.may_end = False
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> int:
        self.exit_code = await self.service.run(self.stopping, self.aborting)
        return self.exit_code

    async def stop(self) -> int:
        """Stop the service and return its exit code. May be called twice.

        Raises:
            WorkerError: raised by the service.
        """
        self.stopping.set()
        return await asyncio.shield(self.task)

    async def abort(self) -> int:
        """Stop the service at once, which hands running jobs back."""
        self.aborting.set()
        return await self.stop()

    async def death(self) -> BaseException:
        """Wait until the service ends by itself, and return its error."""
        self.may_end = True
        await asyncio.wait({self.task})
        error = self.task.exception()
        assert error is not None, f"it ended with {self.exit_code}"
        return error


class RunWorker(Protocol):
    """The fixture `run_worker`: `running()` with the test's URLs and prefix."""

    def __call__(self, tasks: Tasks, **settings: Any) -> AbstractAsyncContextManager[Running]: ...


@asynccontextmanager
async def running(
    tasks: Tasks, *, redis_url: str, database_url: str, prefix: str, **settings: Any
) -> AsyncIterator[Running]:
    """Run a worker in this process until the end of the block.

    If the service ends by itself, the block is cancelled and the test fails, unless the block
    awaits `death()`.

    Args:
        tasks: the task list.
        settings: more attributes of `Settings`, such as `worker_concurrency=10`.

    Raises:
        WorkerError: the service does not start; the block is not entered.
    """
    given = {"worker_shutdown_grace": PATIENCE, "worker_startup_timeout": PATIENCE, **settings}
    service = WorkerService(
        Settings(redis_url=redis_url, database_url=database_url, bullmq_prefix=prefix, **given),
        tasks,
    )
    worker = Running(service)
    await until(lambda: worker.task.done() or service.is_working)
    if worker.task.done():
        worker.task.result()
        raise AssertionError(f"the worker ended at once, with {worker.exit_code}")
    block = asyncio.current_task()
    assert block is not None

    def leave_block(_: asyncio.Task[int]) -> None:
        if not (worker.stopping.is_set() or worker.may_end):
            block.cancel("the worker ended unasked")

    worker.task.add_done_callback(leave_block)
    try:
        yield worker
        if not worker.may_end:
            await worker.stop()
    except asyncio.CancelledError:
        if not worker.task.done() or worker.stopping.is_set():
            raise
        block.uncancel()
        raise AssertionError("the worker ended unasked") from worker.task.exception()
    finally:
        worker.stopping.set()
        worker.aborting.set()
        with suppress(Exception):
            await worker.task
