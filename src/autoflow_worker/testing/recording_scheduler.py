"""``RecordingScheduler``: a `TaskScheduler` that notes what an application schedules."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Self, TypeVar

from pydantic_core import to_jsonable_python

from autoflow_worker.scheduling.jobs import job_data, job_options
from autoflow_worker.scheduling.scheduler import TaskScheduler
from autoflow_worker.tasks.definition import CORRELATION_ID, TaskDefinition
from autoflow_worker.testing.run import TaskRun, run_task

P = TypeVar("P")

MAX_RUNS: Final = 100
"""Runs of one task, after which `drain` gives up on it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduledTask:
    """One call of ``schedule``.

    Attributes:
        task_id: the id that the call returned.
        task: what was scheduled.
        payload: as its row and its job have it, in JSON's own types.
        correlation_id: the one that was given, or a generated one.
        delay_ms: milliseconds until its first run.
        user_id: whose task it is.
    """

    task_id: str
    task: TaskDefinition[Any]
    payload: Mapping[str, Any]
    correlation_id: str
    delay_ms: int
    user_id: str | None


class RecordingScheduler(TaskScheduler):
    """Takes a ``TaskScheduler``'s place in a test: it notes the tasks, and can run them.

    It may be used with or without ``async with``.

    Attributes:
        scheduled: what was scheduled, in order.
    """

    def __init__(self) -> None:
        self.scheduled: list[ScheduledTask] = []
        self._waiting: deque[ScheduledTask] = deque()

    async def __aenter__(self) -> Self:
        return self

    async def open(self, timeout: float = 0) -> None:
        """Return at once."""

    async def close(self) -> None:
        """Return at once; what was scheduled stays."""

    async def schedule(
        self,
        task: TaskDefinition[P],
        payload: P | Mapping[str, object],
        *,
        delay_ms: int | None = None,
        user_id: str | None = None,
        correlation_id: str | None = None,
    ) -> str:
        """Note a task, and return its id; see ``TaskScheduler.schedule``.

        Raises:
            PayloadError: the payload does not validate; nothing was noted.
            WorkerError: the delay is out of range.
        """
        options = job_options(task, delay_ms)
        data = job_data(task, payload, correlation_id)
        task.parse_payload(data)
        correlation_id = data.pop(CORRELATION_ID)
        noted = ScheduledTask(
            task_id=options["jobId"],
            task=task,
            payload=data,
            correlation_id=str(correlation_id),
            delay_ms=options["delay"],
            user_id=user_id,
        )
        self.scheduled.append(noted)
        self._waiting.append(noted)
        return noted.task_id

    def assert_scheduled(self, task: TaskDefinition[Any], /, **fields: object) -> ScheduledTask:
        """Check that a task was scheduled with these fields in its payload; return the first such.

        Args:
            fields: by their names in JSON; the payload may have others as well.

        Raises:
            AssertionError: it was not; the message says what was scheduled.
        """
        wanted = to_jsonable_python(fields, by_alias=True, round_trip=True)
        for noted in self.scheduled:
            if noted.task.queue_name == task.queue_name and wanted.items() <= noted.payload.items():
                return noted
        lines = [f"  {noted.task.queue_name} {dict(noted.payload)}" for noted in self.scheduled]
        raise AssertionError(
            f"{task.queue_name} was not scheduled with {wanted}; scheduled were:\n"
            + ("\n".join(lines) or "  nothing")
        )

    async def drain(self, *, resources: object = None) -> list[TaskRun]:
        """Run what was scheduled since the last drain, and what that schedules with this scheduler.

        The tasks run one after the other, in the order in which they were scheduled. A delay, a
        backoff and a rate limit are not waited for: the next run follows at once.

        Args:
            resources: ``ctx.resources`` of all of them; see ``run_task``.

        Returns:
            The last run of each task.

        Raises:
            AssertionError: a task asks to run again, 100 times.
        """
        runs = []
        while self._waiting:
            runs.append(await self._run(self._waiting.popleft(), resources))
        return runs

    async def _run(self, noted: ScheduledTask, resources: object) -> TaskRun:
        attempt, progress = 1, None
        for _ in range(MAX_RUNS):
            run = await run_task(
                noted.task,
                noted.payload,
                attempt=attempt,
                resources=resources,
                correlation_id=noted.correlation_id,
                last_progress=progress,
                task_id=noted.task_id,
            )
            if run.retry_in_ms is None:
                return run
            attempt += run.outcome == "retry"
            progress = run.progress[-1] if run.progress else progress
        raise AssertionError(
            f"{noted.task.queue_name} was still to run again after {MAX_RUNS} runs: {run.outcome}"
        )
