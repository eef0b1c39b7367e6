"""The commands. No other module reads argv, or turns errors into exit codes."""
# ruff: noqa: PLC0415 - each command imports what it needs, so that --help is quick

import asyncio
import gc
import io
import json
import os
import shutil
import sys
import traceback
from collections import Counter
from collections.abc import Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, NoReturn

import click
import structlog

from autoflow_worker import __version__
from autoflow_worker.broker.backoff import MAX_DELAY_MS
from autoflow_worker.broker.libraries import mismatch_of_import
from autoflow_worker.encoding.masking import mask_secrets
from autoflow_worker.errors import WorkerError
from autoflow_worker.logs.configure import configure_logging
from autoflow_worker.process.event_loop import run_async, run_to_its_end
from autoflow_worker.process.leaving import leave_process

if TYPE_CHECKING:
    from autoflow_worker.operations.reconcile_plan import Lost
    from autoflow_worker.service import WorkerService
    from autoflow_worker.settings import Settings

log = structlog.get_logger(__name__)

# Exit codes of a command that Ctrl-C ends, and of `reconcile` if differences are left.
INTERRUPTED = 130
DIFFERENCES_LEFT = 5

_COLOURS = {"ok": "green", "warning": "yellow", "failed": "red"}

_EPILOG = """
Settings come from the environment or from .env files: REDIS_URL, DATABASE_URL, NODE_ENV,
BULLMQ_PREFIX, TASKS_CONFIG, WORKER_QUEUES, WORKER_CONCURRENCY, WORKER_PROCESSES,
WORKER_RECYCLE_JOBS, WORKER_RECYCLE_MEMORY, WORKER_SHUTDOWN_GRACE, WORKER_STARTUP_TIMEOUT,
DATABASE_POOL_MAX, RECORD_UNKNOWN_JOBS, MAX_PAYLOAD_BYTES, LOG_LEVEL, LOG_FORMAT.

Exit codes: 0 success; 1 a part of the worker died; 2 wrong settings, task list or arguments, or a
missing extra; 3 Redis or PostgreSQL can't be reached, refuses the worker, or does not fit; 4 the
deadline passed and running jobs were handed back; 5 reconcile left differences.
"""


_tasks_option = click.option(
    "--tasks",
    metavar="MODULE:ATTRIBUTE",
    help="The task list. [default: TASKS_CONFIG, else tasks_config:tasks]",
)
_queues_option = click.option(
    "--queues", metavar="A,B", help="Serve only these queues. [default: WORKER_QUEUES, else all]"
)


def _load_settings(**options: Any) -> "Settings":
    """Read the .env files, then the settings."""
    from autoflow_worker.settings import Settings, read_env_files

    read_env_files()
    return Settings.load(**options)


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, epilog=_EPILOG)
@click.version_option(__version__, prog_name="autoflow-worker")
def cli() -> None:
    """Run BullMQ jobs with Python handlers, and record their status in PostgreSQL."""


@cli.command()
@_tasks_option
@_queues_option
@click.option(
    "--until-idle",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="End with exit code 0 when no task had a job for so long. A delayed job counts when due.",
)
@click.option(
    "--processes",
    metavar="N",
    help="Run so many worker processes, or one for each core: auto. [default: WORKER_PROCESSES, "
    "else 1]",
)
@click.option("--quiet", is_flag=True, hidden=True)
@click.option("--supervised", is_flag=True, hidden=True)
def start(
    *,
    tasks: str | None,
    queues: str | None,
    processes: str | None,
    until_idle: float | None,
    quiet: bool,
    supervised: bool,
) -> int:
    """Run the worker, as in production.

    Needs REDIS_URL, DATABASE_URL and a task list. SIGTERM or SIGINT stops it: running jobs have
    WORKER_SHUTDOWN_GRACE seconds to finish, then they are handed back to their queues. A second
    signal, at least a second later, hands them back at once. SIGUSR1 prints what runs. SIGTSTP
    makes the worker quiet: it finishes what runs and fetches nothing more, until SIGCONT.

    With more than one process, SIGHUP replaces all processes, one after the other.
    """
    from autoflow_worker.process.signals import hold_signals
    from autoflow_worker.process.supervised import Supervision
    from autoflow_worker.process.watchdog import leave_stacks

    hold_signals()  # Before the slow imports.
    leave_stacks()
    supervision = Supervision() if supervised else None
    from autoflow_worker.settings import Settings, read_env_files

    inherited = dict(os.environ)
    env_files = read_env_files()
    settings = Settings.load(tasks_config=tasks, worker_queues=queues, worker_processes=processes)
    configure_logging(settings.log_level, settings.log_format)
    if settings.needs_supervisor and not supervised:
        from autoflow_worker.supervisor import supervise

        given = {"--tasks": tasks, "--queues": queues, "--until-idle": until_idle}
        options = [f"{name}={value}" for name, value in given.items() if value is not None]
        # Each process reads the .env files itself, so its start sees a change in them.
        return supervise(settings, options, inherited, end_idle=until_idle is not None)
    if env_files:
        log.info("env_files_read", files=env_files)
    for found in Settings.lookalikes():
        log.warning("unknown_variable", **found._asdict())
    from autoflow_worker.service import WorkerService
    from autoflow_worker.tasks.loader import load_tasks

    listed = load_tasks(settings.tasks_config, settings.worker_queues)
    service = WorkerService(settings, listed, idle_limit=until_idle, supervision=supervision)
    if quiet:
        service.be_quiet()
    return _run_worker(service, settings.worker_shutdown_grace)


