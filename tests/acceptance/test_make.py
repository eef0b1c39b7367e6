"""What `make` runs: the tasks that are meant, in the mode that is meant."""

import asyncio
import itertools
import os
import re
import signal
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from textwrap import dedent

import pytest

from autoflow_worker.local.demo import example_tasks
from tests.support.process import WorkerStarter
from tests.support.until import until

REPOSITORY = Path(__file__).parents[2]
TASKS = """
    from autoflow_worker import define_task

    async def handler(payload, ctx): ...

    tasks = [define_task("{queue}", handler)]
"""


Make = Callable[..., Awaitable[str]]


@pytest.fixture
def started_line(worker_process: WorkerStarter, tmp_path: Path) -> Make:
    """Runs the repository's Makefile in `tmp_path` until a worker says that it has started.

    What is installed serves; the line in which the worker says it is returned.
    """
    # What `make` would install from, and the sign that it has.
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "requirements").symlink_to(REPOSITORY / "requirements")
    (tmp_path / "installed").touch()
    own = ("LOG_FORMAT", "NODE_ENV", "TASKS_CONFIG", "TASKS")
    inherited = {**os.environ, **worker_process.env, "PYTHONPATH": str(REPOSITORY)}
    bin_folder = Path(sys.executable).parent
    runs = itertools.count(1)

    async def started_line(*arguments: str, **env: str) -> str:
        output = tmp_path / f"output-{next(runs)}"

        def line() -> str | None:
            found = [line for line in output.read_text().splitlines() if "worker_started" in line]
            assert found or process.returncode is None, output.read_text()
            return found[0] if found else None

        with output.open("wb") as file:
            process = await asyncio.create_subprocess_exec(
                *("make", "-f", str(REPOSITORY / "Makefile"), *arguments),
                *(f"BIN={bin_folder}", "INSTALLED=installed"),
                cwd=tmp_path,
                env={name: v for name, v in inherited.items() if name not in own} | env,
                stdout=file,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            found: str = await until(line, 60, message=output.read_text)
        finally:
            # To the group, as a terminal does: the worker is a child of make.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGINT)
            await process.wait()
        return found

    return started_line


def write_tasks(path: Path, queue: str) -> None:
    path.write_text(dedent(TASKS.format(queue=queue)))


@pytest.mark.parametrize(
    ("env", "as_json"), [({}, True), ({"NODE_ENV": ""}, True), ({"NODE_ENV": "staging"}, False)]
)
async def test_start_worker_is_in_production(
    started_line: Make, tmp_path: Path, env: dict[str, str], as_json: bool
) -> None:
    write_tasks(tmp_path / "tasks_config.py", "mails")
    line = await started_line("start-worker", **env)
    assert line.startswith("{") == as_json


async def test_dev_worker_runs_the_examples_where_there_is_nothing_else(
    started_line: Make,
) -> None:
    line = await started_line("dev-worker")
    for task in example_tasks():
        assert task.queue_name in line


@pytest.mark.parametrize(
    ("env_file", "arguments", "env", "queue"),
    [
        ("", [], {}, "own"),
        ("TASKS_CONFIG=one:tasks", [], {}, "one"),
        ("TASKS_CONFIG=one:tasks", [], {"TASKS_CONFIG": "two:tasks"}, "two"),
        ("", ["TASKS_CONFIG=one:tasks"], {}, "one"),
        ("", ["TASKS=one:tasks"], {"TASKS_CONFIG": "two:tasks"}, "one"),
    ],
)
async def test_dev_worker_runs_the_users_own_list_first(
    started_line: Make,
    tmp_path: Path,
    *,
    env_file: str,
    arguments: list[str],
    env: dict[str, str],
    queue: str,
) -> None:
    write_tasks(tmp_path / "tasks_config.py", "own")
    write_tasks(tmp_path / "one.py", "one")
    write_tasks(tmp_path / "two.py", "two")
    (tmp_path / ".env").write_text(env_file)
    assert f"['{queue}']" in await started_line("dev-worker", *arguments, **env)


async def test_dev_worker_finds_a_list_that_only_an_env_file_names(
    started_line: Make, tmp_path: Path
) -> None:
    write_tasks(tmp_path / "one.py", "one")
    (tmp_path / ".env").write_text("export TASKS_CONFIG=one:tasks\n")
    assert "['one']" in await started_line("dev-worker")


async def test_start_worker_runs_the_examples_only_if_asked(
    started_line: Make, tmp_path: Path
) -> None:
    with pytest.raises(AssertionError, match="no module 'tasks_config'") as refused:
        await started_line("start-worker")
    [way_out] = re.findall(r"Try the examples: make (.+)", str(refused.value))
    line = await started_line(*way_out.split())
    for task in example_tasks():
        assert task.queue_name in line
