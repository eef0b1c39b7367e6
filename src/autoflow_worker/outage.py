"""A server's troubles: what is said of them, and whether they can be waited out.

An outage is waited out, however long it takes. A server that answers, but refuses what a worker
can't do without, may do so for ever: a password was changed, a right was taken, a table is gone.
"""

import asyncio
import math
import re
from collections.abc import Hashable
from typing import Final

import structlog

log = structlog.get_logger(__name__)

SILENT_AFTER: Final = 5.0
"""Seconds without an answer that is due, after which a server is said to hang."""

MAX_REASONS: Final = 20
"""Reasons that are told in one outage, at most: their texts might vary without an end."""

_NUMBERS: Final = re.compile(r"\d+")


class Refusals:
    """Since when a server refuses, by what it refuses; a success or an outage starts this anew.

    Attributes:
        patience: seconds of nothing but refusals that are waited out.
        lasting: set when something has been refused for longer.
    """

    def __init__(self) -> None:
        self._since: dict[Hashable, float] = {}
        self.patience = math.inf
        self.lasting = asyncio.Event()

    def note(self, what: Hashable) -> None:
        """Something was refused, once more perhaps."""
        now = asyncio.get_running_loop().time()
        if now - self._since.setdefault(what, now) >= self.patience:
            self.lasting.set()

    def over(self, what: Hashable) -> None:
        """It was not refused."""
        self._since.pop(what, None)

    def forget(self) -> None:
        """Count all refusals from now on."""
        self._since.clear()
        self.lasting.clear()


class Reasons:
    """The reasons that were told in this outage, so that each is told once."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def is_new(self, reason: str) -> bool:
        """Whether this was not told yet; it is now. Reasons that differ in numbers are one."""
        words = _NUMBERS.sub("#", reason)
        if words in self._told or len(self._told) >= MAX_REASONS:
            return False
        self._told.add(words)
        return True

    def forget(self) -> None:
        """The outage is over."""
        self._told.clear()


class Silence:
    """Says when a server hangs, and when it answers again; once for all connections.

    Args:
        hangs: the log's event when a first connection waits too long.
        answers: the log's event when the last one has its answer.
    """

    def __init__(self, hangs: str, answers: str) -> None:
        self._hangs = hangs
        self._answers = answers
        self._silent: set[object] = set()
        self._since = 0.0

    def begin(self, connection: object, since: float) -> None:
        """A connection has waited since then for an answer that is due."""
        if not self._silent:
            self._since = since
            silent = asyncio.get_running_loop().time() - since
            log.warning(self._hangs, for_s=round(silent, 1))
        self._silent.add(connection)

    def end(self, connection: object) -> None:
        """It has got one."""
        if connection not in self._silent:
            return
        self._silent.remove(connection)
        if not self._silent:
            silent = asyncio.get_running_loop().time() - self._since
            log.warning(self._answers, after_s=round(silent, 1))

    def forget(self, connection: object) -> None:
        """It is lost; that is told elsewhere."""
        self._silent.discard(connection)
