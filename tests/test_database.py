"""Making the tasks table, and judging it before a start."""

import asyncio

import pytest

from autoflow_worker.database import init_db, inspect_tasks_table
from autoflow_worker.errors import DatabaseUnavailableError, DatabaseUnfitError
from tests.support.database import Connection, Database, other_database
from tests.support.servers import OwnServer


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
