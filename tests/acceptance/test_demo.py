"""The demo as a newcomer runs it, and whether its check of itself would notice anything."""

import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from autoflow_worker.local.demo.kinds import BY_PRIORITY, DELAYED, KINDS, Added, faults
from autoflow_worker.local.demo.run import INTERRUPTED, example_tasks
from autoflow_worker.recording import patches
from autoflow_worker.tasks.definition import PRIORITIES
from autoflow_worker.tasks.loader import load_tasks
from tests.support.process import WorkerStarter
from tests.support.until import until

Rows = dict[str, dict[str, Any]]


@pytest.fixture
def servers_folder() -> Iterator[Path]:
    """Where the demo's servers keep their data; PostgreSQL's user has to get there."""
    with tempfile.TemporaryDirectory(prefix="demo-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def left_behind(folder: Path) -> list[str]:
    """Files, and processes that run there."""
    found = [str(path) for path in folder.iterdir()]
    for process in psutil.process_iter():
        try:
            if Path(process.cwd()).is_relative_to(folder):
                found.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return found


@pytest.mark.slow
async def test_the_demo(worker_process: WorkerStarter, servers_folder: Path) -> None:
    demo = worker_process(None, command="demo", TMPDIR=str(servers_folder))
    assert await demo.wait(timeout=200) == 0, demo.report()
    lines = demo.stdout.splitlines()
    assert "every row and every BullMQ state is as it has to be" in lines[-1]
    for kind in KINDS:
        [line] = [line for line in lines if line.strip().startswith(f"{kind.name}  ")]
        assert line.split()[-1] == "ok"
        assert f"{kind.count} {kind.ends}" in line
    assert demo.stderr == ""
    assert left_behind(servers_folder) == []


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["Starting Valkey", "pending"])
async def test_ctrl_c(worker_process: WorkerStarter, servers_folder: Path, moment: str) -> None:
    demo = worker_process(None, command="demo", TMPDIR=str(servers_folder))
    await until(lambda: moment in demo.stdout, message=demo.report)
    demo.send(signal.SIGINT)
    assert await demo.wait() == INTERRUPTED, demo.report()
    assert demo.stderr.strip() == ""
    assert left_behind(servers_folder) == []


def test_the_example_tasks_are_a_task_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    tasks = example_tasks()
    assert load_tasks("examples.tasks_config:tasks") == tasks
    assert {kind.queue for kind in KINDS} == {task.queue_name for task in tasks}


def as_expected() -> tuple[list[Added], Rows, list[str]]:
    """Jobs, rows and states as they are when all is well."""
    added, rows = [], {}
    for kind in KINDS:
        for n in range(kind.count):
            row_id = f"{kind.name} {n}"
            error = {"reason": f"because: {kind.reason}"} if kind.ends == "failed" else None
            rows[row_id] = {
                "status": kind.ends,
                "attempts": kind.attempts,
                "result": {} if kind.ends == "completed" else None,
                "error": error,
                "priority": list(PRIORITIES)[n * len(PRIORITIES) // kind.count],
                "enqueuedAt": patches.iso(0),
                "startedAt": patches.iso(kind.delay_ms + n) if kind.attempts else None,
            }
            added.append(Added(kind, row_id, row_id))
    return added, rows, [each.kind.state for each in added]


def test_no_fault_is_found_where_there_is_none() -> None:
    assert not any(faults(*as_expected()).values())


FIRST = {kind.name: f"{kind.name} 0" for kind in KINDS}


@pytest.mark.parametrize(
    ("spoil", "kind"),
    [
        (lambda rows: rows.pop(FIRST["quick"]), "quick"),
        (lambda rows: rows.pop(FIRST["by priority"]), "by priority"),
        (lambda rows: rows.update(stranger={}), "quick"),
        (lambda rows: rows[FIRST["slow"]].update(status="active"), "slow"),
        (lambda rows: rows[FIRST["quick"]].update(attempts=2), "quick"),
        (lambda rows: rows[FIRST["quick"]].update(result=None), "quick"),
        (lambda rows: rows[FIRST["quick"]].update(error={"reason": ""}), "quick"),
        (lambda rows: rows[FIRST["invalid payload"]].update(error=None), "invalid payload"),
        (
            lambda rows: rows[FIRST["invalid payload"]].update(error={"reason": "another"}),
            "invalid payload",
        ),
        (lambda rows: rows[FIRST["delayed"]].update(startedAt=patches.iso(999)), DELAYED.name),
        (lambda rows: rows[FIRST["delayed"]].update(startedAt=None), DELAYED.name),
        (lambda rows: rows[FIRST["by priority"]].update(priority="low"), BY_PRIORITY.name),
    ],
)
def test_a_wrong_row_is_noticed(spoil: Callable[[Rows], object], kind: str) -> None:
    added, rows, states = as_expected()
    spoil(rows)
    assert [found.name for found, what in faults(added, rows, states).items() if what] == [kind]


def test_a_wrong_state_and_a_missing_job_are_noticed() -> None:
    added, rows, states = as_expected()
    states[0] = "active"
    assert faults(added, rows, states)[KINDS[0]] == [
        f"{KINDS[0].queue} {added[0].job_id}: BullMQ says active"
    ]
    added, rows, states = as_expected()
    del added[-1], states[-1], rows[f"{KINDS[-1].name} {KINDS[-1].count - 1}"]
    assert len(faults(added, rows, states)[KINDS[-1]]) == 1
