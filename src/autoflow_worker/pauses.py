"""How long to wait before something is tried again."""

import asyncio
import random
from typing import Final

JITTER: Final = 0.25
"""The part of a pause that may be cut off at random."""


class Pauses:
    """The pauses between tries.

    Each pause is twice as long as the one before, up to the longest. Up to a quarter of each is cut
    off at random, so that workers which lost the same server do not return to it in step.

    Args:
        first: seconds before the second try.
        longest: seconds between two tries, at most.
    """

    __slots__ = ("_first", "_longest", "_next")

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
        """Wait for the length of the next pause."""
        await asyncio.sleep(self.take())

    def restart(self) -> None:
        """Begin with the first pause again: a try succeeded."""
        self._next = self._first
