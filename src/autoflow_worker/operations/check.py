"""The `check` command: find everything that a start would refuse, without starting."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing
from typing import Any, Literal, NamedTuple

from redis.exceptions import RedisError

from autoflow_worker.broker.client import PipelinedRedis
from autoflow_worker.broker.official_worker import official_worker
from autoflow_worker.broker.paused_lists import find_split
from autoflow_worker.broker.requirements import examine_redis
from autoflow_worker.encoding.masking import mask_secrets
from autoflow_worker.errors import RedisUnavailableError, SettingsError, WorkerError
from autoflow_worker.operations.task_table import hidden_payloads, task_table
from autoflow_worker.recording.table import PROBED_QUEUE, inspect_tasks_table
from autoflow_worker.settings import Settings
from autoflow_worker.tasks.loader import load_tasks

PATIENCE = 5.0  # seconds to wait for each server; a start waits for WORKER_STARTUP_TIMEOUT


class Finding(NamedTuple):
    """What one check found.

    Attributes:
        check: the check's name; empty for a further finding of the same check.
        text: what the check found, in one line or more, without secrets.
        exit_code: the exit code that a start would end with; 0 unless the check failed.
        table: lines to show below the text, of 80 columns at most.
    """

    check: str
    verdict: Literal["ok", "warning", "failed", "skipped"]
    text: str
    exit_code: int = 0
    table: Sequence[str] = ()


def run_checks(env_files: Sequence[str] = (), **overrides: Any) -> Iterator[Finding]:
    """Run the checks one by one, and yield what each finds.

    Args:
        env_files: the .env files that were read.
        overrides: settings from the command line, by attribute; None keeps the environment's.
    """
    queues: list[str] = []
    settings, faults = Settings.examine(**overrides)
    yield from _run("settings", lambda: _settings(settings, faults, env_files))
    if "tasks_config" in faults or "worker_queues" in faults:
        yield Finding("task list", "skipped", "TASKS_CONFIG or WORKER_QUEUES is wrong")
    else:
        yield from _task_list(settings, queues)
    if "redis_url" in faults:
        yield Finding("Redis", "skipped", "REDIS_URL is missing or wrong")
    else:
        yield from _run("Redis", lambda: asyncio.run(_redis(settings, queues)))
    if "database_url" in faults:
        yield Finding("PostgreSQL", "skipped", "DATABASE_URL is missing or wrong")
    else:
        yield from _run("PostgreSQL", lambda: asyncio.run(_database(settings, queues)))


def _run(name: str, check: Callable[[], list[str]]) -> Iterator[Finding]:
    """Run a check, which returns what it found and then its warnings."""
    try:
        finding, *warnings = check()
    except WorkerError as error:
        yield Finding(name, "failed", mask_secrets(str(error)), error.exit_code)
        return
    yield Finding(name, "ok", finding)
    for warning in warnings:
        yield Finding("", "warning", warning)


def _settings(settings: Settings, faults: dict[str, str], env_files: Sequence[str]) -> list[str]:
    found = [str(lookalike) for lookalike in Settings.lookalikes()]
    if faults:
        raise SettingsError([*faults.values(), *found])
    text = f"NODE_ENV={settings.node_env}, key prefix {settings.bullmq_prefix!r}"
    return [text + "".join(f", {name} read" for name in env_files), *found]


def _task_list(settings: Settings, queues: list[str]) -> Iterator[Finding]:
    table: list[str] = []

    def load() -> list[str]:
        tasks = load_tasks(settings.tasks_config, settings.worker_queues)
        queues.extend(task.queue_name for task in tasks)
        table.extend(task_table(tasks, settings.worker_concurrency))
        count = f"{len(tasks)} task{'s' if len(tasks) > 1 else ''}"
        return [f"{count} in {settings.tasks_config!r}", *hidden_payloads(tasks)]

    for finding in _run("task list", load):
        yield finding._replace(table=table) if finding.verdict == "ok" else finding


async def _redis(settings: Settings, queues: Sequence[str]) -> list[str]:
    async with aclosing(PipelinedRedis(settings.redis_url.get_secret_value())) as client:
        try:
            official_worker("check", client, settings.bullmq_prefix, {})
            await client.open(min(PATIENCE, settings.worker_startup_timeout))
            # The commands are tried on the keys of the task list's queues, if there is one.
            report = await examine_redis(client, settings.bullmq_prefix, queues)
            split = [await _split(client, settings.bullmq_prefix, queue) for queue in queues]
        except (OSError, RedisError) as error:
            raise RedisUnavailableError(f"Redis went away: {error}") from error
    return [report.server, *report.warnings, *filter(None, split)]


async def _split(client: PipelinedRedis, prefix: str, queue: str) -> str:
    found = await find_split(client, prefix, queue)
    if found is None:
        return ""
    return (
        f"{queue} is paused, and has jobs both in BullMQ 5's list 'paused' ({found.paused:,}) and"
        f" in BullMQ 6's 'wait' ({found.wait:,}). If BullMQ 5 resumes it now, those in 'wait' are"
        " lost. Resume it with BullMQ 6, or run a worker for a minute first, which joins the lists"
        " (docs/contract.md, section 9)"
    )


async def _database(settings: Settings, queues: Sequence[str]) -> list[str]:
    version = await inspect_tasks_table(
        settings.database_url.get_secret_value(),
        queue=next(iter(queues), PROBED_QUEUE),
        new_rows=settings.record_unknown_jobs,
        patience=min(PATIENCE, settings.worker_startup_timeout),
    )
    return [f"PostgreSQL {version}, the tasks table is right"]
