"""Runs BullMQ jobs with Python handlers and records their status in PostgreSQL."""

from typing import TYPE_CHECKING, Any

from autoflow_worker.broker.libraries import mismatch_of_import
from autoflow_worker.errors import PayloadError, WorkerError

try:
    from autoflow_worker.tasks.batches import (
        BatchContext,
        BatchEndedError,
        BatchItem,
        BatchOptions,
    )
    from autoflow_worker.tasks.context import TaskCancelledError, TaskContext
    from autoflow_worker.tasks.definition import TaskDefinition, TaskOptions, define_task
    from autoflow_worker.tasks.exceptions import (
        DelayedError,
        RateLimited,
        RateLimitError,
        RetryLater,
        UnrecoverableError,
        WaitingChildrenError,
        WaitingError,
    )
    from autoflow_worker.tasks.job_handle import JobHandle
except ImportError as error:
    # bullmq 3.0 lacks names that are re-exported here.
    if mismatch := mismatch_of_import(error):
        raise mismatch from None
    raise

if TYPE_CHECKING:
    from autoflow_worker.scheduling.scheduler import TaskScheduler

__version__ = "0.1.0"

__all__ = [
    "BatchContext",
    "BatchEndedError",
    "BatchItem",
    "BatchOptions",
    "DelayedError",
    "JobHandle",
    "PayloadError",
    "RateLimitError",
    "RateLimited",
    "RetryLater",
    "TaskCancelledError",
    "TaskContext",
    "TaskDefinition",
    "TaskOptions",
    "TaskScheduler",
    "UnrecoverableError",
    "WaitingChildrenError",
    "WaitingError",
    "WorkerError",
    "__version__",
    "define_task",
]


def __getattr__(name: str) -> Any:
    # Imported on demand: it imports both servers' clients, which a module of tasks does not need.
    if name == "TaskScheduler":
        from autoflow_worker.scheduling.scheduler import TaskScheduler  # noqa: PLC0415

        return TaskScheduler
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
