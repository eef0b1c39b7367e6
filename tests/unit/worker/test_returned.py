"""The shapes that handlers from Node return."""

from typing import Any

import pytest

from autoflow_worker.worker.returned import ReportedFailureError, output_of


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"success": True, "output": {"n": 1}, "duration": 12}, ({"n": 1}, 12)),
        ({"success": True, "duration": 1.5}, (None, 1.5)),
        # These are outputs that only look similar.
        ({"success": True}, ({"success": True}, 7)),
        ({"success": True, "output": 1}, ({"success": True, "output": 1}, 7)),
        ({"success": False}, ({"success": False}, 7)),
        ({"success": False, "reason": 3}, ({"success": False, "reason": 3}, 7)),
        (
            {"success": True, "output": 1, "duration": 1, "more": 1},
            ({"success": True, "output": 1, "duration": 1, "more": 1}, 7),
        ),
        (
            {"success": 1, "output": 1, "duration": 1},
            ({"success": 1, "output": 1, "duration": 1}, 7),
        ),
        ([], ([], 7)),
        (None, (None, 7)),
    ],
)
def test_what_the_output_is(value: Any, expected: Any) -> None:
    assert output_of(value, 7) == expected


@pytest.mark.parametrize("more", [{}, {"stackTrace": "at x", "lastAttemptAt": "then"}])
def test_a_reported_failure_fails_the_attempt(more: dict[str, Any]) -> None:
    with pytest.raises(ReportedFailureError, match=r"^no address$"):
        output_of({"success": False, "reason": "no address", **more}, 7)
