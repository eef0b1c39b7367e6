"""The `demo` command: some hundred jobs of every kind on embedded servers, checked at the end."""

import asyncio
import importlib
import io
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path
from textwrap import indent
from typing import Any, Final

from autoflow_worker.broker.client import PipelinedRedis
from autoflow_worker.broker.producer import Producer
from autoflow_worker.errors import TaskListError
from autoflow_worker.local.demo import kinds
from autoflow_worker.local.demo.display import LiveTable, say, table
from autoflow_worker.local.demo.kinds import Job, Kind, Row
from autoflow_worker.local.embedded import EmbeddedPostgres, EmbeddedRedis, running
from autoflow_worker.logs.configure import configure_logging, flush_logs
from autoflow_worker.process.signals import hold_signals, stop_on_signals
from autoflow_worker.recording import patches
from autoflow_worker.recording.pool import CONNECT_TIMEOUT
from autoflow_worker.recording.table import connection_to, init_db
from autoflow_worker.scheduling.scheduler import TaskScheduler
from autoflow_worker.service import WorkerService
from autoflow_worker.settings import Settings
from autoflow_worker.tasks.definition import PRIORITIES, TaskDefinition
from autoflow_worker.tasks.loader import EXAMPLE

#: Seconds after which the demo gives up; it needs a tenth of that.
TIME_LIMIT: Final = 60.0
#: Seconds between two looks at the rows.
LOOK_INTERVAL: Final = 0.1
#: Rows that are deleted in a moment need not wait for a slow disk.
UNFLUSHED: Final = "?options=-csynchronous_commit%3Doff"
#: Exit code after Ctrl-C.
INTERRUPTED: Final = 130

_CANCEL: Final = 'UPDATE tasks SET data = data || \'{"status": "cancelled"}\' WHERE id = %s'
_NEXT_STEPS: Final = f"""
Next, run a task of your own:
  1. Write a handler, and list its task in tasks_config.py:

{indent(EXAMPLE, " " * 7)}

  2. In that folder, run `autoflow-worker dev`. It starts both servers.
  3. In another terminal, set the two URLs that `dev` prints, and run
       autoflow-worker schedule greetings '{{"name": "Ada"}}'
README.md describes a task's options, the settings, and production."""


def run_demo() -> int:
    """Run the demo.

    Returns:
        0 if every job ended as its kind has to, 1 if not, 130 after Ctrl-C.

    Raises:
        WorkerError: the extra's servers are missing, a server does not start, or the worker died.
    """
    # Before the first file is made: an interrupt would leave a half-made server behind.
    hold_signals()
    tasks = example_tasks()
    log_lines = io.StringIO()
    configure_logging("warning", stream=log_lines)
    say("Starting Valkey and PostgreSQL ...")
    with running(EmbeddedRedis()) as redis_url, running(EmbeddedPostgres()) as database_url:
        settings = Settings.load(
            redis_url=redis_url,
            database_url=database_url + UNFLUSHED,
            bullmq_prefix="bull",
            record_unknown_jobs=True,
            worker_shutdown_grace=5.0,
        )
        code = asyncio.run(_run(settings, tasks))
    flush_logs()
    say({0: _NEXT_STEPS, INTERRUPTED: "Stopped."}.get(code, log_lines.getvalue()))
    return code


def example_tasks() -> Sequence[TaskDefinition[Any]]:
    """Import the tasks in `examples/`: beside `src` in a clone, inside of the package in a wheel.

    Raises:
        TaskListError: they are in neither place.
    """
    package = Path(__file__).parents[2]
    for folder in (package / "_demo", package.parents[1]):
        if (folder / "examples" / "tasks_config.py").is_file():
            sys.path.insert(0, str(folder))
            tasks: Sequence[TaskDefinition[Any]]
            tasks = importlib.import_module("examples.tasks_config").tasks
            return tasks
    raise TaskListError("the example tasks are missing from this installation")


