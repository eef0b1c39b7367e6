"""Outages and refusals of a server: which are logged, and which end the worker.

A worker waits out an outage, however long it takes. A server that answers, but refuses what the
worker needs, may do so for ever: a password was changed, a right was revoked, a table is gone.
"""

import asyncio
import math
import re
from collections.abc import Hashable
from typing import Final

import structlog

log = structlog.get_logger(__name__)

SILENT_AFTER: Final = 5.0
"""Seconds that an answer may be overdue before the log says that the server hangs."""

MAX_REASONS: Final = 20  # logged in one outage; their texts may vary endlessly


class Refusals:
    """Notes since when a server refuses something, without one success or outage in between.

    Attributes:
        patience: seconds for which the worker waits while the server refuses the same thing.
        lasting: set when the server has refused something for longer.
    """

    def __init__(self) -> None:
        self._since: dict[Hashable, float] = {}
        self.patience = math.inf
        self.lasting = asyncio.Event()

    def note(self, what: Hashable) -> None:
        now = asyncio.get_running_loop().time()
        if now - self._since.setdefault(what, now) >= self.patience:
            self.lasting.set()

    def over(self, what: Hashable) -> None:
        """Note that the server did not refuse it this time."""
        self._since.pop(what, None)

    def forget(self) -> None:
        """Drop all notes, as after an outage."""
        self._since.clear()
        self.lasting.clear()


class Reasons:
    """The reasons that were logged in this outage; those that differ in numbers only are one."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def is_new(self, reason: str) -> bool:
        """Return whether this reason is to be logged, and note it."""
        words = re.sub(r"\d+", "#", reason)
        if words in self._told or len(self._told) >= MAX_REASONS:
            return False
        self._told.add(words)
        return True

    def forget(self) -> None:
        self._told.clear()


class Silence:
    """Logs when a server hangs, and when it answers again; once for all connections.

    Args:
        hangs: the event that is logged when the first connection waits too long.
        answers: the event that is logged when the last one has its answer.
    """

    def __init__(self, hangs: str, answers: str) -> None:
        self._hangs = hangs
        self._answers = answers
        self._silent: set[object] = set()
        self._since = 0.0

    def begin(self, connection: object, since: float) -> None:
        """Note that a connection has waited for an answer since then, in event loop time."""
        if not self._silent:
            self._since = since
            log.warning(self._hangs, for_s=self._silent_s())
        self._silent.add(connection)

    def end(self, connection: object) -> None:
        """Note that the connection has its answer."""
        if self._silent:
            self._silent.discard(connection)
            if not self._silent:
                log.warning(self._answers, after_s=self._silent_s())

    def _silent_s(self) -> float:
        return round(asyncio.get_running_loop().time() - self._since, 1)

    def forget(self, connection: object) -> None:
        """Drop a connection that is lost; the loss is logged elsewhere."""
        self._silent.discard(connection)
