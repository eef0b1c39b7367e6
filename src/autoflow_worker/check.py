"""The ``check`` command: everything that a start would refuse, without starting."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import click
from redis.exceptions import RedisError

from autoflow_worker.database import PROBED_QUEUE, inspect_tasks_table
from autoflow_worker.errors import RedisUnavailableError, SettingsError, WorkerError
from autoflow_worker.fitness import examine_redis
from autoflow_worker.loader import load_tasks
from autoflow_worker.masking import mask_secrets
from autoflow_worker.official_worker import official_worker
from autoflow_worker.redis_client import PipelinedRedis
from autoflow_worker.settings import Settings

#: Seconds that each server has to answer; a start waits longer (WORKER_STARTUP_TIMEOUT).
PATIENCE = 5.0


class _Report:
    """Prints one line or more for each check, and keeps the exit code of the first failure."""

    def __init__(self) -> None:
        self.exit_code = 0

    def run(self, name: str, check: Callable[[], list[str]]) -> None:
        """Run a check; what it returns are remarks, the first of which is the finding."""
        try:
            finding, *warnings = check()
        except WorkerError as error:
            self._print(name, click.style("failed", fg="red"), mask_secrets(str(error)))
            self.exit_code = self.exit_code or error.exit_code
            return
        self._print(name, click.style("ok", fg="green"), finding)
        for warning in warnings:
            self._print("", click.style("warning", fg="yellow"), warning)

    def skip(self, name: str, reason: str) -> None:
        self._print(name, "skipped", reason)

    def _print(self, name: str, verdict: str, text: str) -> None:
        pad = " " * (9 - len(click.unstyle(verdict)))
        click.echo(f"{name:<12}{verdict}{pad}" + text.replace("\n", "\n" + " " * 21))


def run_checks(env_files: Sequence[str] = (), **overrides: Any) -> int:
    """Run all checks, print each with its result, and return the exit code of the first failure.

    Args:
        env_files: the files that variables were read from.
        overrides: settings from the command line, by attribute; ``None`` is none.
    """
    report = _Report()
    queues: list[str] = []
    settings, faults = Settings.examine(**overrides)
    report.run("settings", lambda: _settings(settings, faults, env_files))
    if "tasks_config" in faults or "worker_queues" in faults:
        report.skip("task list", "TASKS_CONFIG or WORKER_QUEUES is wrong")
    else:
        report.run("task list", lambda: _task_list(settings, queues))
    if "redis_url" in faults:
        report.skip("Redis", "REDIS_URL is missing or wrong")
    else:
        report.run("Redis", lambda: asyncio.run(_redis(settings, queues)))
    if "database_url" in faults:
        report.skip("PostgreSQL", "DATABASE_URL is missing or wrong")
    else:
        report.run("PostgreSQL", lambda: asyncio.run(_database(settings, queues)))
    return report.exit_code


def _settings(settings: Settings, faults: dict[str, str], env_files: Sequence[str]) -> list[str]:
    found = [str(lookalike) for lookalike in Settings.lookalikes()]
    if faults:
        raise SettingsError([*faults.values(), *found])
    text = f"NODE_ENV={settings.node_env}, key prefix {settings.bullmq_prefix!r}"
    return [text + "".join(f", {name} read" for name in env_files), *found]


def _task_list(settings: Settings, queues: list[str]) -> list[str]:
    tasks = load_tasks(settings.tasks_config, settings.worker_queues)
    queues += [task.queue_name for task in tasks]
    count = f"{len(tasks)} task{'s' if len(tasks) > 1 else ''}"
    return [f"{count} in {settings.tasks_config!r}: {', '.join(queues)}"]


async def _redis(settings: Settings, queues: Sequence[str]) -> list[str]:
    client = PipelinedRedis(settings.redis_url.get_secret_value())
    try:
        official_worker("check", client, settings.bullmq_prefix, {})
        await client.open(min(PATIENCE, settings.worker_startup_timeout))
        # Without a task list there are no queues under whose prefixes commands could be tried.
        report = await examine_redis(client, settings.bullmq_prefix, queues)
    except (OSError, RedisError) as error:
        raise RedisUnavailableError(f"Redis went away: {error}") from error
    finally:
        await client.aclose()
    return [report.server, *report.warnings]


async def _database(settings: Settings, queues: Sequence[str]) -> list[str]:
    version = await inspect_tasks_table(
        settings.database_url.get_secret_value(),
        queue=next(iter(queues), PROBED_QUEUE),
        new_rows=settings.record_unknown_jobs,
        patience=min(PATIENCE, settings.worker_startup_timeout),
    )
    return [f"PostgreSQL {version}, the table is as it has to be"]
