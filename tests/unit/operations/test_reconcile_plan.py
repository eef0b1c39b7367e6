"""What `reconcile` does about a row, whatever the job's fields hold."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoflow_worker.broker.kept_job import EARLIEST_MS, STATUS_OF_STATE, KeptJob
from autoflow_worker.operations.reconcile_plan import (
    AddAgain,
    Leave,
    Lost,
    PutBack,
    ReadTask,
    Retry,
    Set,
    agrees,
    job_of,
    plan,
)
from autoflow_worker.recording.open_rows import OPEN, Row, Task
from tests.support.database import task_data
from tests.support.row import TaskRow

NOW = 1_767_323_045_678
TODAY = "2026-01-02T03:04:05.678Z"
EARLIER = NOW - 5_000
BEFORE = "2026-01-02T03:04:00.678Z"
QUEUE = "reports-render"
TASK_ID = "V1StGXR8_Z5jdHi6B-myT"


def row(status: str = "active", **facts: Any) -> Row:
    known = {"id": TASK_ID, "queue": QUEUE, "started_at": BEFORE, "attempts": "1", "version": "7"}
    return Row(**{**known, "status": status, **facts})


def job(state: str, score: float | None = None, **fields: str) -> KeptJob:
    return KeptJob(TASK_ID, state=state, exists=True, score=score, fields=fields)


def patch_for(row: Row, job: KeptJob) -> dict[str, Any]:
    """What would be written into the row."""
    action = plan(row, job, lost=None, now_ms=NOW)
    assert isinstance(action, Set)
    return dict(action.patch)


# -- any job -------------------------------------------------------------------------------------

numbers = st.integers(-10, 10) | st.sampled_from([EARLIER, NOW, 2**53, 10**400])
texts = st.text(st.characters(exclude_categories=()), max_size=20)
values = (
    numbers.map(str)
    | st.floats().map(str)
    | texts
    | st.sampled_from(["", "null", "{", "[" * 100_000, '{"success": true, "duration": "x"}'])
    | st.sampled_from(
        ['{"success": true, "output": "\\ud800\\u0000", "duration": 1e999}', "9" * 5000]
    )
    | st.recursive(texts, lambda inner: st.lists(inner, max_size=3)).map(json.dumps)
)
fields = st.dictionaries(
    st.sampled_from(
        ["atm", "failedReason", "finishedOn", "processedOn", "returnvalue", "stacktrace"]
    ),
    values,
)
scores = st.none() | st.floats() | numbers.map(lambda number: float(min(number, 10**300)))


@given(
    st.sampled_from(OPEN),
    st.sampled_from(sorted(STATUS_OF_STATE)),
    scores,
    fields,
    st.sampled_from([None, "", BEFORE, "2026-13-01T00:00:00.000Z", "yesterday"]),
)
def test_whatever_a_job_holds_the_api_takes_its_row(
    status: str, state: str, score: float | None, held: dict[str, str], started_at: str | None
) -> None:
    kept = KeptJob(TASK_ID, state=state, exists=True, score=score, fields=held)

    patch = patch_for(row(status, started_at=started_at), kept)

    assert patch["status"] == STATUS_OF_STATE[state]
    TaskRow.model_validate(task_data(QUEUE, {}, status=status) | patch)
    error = patch.get("error") or {}
    times = [patch.get(key) for key in ("startedAt", "completedAt", "failedAt", "delayUntil")]
    for time in [*times, error.get("lastAttemptAt")]:
        assert time is None or time >= "2001"


@given(
    payload=st.none() | texts | st.dictionaries(texts, values, max_size=3).map(json.dumps),
    priority=st.none() | texts | st.sampled_from(["low", "critical"]),
    max_attempts=st.none() | values,
    delay_until=st.sampled_from([None, "", BEFORE, "2026-01-02T04:04:05.678Z", "soon"]),
    status=st.sampled_from(OPEN),
)
def test_whatever_a_row_holds_its_job_is_as_the_api_adds_it_or_left(
    payload: str | None,
    priority: str | None,
    max_attempts: str | None,
    delay_until: str | None,
    status: str,
) -> None:
    task = Task(payload, priority, max_attempts, delay_until)

    action = job_of(row(status), task, NOW)

    if isinstance(action, Leave):
        return
    assert isinstance(action.data["correlationId"], str)
    options = action.options
    assert options["priority"] in {1, 2, 3, 4}
    assert 1 <= options["attempts"] <= 1_000_000
    assert action.patch["status"] == ("delayed" if options.get("delay") else "pending")
    TaskRow.model_validate({**task_data(QUEUE, {}, status=status), **action.patch})


# -- times that nobody knows ---------------------------------------------------------------------


def test_a_time_that_bullmq_lost_is_that_of_its_set() -> None:
    patch = patch_for(row(), job("completed", NOW, returnvalue="1"))
    assert patch["completedAt"] == TODAY
    assert patch["result"] == {"success": True, "output": 1, "duration": 0}


@pytest.mark.parametrize("nothing", ["0", "", "-1", "soon", str(EARLIEST_MS - 1), "9" * 400])
def test_a_time_that_nobody_knows_is_left_out(nothing: str) -> None:
    held: Any = {"finishedOn": nothing, "processedOn": nothing, "failedReason": "no"}
    assert "completedAt" not in patch_for(row(), job("completed", 0, **held))
    assert "startedAt" not in patch_for(row("pending"), job("active", **held))
    assert "delayUntil" not in patch_for(row(), job("delayed", 0, **held))
    failed = patch_for(row(), job("failed", 0, **held))
    assert "failedAt" not in failed
    assert failed["error"]["lastAttemptAt"] == BEFORE, "the row says when it began"
    failed = patch_for(row(started_at=None), job("failed", 0, **held))
    assert failed["error"]["lastAttemptAt"] == TODAY


def test_attempts_that_nobody_counted_are_left_out() -> None:
    assert "attempts" not in patch_for(row(), job("completed", NOW))
    assert "attempts" not in patch_for(row(), job("failed", NOW, atm="many"))
    assert patch_for(row(), job("failed", NOW, atm="2"))["attempts"] == 2
    assert patch_for(row("pending"), job("active", processedOn=str(NOW)))["attempts"] == 1
    assert patch_for(row("pending"), job("active", atm="2"))["attempts"] == 3


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "9" * 5000, '"' + "x" * 20_000_000 + '"'])
def test_a_result_that_cant_be_read_is_left_out(text: str) -> None:
    action = plan(row(), job("completed", NOW, returnvalue=text), lost=None, now_ms=NOW)
    assert isinstance(action, Set)
    assert action.patch["result"] == {"success": True, "duration": 0}
    assert "can't be read" in action.infinitive


# -- which rows differ ---------------------------------------------------------------------------


def test_a_job_that_was_handed_back_agrees_with_its_pending_row() -> None:
    due = job("delayed", NOW * 0x1000)
    assert agrees(row("pending"), due, NOW)
    assert not agrees(row("pending"), due, NOW - 1)
    assert agrees(row("delayed"), due, NOW)
    assert not agrees(row("active"), due, NOW)


def test_a_promoted_job_waits_for_nothing_but_its_turn() -> None:
    patch = patch_for(row("delayed"), job("prioritized"))
    assert (patch["status"], patch["delayUntil"]) == ("pending", None)
    assert "delayUntil" not in patch_for(row("active"), job("prioritized"))


@pytest.mark.parametrize(
    ("facts", "retried"),
    [
        ({"attempts": "0"}, True),
        ({"attempts": "1"}, False),
        ({"attempts": None}, False),
        ({"attempts": "0", "started_at": None}, False),
        ({"attempts": "0", "status": "active"}, False),
    ],
)
def test_the_sign_of_a_retry_that_bullmq_ignored(facts: dict[str, Any], retried: bool) -> None:
    action = plan(row(**{"status": "pending", **facts}), job("failed", NOW), lost=None, now_ms=NOW)
    assert isinstance(action, Retry) is retried


# -- rows without a job --------------------------------------------------------------------------

GONE = KeptJob(TASK_ID)


@pytest.mark.parametrize(
    ("what", "kept", "started_at"),
    [
        ("gone from Redis, so nobody can tell its end", GONE, BEFORE),
        ("removed from Redis, or was never added", GONE, None),
        ("only its id is left in 'failed'", KeptJob(TASK_ID, state="failed"), BEFORE),
        ("finished, and in none of BullMQ's lists", job("", finishedOn=str(NOW)), BEFORE),
    ],
)
def test_a_row_whose_job_can_tell_nothing_is_left_or_fails(
    what: str, kept: KeptJob, started_at: str | None
) -> None:
    left = plan(row(started_at=started_at), kept, lost=None, now_ms=NOW)
    assert isinstance(left, Leave)
    assert what in left.reason
    assert "--lost" in left.reason

    failed = plan(row(started_at=started_at), kept, lost="fail", now_ms=NOW)
    assert isinstance(failed, Set)
    assert failed.patch["failedAt"] == TODAY
    assert what in failed.patch["error"]["reason"]
    assert failed.patch["error"]["lastAttemptAt"] == (started_at or TODAY)
    TaskRow.model_validate({**task_data(QUEUE, {}), **failed.patch})

    again = plan(row(started_at=started_at), kept, lost="requeue", now_ms=NOW)
    assert isinstance(again, ReadTask if kept is GONE else Leave)


@pytest.mark.parametrize("lost", ["fail", "requeue", None])
@pytest.mark.parametrize("status", OPEN)
def test_a_job_that_is_in_no_list_is_put_back(status: str, lost: Lost | None) -> None:
    action = plan(row(status), job("", processedOn=str(EARLIER)), lost=lost, now_ms=NOW)
    assert isinstance(action, PutBack)
    assert action.patch["status"] == "pending"
    assert ("delayUntil" in action.patch) is (status == "delayed")
    TaskRow.model_validate({**task_data(QUEUE, {}), **action.patch})


@pytest.mark.parametrize(
    ("row_id", "taken"),
    [
        ("V1StGXR8_Z5jdHi6B-myT", True),
        ("q~17", True),
        ("repeat:abc:17", True),
        ("007", True),
        ("17", False),
        ("0", False),
        ("-5", False),
        ("a:b", False),
        ("0:17", False),
    ],
)
def test_a_job_is_not_added_under_an_id_that_bullmq_refuses(row_id: str, taken: bool) -> None:
    action = plan(row(id=row_id), GONE, lost="requeue", now_ms=NOW)
    assert isinstance(action, ReadTask if taken else Leave)
    if isinstance(action, Leave):
        assert "use --lost fail" in action.reason


@pytest.mark.parametrize("lost", ["fail", "requeue"])
def test_a_row_whose_jobs_id_was_no_text_is_left(lost: Lost) -> None:
    action = plan(row(id="a\ufffdb"), GONE, lost=lost, now_ms=NOW)
    assert isinstance(action, Leave)


def test_a_delayed_task_is_added_with_the_rest_of_its_delay() -> None:
    task = Task('{"n": 1}', "high", "5", "2026-01-02T04:04:05.678Z")
    action = job_of(row("delayed"), task, NOW)
    assert isinstance(action, AddAgain)
    assert action.data == {"n": 1, "correlationId": action.data["correlationId"]}
    assert action.options == {
        "jobId": TASK_ID,
        "priority": 2,
        "attempts": 5,
        "backoff": {"type": "exponential", "delay": 5000},
        "delay": 3_600_000,
        "removeOnComplete": 100,
        "removeOnFail": 500,
    }
    assert action.patch["status"] == "delayed"
    pending = job_of(row("active"), task, NOW)
    assert isinstance(pending, AddAgain)
    assert "delay" not in pending.options