def _run_worker(service: "WorkerService", grace: float) -> int:
    from autoflow_worker.process.forks import guard_forks
    from autoflow_worker.process.signals import QUIET, TELL, WAKE, stop_on_signals
    from autoflow_worker.worker.handler_tasks import contain_tasks

    # Modules stay, and jobs leave almost no cyclic garbage. At Python's default threshold, 700 or
    # 2000 new objects, the collector took a tenth of the time.
    gc.freeze()
    gc.set_threshold(10_000)

    calls = {TELL: service.tell, QUIET: service.be_quiet, WAKE: service.wake}

    async def run() -> int:
        loop = asyncio.get_running_loop()
        guard_forks(loop)
        contain_tasks(loop)
        with stop_on_signals(grace, calls) as (stop, abort):
            return await service.run(stop, abort)

    return run_to_its_end(run(), service.fail)


@cli.command()
@_tasks_option
@_queues_option
def dev(tasks: str | None, queues: str | None) -> int:
    """Run the worker with hot reload and embedded servers.

    Restarts the worker when a Python or .env file in the working directory changes. Starts a server
    of its own for each of REDIS_URL and DATABASE_URL that is not set, and deletes its data at the
    end.
    """
    from autoflow_worker.local.dev import run_dev

    return run_dev(tasks=tasks, queues=queues)


@cli.command()
def demo() -> int:
    """Run some hundred jobs of every kind, and check how each ended.

    Starts servers of its own, and leaves nothing behind.
    """
    from autoflow_worker.local.demo import run_demo

    return run_demo()


@cli.command()
@_tasks_option
@_queues_option
def check(tasks: str | None, queues: str | None) -> int:
    """Check all that a start needs, without starting.

    Checks the settings, the task list, Redis and PostgreSQL. The exit code is that of the first
    failed check.
    """
    from autoflow_worker.operations.check import run_checks
    from autoflow_worker.settings import read_env_files

    configure_logging("error")
    exit_code = 0
    for found in run_checks(read_env_files(), tasks_config=tasks, worker_queues=queues):
        verdict = click.style(f"{found.verdict:<9}", fg=_COLOURS.get(found.verdict))
        click.echo(f"{found.check:<12}{verdict}" + found.text.replace("\n", "\n" + " " * 21))
        for line in found.table:
            click.echo(line)
        exit_code = exit_code or found.exit_code
    return exit_code


