"""What a start refuses: one clear message, the right exit code, no traceback, no secret."""

from pathlib import Path
from textwrap import dedent
from typing import Any
from urllib.parse import urlsplit

import pytest
from redis.asyncio import Redis

from autoflow_worker.tasks.loader import EXAMPLE
from tests.support.configured import ConfiguredRedis, SentinelRedis
from tests.support.database import Connection, Database, other_database
from tests.support.pooler import TransactionPooler
from tests.support.process import WorkerProcess, WorkerStarter
from tests.support.servers import OwnServer, redis_programs
from tests.support.until import until

TASKS = """
    from autoflow_worker import define_task

    async def handler(payload, ctx): ...

    tasks = [define_task("mails", handler), define_task("reports", handler)]
"""
SECRET = "S3cr3t"


async def refusal(worker: WorkerProcess, code: int) -> str:
    """The only message of a start that was refused with this exit code."""
    assert await worker.wait() == code, worker.report()
    said = worker.stdout + worker.stderr
    assert worker.stderr.startswith("autoflow-worker: "), worker.report()
    assert said.count("autoflow-worker: ") == 1, worker.report()
    assert "Traceback" not in said
    assert SECRET not in said
    assert not worker.logged("worker_started")
    return worker.stderr.removeprefix("autoflow-worker: ").strip()


# -- settings and task list ----------------------------------------------------------------------


async def test_nothing_set(worker_process: WorkerStarter) -> None:
    unset: dict[str, Any] = dict.fromkeys(worker_process.env)
    message = await refusal(worker_process(None, **unset), 2)
    assert "REDIS_URL is not set" in message
    assert "DATABASE_URL is not set" in message
    assert "`autoflow-worker dev` starts a server of its own" in message


async def test_all_wrong_settings_at_once(worker_process: WorkerStarter) -> None:
    wrong = {
        "REDIS_URL": f"http://user:{SECRET}@localhost",
        "DATABASE_URL": f"postgresql://user:{SECRET}@localhost:port/db",
        "TASKS_CONFIG": "tasks",
        "WORKER_CONCURRENCY": "many",
        "WORKER_SHUTDOWN_GRACE": "-1",
        "WORKER_STARTUP_TIMEOUT": "soon",
        "DATABASE_POOL_MAX": "0",
        "RECORD_UNKNOWN_JOBS": "perhaps",
        "LOG_LEVEL": "loud",
        "LOG_FORMAT": "xml",
    }
    message = await refusal(worker_process(TASKS, **dict[str, Any](wrong)), 2)
    assert [name for name in wrong if f"- {name}=" not in message] == []
    assert message.count("\n") == len(wrong)


@pytest.mark.parametrize(
    "arguments",
    [["start"], ["check"], ["init-db"], ["reconcile"], ["schedule", "mails", "{}"]],
    ids=lambda arguments: arguments[0],
)
@pytest.mark.parametrize(
    "url",
    [f"postgresql://app:{SECRET}@{SECRET}@db:1/x", f"host=db user=app password={SECRET}"],
    ids=["@", "key=value"],
)
async def test_no_command_shows_a_part_of_a_password(
    worker_process: WorkerStarter, arguments: list[str], url: str
) -> None:
    command, *rest = arguments
    worker = worker_process(TASKS, *rest, command=command, DATABASE_URL=url)
    assert await worker.wait() == 2, worker.report()
    said = worker.stdout + worker.stderr
    assert "DATABASE_URL=" in said
    assert "it must be postgresql://" in said
    assert "Traceback" not in said
    assert SECRET not in said


@pytest.mark.parametrize(
    ("tasks", "arguments", "words"),
    [
        (TASKS, ["--tasks", "nowhere.tasks:all"], ["no module 'nowhere'"]),
        ("import nowhere", [], ["ModuleNotFoundError", "'nowhere'", "tasks_config.py, line 1"]),
        ("1 / 0", [], ["ZeroDivisionError", "tasks_config.py, line 1"]),
        ("tasks = [", [], ["SyntaxError", "tasks_config.py, line 1"]),
        (TASKS, ["--tasks", "tasks_config:other"], ["no attribute 'other'"]),
        ("tasks = []", [], ["is empty"]),
        ("tasks = ['mails']", [], ["item 0 is a str"]),
        (TASKS.replace("reports", "mails"), [], ["two tasks have the queue 'mails'"]),
        (TASKS.replace('"mails", handler', '"mails", "handler"'), [], ["'mails'", "handler must"]),
        (TASKS.replace("payload, ctx", "payload"), [], ["'mails'", "two arguments"]),
        (TASKS, ["--queues", "mails,nails"], ["'nails'", "'mails', 'reports'"]),
    ],
)
async def test_a_wrong_task_list(
    worker_process: WorkerStarter, tasks: str | None, arguments: list[str], words: list[str]
) -> None:
    message = await refusal(worker_process(tasks, *arguments), 2)
    assert [word for word in words if word not in message] == [], message
    assert "\n" not in message


