"""Making the tasks table, and judging it before a start."""

import asyncio
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
import pytest

from autoflow_worker.errors import DatabaseUnavailableError, DatabaseUnfitError
from autoflow_worker.local.embedded import free_port
from autoflow_worker.recording.table import init_db, inspect_tasks_table
from autoflow_worker.recording.write import Verdict
from tests.support.database import Connection, Database, other_database
from tests.support.pooler import TransactionPooler
from tests.support.recording import QUEUE, active, recording, submit, write
from tests.support.servers import OwnServer
from tests.support.until import until


async def test_the_apis_table_will_do(db: Database) -> None:
    assert (await inspect_tasks_table(db.url)).split(".")[0].isdigit()


async def test_init_db_makes_what_is_missing(db: Database) -> None:
    indexes = "SELECT indexname FROM pg_indexes WHERE tablename = 'tasks' ORDER BY 1"
    wanted = await db.fetch(indexes)
    await db.execute("DROP TABLE tasks")
    await asyncio.gather(*(init_db(db.url) for _ in range(4)))
    await inspect_tasks_table(db.url)
    assert await db.fetch(indexes) == wanted


async def test_init_db_changes_nothing_that_is_there(db: Database) -> None:
    task_id = await db.insert_task("mails")
    await db.execute("ALTER TABLE tasks ADD COLUMN more text")
    await init_db(db.url)
    assert await db.row(task_id) is not None
    await db.execute("SELECT more FROM tasks")


async def test_a_table_that_is_not_there(db: Database) -> None:
    await db.execute("DROP TABLE tasks")
    with pytest.raises(DatabaseUnfitError, match=r"no table 'tasks': .*init-db"):
        await inspect_tasks_table(db.url)


async def test_every_fault_of_the_table_is_told_at_once(db: Database) -> None:
    await db.execute("DROP TABLE tasks")
    await db.execute("CREATE TABLE tasks (id bigint, data json, created_at date)")
    with pytest.raises(DatabaseUnfitError) as caught:
        await inspect_tasks_table(db.url)
    faults = str(caught.value).split("; ")
    assert faults == [
        "tasks.id is of type bigint and has to be text",
        "tasks.data is of type json and has to be jsonb",
        "tasks.created_at is of type date and has to be timestamp without time zone",
        "tasks has no column updated_at",
        "tasks.id has to be the primary key",
    ]


async def test_more_columns_and_other_text_types_will_do(db: Database) -> None:
    await db.execute("ALTER TABLE tasks ADD COLUMN more int, ALTER COLUMN id TYPE varchar(64)")
    await inspect_tasks_table(db.url)


async def test_a_view_is_not_a_table(db: Database) -> None:
    await db.execute("ALTER TABLE tasks RENAME TO real_tasks")
    await db.execute("CREATE VIEW tasks AS SELECT * FROM real_tasks")
    with pytest.raises(DatabaseUnfitError, match="tasks is not a table"):
        await inspect_tasks_table(db.url)


async def test_missing_privileges_and_a_read_only_database(db: Database, prefix: str) -> None:
    role = f'"{prefix}"'
    await db.execute(f"CREATE ROLE {role} LOGIN")
    try:
        await db.execute(f"GRANT USAGE ON SCHEMA public TO {role}")
        await db.execute(f"GRANT SELECT ON tasks TO {role}")
        await db.execute(f"ALTER ROLE {role} SET default_transaction_read_only = on")
        with pytest.raises(DatabaseUnfitError) as caught:
            await inspect_tasks_table(db.url.replace("postgres@", f"{prefix}@"))
        assert "PostgreSQL is read-only" in str(caught.value)
        assert "the user lacks INSERT, UPDATE on tasks" in str(caught.value)
        with pytest.raises(DatabaseUnfitError, match="PostgreSQL refused"):
            await init_db(db.url.replace("postgres@", f"{prefix}@"))
    finally:
        await db.execute(f"DROP OWNED BY {role}")
        await db.execute(f"DROP ROLE {role}")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("127.0.0.1", "127.0.0.2"), "127.0.0.2"),
        (("127.0.0.1", "no-such-host.invalid"), "no-such-host.invalid"),
    ],
)
async def test_a_server_that_is_not_there(
    database_url: str, change: tuple[str, str], reason: str
) -> None:
    url = database_url.replace(*change).replace("postgres@", "postgres:S3cr3t@")
    with pytest.raises(DatabaseUnavailableError) as caught:
        await inspect_tasks_table(url, patience=2)
    assert reason in str(caught.value)
    assert "S3cr3t" not in str(caught.value)
    assert "\n" not in str(caught.value)


