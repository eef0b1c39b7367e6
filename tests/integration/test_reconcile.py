"""`autoflow-worker reconcile`: rows that lie, and what BullMQ knows."""

from typing import Any

from click.testing import CliRunner

from autoflow_worker import TaskContext, TaskOptions, UnrecoverableError, define_task
from autoflow_worker.cli import cli
from autoflow_worker.reconcile import GONE, Difference, reconcile, report
from autoflow_worker.redis_client import PipelinedRedis
from tests.support.api import Api
from tests.support.running import RunWorker

QUEUE = "reports-render"


async def render(payload: dict[str, Any], ctx: TaskContext) -> object:
    if payload.get("bad"):
        raise UnrecoverableError("no such report")
    return {"pages": 3}


TASK = define_task(QUEUE, render, TaskOptions(concurrency=5))


async def compare(redis_url: str, database_url: str, prefix: str, *, fix: bool) -> dict[str, Any]:
    client = PipelinedRedis(redis_url)
    await client.open(5)
    try:
        found = await reconcile(client, database_url, prefix, fix=fix)
    finally:
        await client.aclose()
    return {difference.row_id: difference for difference in found}


async def test_rows_that_an_older_worker_left_behind_get_what_bullmq_knows(
    redis_url: str, database_url: str, prefix: str, api: Api, run_worker: RunWorker
) -> None:
    db = api.db
    done = await api.schedule(QUEUE, {})
    bad = await api.schedule(QUEUE, {"bad": True})
    async with run_worker([TASK]):
        await db.until_status(done, "completed")
        await db.until_status(bad, "failed")
    told = {row_id: await db.row(row_id) or {} for row_id in (done, bad)}
    waiting = await api.schedule(QUEUE, {})
    lost = await db.insert_task(QUEUE, {})
    # As the Node worker leaves them: the job is over, and its row says `active` for ever.
    await db.execute(
        """UPDATE tasks SET data = data || '{"status": "active", "result": null, "error": null,
           "completedAt": null, "failedAt": null}' WHERE id = ANY(%s)""",
        [done, bad, waiting],
    )

    found = await compare(redis_url, database_url, prefix, fix=False)

    assert {row_id: (one.status, one.state) for row_id, one in found.items()} == {
        done: ("active", "completed"),
        bad: ("active", "failed"),
        waiting: ("active", "prioritized"),
        lost: ("pending", GONE),
    }
    assert await db.status(done) == "active", "without fix, nothing is written"

    found = await compare(redis_url, database_url, prefix, fix=True)

    assert {row_id for row_id, one in found.items() if one.fixed} == {done, bad, waiting}
    assert await db.status(waiting) == "pending"
    assert await db.status(lost) == "pending", "nobody knows what became of it"
    row, before = await db.row(done) or {}, told[done]
    assert (row["status"], row["result"]) == ("completed", before["result"])
    row, before = await db.row(bad) or {}, told[bad]
    assert row["status"] == "failed"
    assert row["error"]["reason"] == before["error"]["reason"] == "no such report"
    assert row["error"]["stackTrace"] == before["error"]["stackTrace"]
    assert await compare(redis_url, database_url, prefix, fix=True) == {lost: found[lost]}


async def test_a_healthy_system_has_no_differences(
    redis_url: str, database_url: str, prefix: str, api: Api
) -> None:
    await api.schedule(QUEUE, {})
    await api.schedule(QUEUE, {}, delay=3_600_000)

    assert await compare(redis_url, database_url, prefix, fix=True) == {}


def test_the_command_says_that_all_is_well(redis_url: str, database_url: str, prefix: str) -> None:
    environment = {
        "REDIS_URL": redis_url,
        "DATABASE_URL": database_url,
        "BULLMQ_PREFIX": prefix,
    }
    result = CliRunner().invoke(cli, ["reconcile"], env=environment, standalone_mode=False)
    assert result.return_value == 0, result.output
    assert "agrees" in result.output


def test_the_report_names_each_row_and_the_way_out() -> None:
    text = report(
        [
            Difference("a", "q", "active", "completed", None, {"status": "completed"}),
            Difference("b", "q", "pending", GONE, None, None),
        ]
    )
    assert "a    q      active        completed" in text
    assert "1 can be set right with --fix" in text
    assert "1 jobs are gone from Redis" in text
