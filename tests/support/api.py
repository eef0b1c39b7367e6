"""The API's side of a task: its row in PostgreSQL and its job in BullMQ."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from tests.support.database import Database, new_task_id
from tests.support.node import Node, Scheduled
from tests.support.until import until

Json = dict[str, Any]

# The API's status for each of BullMQ's states (contract, section 3).
STATUS_OF_STATE = {
    "active": "active",
    "completed": "completed",
    "delayed": "delayed",
    "failed": "failed",
    "prioritized": "pending",
    "waiting": "pending",
    "waiting-children": "pending",
}


@dataclass
class Api:
    """Schedules tasks as the API does, and sees both stores."""

    db: Database
    node: Node

    async def schedule(
        self, queue: str, payload: Mapping[str, Any] | None = None, **options: Any
    ) -> str:
        """Insert the row, add the job, and return their id.

        Args:
            queue: the task's and the queue's name.
            payload: without `correlationId`.
            options: the other attributes of `Scheduled`.
        """
        job = Scheduled(payload or {}, **({"task_id": new_task_id()} | options))
        row: Json = {"maxAttempts": job.attempts, "priority": job.priority}
        if job.delay:
            due = datetime.now(UTC) + timedelta(milliseconds=job.delay)
            due_text = due.isoformat(timespec="milliseconds").replace("+00:00", "Z")
            row |= {"status": "delayed", "delayUntil": due_text}
        await self.db.insert_task(queue, job.payload, task_id=job.task_id, **row)
        await self.node.schedule_all(queue, [job])
        await self.db.execute(
            "UPDATE tasks SET data = data || jsonb_build_object('externalId', id) WHERE id = %s",
            job.task_id,
        )
        return job.task_id

    async def retry(self, queue: str, task_id: str, **options: Any) -> None:
        """Retry a failed task (contract, section 5): first its row, then a job under its id.

        BullMQ ignores the id of a job that it still keeps, and answers as if it had added it.

        Args:
            queue: the task's and the queue's name.
            task_id: the row's id.
            options: the other attributes of `Scheduled`.
        """
        row = await self.db.row(task_id)
        assert row is not None
        assert row["status"] == "failed", "the API retries only what has failed"
        await self.db.execute(
            """UPDATE tasks SET data = data ||
               '{"status": "pending", "attempts": 0, "failedAt": null, "error": null}'
               WHERE id = %s""",
            task_id,
        )
        options = {"priority": row["priority"], "attempts": row["maxAttempts"], **options}
        await self.node.schedule(queue, row["payload"], task_id=task_id, **options)

    async def until_both_say(
        self, queue: str, task_id: str, status: str, *, row_id: str | None = None
    ) -> Json:
        """Wait until row and job agree on a status; return the row's data."""
        row_id = row_id or task_id
        said: list[str | None] = []

        async def both() -> bool:
            state = await self.node.get_state(queue, task_id)
            said[:] = [await self.db.status(row_id), STATUS_OF_STATE.get(state, state)]
            return said == [status, status]

        await until(both, message=lambda: f"{status}; row and job say {said}")
        row = await self.db.row(row_id)
        assert row is not None
        return row
