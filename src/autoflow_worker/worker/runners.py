"""Chooses a task's way to run its handler."""

from typing import Any

from autoflow_worker.tasks.definition import TaskDefinition
from autoflow_worker.worker.batch_runner import BatchRunner
from autoflow_worker.worker.handler import LoopRunner, ThreadRunner
from autoflow_worker.worker.processes import ProcessRunner
from autoflow_worker.worker.runner import Runner
from autoflow_worker.worker.time_limit import TimeLimit


def runner_for(
    task: TaskDefinition[Any], concurrency: int, limit: TimeLimit, tasks_config: str
) -> Runner:
    """Return the way in which a task runs its handler.

    Args:
        concurrency: calls of the handler at once.
        limit: the time limit of the task's attempts.
        tasks_config: the name by which another process imports the task list.
    """
    if task.options.run_in == "process":
        return ProcessRunner(task, tasks_config, concurrency, limit)
    runner = LoopRunner(task) if task.is_async else ThreadRunner(task, concurrency)
    if task.batch is None:
        return runner
    call_limit = TimeLimit(task.options.timeout_ms)
    return BatchRunner(runner, task.batch, call_limit, concurrency=concurrency)
