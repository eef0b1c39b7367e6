"""Checks of a running image: what it refuses, how it runs jobs, and how it stops."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psycopg

from autoflow_worker.scheduling.scheduler import TaskScheduler
from scripts.image_test.build import Image
from scripts.image_test.container import Container
from scripts.image_test.tasks.tasks_config import (
    Numbered,
    broken_task,
    flaky_task,
    slow_task,
    whoami_task,
)
from tests.support.database import Database, check_rows
from tests.support.until import until

JOBS = 100
NOBODY_LISTENS = "redis://127.0.0.1:1/0"


class Runs:
    """Starts containers, and kills those that still run.

    Attributes:
        tasks: the folder with the task list.
        urls: the variables of the two servers.
    """

    def __init__(self, folder: Path, tasks: Path, urls: dict[str, str]) -> None:
        self.tasks = tasks
        self.urls = urls
        self._folder = folder
        self._started: list[Container] = []

    def start(self, image: Image, env: dict[str, str] | None = None, **options: Any) -> Container:
        """Start a container with these variables, those of the servers if None."""
        log = self._folder / f"container-{len(self._started)}.log"
        container = Container(image, log, self.urls if env is None else env, **options)
        self._started.append(container)
        return container

    def close(self) -> None:
        """Kill all containers."""
        for container in self._started:
            container.close()


async def check_faults(runs: Runs, image: Image) -> None:
    """Check message and exit code of each missing setting, and then a start with all of them."""
    await _refuses(runs.start(image, {}, tasks=runs.tasks), 2, "REDIS_URL", "DATABASE_URL")
    await _refuses(runs.start(image), 2, "tasks_config")
    await _refuses(runs.start(image, tasks=runs.tasks), 3, "no table 'tasks'")
    away = {**runs.urls, "REDIS_URL": NOBODY_LISTENS, "WORKER_STARTUP_TIMEOUT": "1"}
    await _succeeds(runs, image, "init-db")
    await _refuses(runs.start(image, away, tasks=runs.tasks), 3, "Redis")
    await _succeeds(runs, image, "check")
    await _succeeds(runs, image, "check", "--tasks", "examples.tasks_config:tasks")


async def _refuses(container: Container, exit_code: int, *words: str) -> None:
    assert await container.ended() == exit_code, container.output
    for word in words:
        assert word in container.output, f"{word!r} is not in:\n{container.output}"
    assert "Traceback" not in container.output, container.output


async def _succeeds(runs: Runs, image: Image, *command: str) -> None:
    container = runs.start(image, tasks=runs.tasks, command=["autoflow-worker", *command])
    assert await container.ended() == 0, container.output


async def check_jobs(runs: Runs, image: Image, derived: Image) -> None:
    """Run an image with a mounted task list and stop it; run the rest in one with its own list."""
    url = runs.urls["DATABASE_URL"]
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
        database = Database(url, connection)
        worker = runs.start(image, tasks=runs.tasks)
        await worker.until_logged("worker_started")
        await _jobs_of_each_kind(runs, image, database)
        left = await _stopped_at_work(runs, worker, database)
        successor = runs.start(derived)
        await successor.until_logged("worker_started")
        await _until(database, left, "completed")
        await _stops(successor)
    await check_rows(url)


async def _jobs_of_each_kind(runs: Runs, image: Image, database: Database) -> None:
    whoami = await _schedule(runs, whoami_task, JOBS)
    flaky = await _schedule(runs, flaky_task, JOBS // 10)
    broken = await _schedule(runs, broken_task, JOBS // 10)
    await _until(database, whoami + flaky, "completed")
    await _until(database, broken, "failed")
    user, group = (int(number) for number in image.config["User"].split(":"))
    for number, task_id in enumerate(whoami):
        result = (await database.task(task_id)).result
        expected = {"number": number, "pid": 1, "uid": user, "gid": group, "groups": [group]}
        assert result is not None and result.output == expected, result  # noqa: PT018


async def _stopped_at_work(runs: Runs, worker: Container, database: Database) -> list[str]:
    """Stop the worker while it runs jobs, and return the jobs that it left waiting."""
    slow = await _schedule(runs, slow_task, JOBS // 5)
    await until(lambda: _with_status(database, slow, "active"))
    running = await _with_status(database, slow, "active")
    await _stops(worker)
    completed = await _with_status(database, slow, "completed")
    assert set(running) <= set(completed), f"{running} ran, {completed} completed"
    waiting = await _with_status(database, slow, "pending")
    assert waiting, "there was nothing left to do"
    assert len(completed) + len(waiting) == len(slow), await database.statuses()
    return waiting


async def _stops(worker: Container) -> None:
    worker.stop()
    exit_code = await worker.ended()
    assert exit_code == 0, f"exit code {exit_code}:\n{worker.output}"
    assert worker.logged("worker_stopped"), worker.output


async def _schedule(runs: Runs, task: Any, count: int) -> list[str]:
    urls = runs.urls
    async with TaskScheduler(
        redis_url=urls["REDIS_URL"], database_url=urls["DATABASE_URL"]
    ) as scheduler:
        return [await scheduler.schedule(task, Numbered(number=n)) for n in range(count)]


async def _until(database: Database, task_ids: Sequence[str], status: str) -> None:
    async def reached() -> bool:
        return len(await _with_status(database, task_ids, status)) == len(task_ids)

    await until(reached, 60.0, message=f"all of {len(task_ids)} jobs to be {status}")


async def _with_status(database: Database, task_ids: Sequence[str], status: str) -> list[str]:
    query = "SELECT id FROM tasks WHERE id = ANY(%s) AND data->>'status' = %s"
    return [task_id for (task_id,) in await database.fetch(query, list(task_ids), status)]
