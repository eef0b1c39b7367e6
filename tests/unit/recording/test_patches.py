"""Every patch and row is what the contract says, and the API's strict schema takes it."""

import json
import math
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import orjson
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from autoflow_worker.errors import NotStorableError
from autoflow_worker.recording import patches
from tests.support.row import TaskRow

NOW = 1_767_323_045_678
TODAY = "2026-01-02T03:04:05.678Z"
LATER = "2026-01-02T03:04:06.678Z"
ERROR = {"success": False, "reason": "boom", "lastAttemptAt": TODAY}


@dataclass
class Job:
    """The parts of a `bullmq.Job` that a row is made of."""

    data: Any = None
    options: Any = None
    timestamp: Any = NOW


def a_row() -> dict[str, Any]:
    return patches.unknown_job_row("queue", **vars(Job({"n": 1}, {})))


def assert_row(row: dict[str, Any]) -> None:
    assert json.loads(patches.encode(row)) == row
    TaskRow.model_validate(row)


# -- patches (contract, section 3) ---------------------------------------------------------------

RESULT = {"success": True, "output": {"sent": True}, "duration": 12}
NOT_FINISHED = {"completedAt": None, "failedAt": None, "result": None}

PATCHES = {
    "active": (
        patches.active_patch(now_ms=NOW, attempt=1),
        {"status": "active", "startedAt": TODAY, "attempts": 1, **NOT_FINISHED},
    ),
    "completed": (
        patches.completed_patch(now_ms=NOW, result=patches.success_result({"sent": True}, 12)),
        {
            "status": "completed",
            "completedAt": TODAY,
            "result": RESULT,
            "error": None,
            "failedAt": None,
            "delayUntil": None,
        },
    ),
    "delayed": (
        patches.delayed_patch(until_ms=NOW + 1000, attempt=2, error=ERROR),
        {
            "status": "delayed",
            "delayUntil": LATER,
            "attempts": 2,
            "error": ERROR,
            **NOT_FINISHED,
        },
    ),
    "pending": (
        patches.pending_patch(attempt=2, error=ERROR),
        {"status": "pending", "attempts": 2, "error": ERROR, **NOT_FINISHED},
    ),
    "failed": (
        patches.failed_patch(now_ms=NOW, attempt=3, error=ERROR),
        {
            "status": "failed",
            "failedAt": TODAY,
            "attempts": 3,
            "error": ERROR,
            "completedAt": None,
            "result": None,
        },
    ),
    "handed back": (patches.handed_back_patch(), {"status": "pending", **NOT_FINISHED}),
    "moved to delayed": (
        patches.moved_to_delayed_patch(until_ms=NOW + 1000),
        {"status": "delayed", "delayUntil": LATER, **NOT_FINISHED},
    ),
}


@pytest.mark.parametrize(("patch", "expected"), PATCHES.values(), ids=PATCHES)
def test_each_moment_writes_what_the_contract_says(
    patch: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert patch == expected
    assert_row({**a_row(), **patch})


# -- results and errors --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("duration", "stored"),
    [(0, 0), (12.9, 12), (-1, 0), (math.nan, 0), (math.inf, 0), (1e300, 2**53 - 1)],
)
def test_the_duration_is_in_whole_milliseconds(duration: float, stored: int) -> None:
    result = patches.success_result(None, duration)
    assert result == {"success": True, "output": None, "duration": stored}
    assert type(result["duration"]) is int


def test_an_output_that_can_not_be_stored_is_refused() -> None:
    with pytest.raises(NotStorableError):
        patches.success_result(object(), 1)


def test_an_output_at_the_limits_fits_into_its_row() -> None:
    deepest: Any = "\0"
    for _ in range(200):
        deepest = [deepest]
    for output in (deepest, "x" * (16 * 1024 * 1024 - 2), [0] * 1_000_000, [2**70, deepest[0]]):
        patch = patches.completed_patch(now_ms=NOW, result=patches.success_result(output, 1))
        assert json.loads(patches.encode(patch)) == patch


def test_an_exception_becomes_an_error() -> None:
    made = patches.error_record(ValueError("boom"), NOW)
    assert list(made) == ["success", "reason", "stackTrace", "lastAttemptAt"]
    assert (made["success"], made["reason"], made["lastAttemptAt"]) == (False, "boom", TODAY)
    assert made["stackTrace"].endswith("ValueError: boom")
    assert_row({**a_row(), "error": made})


def test_a_reason_in_words_becomes_an_error_without_a_stack_trace() -> None:
    assert patches.error_record("boom", NOW) == ERROR
    made = patches.error_record("\0\ud800 redis://u:pw@h " + "x" * 10_000_000, NOW)
    assert made["reason"].startswith("\ufffd\ufffd redis://u:***@h xxx")
    assert_row({**a_row(), "error": made})