async def _run(settings: Settings, tasks: Sequence[TaskDefinition[Any]]) -> int:
    redis_url = settings.redis_url.get_secret_value()
    database_url = settings.database_url.get_secret_value()
    with stop_on_signals() as (stop, abort):
        await init_db(database_url)
        async with (
            aclosing(PipelinedRedis(redis_url)) as redis,
            TaskScheduler(redis_url=redis_url, database_url=database_url) as scheduler,
            connection_to(database_url, CONNECT_TIMEOUT, autocommit=True) as database,
        ):
            await redis.open(settings.worker_startup_timeout)
            stores = _Stores(scheduler, Producer(redis, "bull"), database)
            # All jobs wait when the worker starts, so that their priorities decide on the order.
            await asyncio.gather(*(stores.add(kind, tasks) for kind in kinds.KINDS))
            say(f"Running {len(stores.jobs)} jobs of {len(kinds.KINDS)} kinds ...")
            worker = asyncio.create_task(WorkerService(settings, tasks).run(stop, abort))
            try:
                await _watch(stores, until=lambda: stop.is_set() or worker.done())
            finally:
                interrupted = stop.is_set()
                stop.set()
                await worker
            return INTERRUPTED if interrupted else await _judge(stores)


async def _watch(stores: "_Stores", until: Callable[[], bool]) -> None:
    """Show how far the jobs are, until all have ended or something else has."""
    live = LiveTable()
    deadline = time.monotonic() + TIME_LIMIT
    while not until() and time.monotonic() < deadline:
        rows, states = await stores.look()
        statuses = stores.statuses(rows)
        live.show(stores.jobs, statuses)
        if kinds.FINAL.issuperset([*statuses, *states]):
            break
        await asyncio.sleep(LOOK_INTERVAL)
    live.remove()


async def _judge(stores: "_Stores") -> int:
    """Compare both stores with what has to be in them, now that the worker has stopped."""
    rows, states = await stores.look()
    columns = {"rows in PostgreSQL": stores.statuses(rows), "jobs in BullMQ": states}
    say(table(stores.jobs, columns))
    if found := kinds.faults(stores.jobs, rows, states):
        say("\n".join(f"wrong: {fault}" for fault in found[:20]))
        say(f"{len(found)} jobs are not as they have to be.")
        return 1
    say(f"\nAll {len(stores.jobs)} jobs ended as they have to, in both stores.")
    return 0


@dataclass
class _Stores:
    """Adds the jobs, and looks them up in both stores."""

    scheduler: TaskScheduler
    producer: Producer
    database: Any
    jobs: list[Job] = field(default_factory=list)

    async def add(self, kind: Kind, tasks: Sequence[TaskDefinition[Any]]) -> None:
        """Add the jobs of a kind."""
        [task] = [task for task in tasks if task.queue_name == kind.queue]
        for number in range(kind.count):
            if not kind.has_row:
                job = await self.producer.queue(kind.queue).add(kind.queue, kind.payload)
                self.jobs.append(Job(kind, job.id, patches.row_id(kind.queue, job.id)))
                continue
            if kind is kinds.BY_PRIORITY:  # The least urgent first, which is the wrong order.
                level = tuple(PRIORITIES)[-1 - number % len(PRIORITIES)]
                task = replace(task, options=replace(task.options, priority=level))
            task_id = await self.scheduler.schedule(task, kind.payload, delay_ms=kind.delay_ms)
            self.jobs.append(Job(kind, task_id, task_id))
            if kind is kinds.CANCELLED:  # As the API does it.
                await self.database.execute(_CANCEL, (task_id,))

    async def look(self) -> tuple[dict[str, Row], list[str]]:
        """Every row's data by its id, and the BullMQ state of each job."""
        cursor = await self.database.execute("SELECT id, data FROM tasks")
        rows = dict(await cursor.fetchall())
        asked = (self.producer.queue(job.kind.queue).getJobState(job.job_id) for job in self.jobs)
        return rows, list(await asyncio.gather(*asked))

    def statuses(self, rows: dict[str, Row]) -> list[str]:
        """The status of each job's row."""
        return [rows.get(job.row_id, {}).get("status", "no row") for job in self.jobs]
