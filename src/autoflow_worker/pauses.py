"""How long to wait before something is tried again."""

import asyncio
import random
from typing import Final

JITTER: Final = 0.25  # of a pause


class Pauses:
    """The pauses between tries.

    Each pause is twice as long as the one before, up to the longest; both limits are in seconds. Up
    to a quarter of each is cut off at random, so that workers which lost the same server do not
    return to it in step.
    """

    def __init__(self, first: float, longest: float) -> None:
        self._first = first
        self._longest = longest
        self._next = first

    def take(self) -> float:
        """Return the next pause, in seconds."""
        pause = self._next
        self._next = min(2 * pause, self._longest)
        return pause * random.uniform(1 - JITTER, 1)  # noqa: S311 - not a secret

    async def sleep(self) -> None:
        await asyncio.sleep(self.take())

    def restart(self) -> None:
        """Begin with the first pause again: a try succeeded."""
        self._next = self._first
