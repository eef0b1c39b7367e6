"""The main job on every server version that this machine has, from the oldest served on."""

from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any

import pytest
from redis.asyncio import Redis

from autoflow_worker import TaskContext, TaskOptions, define_task
from autoflow_worker.broker.client import PipelinedRedis
from autoflow_worker.operations.reconcile import Settling, reconcile
from tests.support.api import Api, Json
from tests.support.database import Connection, Database, check_rows
from tests.support.node import Node
from tests.support.permissions import documented_rules
from tests.support.running import running
from tests.support.servers import OwnServer, postgres_programs, redis_programs
from tests.support.until import until

QUEUE = "users-send-welcome-email"

MakeServer = Callable[..., Awaitable[OwnServer]]


async def handler(payload: Json, ctx: TaskContext) -> object:
    if ctx.attempt <= payload["failures"]:
        raise ValueError(f"attempt {ctx.attempt}")
    return {"attempt": ctx.attempt}


async def run_some_jobs(api: Api, **where: Any) -> None:
    """Run a job of each kind; each has to end as the contract says, in both stores."""
    tasks = [define_task(QUEUE, handler, TaskOptions(concurrency=3))]
    await api.node.listen(QUEUE, "completed", "failed")
    async with running(tasks, **where):
        quick = await api.schedule(QUEUE, {"failures": 0})
        recovering = await api.schedule(QUEUE, {"failures": 2}, attempts=3, backoff=10)
        failing = await api.schedule(QUEUE, {"failures": 9}, attempts=2, backoff=10)
        delayed = await api.schedule(QUEUE, {"failures": 0}, delay=50)
        unknown = await api.node.add(QUEUE, {"failures": 0})
        rows = [
            await api.until_both_say(QUEUE, task_id, "completed")
            for task_id in (quick, recovering, delayed)
        ]
        rows.append(
            await api.until_both_say(QUEUE, unknown, "completed", row_id=f"{QUEUE}~{unknown}")
        )
        failed = await api.until_both_say(QUEUE, failing, "failed")
        await until(lambda: len(api.node.heard("completed")) == 4 and api.node.heard("failed"))
    assert [row["attempts"] for row in rows] == [1, 3, 1, 1]
    assert [row["result"]["output"] for row in rows] == [{"attempt": n} for n in (1, 3, 1, 1)]
    assert (failed["attempts"], failed["error"]["reason"]) == (2, "attempt 2")
    await reconcile_them(api, **where)
    await check_rows(api.db.url)


async def reconcile_them(api: Api, *, redis_url: str, database_url: str, prefix: str) -> None:
    """Have the rows set right after they were made to lie."""
    statuses = await api.db.statuses()
    await api.db.execute("""UPDATE tasks SET data = data || '{"status": "active"}'""")
    client = PipelinedRedis(redis_url)
    await client.open(30)
    async with aclosing(reconcile(client, database_url, prefix, fix=True)) as found:
        assert {difference.settling async for difference in found} == {Settling.DONE}
    await client.aclose()
    assert await api.db.statuses() == statuses


@pytest.mark.parametrize("name", ["redis-6.2", "valkey-8.1", "redis-8.2", "valkey-9.1"])
async def test_redis(
    name: str, make_redis: MakeServer, db: Database, database_url: str, prefix: str
) -> None:
    program = redis_programs().get(name)
    if program is None:
        pytest.skip(f"no wheel with {name} is installed")
    server = await make_redis(program=program, appendonly=False)
    # The worker's user has the documented rights and no other.
    async with Redis.from_url(server.url) as admin:
        rules = [rule.replace("~bull:", f"~{prefix}:") for rule in documented_rules()]
        command = ("ACL", "SETUSER", "autoflow", "reset", "on", ">secret", *rules)
        await admin.execute_command(*command)  # type: ignore[no-untyped-call]
    url = server.url.replace("redis://", "redis://autoflow:secret@")
    where = {"redis_url": url, "database_url": database_url, "prefix": prefix}
    async with Node(5, server.url, prefix) as node:
        await run_some_jobs(Api(db, node), **where)


@pytest.mark.parametrize("name", ["postgres-15", "postgres-16", "postgres-18"])
async def test_postgres(
    name: str, make_postgres: MakeServer, node5: Node, redis_url: str, prefix: str
) -> None:
    program = postgres_programs().get(name)
    if program is None:
        pytest.skip(f"neither this machine nor a wheel has {name}")
    server = await make_postgres(program=program)
    where = {"redis_url": redis_url, "database_url": server.url, "prefix": prefix}
    async with await Connection.connect(server.url, autocommit=True) as connection:
        await run_some_jobs(Api(Database(server.url, connection), node5), **where)
