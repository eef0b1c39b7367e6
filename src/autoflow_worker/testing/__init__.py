"""Helpers for an application's tests of its tasks; docs/testing.md shows them."""

from autoflow_worker.testing.embedded_worker import (
    EmbeddedServers,
    EmbeddedWorker,
    embedded_servers,
    worker_on_embedded_servers,
)
from autoflow_worker.testing.recording_scheduler import RecordingScheduler, ScheduledTask
from autoflow_worker.testing.run import TaskRun, run_task

__all__ = [
    "EmbeddedServers",
    "EmbeddedWorker",
    "RecordingScheduler",
    "ScheduledTask",
    "TaskRun",
    "embedded_servers",
    "run_task",
    "worker_on_embedded_servers",
]