async def test_a_database_that_is_not_there(database_url: str) -> None:
    with pytest.raises(DatabaseUnavailableError, match='"nothing" does not exist'):
        await inspect_tasks_table(other_database(database_url, "nothing"))


async def test_a_server_that_hangs(own_postgres: OwnServer) -> None:
    async with await Connection.connect(own_postgres.url):
        own_postgres.suspend()
        try:
            with pytest.raises(DatabaseUnavailableError):
                await inspect_tasks_table(own_postgres.url, patience=0.5)
        finally:
            own_postgres.resume()


# -- what only a write shows -----------------------------------------------------------------------


async def refusal(db: Database, *, new_rows: bool = True) -> str:
    """Why statuses can't be kept there."""
    with pytest.raises(DatabaseUnfitError) as caught:
        await inspect_tasks_table(db.url, new_rows=new_rows)
    assert "Failing row" not in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


async def test_nothing_is_left_of_the_row_that_was_tried(db: Database) -> None:
    await db.execute("CREATE TABLE told (id text)")
    await db.execute(
        "CREATE FUNCTION tell() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN INSERT INTO told VALUES (NEW.id); RETURN NEW; END $$"
    )
    await db.execute(
        "CREATE TRIGGER tell BEFORE INSERT OR UPDATE ON tasks FOR EACH ROW EXECUTE FUNCTION tell()"
    )
    await inspect_tasks_table(db.url)
    await inspect_tasks_table(db.url, new_rows=False)
    assert await db.rows() == {}
    assert await db.fetch("SELECT * FROM told") == []


async def test_a_column_that_the_worker_does_not_know(db: Database) -> None:
    await db.execute("ALTER TABLE tasks ADD COLUMN tenant text NOT NULL")
    message = await refusal(db)
    assert 'null value in column "tenant"' in message
    assert "RECORD_UNKNOWN_JOBS=false" in message
    # The API fills the column, and the worker makes no rows.
    await inspect_tasks_table(db.url, new_rows=False)


async def test_a_constraint_that_refuses_a_status(db: Database) -> None:
    await db.execute("ALTER TABLE tasks ADD CHECK (data->>'status' <> 'completed')")
    message = await refusal(db)
    assert "a row's status 'completed'" in message
    assert "check constraint" in message


async def make_trigger(db: Database, when: str, body: str) -> None:
    await db.execute(
        f"CREATE FUNCTION act() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {body} END $$"
    )
    await db.execute(
        f"CREATE TRIGGER act BEFORE {when} ON tasks FOR EACH ROW EXECUTE FUNCTION act()"
    )


async def test_a_trigger_that_raises(db: Database) -> None:
    await make_trigger(db, "UPDATE", "RAISE EXCEPTION 'no updates on Sundays';")
    assert "no updates on Sundays" in await refusal(db)


@pytest.mark.parametrize("when", ["INSERT", "UPDATE"])
async def test_a_trigger_that_leaves_rows_out(db: Database, when: str) -> None:
    await make_trigger(db, when, "RETURN NULL;")
    assert "without an error" in await refusal(db)


async def test_row_level_security(db: Database, prefix: str) -> None:
    role = f'"{prefix}"'
    await db.execute(f"CREATE ROLE {role} LOGIN")
    try:
        await db.execute(f"GRANT USAGE ON SCHEMA public TO {role}")
        await db.execute(f"GRANT SELECT, INSERT, UPDATE ON tasks TO {role}")
        await db.execute("ALTER TABLE tasks ENABLE ROW LEVEL SECURITY")
        await db.execute("CREATE POLICY seen ON tasks FOR SELECT USING (true)")
        await db.execute("CREATE POLICY new ON tasks FOR INSERT WITH CHECK (true)")
        theirs = Database(db.url.replace("postgres@", f"{prefix}@"), db.connection)
        assert "status 'active'" in await refusal(theirs)
        await db.execute("CREATE POLICY changed ON tasks FOR UPDATE USING (true)")
        await inspect_tasks_table(theirs.url)
    finally:
        await db.execute(f"DROP OWNED BY {role}")
        await db.execute(f"DROP ROLE {role}")