async def test_no_task_list(worker_process: WorkerStarter) -> None:
    """The message says what to write; what it says is a task list."""
    message = await refusal(worker_process(None), 2)
    assert "no module 'tasks_config'" in message
    assert "--tasks or TASKS_CONFIG, or write tasks_config.py:\n" in message
    assert dedent(message.partition("\n\n")[2]) == EXAMPLE
    worker = worker_process(EXAMPLE)
    assert (await worker.until_logged("worker_started"))["queues"] == ["greetings"]
    worker.terminate()
    assert await worker.wait() == 0


# -- Redis ---------------------------------------------------------------------------------------


async def test_redis_can_not_be_reached(worker_process: WorkerStarter) -> None:
    url = f"redis://:{SECRET}@127.0.0.1:1/0"
    worker = worker_process(TASKS, REDIS_URL=url, WORKER_STARTUP_TIMEOUT="0.3")
    assert "Redis can't be reached within 0.3 s" in await refusal(worker, 3)


async def test_redis_asks_for_another_password(
    worker_process: WorkerStarter, own_redis: OwnServer
) -> None:
    async with Redis.from_url(own_redis.url) as client:
        await client.config_set("requirepass", "another")
    url = own_redis.url.replace("redis://", f"redis://:{SECRET}@")
    worker = worker_process(TASKS, REDIS_URL=url)
    assert "password" in await refusal(worker, 3)


async def test_redis_is_no_redis(worker_process: WorkerStarter, database_url: str) -> None:
    url = f"redis://:{SECRET}@127.0.0.1:{urlsplit(database_url).port}"
    worker = worker_process(TASKS, REDIS_URL=url, WORKER_STARTUP_TIMEOUT="0.3")
    assert "Redis can't be reached" in await refusal(worker, 3)


async def test_redis_is_a_replica(worker_process: WorkerStarter, own_redis: OwnServer) -> None:
    async with Redis.from_url(own_redis.url) as client:
        await client.replicaof("127.0.0.1", "1")
    message = await refusal(worker_process(TASKS, REDIS_URL=own_redis.url), 3)
    assert "read-only replica" in message


@pytest.mark.parametrize("program", ["redis-6.2", "valkey-8.1", "redis-8.2", "valkey-9.1"])
@pytest.mark.parametrize("number", ["0", "1"])
@pytest.mark.parametrize("kind", ["Sentinel", "cluster"])
async def test_redis_is_no_single_server(
    worker_process: WorkerStarter, kind: str, number: str, program: str
) -> None:
    executable = redis_programs().get(program)
    if executable is None:
        pytest.skip(f"no wheel with {program} is installed")
    options = {"cluster-enabled": "yes", "appendonly": "no"}
    made = (
        SentinelRedis(executable=executable)
        if kind == "Sentinel"
        else ConfiguredRedis(executable=executable, **options)
    )
    server = OwnServer(made)
    try:
        await server.start()
        url = server.url.removesuffix("0") + number
        worker = worker_process(TASKS, REDIS_URL=url, WORKER_STARTUP_TIMEOUT="60")
        assert kind in await refusal(worker, 3)
    finally:
        await server.close()


async def test_the_redis_user_lacks_rights(
    worker_process: WorkerStarter, own_redis: OwnServer, prefix: str
) -> None:
    async with Redis.from_url(own_redis.url) as client:
        await client.acl_setuser(
            "worker",
            enabled=True,
            passwords=[f"+{SECRET}"],
            keys=[f"{prefix}:mails:*"],
            commands=["-lpush", "-evalsha"],
            categories=["+@all"],
        )
    url = own_redis.url.replace("redis://", f"redis://worker:{SECRET}@")
    message = await refusal(worker_process(TASKS, REDIS_URL=url), 3)
    assert "may not run EVALSHA" in message
    assert "docs/permissions.md" in message
    checked = worker_process(TASKS, command="check", REDIS_URL=url)
    assert await checked.wait() == 3
    assert "may not run EVALSHA" in checked.stdout
    async with Redis.from_url(own_redis.url) as client:
        await client.acl_setuser("worker", enabled=True, commands=["+evalsha"])
        message = await refusal(worker_process(TASKS, REDIS_URL=url), 3)
        assert "may not run LPUSH" in message
        assert f"may not use the keys {prefix}:reports:*" in message


# -- PostgreSQL ----------------------------------------------------------------------------------


async def test_postgresql_can_not_be_reached(worker_process: WorkerStarter) -> None:
    url = f"postgresql://user:{SECRET}@127.0.0.1:1/autoflow"
    worker = worker_process(TASKS, DATABASE_URL=url, WORKER_STARTUP_TIMEOUT="0.3")
    message = await refusal(worker, 3)
    assert "PostgreSQL can't be reached" in message
    assert "waited 0.3 s" in message


