"""What `reconcile` prints."""

import pytest

from autoflow_worker.operations.reconcile_report import HEADER, Difference, Settling, Summary, line

ONE = Difference(
    "V1StGXR8_Z5jdHi6B-myT",
    "users-send-welcome-email",
    "active",
    "completed",
    Settling.POSSIBLE,
    "would set completed",
)


def test_a_line_names_the_row_and_what_is_done() -> None:
    assert line(ONE, None).split() == [
        "V1StGXR8_Z5jdHi6B-myT",
        "active",
        "completed",
        "users-send-welcome-email:",
        "would",
        "set",
        "completed",
    ]
    assert line(ONE, None).index("active") == HEADER.index("it says")
    assert line(ONE, None).index("completed") == HEADER.index("BullMQ")


@pytest.mark.parametrize("width", [20, 60, 80])
def test_a_long_line_is_wrapped_for_a_terminal(width: int) -> None:
    lines = line(ONE, width).splitlines()
    assert max(map(len, lines)) <= width
    assert "".join("".join(lines).split()) == "".join(line(ONE, None).split())
    assert line(ONE, 500) == line(ONE, None)


def test_a_line_is_one_line_and_commands_nothing() -> None:
    hostile = Difference("a\nb", "\x1b[2J", "active", "gone", Settling.LEFT, "left: \x07")
    assert line(hostile, None).isprintable()


@pytest.mark.parametrize(
    ("settlings", "text", "settled"),
    [
        ([], "every row that is not finished agrees with its job", True),
        ([Settling.DONE], "1 row differs: 1 settled", True),
        ([Settling.DONE, Settling.LEFT], "2 rows differ: 1 settled, 1 left", False),
        ([Settling.POSSIBLE], "1 row differs: 1 can be settled with --fix", False),
    ],
)
def test_the_sentence_at_the_end(settlings: list[Settling], text: str, settled: bool) -> None:
    summary = Summary()
    for settling in settlings:
        summary.add(Difference("a", "q", "active", "failed", settling, "set failed"))
    assert str(summary) == text
    assert summary.is_settled is settled
    assert bool(summary) is bool(settlings)
