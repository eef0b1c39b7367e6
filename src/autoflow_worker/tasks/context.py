"""``TaskContext``: what a handler gets besides the payload."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from autoflow_worker.logs.configure import job_logger

if TYPE_CHECKING:
    from bullmq import Job
    from structlog.typing import FilteringBoundLogger


class TaskContext:
    """What a handler gets to know about its job, besides the payload.

    Attributes:
        task_id: the job's id, which is also the id of its row.
        correlation_id: the producer's, or a generated one.
        queue_name: the queue, which is the task's name.
        attempt: the number of this attempt, from 1.
        max_attempts: how many attempts the job has at most.
    """

    __slots__ = (
        "_job",
        "_make_job",
        "attempt",
        "correlation_id",
        "max_attempts",
        "queue_name",
        "task_id",
    )

    def __init__(
        self,
        *,
        task_id: str,
        correlation_id: str,
        queue_name: str,
        attempt: int = 1,
        max_attempts: int = 1,
        job: "Job" = None,
        make_job: "Callable[[], Job] | None" = None,
    ) -> None:
        self.task_id = task_id
        self.correlation_id = correlation_id
        self.queue_name = queue_name
        self.attempt = attempt
        self.max_attempts = max_attempts
        self._job = job
        self._make_job = make_job

    @property
    def job(self) -> "Job":
        """The bullmq ``Job``, for progress, logs, children and moves; made at the first access."""
        if self._job is None and self._make_job is not None:
            self._job = self._make_job()
        return self._job

    @property
    def logger(self) -> "FilteringBoundLogger":
        """A structlog logger that is bound to this context's attributes; made at each access."""
        return job_logger(
            task_id=self.task_id,
            queue_name=self.queue_name,
            attempt=self.attempt,
            max_attempts=self.max_attempts,
            correlation_id=self.correlation_id,
        )
