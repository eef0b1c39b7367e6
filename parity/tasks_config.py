"""The task list of `autoflow-worker start`: a task for each queue of each scenario."""

from typing import Any, cast

import parity.scenarios  # noqa: F401 - its modules enter their scenarios into ALL
from autoflow_worker import TaskDefinition, TaskOptions, define_task
from autoflow_worker.tasks.worker_options import WorkerOptions
from parity.scenario import ALL, Json
from parity.script import STRATEGIES, act


def task(queue: str, options: Json) -> TaskDefinition[Any]:
    """Return the task of a queue whose worker has these options, by BullMQ's names."""
    given = dict(options)
    concurrency = given.pop("concurrency", 1)
    if backoff := given.pop("backoff", None):
        given["settings"] = {"backoffStrategy": STRATEGIES[backoff]}
    return define_task(
        queue,
        act,
        TaskOptions(timeout_ms=None, concurrency=concurrency),
        worker_options=cast(WorkerOptions, given),
    )


tasks = [
    task(queue, options) for scenario in ALL.values() for queue, options in scenario.queues.items()
]