async def test_the_table_is_missing(worker_process: WorkerStarter, db: Database) -> None:
    await db.execute("DROP TABLE tasks")
    message = await refusal(worker_process(TASKS), 3)
    assert "there is no table 'tasks'" in message
    assert "init-db" in message


async def test_the_table_is_of_another_shape(worker_process: WorkerStarter, db: Database) -> None:
    await db.execute("ALTER TABLE tasks ALTER data TYPE json")
    message = await refusal(worker_process(TASKS), 3)
    assert "tasks.data is of type json and has to be jsonb" in message


async def test_the_database_is_missing(worker_process: WorkerStarter, database_url: str) -> None:
    url = other_database(database_url, "nothing").replace("postgres@", f"postgres:{SECRET}@")
    message = await refusal(worker_process(TASKS, DATABASE_URL=url), 3)
    assert '"nothing" does not exist' in message


async def ask_for_passwords(server: OwnServer) -> str:
    """Let PostgreSQL ask for a user's password; the user's URL, with a wrong one."""
    rules = "host all app all scram-sha-256\nlocal all app scram-sha-256\n"
    async with await Connection.connect(server.url, autocommit=True) as connection:
        await connection.execute("CREATE ROLE app LOGIN PASSWORD 'right'")
        [[file]] = await (await connection.execute("SHOW hba_file")).fetchall()
        Path(file).write_text(rules + Path(file).read_text())  # noqa: ASYNC240 - a small file
        await connection.execute("SELECT pg_reload_conf()")
    user = urlsplit(server.url).username
    return server.url.replace(f"{user}@", f"app:{SECRET}@")


async def test_postgresql_asks_for_another_password(
    worker_process: WorkerStarter, own_postgres: OwnServer
) -> None:
    url = await ask_for_passwords(own_postgres)
    message = await refusal(worker_process(TASKS, DATABASE_URL=url), 3)
    assert "password authentication failed" in message


async def test_the_user_may_not_log_in(
    worker_process: WorkerStarter, db: Database, prefix: str
) -> None:
    await db.execute(f'CREATE ROLE "{prefix}" NOLOGIN')
    worker = worker_process(TASKS, DATABASE_URL=db.url.replace("postgres@", f"{prefix}@"))
    message = await refusal(worker, 3)
    await db.execute(f'DROP ROLE "{prefix}"')
    assert "is not permitted to log in" in message


async def test_rows_are_refused(worker_process: WorkerStarter, db: Database) -> None:
    await db.execute("ALTER TABLE tasks ADD COLUMN tenant text NOT NULL")
    message = await refusal(worker_process(TASKS), 3)
    assert 'null value in column "tenant"' in message
    checked = worker_process(TASKS, command="check")
    assert await checked.wait() == 3
    assert 'null value in column "tenant"' in checked.stdout
    checked = worker_process(TASKS, command="check", RECORD_UNKNOWN_JOBS="false")
    assert await checked.wait() == 0


async def test_a_pooler_deals_out_sessions(worker_process: WorkerStarter, db: Database) -> None:
    async with TransactionPooler(db.url) as pooler:
        message = await refusal(worker_process(TASKS, DATABASE_URL=pooler.url), 3)
        assert "PgBouncer in transaction or statement mode" in message
    # The pooler's session, which others use, has no options of ours.
    assert pooler.said.count(b"enable_seqscan") == 0


# -- no refusal ----------------------------------------------------------------------------------


async def test_a_table_that_is_locked_at_the_start_is_waited_for(
    worker_process: WorkerStarter, db: Database
) -> None:
    async with await Connection.connect(db.url) as migration:
        await migration.execute("LOCK TABLE tasks")
        worker = worker_process(TASKS, WORKER_STARTUP_TIMEOUT="60")

        async def waits() -> bool:
            return bool(
                await db.fetch(
                    "SELECT FROM pg_stat_activity"
                    " WHERE wait_event_type = 'Lock' AND application_name = 'autoflow-worker'"
                )
            )

        await until(waits, 30)
    await worker.until_logged("worker_started")
    worker.terminate()
    assert await worker.wait() == 0


async def test_servers_that_come_late_are_waited_for(
    worker_process: WorkerStarter, own_redis: OwnServer, own_postgres: OwnServer
) -> None:
    await own_redis.stop()
    await own_postgres.stop()
    worker = worker_process(TASKS, REDIS_URL=own_redis.url, DATABASE_URL=own_postgres.url)
    await own_postgres.start()
    await own_redis.start()
    await worker.until_logged("worker_started")
    worker.terminate()
    assert await worker.wait() == 0
