"""The demo as a newcomer runs it, and whether its check of itself would notice anything."""

import os
import pty
import signal
import subprocess
import sys
import tempfile
import termios
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from autoflow_worker.local.demo import INTERRUPTED, KINDS, Job, example_tasks, faults
from autoflow_worker.recording import patches
from autoflow_worker.tasks.definition import PRIORITIES
from autoflow_worker.tasks.loader import load_tasks
from tests.support.process import WorkerStarter
from tests.support.until import until

Rows = dict[str, dict[str, Any]]
COUNT = sum(kind.count for kind in KINDS)


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
    assert f"All {COUNT} jobs ended as they have to, in both stores." in lines
    for kind in KINDS:
        [line] = [line for line in lines if line.startswith(f"{kind.name}  ")]
        assert line.split() == [
            *kind.name.split(),
            *kind.expected.split(),
            *(str(kind.count), kind.ends),
            *(str(kind.count), kind.state),
        ]
    assert max(map(len, lines)) <= 80
    assert "autoflow-worker dev" in demo.stdout, "what to do next"
    assert "\x1b" not in demo.stdout
    assert demo.stderr == ""
    assert left_behind(servers_folder) == []


@pytest.mark.slow
def test_a_terminal_of_80_columns_shows_a_live_table(servers_folder: Path) -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    env = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    demo = subprocess.Popen(
        [sys.executable, "-m", "autoflow_worker", "demo"],
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        env=env | {"TMPDIR": str(servers_folder)},
    )
    os.close(theirs)
    said = b""
    with suppress(OSError):  # what Linux raises at the end
        while piece := os.read(ours, 65_536):
            said += piece
    os.close(ours)
    assert demo.wait() == 0, said
    assert said.count(b"\x1b[J") > 1, "the table was replaced"
    lines = said.decode().rpartition("\x1b[J")[2].splitlines()
    assert max(map(len, lines)) <= 80


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["Starting Valkey", "Running"])
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


def as_expected() -> tuple[list[Job], Rows, list[str]]:
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
            added.append(Job(kind, row_id, row_id))
    return added, rows, [each.kind.state for each in added]


def test_no_fault_is_found_where_there_is_none() -> None:
    assert faults(*as_expected()) == []


FIRST = {kind.name: f"{kind.name} 0" for kind in KINDS}


@pytest.mark.parametrize(
    ("spoil", "kind"),
    [
        (lambda rows: rows.pop(FIRST["quick"]), "quick"),
        (lambda rows: rows.pop(FIRST["by priority"]), "by priority"),
        (lambda rows: rows.update(stranger={}), "rows of no job"),
        (lambda rows: rows[FIRST["slow"]].update(status="active"), "slow"),
        (lambda rows: rows[FIRST["quick"]].update(attempts=2), "quick"),
        (lambda rows: rows[FIRST["quick"]].update(result=None), "quick"),
        (lambda rows: rows[FIRST["quick"]].update(error={"reason": ""}), "quick"),
        (lambda rows: rows[FIRST["invalid payload"]].update(error=None), "invalid payload"),
        (
            lambda rows: rows[FIRST["invalid payload"]].update(error={"reason": "another"}),
            "invalid payload",
        ),
        (lambda rows: rows[FIRST["delayed"]].update(startedAt=patches.iso(999)), "delayed"),
        (lambda rows: rows[FIRST["delayed"]].update(startedAt=None), "delayed"),
        (lambda rows: rows[FIRST["by priority"]].update(priority="low"), "by priority"),
    ],
)
def test_a_wrong_row_is_noticed(spoil: Callable[[Rows], object], kind: str) -> None:
    added, rows, states = as_expected()
    spoil(rows)
    [fault] = faults(added, rows, states)
    assert fault.startswith(f"{kind}: ")


def test_a_wrong_state_is_noticed() -> None:
    added, rows, states = as_expected()
    states[0] = "active"
    assert faults(added, rows, states) == [
        f"{KINDS[0].name}: job {added[0].job_id}: BullMQ says active"
    ]
