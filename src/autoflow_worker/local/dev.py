"""The ``dev`` command: the worker in a process of its own, restarted when its source changes."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from autoflow_worker.errors import MissingExtraError
from autoflow_worker.local.embedded import EmbeddedPostgres, EmbeddedRedis, running
from autoflow_worker.logs.configure import configure_logging
from autoflow_worker.process.children import Child, Children
from autoflow_worker.process.signals import stop_on_signals
from autoflow_worker.recording.table import init_db
from autoflow_worker.settings import Settings, read_env_files

try:
    from watchfiles import Change, PythonFilter, awatch
except ImportError as error:
    raise MissingExtraError(f"dev needs {error.name or error}") from None

RELOAD_GRACE = "2"  # WORKER_SHUTDOWN_GRACE if it is not set
_WATCHED = PythonFilter(extra_extensions=(".env", ".env.local", ".env.development"))


def run_dev(*, tasks: str | None = None, queues: str | None = None) -> int:
    """Run the worker until a signal, and restart it when a Python or .env file changes.

    Returns:
        The last worker's exit code; 1 if it had to be killed.

    Raises:
        SettingsError: the settings are wrong. The URLs need not be set.
        WorkerError: an embedded server is not installed, or does not start.
    """
    # Each worker reads the .env files itself, so its next start sees a change in them.
    inherited = dict(os.environ)
    read_env_files()
    if not os.environ.get("WORKER_SHUTDOWN_GRACE"):
        os.environ["WORKER_SHUTDOWN_GRACE"] = inherited["WORKER_SHUTDOWN_GRACE"] = RELOAD_GRACE
    settings = Settings.load(
        tasks_config=tasks,
        worker_queues=queues,
        redis_url=os.environ.get("REDIS_URL") or "redis://embedded",
        database_url=os.environ.get("DATABASE_URL") or "postgresql://embedded",
    )
    command = [sys.executable, "-m", "autoflow_worker", "start", "--supervised"]
    command += ["--tasks", tasks] if tasks else []
    command += ["--queues", queues] if queues else []
    configure_logging("error")  # Each worker configures its own logs.
    with _servers() as urls:
        _introduce(urls, tasks)
        return asyncio.run(_run(command, {**inherited, **urls}, settings.worker_shutdown_grace))


@contextmanager
def _servers() -> Iterator[Mapping[str, str]]:
    """Run a server for each URL that is not set; yield their URLs by variable."""
    urls = {}
    with ExitStack() as stack:
        if not os.environ.get("REDIS_URL"):
            urls["REDIS_URL"] = stack.enter_context(running(EmbeddedRedis()))
        if not os.environ.get("DATABASE_URL"):
            urls["DATABASE_URL"] = stack.enter_context(running(EmbeddedPostgres()))
            asyncio.run(init_db(urls["DATABASE_URL"]))
        yield urls


def _introduce(urls: Mapping[str, str], tasks: str | None) -> None:
    """Say what runs, and how to schedule a job."""
    _say("runs the worker, and restarts it when a Python or .env file changes; Ctrl-C ends it")
    if urls:
        _say(
            "runs embedded servers for the URLs that are not set, and deletes their data at the end"
        )
    _say("to schedule a job, run in another terminal, in this folder:")
    option = f"--tasks {tasks} " if tasks else ""
    schedule = f'autoflow-worker schedule {option}QUEUE \'{{"name": "Ada"}}\''
    for line in (*(f"export {name}={url}" for name, url in urls.items()), schedule):
        sys.stderr.write(f"       {line}\n")


async def _run(command: Sequence[str], env: Mapping[str, str], grace: float) -> int:
    """Run until a signal; return the last worker's exit code, 1 if it had to be killed."""
    root = Path.cwd()
    with stop_on_signals() as (stop, abort), Children(command, env) as children:
        changes = awatch(root, watch_filter=_WATCHED, stop_event=stop)
        while True:
            worker = children.start()
            changed = await _until_change(worker, changes, stop)
            code = await worker.end(abort, grace)
            if not changed:
                return code
            names = sorted(path.removeprefix(f"{root}/") for path in changed)
            _say(f"{', '.join(names)} changed: restarting")


async def _until_change(
    worker: Child, changes: AsyncIterator[set[tuple[Change, str]]], stop: asyncio.Event
) -> set[str]:
    """Wait for a change, and return the files that changed; none after a signal to stop."""
    change = asyncio.ensure_future(anext(changes, None))
    waits: set[asyncio.Future[Any]] = {worker.ended, change}
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    if worker.is_over and not stop.is_set() and not change.done():
        _say(f"the worker ended with exit code {worker.exit_code}; waiting for a change")
    # A signal to stop ends the iterator, and so this wait.
    return {path for _, path in await change or ()}


def _say(message: str) -> None:
    sys.stderr.write(f"dev: {message}\n")
