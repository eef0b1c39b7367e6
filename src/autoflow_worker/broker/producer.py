"""The producing side of BullMQ: bullmq's own scripts add jobs, and retry those that failed."""

from collections.abc import Mapping
from typing import Any, Final

from bullmq import Job, Queue

from autoflow_worker.broker.client import PipelinedRedis
from autoflow_worker.broker.script_guard import guard

KEPT_COMPLETED: Final = 100
KEPT_FAILED: Final = 500
"""How many finished jobs of a queue BullMQ keeps, as the API asks it to (contract, section 1)."""


class Producer:
    """Adds jobs to any queue, over one client.

    The queues are never closed: bullmq would close the client once for each of them.

    Args:
        redis: a client, which the caller opens and closes.
        prefix: BullMQ's key prefix.
    """

    def __init__(self, redis: PipelinedRedis, prefix: str) -> None:
        self._redis = redis
        self._prefix = prefix
        self._queues: dict[str, Queue] = {}

    def queue(self, name: str) -> Queue:
        """Bullmq's `Queue` of that name."""
        queue = self._queues.get(name)
        if queue is None:
            queue = Queue(name, {"connection": self._redis, "prefix": self._prefix})
            guard(queue.scripts.commands, self._redis.register_script)
            self._queues[name] = queue
        return queue

    def job(self, queue: str, data: Mapping[str, Any], options: Mapping[str, Any]) -> Job:
        """Make a job of that queue's name, as Node's producer would; it is not added yet."""
        job = Job(self.queue(queue), queue, dict(data), dict(options))
        if not options.get("delay"):
            # Python's bullmq writes a delay of 0 into every job, Node's doesn't.
            del job.opts["delay"]
        return job

    async def add(self, job: Job) -> None:
        """Add the job; one whose id is taken is left as it is.

        Raises:
            redis.exceptions.RedisError: not added; or, if the connection broke, nobody knows.
        """
        await job.backend.addJob(job)

    async def retry_failed(self, queue: str, job_id: str) -> bool:
        """Move a failed job back to its queue, with its attempts reset.

        Returns:
            False if the job is gone, or not among the failed any more.

        Raises:
            redis.exceptions.RedisError: as `add`.
        """
        owner = self.queue(queue)
        # By the id alone: whatever else the job's fields hold, it is among the failed.
        stand_in = Job(owner, queue, {}, {"jobId": job_id})
        try:
            # Never `ats`: it counts the claims, by which a worker tells whose the job is.
            await owner.backend.reprocessJob(stand_in, "failed", {"resetAttemptsMade": True})
        except TypeError:  # which is what bullmq raises then
            return False
        return True
