"""The task lists of the section `handlers`: each has one kind of handler, in one queue."""

import time
from typing import Any

from autoflow_worker import TaskContext, TaskDefinition, TaskOptions, define_task

QUEUE = "q"
BUSY_S = 0.02
"""Seconds of CPU time that a busy handler takes."""

PROCESSES = 2


def _work() -> dict[str, Any]:
    ends = time.thread_time() + BUSY_S
    while time.thread_time() < ends:
        sum(range(1000))
    return {"ok": True}


async def work(_payload: dict[str, Any], _ctx: TaskContext) -> dict[str, Any]:
    return _work()


def work_sync(_payload: dict[str, Any], _ctx: TaskContext) -> dict[str, Any]:
    return _work()


async def nothing(_payload: dict[str, Any], _ctx: TaskContext) -> dict[str, Any]:
    return {"ok": True}


def nothing_sync(_payload: dict[str, Any], _ctx: TaskContext) -> dict[str, Any]:
    return {"ok": True}


_IN_PROCESSES = TaskOptions(run_in="process", concurrency=PROCESSES)

Tasks = list[TaskDefinition[Any, Any]]
busy_in_loop: Tasks = [define_task(QUEUE, work)]
busy_in_threads: Tasks = [define_task(QUEUE, work_sync)]
busy_in_processes: Tasks = [define_task(QUEUE, work_sync, _IN_PROCESSES)]
idle_in_loop: Tasks = [define_task(QUEUE, nothing)]
idle_in_threads: Tasks = [define_task(QUEUE, nothing_sync)]
idle_in_processes: Tasks = [define_task(QUEUE, nothing_sync, _IN_PROCESSES)]
