"""The `demo` command: some hundred jobs of every kind on embedded servers, checked at the end."""

import asyncio
import importlib
import io
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from textwrap import indent
from typing import Any, Final, Literal

from autoflow_worker.broker.client import PipelinedRedis
from autoflow_worker.broker.producer import Producer
from autoflow_worker.errors import TaskListError
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

Row = dict[str, Any]

TIME_LIMIT: Final = 60.0  # seconds; it needs a tenth of that
INTERRUPTED: Final = 130  # the exit code after Ctrl-C
WIDTH: Final = 80  # columns of what is printed

# Rows that are deleted in a moment need not wait for a slow disk.
_UNFLUSHED: Final = "?options=-csynchronous_commit%3Doff"
_CANCEL: Final = 'UPDATE tasks SET data = data || \'{"status": "cancelled"}\' WHERE id = %s'
_NEXT_STEPS: Final = f"""
Next, run a task of your own:
  1. Write a handler, and list its task in tasks_config.py:

{indent(EXAMPLE, " " * 7)}

  2. In that folder, run `autoflow-worker dev`. It starts both servers.
  3. In another terminal, set the two URLs that `dev` prints, and run
       autoflow-worker schedule greetings '{{"name": "Ada"}}'
README.md describes a task's options, the settings, and production."""


@dataclass(frozen=True, eq=False)
class Kind:
    """Jobs that have to end in the same way.

    Attributes:
        queue: the queue of an example task.
        count: how many jobs there are, each with the same `payload`.
        ends: the status that each row has to end with, after so many `attempts`.
        reason: a part of each row's error.
        has_row: whether the producer inserts a row, as the API does.
    """

    name: str
    queue: str
    count: int
    payload: Mapping[str, Any]
    ends: Literal["completed", "failed", "cancelled"] = "completed"
    attempts: int = 1
    reason: str = ""
    delay_ms: int = 0
    has_row: bool = True

    @property
    def state(self) -> str:
        """The BullMQ state that goes with `ends`. A cancelled job fails without an attempt."""
        return "failed" if self.ends == "cancelled" else self.ends

    @property
    def expected(self) -> str:
        """What each job has to end as, in words."""
        return f"{self.ends}, attempt {self.attempts}" if self.attempts else f"{self.ends}, not run"


def _webhook(host: str) -> Mapping[str, Any]:
    return {"url": f"https://{host}.example.com", "event": {}}


_USER: Final = {"email": "ada@example.com", "name": "Ada", "articles": ["a", "b"]}
_REPORT: Final = {"customer": "ada", "month": "2026-01-01"}
_CHARGE: Final = {"card": "4111 1111 1111 0000", "amount": "9.90"}
_NOBODY: Final = {"email": 17, "name": None}

BY_PRIORITY: Final = Kind("by priority", "tickets-triage", 40, {"title": "the invoice"})
CANCELLED: Final = Kind("cancelled", "reports-build", 5, _REPORT, "cancelled", 0, delay_ms=2000)
KINDS: Final = (
    Kind("quick", "users-send-welcome-email", 100, _USER),
    Kind("slow", "reports-build", 10, _REPORT),
    Kind("in a thread", "files-checksum", 24, {"name": "a file", "size": 1_000_000}),
    Kind("in batches", "readings-store", 100, {"sensor": "roof", "celsius": 21.5}),
    BY_PRIORITY,
    Kind("delayed", "users-send-digest", 20, _USER, delay_ms=1000),
    Kind("fails twice", "payments-refund", 20, {"charge": "17"}, attempts=3),
    Kind("fails for good", "payments-charge", 20, _CHARGE, "failed", 1, "declined"),
    Kind("fails every time", "webhooks-deliver", 10, _webhook("gone"), "failed", 3, "refuses"),
    Kind("exceeds time limit", "webhooks-deliver", 5, _webhook("slow"), "failed", 3, "time limit"),
    Kind("invalid payload", "users-send-digest", 20, _NOBODY, "failed", 1, "email", has_row=False),
    Kind("added without a row", "webhooks-deliver", 20, _webhook("up"), has_row=False),
    CANCELLED,
)
# Moves the cursor to the table's first line, and clears the terminal from there on.
_OVER_THE_TABLE: Final = f"\x1b[{len(KINDS) + 1}F\x1b[J"


@dataclass(frozen=True)
class Job:
    """A job that was added, and its ids in both stores."""

    kind: Kind
    job_id: str
    row_id: str


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
    _say("Starting Valkey and PostgreSQL ...")
    with running(EmbeddedRedis()) as redis_url, running(EmbeddedPostgres()) as database_url:
        settings = Settings.load(
            redis_url=redis_url,
            database_url=database_url + _UNFLUSHED,
            bullmq_prefix="bull",
            record_unknown_jobs=True,
            worker_shutdown_grace=5.0,
        )
        code = asyncio.run(_run(settings, tasks))
    flush_logs()
    _say({0: _NEXT_STEPS, INTERRUPTED: "Stopped."}.get(code, log_lines.getvalue()))
    return code


def example_tasks() -> Sequence[TaskDefinition[Any]]:
    """Import the tasks in `examples/`: beside `src` in a clone, inside of the package in a wheel.

    Raises:
        TaskListError: they are in neither place.
    """
    package = Path(__file__).parents[1]
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
            await asyncio.gather(*(stores.add(kind, tasks) for kind in KINDS))
            _say(f"Running {len(stores.jobs)} jobs of {len(KINDS)} kinds ...")
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
    live = sys.stdout.isatty() and shutil.get_terminal_size().columns >= WIDTH
    over_the_last = ""
    deadline = time.monotonic() + TIME_LIMIT
    while not until() and time.monotonic() < deadline:
        rows, states = await stores.look()
        statuses = stores.statuses(rows)
        if live:
            _say(over_the_last + _table(stores.jobs, {"rows in PostgreSQL": statuses}))
            over_the_last = _OVER_THE_TABLE
        if {"completed", "failed", "cancelled"}.issuperset([*statuses, *states]):
            break
        await asyncio.sleep(0.1)
    sys.stdout.write(over_the_last)


