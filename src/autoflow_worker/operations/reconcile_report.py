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
        row_id: the row.
        queue: its queue.
        status: what the row said.
        state: what BullMQ said, by the name of its list or set; "gone" for a job that is not there.
        settling: what became of it.
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
    """One difference as one line, whatever its texts hold.

    Args:
        width: characters of the terminal, for which a longer line is wrapped; None: of no terminal.
    """
    one = difference
    text = f"{one.row_id:21}  {one.status:7}  {one.state:16}  {one.queue}: {one.what}"
    # A queue's name may hold what a terminal takes for a command.
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
        """Whether there was any."""
        return bool(self._counts)

    @property
    def is_settled(self) -> bool:
        """Whether nothing is left to do."""
        return self._counts.total() == self._counts[Settling.DONE]

    def __str__(self) -> str:
        total = self._counts.total()
        if not total:
            return "every row that is not finished agrees with its job"
        counts = [f"{self._counts[s]:,} {s.value}" for s in Settling if self._counts[s]]
        rows = "1 row differs" if total == 1 else f"{total:,} rows differ"
        return f"{rows}: {', '.join(counts)}"
