"""Runs BullMQ jobs with Python handlers and records their status in PostgreSQL."""

from autoflow_worker.errors import WorkerError
from autoflow_worker.task import (
    DelayedError,
    TaskContext,
    TaskDefinition,
    TaskOptions,
    UnrecoverableError,
    WaitingChildrenError,
    define_task,
)

__version__ = "0.1.0"

__all__ = [
    "DelayedError",
    "TaskContext",
    "TaskDefinition",
    "TaskOptions",
    "UnrecoverableError",
    "WaitingChildrenError",
    "WorkerError",
    "__version__",
    "define_task",
]
