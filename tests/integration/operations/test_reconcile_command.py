"""`reconcile` where a server refuses or goes away, and what the command prints."""

import asyncio
from collections.abc import Awaitable
from contextlib import aclosing
from typing import Any

import pytest
from click.testing import CliRunner
from redis.asyncio import Redis

from autoflow_worker.broker.client import PipelinedRedis
from autoflow_worker.broker.kept_job import JobReader
from autoflow_worker.cli import DIFFERENCES_LEFT, cli
from autoflow_worker.errors import (
    DatabaseUnavailableError,
    DatabaseUnfitError,
    RedisUnavailableError,
    RedisUnfitError,
)
from autoflow_worker.operations import reconcile
from autoflow_worker.operations.reconcile import Settling
from tests.support.api import Api
from tests.support.database import Connection, Database, new_task_id
from tests.support.process import WorkerStarter
from tests.support.reconciling import QUEUE, Compare
from tests.support.servers import OwnServer

# -- what stands in the way ----------------------------------------------------------------------


async def test_a_refused_change_costs_its_row_and_shows_nothing_of_it(
    compare: Compare, api: Api, database_url: str
) -> None:
    db = api.db
    refused, silent, locked, fine = [
        await db.insert_task(QUEUE, {"secret": "S3cr3t"}, task_id=f"{n}-{new_task_id()}")
        for n in range(4)
    ]
    await db.execute(
        "ALTER TABLE tasks ADD CONSTRAINT no_failures"
        f" CHECK (id <> '{refused}' OR data->>'status' <> 'failed')"
    )
    await db.execute(
        "CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'"
    )
    await db.execute(
        "CREATE TRIGGER keep BEFORE UPDATE ON tasks FOR EACH ROW"
        f" WHEN (OLD.id = '{silent}') EXECUTE FUNCTION keep()"
    )
    async with await Connection.connect(database_url) as holder:
        await holder.execute("SELECT FROM tasks WHERE id = %s FOR UPDATE", (locked,))
        found = await compare(fix=True, lost="fail")
    what = {row_id: one.what for row_id, one in found.items()}
    assert what == {
        refused: 'left: PostgreSQL refuses the change: new row for relation "tasks" violates check'
        ' constraint "no_failures"',
        silent: "left: PostgreSQL leaves the row as it is: a trigger or a policy",
        locked: "left: PostgreSQL refuses the change: canceling statement due to lock timeout",
        fine: "set failed",
    }
    assert found[refused].settling is Settling.LEFT


async def test_a_table_that_cant_be_written_is_told_once(compare: Compare, db: Database) -> None:
    await db.execute("ALTER TABLE tasks RENAME TO elsewhere")
    with pytest.raises(DatabaseUnfitError, match="there is no table 'tasks'"):
        await compare(fix=True)
    with pytest.raises(DatabaseUnfitError, match="tasks"):
        await compare()


@pytest.mark.parametrize("end", ["killed", "refuses"])
async def test_redis_goes_away_in_the_middle(
    end: str, own_redis: OwnServer, database_url: str, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autoflow_worker.operations.reconcile.SETTLING", 0.0)
    monkeypatch.setattr("autoflow_worker.operations.reconcile.SUSPECTS", 1)
    monkeypatch.setattr("autoflow_worker.broker.channel.CONNECT_PATIENCE", 1.0)
    await db.insert_tasks(QUEUE, {new_task_id(): {} for _ in range(1500)})
    client = PipelinedRedis(own_redis.url)
    await client.open(30)
    found = reconcile.reconcile(client, database_url, "bull", fix=True, lost="fail")
    async with aclosing(found):
        await anext(found)
        if end == "killed":
            await own_redis.kill()
            with pytest.raises(RedisUnavailableError, match="Redis went away"):
                _ = [difference async for difference in found]
        else:
            async with Redis.from_url(own_redis.url) as admin:
                await admin.acl_setuser("default", commands=["-evalsha"])
            with pytest.raises(RedisUnfitError, match="evalsha"):
                _ = [difference async for difference in found]
    await client.aclose()


async def test_postgresql_goes_away_in_the_middle(
    compare: Compare, api: Api, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await api.db.insert_task(QUEUE, {})
    look = JobReader.look

    async def look_and_cut(self: Any, *args: Any, **options: Any) -> Any:
        if options["fields"]:
            await api.db.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        return await look(self, *args, **options)

    monkeypatch.setattr(JobReader, "look", look_and_cut)
    with pytest.raises(DatabaseUnavailableError):
        await compare(fix=True, lost="fail")


# -- the command ---------------------------------------------------------------------------------


def command(redis_url: str, database_url: str, prefix: str, *arguments: str) -> tuple[int, str]:
    environment = {"REDIS_URL": redis_url, "DATABASE_URL": database_url, "BULLMQ_PREFIX": prefix}
    result = CliRunner().invoke(
        cli, ["reconcile", *arguments], env=environment, standalone_mode=False
    )
    assert result.exception is None, result.output
    code: int = result.return_value
    return code, result.output


async def test_the_command_says_what_it_would_do_and_did(
    redis_url: str, database_url: str, prefix: str, db: Database
) -> None:
    def run(*arguments: str) -> Awaitable[tuple[int, str]]:
        return asyncio.to_thread(command, redis_url, database_url, prefix, *arguments)

    code, output = await run()
    assert code == 0
    assert output == "every row that is not finished agrees with its job\n"
    task_id = await db.insert_task(QUEUE, {})
    assert DIFFERENCES_LEFT == 5

    code, output = await run()
    assert code == 5
    assert f"{QUEUE}: would leave: the job was removed from Redis" in output
    assert output.endswith("1 row differs: 1 left\n")
    code, output = await run("--fix")
    assert code == 5
    assert output.endswith("1 row differs: 1 left\n")
    code, output = await run("--lost", "requeue")
    assert code == 5
    assert f"{QUEUE}: would add the job again" in output
    assert output.endswith("1 row differs: 1 can be settled with --fix\n")
    code, output = await run("--fix", "--lost", "requeue")
    assert code == 0
    assert output.splitlines()[1].startswith(task_id)
    assert output.endswith("1 row differs: 1 settled\n")
    assert await run() == (0, "every row that is not finished agrees with its job\n")


async def test_the_command_ends_with_one_message_when_a_server_is_away(
    worker_process: WorkerStarter,
) -> None:
    process = worker_process(
        "", command="reconcile", REDIS_URL="redis://127.0.0.1:1", WORKER_STARTUP_TIMEOUT="0.2"
    )
    assert await process.wait() == 3
    assert process.stderr.startswith("autoflow-worker: Redis can't be reached")
    assert "Traceback" not in process.stderr
