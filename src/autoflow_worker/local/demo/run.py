"""The ``demo`` command: some hundred jobs of every kind on embedded servers, checked at the end."""

import asyncio
import importlib
import io
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from autoflow_worker.errors import MissingExtraError, TaskListError
from autoflow_worker.local.demo.jobs import DemoJobs, demo_jobs
from autoflow_worker.local.demo.kinds import KINDS, faults
from autoflow_worker.local.embedded import embedded_postgres, embedded_redis
from autoflow_worker.logs.configure import configure_logging, flush_logs
from autoflow_worker.process.signals import hold_signals, stop_on_signals
from autoflow_worker.recording.table import init_db
from autoflow_worker.service import WorkerService
from autoflow_worker.settings import Settings
from autoflow_worker.tasks.definition import TaskDefinition

if TYPE_CHECKING:
    from autoflow_worker.local.demo.display import Display

#: Seconds after which the demo gives up waiting; it takes a tenth of that.
TIME_LIMIT: Final = 60.0
#: Seconds between two looks at the rows.
LOOK_INTERVAL: Final = 0.1
#: What is thrown away in a moment needn't wait for a slow disk.
UNFLUSHED: Final = "?options=-csynchronous_commit%3Doff"
#: Exit code after Ctrl-C.
INTERRUPTED: Final = 130


def run_demo() -> int:
    """Run the demo.

    Returns:
        0 if every job came to the end that its kind is to have, 1 if not, 130 after Ctrl-C.

    Raises:
        WorkerError: what is in the extra is missing, a server does not start, or the worker died.
    """
    # Before the first file: an interrupt in the middle of making a server would leave a part of it.
    hold_signals()
    display = _display()
    tasks = example_tasks()
    log_lines = io.StringIO()
    configure_logging("warning", stream=log_lines)
    display.say("Starting Valkey and PostgreSQL ...")
    with embedded_redis() as redis_url, embedded_postgres() as database_url:
        settings = Settings.load(
            redis_url=redis_url,
            database_url=database_url + UNFLUSHED,
            bullmq_prefix="bull",
            record_unknown_jobs=True,
            worker_shutdown_grace=5.0,
        )
        code = asyncio.run(_run(settings, tasks, display))
    flush_logs()
    if code == INTERRUPTED:
        display.say("Stopped.")
    elif code:
        display.say(log_lines.getvalue())
    return code


def example_tasks() -> Sequence[TaskDefinition[Any]]:
    """The tasks in `examples/`: beside `src` in a checkout, inside of the package in a wheel."""
    here = Path(__file__).parents[2]
    for folder in (here / "_demo", here.parents[1]):
        if (folder / "examples" / "tasks_config.py").is_file():
            sys.path.insert(0, str(folder))
            tasks: Sequence[TaskDefinition[Any]]
            tasks = importlib.import_module("examples.tasks_config").tasks
            return tasks
    raise TaskListError("the example tasks are missing from this installation")


def _display() -> "Display":
    try:
        from autoflow_worker.local.demo.display import Display  # noqa: PLC0415 - in an extra
    except ImportError as error:
        raise MissingExtraError(f"the demo needs {error.name or error}") from None
    return Display()


async def _run(settings: Settings, tasks: Sequence[TaskDefinition[Any]], display: "Display") -> int:
    with stop_on_signals() as (stop, abort):
        if stop.is_set():
            return INTERRUPTED
        await init_db(settings.database_url.get_secret_value())
        async with demo_jobs(settings, tasks) as jobs:
            await jobs.add_before_start()
            worker = asyncio.create_task(WorkerService(settings, tasks).run(stop, abort))
            adding = asyncio.create_task(jobs.add_others())
            try:
                with display:
                    await _watch(jobs, display, until=(stop, worker, adding))
            finally:
                interrupted = stop.is_set()
                stop.set()
                adding.cancel()
                await asyncio.wait({adding, worker})
            worker.result()
            if interrupted:
                return INTERRUPTED
            if not adding.cancelled():  # at the time limit
                adding.result()
            return await _judge(jobs, display)


async def _watch(
    jobs: DemoJobs,
    display: "Display",
    until: tuple[asyncio.Event, asyncio.Task[int], asyncio.Task[None]],
) -> None:
    """Show how the jobs get on until all have ended, or something else has."""
    stop, worker, adding = until
    try:
        async with asyncio.timeout(TIME_LIMIT):
            while not stop.is_set() and not worker.done():
                rows = await jobs.rows()
                display.show(jobs.tally(rows))
                if adding.done() and (adding.exception() or await jobs.settled(rows)):
                    return
                await asyncio.sleep(LOOK_INTERVAL)
    except TimeoutError:
        display.say(f"Not finished after {TIME_LIMIT:g} s.")


async def _judge(jobs: DemoJobs, display: "Display") -> int:
    """Compare both stores with what has to be in them, now that the worker has stopped."""
    rows, states = await jobs.rows(), await jobs.states()
    states_of_kind = {kind: Counter[str]() for kind in KINDS}
    for each, state in zip(jobs.added, states, strict=True):
        states_of_kind[each.kind][state] += 1
    found = faults(jobs.added, rows, states)
    display.verdict(jobs.tally(rows), states_of_kind, found)
    return 1 if any(found.values()) else 0
