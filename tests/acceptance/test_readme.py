"""README's blocks do what README says, as they are written."""

import asyncio
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from autoflow_worker.cli import cli
from autoflow_worker.settings import Settings
from tests.support.database import Connection, Database
from tests.support.process import WorkerStarter
from tests.support.readme import REPOSITORY, blocks, commands, modules, table
from tests.support.servers import OwnServer

BIN = Path(sys.executable).parent
FIRST_JOB, OWN_SERVERS = "autoflow-worker schedule", "autoflow-worker init-db"
VARIABLES = {name.upper() for name in Settings.model_fields}


def block_with(text: str) -> str:
    """The one shell block in which this stands."""
    [found] = [block for block in blocks("bash") if text in block]
    return found


async def shell(script: str, folder: Path, **env: str) -> str:
    """Run a block in a folder, with what is installed here and these variables; what it prints."""
    inherited = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    process = await asyncio.create_subprocess_exec(
        *("bash", "-euc", script),
        cwd=folder,
        env=inherited | {"PATH": f"{BIN}:{os.environ['PATH']}"} | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert process.returncode == 0, (out + err).decode()
    return out.decode().strip()


async def strictly_typed(folder: Path, names: Iterable[str]) -> None:
    """Have mypy check these modules; it knows the libraries if it has run before."""
    cache = str(REPOSITORY / ".mypy_cache")
    await shell(f"mypy --strict {' '.join(names)}", folder, MYPY_CACHE_DIR=cache)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working directory with README's modules."""
    for name, text in modules().items():
        (tmp_path / name).write_text(text)
    return tmp_path


def steady(data: dict[str, Any]) -> dict[str, Any]:
    """A row without what differs from run to run: its id, its duration, and the times' values."""
    kept = {key: value for key, value in data.items() if key != "externalId"}
    kept["result"] = {**data["result"], "duration": type(data["result"]["duration"])}
    return kept | {key: value is None for key, value in data.items() if key.endswith("At")}


async def test_the_python_blocks_pass_mypy_strict(folder: Path) -> None:
    lines = [line for line in modules()["tasks_config.py"].splitlines()[1:] if line]
    assert len(lines) == 10
    await strictly_typed(folder, modules())


async def test_the_page_on_handlers(
    worker_process: WorkerStarter, tmp_path: Path, redis_url: str, db: Database, prefix: str
) -> None:
    pages = modules((REPOSITORY / "docs" / "handlers.md").read_text())
    for name, text in pages.items():
        (tmp_path / name).write_text(text)
    await strictly_typed(tmp_path, pages)
    env = {"REDIS_URL": redis_url, "DATABASE_URL": db.url, "BULLMQ_PREFIX": prefix}
    payloads = {
        "exports.py": ("accounts-export", '{"account": "a"}', 10),
        "mails.py": ("mails-send", '{"to": "a@b.c"}', 1),
        "events.py": ("events-store", '{"name": "seen"}', {"stored": "seen"}),
    }
    for name in pages:
        queue, payload, output = payloads[name]
        tasks = f"{name.removesuffix('.py')}:tasks"
        worker = worker_process(None, "--tasks", tasks)
        await worker.until_logged("worker_started")
        schedule = f"autoflow-worker schedule --tasks {tasks} {queue} '{payload}'"
        task_id = await shell(schedule, tmp_path, **env)
        result = (await db.until_status(task_id, "completed")).result
        assert result is not None
        assert result.output == output
        worker.terminate()
        assert await worker.wait() == 0, worker.report()


async def test_the_page_on_testing(tmp_path: Path) -> None:
    pages = modules((REPOSITORY / "docs" / "testing.md").read_text())
    for name, text in pages.items():
        (tmp_path / name).write_text(text)
    await shell(f"mypy --strict {' '.join(pages)}", tmp_path)
    told = await shell("python -m pytest -q -p no:cacheprovider -o asyncio_mode=auto", tmp_path)
    assert "4 passed" in told


async def test_the_first_screen(worker_process: WorkerStarter, folder: Path) -> None:
    unset = dict.fromkeys(("REDIS_URL", "DATABASE_URL", "BULLMQ_PREFIX"))
    _, command = next(commands(block_with("autoflow-worker dev\n")))
    dev = worker_process(command=command, **unset)
    await dev.until_logged("worker_started")
    exports = re.findall(r"\bexport [A-Z_]+=\S+", dev.stderr)
    [promised] = blocks("json")
    task_id = await shell("\n".join([*exports, block_with(FIRST_JOB)]), folder)
    database_url = await shell("\n".join([*exports, 'echo "$DATABASE_URL"']), folder)
    async with await Connection.connect(database_url, autocommit=True) as connection:
        db = Database(database_url, connection)
        await db.until_status(task_id, "completed")
        data = await db.row(task_id)
    assert data is not None
    assert data["externalId"] == task_id
    assert steady(data) == steady(json.loads(promised))
    dev.terminate()
    assert await dev.wait() == 0, dev.report()


async def test_servers_of_ones_own(
    worker_process: WorkerStarter, folder: Path, own_redis: OwnServer, db: Database
) -> None:
    await db.execute("DROP TABLE tasks")
    env = {"REDIS_URL": own_redis.url, "DATABASE_URL": db.url}
    export, *preparations, start = commands(block_with(OWN_SERVERS))
    assert [word.partition("=")[0] for word in export] == ["export", *env]
    for words in preparations:
        await shell(" ".join(words), folder, **env)
    # Under the producers' usual prefix, as README's commands are.
    worker = worker_process(None, command=start[1], **env, BULLMQ_PREFIX=None)
    await worker.until_logged("worker_started")

    later = await shell("python schedule.py", folder, **env)
    row = await db.task(later)
    assert row.status == "delayed"
    assert row.delayUntil is not None

    reports = worker_process(None, "--tasks", "reports:tasks", **env, BULLMQ_PREFIX=None)
    await reports.until_logged("worker_started")
    task_id = await shell(
        """autoflow-worker schedule --tasks reports:tasks reports-render '{"month": "2026-11"}'""",
        folder,
        **env,
    )
    result = (await db.until_status(task_id, "completed")).result
    assert result is not None
    assert result.output == {"file": "2026-11.pdf"}
    for process in (worker, reports):
        process.terminate()
        assert await process.wait() == 0, process.report()


@pytest.mark.parametrize(
    "words", [words for block in blocks("bash") for words in commands(block)], ids=" ".join
)
async def test_each_command_exists(words: list[str]) -> None:
    match words:
        case ["make", *arguments]:
            await shell(" ".join(["make", "-n", *arguments]), REPOSITORY)
        case ["autoflow-worker", command, *_]:
            assert command in cli.commands
        case ["export", *assignments]:
            assert {assignment.partition("=")[0] for assignment in assignments} <= VARIABLES
        case ["pip", "install", what]:
            project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
            assert what.removeprefix(".").strip("[]") in project["optional-dependencies"]
        case ["docker", "run", *arguments]:
            check_docker_run(arguments)
        case _:
            pytest.fail("no test knows this command")


def check_docker_run(arguments: list[str]) -> None:
    """The container gets what the worker needs, where the image looks for it."""
    *options, image = arguments
    given: dict[str, list[str]] = {}
    for option, value in pairwise(options):
        given.setdefault(option, []).append(value)
    assert given["--env"] == ["REDIS_URL", "DATABASE_URL"]
    # These URLs say localhost, which is the container itself in a network of its own.
    assert given["--network"] == ["host"]
    dockerfile = (REPOSITORY / "Dockerfile").read_text()
    *_, workdir = re.findall(r"^WORKDIR (.+)$", dockerfile, re.MULTILINE)  # the last stage's
    assert given["--volume"] == [f"$PWD/tasks_config.py:{workdir}/tasks_config.py:ro"]
    [seconds] = given["--stop-timeout"]
    assert int(seconds) > Settings.model_fields["worker_shutdown_grace"].default
    assert f"\nIMAGE ?= {image}\n" in (REPOSITORY / "Makefile").read_text()


def test_the_tables_are_whole() -> None:
    assert set(table("Configuration")) - {"?family=4"} >= VARIABLES
    assert {code.split()[1] for code in table("Commands")} == cli.commands.keys()
