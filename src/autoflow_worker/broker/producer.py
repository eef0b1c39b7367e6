"""The producing side of BullMQ: add jobs, and retry failed ones, by bullmq's own scripts."""

from collections.abc import Mapping
from typing import Any, Final

from bullmq import Job, Queue

from autoflow_worker.broker.client import PipelinedRedis
from autoflow_worker.broker.script_guard import guard, guarded
from autoflow_worker.broker.scripts import PUT_BACK, PUT_BACK_KEYS
from autoflow_worker.clock import now_ms

KEPT_COMPLETED: Final = 100
KEPT_FAILED: Final = 500
"""How many finished jobs of a queue the API tells BullMQ to keep (contract, section 1)."""


class Producer:
    """Adds jobs to any queue, over one client.

    It never closes bullmq's queues, as each of them would close the client, which is the caller's.
    """

    def __init__(self, redis: PipelinedRedis, prefix: str) -> None:
        self._redis = redis
        self._prefix = prefix
        self._put_back = redis.register_script(guarded(PUT_BACK))
        self._queues: dict[str, Queue] = {}

    def queue(self, name: str) -> Queue:
        queue = self._queues.get(name)
        if queue is None:
            queue = Queue(name, {"connection": self._redis, "prefix": self._prefix})
            guard(queue.scripts.commands, self._redis.register_script)
            self._queues[name] = queue
        return queue

    def job(self, queue: str, data: Mapping[str, Any], options: Mapping[str, Any]) -> Job:
        """Make a job whose name is its queue's, as the API does; `add` adds it."""
        job = Job(self.queue(queue), queue, dict(data), dict(options))
        if not options.get("delay"):
            # Python's bullmq writes a delay of 0 into every job, Node's doesn't.
            del job.opts["delay"]
        return job

    async def add(self, job: Job) -> None:
        """Add the job, unless its queue has a job of that id.

        Raises:
            redis.exceptions.RedisError: the job is not added; if the connection broke, it may be.
        """
        await job.backend.addJob(job)

    async def retry_failed(self, queue: str, job_id: str) -> bool:
        """Move a failed job back to its queue, with its attempts reset; errors are those of `add`.

        Return False if the job is deleted, or not in `failed` any more.
        """
        owner = self.queue(queue)
        # bullmq needs only the id. The job's own fields may hold anything.
        stand_in = Job(owner, queue, {}, {"jobId": job_id})
        try:
            # `ats` stays: it counts the claims, which shows a worker whether it lost a job.
            await owner.backend.reprocessJob(stand_in, "failed", {"resetAttemptsMade": True})
        except TypeError:  # bullmq raises it if the job is not in `failed`.
            return False
        return True

    async def put_back(self, queue: str, job_id: str) -> bool:
        """Put a job that is in no list back into its queue; errors are those of `add`.

        Return False if it is in a list after all, or held, finished or deleted.
        """
        base = f"{self._prefix}:{queue}:"
        keys = [base + name for name in (f"{job_id}:lock", job_id, "active", *PUT_BACK_KEYS)]
        return bool(await self._put_back(keys=keys, args=[job_id, now_ms()]))
