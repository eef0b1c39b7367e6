"""What the tests of `reconcile` share."""

from collections.abc import Callable, Coroutine
from typing import Any

from autoflow_worker import TaskContext, TaskOptions, UnrecoverableError, define_task
from autoflow_worker.operations.reconcile import Difference
from tests.support.database import Database

QUEUE = "reports-render"
ACTIVE = (
    '{"status": "active", "result": null, "error": null, "completedAt": null, "failedAt": null}'
)
Json = dict[str, Any]


async def render(payload: Json, ctx: TaskContext) -> object:
    if payload.get("bad"):
        raise UnrecoverableError("no such report")
    if payload.get("bad once") and ctx.job.attemptsStarted == 1:
        raise UnrecoverableError("not yet")
    return {"pages": 3}


TASK = define_task(QUEUE, render, TaskOptions(concurrency=5))

Compare = Callable[..., Coroutine[Any, Any, dict[str, Difference]]]


def told(found: dict[str, Difference]) -> dict[str, tuple[str, str, str]]:
    """What is said of each row."""
    return {row_id: (one.status, one.state, one.what) for row_id, one in found.items()}


async def set_rows(db: Database, patch: str, *ids: str) -> None:
    await db.execute("UPDATE tasks SET data = data || %s::jsonb WHERE id = ANY(%s)", patch, [*ids])