async def _judge(stores: "_Stores") -> int:
    """Compare both stores with what has to be in them, now that the worker has stopped."""
    rows, states = await stores.look()
    columns = {"rows in PostgreSQL": stores.statuses(rows), "jobs in BullMQ": states}
    _say(_table(stores.jobs, columns))
    if found := faults(stores.jobs, rows, states):
        _say("\n".join(f"wrong: {fault}" for fault in found[:20]))
        _say(f"{len(found)} jobs are not as they have to be.")
        return 1
    _say(f"\nAll {len(stores.jobs)} jobs ended as they have to, in both stores.")
    return 0


@dataclass
class _Stores:
    """Adds the jobs, and looks them up in both stores."""

    scheduler: TaskScheduler
    producer: Producer
    database: Any
    jobs: list[Job] = field(default_factory=list)

    async def add(self, kind: Kind, tasks: Sequence[TaskDefinition[Any]]) -> None:
        [task] = [task for task in tasks if task.queue_name == kind.queue]
        for number in range(kind.count):
            if not kind.has_row:
                job = await self.producer.queue(kind.queue).add(kind.queue, kind.payload)
                self.jobs.append(Job(kind, job.id, patches.row_id(kind.queue, job.id)))
                continue
            if kind is BY_PRIORITY:  # The least urgent first, which is the wrong order.
                level = tuple(PRIORITIES)[-1 - number % len(PRIORITIES)]
                task = replace(task, options=replace(task.options, priority=level))
            task_id = await self.scheduler.schedule(task, kind.payload, delay_ms=kind.delay_ms)
            self.jobs.append(Job(kind, task_id, task_id))
            if kind is CANCELLED:  # As the API does it.
                await self.database.execute(_CANCEL, (task_id,))

    async def look(self) -> tuple[dict[str, Row], list[str]]:
        """Every row's data by its id, and the BullMQ state of each job."""
        cursor = await self.database.execute("SELECT id, data FROM tasks")
        rows = dict(await cursor.fetchall())
        asked = (self.producer.queue(job.kind.queue).getJobState(job.job_id) for job in self.jobs)
        return rows, list(await asyncio.gather(*asked))

    def statuses(self, rows: dict[str, Row]) -> list[str]:
        return [rows.get(job.row_id, {}).get("status", "no row") for job in self.jobs]


def faults(jobs: Sequence[Job], rows: Mapping[str, Row], states: Sequence[str]) -> list[str]:
    """Say what is wrong with the rows, by their ids, and with the jobs' states in BullMQ."""
    found = []
    for job, state in zip(jobs, states, strict=True):
        row = rows.get(job.row_id)
        wrong = ["it has no row"] if row is None else _faults_of_row(job.kind, row)
        if state != job.kind.state:
            wrong.append(f"BullMQ says {state}")
        if wrong:
            found.append(f"{job.kind.name}: job {job.job_id}: {', '.join(wrong)}")
    if strangers := rows.keys() - {job.row_id for job in jobs}:
        found.append(f"rows of no job: {', '.join(strangers)}")
    by_priority = [rows.get(job.row_id) for job in jobs if job.kind is BY_PRIORITY]
    # Jobs that started in the same millisecond count as started in the right order.
    started = sorted(
        (row["startedAt"] or "", PRIORITIES[row["priority"]]) for row in by_priority if row
    )
    order = [priority for _, priority in started]
    if order != sorted(order):
        found.append(f"{BY_PRIORITY.name}: the priorities started in the order {order}")
    return found


def _faults_of_row(kind: Kind, row: Row) -> list[str]:
    reason = row["error"]["reason"] if row["error"] else ""
    enqueued, started = row["enqueuedAt"], row["startedAt"] or row["enqueuedAt"]
    waited = datetime.fromisoformat(started) - datetime.fromisoformat(enqueued)
    checks = {
        "status": row["status"] == kind.ends,
        "attempts": row["attempts"] == kind.attempts,
        "result": (row["result"] is not None) == (kind.ends == "completed"),
        "error": (row["error"] is not None) == (kind.ends == "failed") and kind.reason in reason,
        "startedAt": not kind.attempts or waited.total_seconds() * 1000 >= kind.delay_ms,
    }
    return [f"its row's {key} is {row[key]}" for key, right in checks.items() if not right]


def _table(jobs: Sequence[Job], columns: Mapping[str, Sequence[str]]) -> str:
    """Make a table with a line for each kind; the columns are the jobs' statuses, by heading."""
    lines = [["kind of job", "has to end as", *columns]]
    for kind in KINDS:
        of_kind = [n for n, job in enumerate(jobs) if job.kind is kind]
        counts = [Counter(column[n] for n in of_kind).items() for column in columns.values()]
        cells = [", ".join(f"{count} {status}" for status, count in each) for each in counts]
        lines.append([kind.name, kind.expected, *cells])
    texts = [f"{a:21}{b:22}{'  '.join(f'{c:17}' for c in rest)}" for a, b, *rest in lines]
    return "\n".join(text[:WIDTH].rstrip() for text in texts)


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
