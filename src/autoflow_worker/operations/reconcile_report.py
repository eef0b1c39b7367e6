"""What the `reconcile` command prints: a line for each difference, and a sentence at the end."""

import textwrap
from collections import Counter
from dataclasses import dataclass
from enum import Enum


class Settling(Enum):
    """What became of a difference."""

    DONE = "settled"
    POSSIBLE = "can be settled with --fix"
    LEFT = "left"


@dataclass(frozen=True, slots=True)
class Difference:
    """A row whose status is not its job's state.

    Attributes:
        row_id: the row's id.
        queue: the row's queue.
        status: the row's status.
        state: the job's state, by the name of BullMQ's list or set; "gone" for a missing job.
        settling: what became of the difference.
        what: the same in words.
    """

    row_id: str
    queue: str
    status: str
    state: str
    settling: Settling
    what: str


HEADER = f"{'row':21}  {'it says':7}  {'BullMQ says':16}  queue: what is done"


def line(difference: Difference, width: int | None) -> str:
    """Write a difference as one line, without control characters.

    Args:
        width: the terminal's columns, at which to wrap the line; None never wraps it.
    """
    one = difference
    text = f"{one.row_id:21}  {one.status:7}  {one.state:16}  {one.queue}: {one.what}"
    # A queue's name may contain a terminal's escape sequence.
    text = "".join(char if char.isprintable() else "\ufffd" for char in text)
    if width is None or len(text) <= width:
        return text
    return textwrap.fill(text, width, subsequent_indent="    ", break_on_hyphens=False)


class Summary:
    """Counts the differences."""

    def __init__(self) -> None:
        self._counts: Counter[Settling] = Counter()

    def add(self, difference: Difference) -> None:
        self._counts[difference.settling] += 1

    def __bool__(self) -> bool:
        """Whether there is any difference."""
        return bool(self._counts)

    @property
    def is_settled(self) -> bool:
        """Whether every difference was settled."""
        return self._counts.total() == self._counts[Settling.DONE]

    def __str__(self) -> str:
        total = self._counts.total()
        if not total:
            return "every row that is not finished agrees with its job"
        counts = [f"{self._counts[s]:,} {s.value}" for s in Settling if self._counts[s]]
        rows = "1 row differs" if total == 1 else f"{total:,} rows differ"
        return f"{rows}: {', '.join(counts)}"
