"""A bullmq or a redis-py that differs from the one that this package knows ends the start.

The other version is made out of the installed one: a copy with one thing changed, most as releases
of bullmq have changed it.
"""

import asyncio
import importlib.metadata
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
from redis.asyncio import Redis

from autoflow_worker.broker import official_worker as module
from autoflow_worker.broker.official_worker import official_worker
from tests.support.database import Database
from tests.support.node import Node
from tests.support.process import WorkerStarter

NEEDED = {"bullmq": "bullmq~=3.4.4", "redis": "redis~=8.1.0"}

TASKS = """
    from autoflow_worker import define_task

    async def handler(payload, ctx): ...

    tasks = [define_task("completed:mail", handler)]
"""

MAKE_A_WORKER = """
import asyncio
from autoflow_worker.broker.official_worker import official_worker
from autoflow_worker.broker.client import PipelinedRedis

async def main():
    official_worker("mail", PipelinedRedis("redis://127.0.0.1:1"), "bull", {})

asyncio.run(main())
"""


class Change(NamedTuple):
    """One change in a file of a library, and what is said about it."""

    file: str
    old: str
    new: str
    told: str


CHANGES = {
    "an argument more": Change(
        "bullmq/scripts.py",
        "self.keys[''], packedOpts]",
        "self.keys[''], packedOpts, 0]",
        "moveToCompletedArgs packs something else than this worker",
    ),
    "keys in another order": Change(
        "bullmq/scripts.py",
        "'stalled', 'limiter',",
        "'limiter', 'stalled',",
        "moveToCompletedArgs packs something else than this worker",
    ),
    "all are kept by another word": Change(
        "bullmq/scripts.py",
        'return {"count": -1}',
        "return {}",
        "moveToCompletedArgs packs something else than this worker",
    ),
    "bullmq 3.0's reasons": Change(
        "bullmq/scripts.py",
        "val\n            if propVal == 'failedReason'",
        "json.dumps(val)\n            if propVal == 'failedReason'",
        "moveToFailedArgs packs something else than this worker expects",
    ),
    "an option more of a claim": Change(
        "bullmq/scripts.py",
        '"lockDuration": lockDuration, "limiter": limiter}',
        '"lockDuration": lockDuration, "limiter": limiter, "group": None}',
        "moveToActive packs something else than this worker",
    ),
    "an option less of a claim": Change(
        "bullmq/scripts.py",
        '"limiter": worker_opts.get("limiter", None),',
        "",
        "moveToDelayedArgs packs something else than this worker",
    ),
    "parameters in another order": Change(
        "bullmq/scripts.py",
        "token: str, delay: int = 0",
        "delay: int, token: str = ''",
        "moveToDelayedArgs takes job_id, timestamp, delay, token, opts",
    ),
    "a method less": Change(
        "bullmq/scripts.py",
        "def extendJobLocks",
        "def extendLocks",
        "AttributeError: 'Scripts' object has no attribute 'extendJobLocks'",
    ),
    "a script less": Change(
        "bullmq/redis_connection.py", '"retryJob": "r', '"retry": "r', "KeyError: 'retryJob'"
    ),
    "another constructor": Change(
        "bullmq/worker.py",
        "(self, name: str, processor: Callable[..., asyncio.Future], opts:",
        "(self, name: str, processor, backend, opts:",
        "Worker takes other arguments",
    ),
    "a method of redis-py less": Change(
        "redis/_parsers/base.py",
        "def parse_error(",
        "def error_of(",
        "AttributeError: type object 'BaseParser' has no attribute 'parse_error'",
    ),
    "redis-py's writers by another name": Change(
        "redis/asyncio/connection.py",
        "_writer",
        "_sender",
        "AttributeError: 'Connection' object has no attribute '_writer'",
    ),
}