async def test_the_right_to_insert_is_needed_for_new_rows_only(db: Database, prefix: str) -> None:
    role = f'"{prefix}"'
    await db.execute(f"CREATE ROLE {role} LOGIN")
    try:
        await db.execute(f"GRANT USAGE ON SCHEMA public TO {role}")
        await db.execute(f"GRANT SELECT, UPDATE ON tasks TO {role}")
        theirs = Database(db.url.replace("postgres@", f"{prefix}@"), db.connection)
        assert "the user lacks INSERT on tasks" in await refusal(theirs)
        await inspect_tasks_table(theirs.url, new_rows=False)
        await db.execute(f"REVOKE UPDATE ON tasks FROM {role}")
        assert "the user lacks UPDATE on tasks" in await refusal(theirs, new_rows=False)
    finally:
        await db.execute(f"DROP OWNED BY {role}")
        await db.execute(f"DROP ROLE {role}")


async def test_a_table_that_is_locked_is_not_waited_for_without_end(db: Database) -> None:
    async with await Connection.connect(db.url) as migration:
        await migration.execute("LOCK TABLE tasks")
        with pytest.raises(DatabaseUnavailableError, match="lock timeout"):
            await inspect_tasks_table(db.url, patience=0.5)
    await inspect_tasks_table(db.url)


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
async def test_a_database_of_another_encoding(db: Database, prefix: str, encoding: str) -> None:
    name = f'"{prefix}-{encoding}"'
    await db.execute(
        f"CREATE DATABASE {name} ENCODING '{encoding}' TEMPLATE template0"
        " LC_COLLATE 'C' LC_CTYPE 'C'"
    )
    try:
        url = other_database(db.url, f"{prefix}-{encoding}")
        await init_db(url)
        with pytest.raises(DatabaseUnfitError, match=f"encoding is {encoding}.*UTF8"):
            await inspect_tasks_table(url)
    finally:
        await db.execute(f"DROP DATABASE {name}")


# -- poolers ---------------------------------------------------------------------------------------


async def test_a_pooler_that_deals_out_sessions(db: Database) -> None:
    async with TransactionPooler(db.url) as pooler:
        with pytest.raises(DatabaseUnfitError, match="PgBouncer in transaction"):
            await inspect_tasks_table(pooler.url)


PGBOUNCER = shutil.which("pgbouncer") or shutil.which("/usr/sbin/pgbouncer")


@pytest.mark.skipif(PGBOUNCER is None, reason="pgbouncer is not installed")
@pytest.mark.parametrize("sessions", [1, 5])
@pytest.mark.parametrize("mode", ["session", "transaction", "statement"])
async def test_pgbouncer(db: Database, tmp_path: Path, mode: str, sessions: int) -> None:
    async with pgbouncer(db.url, tmp_path, mode, sessions) as url:
        if mode == "session":
            await inspect_tasks_table(url)
            task = await db.insert_task(QUEUE)
            async with recording(url) as keeper:
                assert await submit(keeper, write(task, active())) == [Verdict.WRITTEN]
        else:
            with pytest.raises(DatabaseUnfitError, match="PgBouncer in transaction"):
                await inspect_tasks_table(url)


@asynccontextmanager
async def pgbouncer(url: str, folder: Path, mode: str, sessions: int) -> AsyncIterator[str]:
    """Run PgBouncer before a server; its URL."""
    assert PGBOUNCER is not None
    parts, port = urlsplit(url), free_port()
    settings = folder / "pgbouncer.ini"
    settings.write_text(
        f"[databases]\n{parts.path[1:]} = host=127.0.0.1 port={parts.port} user=postgres\n"
        f"[pgbouncer]\nlisten_addr=127.0.0.1\nlisten_port={port}\nauth_type=any\n"
        f"unix_socket_dir=\npool_mode={mode}\ndefault_pool_size={sessions}\n"
    )
    if os.geteuid() == 0:  # as whom it refuses to run
        settings.write_text(settings.read_text() + "user=nobody\n")
    process = await asyncio.create_subprocess_exec(
        PGBOUNCER,
        settings,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    pooled = parts._replace(netloc=f"postgres@127.0.0.1:{port}").geturl()

    async def answers() -> bool:
        try:
            async with await Connection.connect(pooled):
                return True
        except psycopg.OperationalError:
            return False

    try:
        await until(answers)
        yield pooled
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
