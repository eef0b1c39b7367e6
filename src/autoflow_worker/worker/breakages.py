"""What a task does when this worker or its machine, and no job, is at fault: it slows down."""

import asyncio
from typing import Final

FIRST_PAUSE: Final = 0.5
"""Seconds for which a task takes no job after something broke; doubled each time."""

MAX_BREAKAGES: Final = 5
"""Times in a row without one success after which the task counts as broken for good."""


class Breakages:
    """Counts how often in a row a task's slots broke.

    What breaks while the task pauses counts together with what began the pause: when a machine has
    no thread left, all slots break at once.

    Attributes:
        in_a_row: pauses since the last success; 0 if the last attempt did not break its slot.
        last: what broke last.
    """

    def __init__(self) -> None:
        self.in_a_row = 0
        self._until = 0.0
        self.last: Exception | None = None

    def note(self, error: Exception) -> None:
        """A slot broke: pause, twice as long as the last time."""
        self.last = error
        now = asyncio.get_running_loop().time()
        if now >= self._until:
            self._until = now + FIRST_PAUSE * 2**self.in_a_row
            self.in_a_row += 1

    def end(self) -> None:
        """An attempt went its whole way, or a job was found to be at fault."""
        self.in_a_row, self._until = 0, 0.0

    @property
    def pause(self) -> float:
        """Seconds for which the task is to take no job."""
        return max(0.0, self._until - asyncio.get_running_loop().time())

    @property
    def too_many(self) -> bool:
        """Whether the task can't be expected to work again."""
        return self.in_a_row >= MAX_BREAKAGES