NAMES_LESS = {
    "before the command": Change(
        "bullmq/custom_errors/__init__.py",
        "import DelayedError",
        "import DelayedError as LaterError",
        "'DelayedError'",
    ),
    "in the command": Change(
        "redis/commands/core.py", "class AsyncScript:", "class _AsyncScript:", "'AsyncScript'"
    ),
}


def changed_copy(change: Change, folder: Path) -> str:
    """Copy an installed library, changed, as version 9.9.9; the folder to import it from."""
    library = change.file.partition("/")[0]
    spec = find_spec(library)
    assert spec is not None
    assert spec.origin is not None
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(spec.origin).parent, folder / library, ignore=ignored)
    changed = folder / change.file
    text = changed.read_text()
    assert change.old in text
    changed.write_text(text.replace(change.old, change.new))
    metadata = folder / f"{library}-9.9.9.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: {library}\nVersion: 9.9.9\n")
    return str(folder)


def told_of(change: Change) -> tuple[str, str]:
    """How the two lines begin that say so."""
    library = change.file.partition("/")[0]
    needed = NEEDED[library]
    return (
        f"{library} 9.9.9 is installed, and this worker needs {needed}: ",
        f"To mend it: pip install '{needed}'",
    )


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
async def test_a_difference_is_found(change: Change, tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": changed_copy(change, tmp_path)}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", MAKE_A_WORKER, env=env, stderr=subprocess.PIPE
    )
    _, stderr = await process.communicate()
    *_, last, remedy = stderr.decode().splitlines()
    found, mended = told_of(change)
    assert last.startswith(f"autoflow_worker.errors.LibraryMismatchError: {found}{change.told}")
    assert remedy == mended


@pytest.mark.parametrize("name", ["an argument more", "redis-py's writers by another name"])
async def test_a_start_ends_before_a_job_is_touched(
    worker_process: WorkerStarter, db: Database, node5: Node, tmp_path: Path, *, name: str
) -> None:
    task_id = await db.insert_task("completed:mail")
    await node5.schedule("completed:mail", {}, task_id=task_id)
    worker = worker_process(TASKS, PYTHONPATH=changed_copy(CHANGES[name], tmp_path / "changed"))
    assert await worker.wait() == 1, worker.report()
    messages = [line for line in worker.stderr.splitlines() if not line.startswith("{")]
    found, mended = told_of(CHANGES[name])
    assert messages == [f"autoflow-worker: {found}{CHANGES[name].told}", mended]
    assert await node5.get_state("completed:mail", task_id) == "prioritized"
    assert await db.status(task_id) == "pending"


async def test_the_check_says_so_too(worker_process: WorkerStarter, tmp_path: Path) -> None:
    change = CHANGES["an argument more"]
    folder = changed_copy(change, tmp_path / "changed")
    check = worker_process(TASKS, command="check", PYTHONPATH=folder)
    assert await check.wait() == 1, check.report()
    assert told_of(change)[0] + change.told in check.stdout


@pytest.mark.parametrize("change", NAMES_LESS.values(), ids=NAMES_LESS)
async def test_a_name_that_can_not_be_imported(
    worker_process: WorkerStarter, tmp_path: Path, change: Change
) -> None:
    worker = worker_process(TASKS, PYTHONPATH=changed_copy(change, tmp_path / "changed"))
    assert await worker.wait() == 1, worker.report()
    *_, last, remedy = worker.stderr.splitlines()
    found, mended = told_of(change)
    assert f"{found}cannot import name {change.told}" in last
    assert remedy == mended


def test_the_needed_versions_are_the_installed_ones() -> None:
    requirements = importlib.metadata.requires("autoflow-worker") or []
    assert set(NEEDED.values()) <= set(requirements)


async def test_a_process_compares_once(
    redis: Redis, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    official_worker("mail", redis, prefix, {})
    monkeypatch.setattr(module, "_differences", lambda *given: pytest.fail("compared again"))
    official_worker("mail", redis, prefix, {"limiter": {"max": 1, "duration": 1000}})
