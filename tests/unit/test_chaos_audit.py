"""The audit of `chaos/` has to find what it is there to find."""

import json
from dataclasses import replace
from typing import Any

import pytest

from chaos.audit import Story, _differences
from chaos.effects import Run
from chaos.queues import BullJob
from chaos.reruns import Causes
from chaos.servers import POSTGRES, REDIS, Outage
from chaos.tasks import LOCK_S, QUICK
from chaos.workers import Life
from chaos.workload import PlannedJob
from tests.support.database import iso_now, task_data
from tests.support.node import Scheduled

PID = 4711
JOB = "a-job"


class Process:
    """What `Life` asks of a process."""

    pid = PID


def a_run(
    started_at: float, ended_at: float | None = None, *, run_id: str = "run", attempt: int = 1
) -> Run:
    how = "returned" if ended_at else ""
    return Run(run_id, QUICK, JOB, attempt, PID, PID, started_at, ended_at, how)


def a_life(**what_happened: Any) -> Life:
    return Life(Process(), started_at=0.0, **what_happened)  # type: ignore[arg-type]


def a_story() -> Story:
    result = {"success": True, "output": {"run": "run"}, "duration": 1}
    row = task_data(
        QUICK,
        {"n": 1},
        status="completed",
        attempts=1,
        startedAt=iso_now(),
        completedAt=iso_now(),
        result=result,
        externalId=JOB,
    )
    planned = PlannedJob(QUICK, Scheduled({"n": 1}, task_id=JOB), False, True, 1, True)
    job = BullJob(["completed"], {"atm": "1", "returnvalue": json.dumps(result)})
    return Story(planned, [a_run(1, 2)], row, job)


def test_a_sound_story() -> None:
    assert list(_differences(a_story())) == []


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"runs": []}, "never ran"),
        ({"row": None}, "has no row"),
        ({"job": BullJob(["failed"], {"atm": "1"})}, "is ['failed'] in BullMQ, not completed"),
        ({"job": BullJob([], {})}, "is [] in BullMQ, not completed"),
    ],
)
def test_a_part_that_differs(change: dict[str, Any], fault: str) -> None:
    assert fault in list(_differences(replace(a_story(), **change)))


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"status": "active"}, "its row says active"),
        ({"attempts": 2}, "took 1 attempts"),
        ({"externalId": None}, "lost what the API wrote"),
        ({"result": {"success": True, "output": {"run": "other"}, "duration": 1}}, "no run"),
        ({"result": None}, "its row's result is"),
        ({"failedAt": iso_now()}, "not that of a completed job"),
        ({"unknown": 1}, "the API refuses its row"),
    ],
)
def test_a_row_that_differs(change: dict[str, Any], fault: str) -> None:
    story = a_story()
    assert story.row is not None
    found = list(_differences(replace(story, row=story.row | change)))
    assert any(fault in text for text in found), found


@pytest.mark.parametrize(
    ("life", "outages", "cause"),
    [
        (a_life(), [], None),
        (a_life(killed_at=102.5), [], "killed"),
        (a_life(killed_at=110.0), [], None),
        (a_life(killed_at=110.0), [Outage(POSTGRES, "suspended", 100, 109)], "killed"),
        (a_life(killed_at=110.0), [Outage(POSTGRES, "suspended", 90, 95)], None),
        (a_life(handed_back={JOB}), [], "handed back"),
        (a_life(handed_back={"other"}), [], None),
        (a_life(stops=[(100.5, 100.6)]), [], None),
        (a_life(stops=[(100.5, 100.5 + LOCK_S)]), [], "its lock expired in a silence"),
        (a_life(stops=[(119 - LOCK_S, 119.9)]), [], "its worker stood still before it began"),
        (a_life(stops=[(119.8, 119.9)]), [], None),
        (a_life(), [Outage(POSTGRES, "suspended", 100, 100 + LOCK_S)], None),
        (
            a_life(),
            [Outage(REDIS, "suspended", 100, 100 + LOCK_S)],
            "its lock expired in a silence",
        ),
    ],
)
def test_the_cause_of_a_repeated_run(life: Life, outages: list[Outage], cause: str | None) -> None:
    first, second = a_run(100, 101), a_run(120, 121)
    assert list(Causes([life], outages).of_repeated([second, first])) == [(first, cause)]


def test_another_attempt_is_no_repetition() -> None:
    runs = [a_run(100, 101), a_run(102, 103, attempt=2)]
    assert list(Causes([a_life()], []).of_repeated(runs)) == []
