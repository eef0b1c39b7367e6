"""What `reconcile` prints."""

from collections import Counter

import pytest

from autoflow_worker.operations.reconcile import HEADER, Difference, Settling, summary

ONE = Difference(
    "V1StGXR8_Z5jdHi6B-myT",
    "users-send-welcome-email",
    "active",
    "completed",
    Settling.POSSIBLE,
    "would set completed",
)


def test_a_line_names_the_row_and_what_is_done() -> None:
    assert ONE.line(None).split() == [
        "V1StGXR8_Z5jdHi6B-myT",
        "active",
        "completed",
        "users-send-welcome-email:",
        "would",
        "set",
        "completed",
    ]
    assert ONE.line(None).index("active") == HEADER.index("it says")
    assert ONE.line(None).index("completed") == HEADER.index("BullMQ")


@pytest.mark.parametrize("width", [20, 60, 80])
def test_a_long_line_is_wrapped_for_a_terminal(width: int) -> None:
    lines = ONE.line(width).splitlines()
    assert max(map(len, lines)) <= width
    assert "".join("".join(lines).split()) == "".join(ONE.line(None).split())
    assert ONE.line(500) == ONE.line(None)


def test_a_line_is_one_line_and_commands_nothing() -> None:
    hostile = Difference("a\nb", "\x1b[2J", "active", "gone", Settling.LEFT, "left: \x07")
    assert hostile.line(None).isprintable()


@pytest.mark.parametrize(
    ("settlings", "text"),
    [
        ([], "every row that is not finished agrees with its job"),
        ([Settling.DONE], "1 row differs: 1 settled"),
        ([Settling.DONE, Settling.LEFT], "2 rows differ: 1 settled, 1 left"),
        ([Settling.POSSIBLE], "1 row differs: 1 can be settled with --fix"),
    ],
)
def test_the_sentence_at_the_end(settlings: list[Settling], text: str) -> None:
    assert summary(Counter(settlings)) == text
