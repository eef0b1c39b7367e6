"""A task slows down when this worker or its machine is at fault, and no job is."""

import asyncio
from typing import Final

from autoflow_worker.pauses import Pauses

FIRST_PAUSE: Final = 0.5
"""Seconds for which a task takes no job after something broke; doubled each time."""

MAX_BREAKAGES: Final = 5
"""Pauses in a row without one success after which the task counts as broken for good."""


class Breakages:
    """Counts how often in a row a task's slots broke.

    What breaks during a pause counts together with what began the pause: on a machine without a
    free thread, all slots break at once.

    Attributes:
        in_a_row: pauses since the last success; 0 if the last attempt did not break its slot.
    """

    def __init__(self) -> None:
        self.in_a_row = 0
        self._pauses = Pauses(FIRST_PAUSE, FIRST_PAUSE * 2**MAX_BREAKAGES)
        self._until = 0.0

    def note(self) -> None:
        """Begin a pause because a slot broke, unless the task pauses already."""
        now = asyncio.get_running_loop().time()
        if now >= self._until:
            self._until = now + self._pauses.take()
            self.in_a_row += 1

    def end(self) -> None:
        """Start anew: an attempt went its whole way, or a job was found to be at fault."""
        self.in_a_row, self._until = 0, 0.0
        self._pauses.restart()

    @property
    def pause(self) -> float:
        """Seconds for which the task is to take no job."""
        return max(0.0, self._until - asyncio.get_running_loop().time())

    @property
    def too_many(self) -> bool:
        """Whether the task can't be expected to work again."""
        return self.in_a_row >= MAX_BREAKAGES