def test_text_that_was_added_to_a_patch_is_cleaned_on_the_way() -> None:
    patch = patches.pending_patch(attempt=1, error={**ERROR, "reason": "a\0\ud800"})
    assert json.loads(patches.encode(patch))["error"]["reason"] == "a\ufffd\ufffd"


# -- rows for unknown jobs (contract, section 4) -------------------------------------------------

ODD: list[object] = [None, 0, -1, "3", True, math.nan, math.inf, [], {}]


def test_an_unknown_job_gets_a_whole_row() -> None:
    job = Job({"n": 1, "correlationId": "c"}, {"priority": 2, "attempts": 5, "jobId": "x"})
    row = patches.unknown_job_row("users-send-welcome-email", **vars(job))
    assert row == {
        "schemaVersion": 1,
        "taskName": "users-send-welcome-email",
        "queueName": "users-send-welcome-email",
        "payload": {"n": 1},
        "status": "pending",
        "priority": "high",
        "attempts": 0,
        "maxAttempts": 5,
        "enqueuedAt": TODAY,
        "startedAt": None,
        "completedAt": None,
        "failedAt": None,
        "delayUntil": None,
        "result": None,
        "error": None,
        "userId": None,
        "externalId": None,
    }
    assert set(row) == set(TaskRow.model_fields)
    assert_row(row)


@pytest.mark.parametrize(
    ("priority", "word"),
    [
        (1, "critical"),
        (2, "high"),
        (3, "normal"),
        (4, "low"),
        (4.0, "low"),
        *((other, "normal") for other in ODD),
        (5, "normal"),
        (2**21, "normal"),
    ],
)
def test_a_priority_becomes_a_word(priority: object, word: str) -> None:
    assert patches.unknown_job_row("q", **vars(Job({}, {"priority": priority})))["priority"] == word


@pytest.mark.parametrize(
    ("attempts", "stored"),
    [
        (1, 1),
        (3, 3),
        (3.7, 3),
        (1e300, 2**53 - 1),
        *((other, 1) for other in ODD),
    ],
)
def test_there_is_at_least_one_attempt(attempts: object, stored: int) -> None:
    row = patches.unknown_job_row("q", **vars(Job({}, {"attempts": attempts})))
    assert row["maxAttempts"] == stored
    assert type(row["maxAttempts"]) is int


@pytest.mark.parametrize(
    ("data", "payload"),
    [
        ({}, {}),
        ({"correlationId": 1, "a": {"correlationId": 2}}, {"a": {"correlationId": 2}}),
        (None, {"value": None}),
        ([1], {"value": [1]}),
        ("text\0", {"value": "text\ufffd"}),
        ({"n": math.nan, "big": 10**30}, {"n": None, "big": 10**30}),
        (object(), {}),
        ({"a": object()}, {}),
        ({"a": "x" * 17_000_000}, {}),
    ],
    ids=["{}", "correlationId", "None", "list", "text", "numbers", "object", "in", "large"],
)
def test_a_payload_is_always_an_object(data: object, payload: object) -> None:
    row = patches.unknown_job_row("q", **vars(Job(data, {})))
    assert row["payload"] == payload
    assert_row(row)


@pytest.mark.parametrize("timestamp", [None, "x", True, math.nan, math.inf, [], {}])
def test_a_job_without_a_time_was_added_now(timestamp: object) -> None:
    row = patches.unknown_job_row("q", **vars(Job({}, {}, timestamp)))
    assert abs(datetime.fromisoformat(row["enqueuedAt"]) - datetime.now(UTC)).total_seconds() < 60
    assert_row(row)


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(exclude_categories=())),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)
opts = st.fixed_dictionaries({}, optional={"priority": anything, "attempts": anything}) | anything


@given(st.text(st.characters(exclude_categories=())), anything, opts, anything)
def test_any_job_gets_a_row(queue: str, data: Any, opts: Any, timestamp: Any) -> None:
    assert_row(patches.unknown_job_row(queue, data=data, options=opts, timestamp=timestamp))


# -- ids and dates -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("job_id", "expected"),
    [
        ("1", "q~1"),
        ("42", "q~42"),
        ("9007199254740991", "q~9007199254740991"),
        ("V1StGXR8_Z5jdHi6B-myT", "V1StGXR8_Z5jdHi6B-myT"),
        # BullMQ takes these from a producer, and counts none of them.
        ("007", "007"),
        ("1234567890123456789", "1234567890123456789"),
        ("1.5", "1.5"),
        ("1 ", "1 "),
        ("1\n", "1\n"),
        ("²", "²"),
        ("repeat:abc:17", "repeat:abc:17"),
        ("a\0b", "a\ufffdb"),
        ("", ""),
    ],
)
def test_the_ids_that_bullmq_counts_get_the_queue_before_them(job_id: str, expected: str) -> None:
    assert patches.row_id("q", job_id) == expected