@cli.command()
@click.argument("queue")
@click.argument("payload", metavar="JSON")
@_tasks_option
@click.option("--delay-ms", type=click.IntRange(0, MAX_DELAY_MS), help="Delay the job.")
@click.option("--user-id", help="The user whose task it is.")
@click.option("--correlation-id", help="An id that the handler gets. [default: generated]")
def schedule(queue: str, payload: str, tasks: str | None, **options: Any) -> int:
    """Add one job to QUEUE, and print its task's id.

    The payload is the JSON object; `-` reads it from stdin.
    """
    from autoflow_worker.scheduling.scheduler import TaskScheduler
    from autoflow_worker.tasks.loader import load_tasks

    settings = _load_settings(tasks_config=tasks)
    [task] = load_tasks(settings.tasks_config, [queue])
    data = _json_object(payload)
    configure_logging("error")

    async def run() -> str:
        async with TaskScheduler(
            redis_url=settings.redis_url.get_secret_value(),
            database_url=settings.database_url.get_secret_value(),
            prefix=settings.bullmq_prefix,
        ) as scheduler:
            return await scheduler.schedule(task, data, **options)

    click.echo(run_async(run()))
    return 0


def _json_object(text: str) -> dict[str, Any]:
    try:
        # Read bytes: a text stream's decoding depends on the locale.
        value = json.loads(sys.stdin.buffer.read() if text == "-" and sys.stdin else text)
    except (ValueError, RecursionError) as error:
        raise click.BadParameter(f"not JSON: {error}", param_hint="JSON") from None
    if not isinstance(value, dict):
        raise click.BadParameter("must be a JSON object", param_hint="JSON")
    return value


@cli.command("init-db")
def init_db() -> int:
    """Create the tasks table if it is missing.

    Creates its indexes too, and changes nothing that exists. In production, the API's migrations
    create the table.
    """
    from autoflow_worker.recording import table

    settings = _load_settings(needs={"database_url"})
    run_async(table.init_db(settings.database_url.get_secret_value()))
    click.echo("the tasks table exists")
    return 0


@cli.command()
@click.option("--fix", is_flag=True, help="Settle the differences; without it, only list them.")
@click.option(
    "--lost",
    type=click.Choice(["fail", "requeue"]),
    help="What to do if a row's job is gone from Redis: set the row failed, or add the job again.",
)
def reconcile(fix: bool, lost: "Lost | None") -> int:
    """Compare unfinished rows with their jobs in BullMQ.

    With --fix, each row gets the state of its job; and a task that the API retried while BullMQ
    still kept its failed job is retried in BullMQ. Without --lost, a row whose job is gone is left
    alone. The exit code is 5 if differences are left, else 0.
    """
    from autoflow_worker.broker.client import PipelinedRedis
    from autoflow_worker.operations.reconcile import HEADER, Settling, summary
    from autoflow_worker.operations.reconcile import reconcile as compare

    settings = _load_settings(needs={"redis_url", "database_url"})
    configure_logging("error")
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    counts: Counter[Settling] = Counter()

    async def run() -> None:
        database_url, prefix = settings.database_url.get_secret_value(), settings.bullmq_prefix
        async with aclosing(PipelinedRedis(settings.redis_url.get_secret_value())) as redis:
            await redis.open(settings.worker_startup_timeout)
            async with aclosing(compare(redis, database_url, prefix, fix=fix, lost=lost)) as found:
                async for difference in found:
                    if not counts:
                        click.echo(HEADER)
                    counts[difference.settling] += 1
                    click.echo(difference.line(width))

    run_async(run())
    click.echo(summary(counts))
    return 0 if counts.keys() <= {Settling.DONE} else DIFFERENCES_LEFT


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run a command and end the process with its exit code."""
    leave_process(*_result(argv))


def _result(argv: Sequence[str] | None) -> tuple[int, str | None]:
    """Run a command; return its exit code, and a message if it failed."""
    try:
        code = cli.main(args=argv, prog_name="autoflow-worker", standalone_mode=False)
    except WorkerError as error:
        return error.exit_code, f"autoflow-worker: {mask_secrets(str(error))}"
    except click.ClickException as error:
        text = io.StringIO()
        error.show(text)
        return error.exit_code, text.getvalue().rstrip()
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED, None
    except (Exception, SystemExit) as error:
        return WorkerError.exit_code, f"autoflow-worker: {mask_secrets(_accident(error))}"
    return code if isinstance(code, int) else 0, None


def _accident(error: BaseException) -> str:
    """Describe an error that this package does not raise on purpose."""
    if isinstance(error, SystemExit):
        return f"foreign code called sys.exit({error.code!r}), outside of any job"
    if isinstance(error, ImportError) and (mismatch := mismatch_of_import(error)):
        return str(mismatch)
    return traceback.format_exc()
