"""What ``ctx.job`` is where no job is in Redis."""

from typing import Any, NoReturn

from autoflow_worker.clock import now_ms
from autoflow_worker.encoding.cleaner import clean_text
from autoflow_worker.encoding.results import storable
from autoflow_worker.errors import NeedsServersError


class StandInJob:
    """The facts of a new job, its progress and its log; see `JobHandle`.

    Attributes:
        reports: each value that was reported as progress.
        logs: each line of the job's log.
    """

    prefix = "bull"
    parent = None
    parentKey = None
    repeatJobKey = None
    deduplicationId = None
    failedReason = None
    stalledCounter = 0
    processedBy = None

    def __init__(
        self, queue_name: str, data: dict[str, Any], options: dict[str, Any], attempt: int
    ) -> None:
        self.id: str = options["jobId"]
        self.name = self.queueName = queue_name
        self.queueQualifiedName = f"{self.prefix}:{queue_name}"
        self.data: Any = data
        self.opts = options
        self.token = self.id
        self.progress: Any = 0
        self.timestamp = self.processedOn = now_ms()
        self.delay: int = options["delay"]
        self.priority: int = options["priority"]
        self.attemptsMade = attempt - 1
        self.attemptsStarted = attempt
        self.stacktrace: list[str] = []
        self.reports: list[Any] = []
        self.logs: list[str] = []
        self.discarded = False

    async def updateProgress(self, progress: object) -> None:
        self.report(progress)
        self.progress = progress

    async def updateData(self, data: Any) -> None:
        self.data = storable(data)

    async def log(self, logRow: str) -> int:
        self.append(logRow)
        return len(self.logs)

    def discard(self) -> None:
        self.discarded = True

    def report(self, value: object) -> None:
        """Note progress; raises NotStorableError."""
        self.reports.append(storable(value))

    def append(self, line: str) -> None:
        """Note a line of the log."""
        self.logs.append(clean_text(str(line)))

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        raise NeedsServersError(
            f"ctx.job.{name} needs a job in Redis, which run_task does not have: test this handler "
            "with worker_on_embedded_servers"
        )