@pytest.mark.parametrize(
    ("queue", "job_id", "expected"),
    [
        ("users-send-welcome-email", "17", "users-send-welcome-email~17"),
        ("reports.render", "my.own-id", "reports.render~my.own-id"),
        ("old:users:import", "17", "old=3Ausers=3Aimport~17"),
        ("q", "repeat:abc:17", "q~repeat=3Aabc=3A17"),
        ("12", "17", "12~17"),
        ("a~b=c", "d~e", "a=7Eb=3Dc~d=7Ee"),
    ],
)
def test_the_id_of_a_row_whose_jobs_own_id_is_taken(queue: str, job_id: str, expected: str) -> None:
    assert patches.own_row_id(queue, job_id) == expected
    assert patches.job_ids_of(queue, expected) == [expected, job_id]


# What jsonb takes. The few characters that matter come up often.
storable_text = st.text(
    st.sampled_from(":~=3A7ED01") | st.characters(codec="utf-8", exclude_characters="\0")
)


@given(storable_text, storable_text, storable_text, storable_text)
def test_two_jobs_never_share_an_own_row(
    queue: str, job_id: str, other_queue: str, other_id: str
) -> None:
    assume((queue, job_id) != (other_queue, other_id))
    assert patches.own_row_id(queue, job_id) != patches.own_row_id(other_queue, other_id)


@given(storable_text, storable_text)
def test_bullmq_takes_the_id_of_an_own_row_and_the_job_is_found_by_it(
    queue: str, job_id: str
) -> None:
    own = patches.own_row_id(queue, job_id)
    assert ":" not in own
    assert not re.fullmatch(r"-?[0-9]+", own)
    assert patches.job_ids_of(queue, own) == [own, job_id]


@given(storable_text, st.integers(1, 2**53 - 1))
def test_a_numbered_job_has_an_own_row(queue: str, number: int) -> None:
    assert patches.row_id(queue, str(number)) == patches.own_row_id(queue, str(number))


def test_a_row_of_another_queue_is_not_taken_for_an_own_one() -> None:
    assert patches.job_ids_of("a", "b~17") == ["b~17"]
    assert patches.job_ids_of("a", "a17") == ["a17"]


@pytest.mark.parametrize(
    ("ms", "expected"),
    [
        (0, "1970-01-01T00:00:00.000Z"),
        (NOW, TODAY),
        (NOW + 0.9, TODAY),
        (999.999, "1970-01-01T00:00:00.999Z"),
        (-1, "1970-01-01T00:00:00.000Z"),
        (-math.inf, "1970-01-01T00:00:00.000Z"),
        (math.nan, "1970-01-01T00:00:00.000Z"),
        (253_402_300_799_999, "9999-12-31T23:59:59.999Z"),
        (1e300, "9999-12-31T23:59:59.999Z"),
        (10**400, "9999-12-31T23:59:59.999Z"),
        (math.inf, "9999-12-31T23:59:59.999Z"),
    ],
)
def test_every_time_becomes_a_date(ms: float, expected: str) -> None:
    assert patches.iso(ms) == expected


@given(st.integers(0, 253_402_300_799_999))
def test_dates_are_as_in_javascript(ms: int) -> None:
    text = patches.iso(ms)
    assert len(text) == len(TODAY)
    seconds = datetime.fromisoformat(text).replace(microsecond=0).timestamp()
    assert int(seconds) * 1000 + int(text[-4:-1]) == ms


@pytest.mark.parametrize(
    "output", [{"a": [1, "é"]}, "\0\ud800", "\\u0000", 2**70, 10**400, "x" * 100_000, None]
)
def test_an_output_that_is_encoded_once_is_the_same_everywhere(output: object) -> None:
    plain, encoded = patches.success_result(output, 1), patches.encoded_result(output, 1)
    assert json.loads(patches.encode(encoded)) == plain
    patch = patches.completed_patch(now_ms=NOW, result=encoded)
    assert json.loads(patches.encode(patch))["result"] == plain


def test_an_output_with_text_that_only_says_it_is_json_is_refused() -> None:
    with pytest.raises(NotStorableError):
        patches.encoded_result([orjson.Fragment("no JSON")], 1)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"backoff": 100}, True),
        # As bullmq's `Job` fills the options of a job that has none.
        ({"attempts": 0}, False),
        ({"backoff": None}, False),
        ({"priority": 5}, False),
        ({"jobId": "another"}, False),
    ],
)
def test_whether_the_api_made_a_job(changes: dict[str, Any], expected: bool) -> None:
    job_id = "priorities-in-bulk-j1"
    options = {
        "jobId": job_id,
        "priority": 3,
        "attempts": 3,
        "backoff": {"type": "exponential", "delay": 5000},
    }
    assert patches.is_task_of_api(job_id, {**options, **changes}) is expected
    assert not patches.is_task_of_api("short", {**options, **changes, "jobId": "short"})
