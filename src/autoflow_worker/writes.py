"""One patch on its way into one row, and what became of it."""

import asyncio
import enum
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import orjson


class Verdict(enum.Enum):
    """What became of a write."""

    WRITTEN = "written"
    LATE = "late"  # not yet: PostgreSQL is away, the write follows
    CANCELLED = "cancelled"  # the row says so, and still does
    CONTESTED = "contested"  # the row shows another start than this attempt's
    MISSING = "missing"  # there is no row, and none is wanted
    UNSTORABLE = "unstorable"  # not even the smallest true patch can be stored


class Write:
    """One patch on its way into one row.

    Attributes:
        ready: the verdict, or `Verdict.LATE` where a start was waited for long enough.
        settled: the verdict, however long it takes; the same future unless `ready` was LATE.
        alone: it was put off before, so it must not hold up others.
        puzzled: it was not written once, and nothing in its row says why.
        is_smallest: it holds nothing more that could be left out.
    """

    __slots__ = (
        "alone",
        "created_at",
        "fence",
        "is_smallest",
        "is_start",
        "new_row",
        "patch",
        "puzzled",
        "queue",
        "ready",
        "row_id",
        "settled",
        "since",
        "text",
    )

    def __init__(
        self,
        row_id: str,
        queue: str,
        patch: Mapping[str, Any],
        text: str,
        *,
        since: str | None = None,
        fence: str | None = None,
        new_row: Callable[[], Mapping[str, Any]] | None = None,
    ) -> None:
        loop = asyncio.get_running_loop()
        self.row_id = row_id
        self.queue = queue
        self.patch = patch
        self.text = text
        self.since = since
        self.fence = fence
        self.new_row = new_row
        self.is_start = patch.get("status") == "active"
        self.alone = False
        self.puzzled = False
        self.is_smallest = False
        self.created_at = loop.time()
        self.ready: asyncio.Future[Verdict] = loop.create_future()
        self.settled = self.ready

    def settle(self, verdict: Verdict) -> None:
        if not self.settled.done():
            self.settled.set_result(verdict)

    def release(self) -> None:
        """Let the caller go on; the write stays on its way."""
        if self.settled is self.ready and not self.ready.done():
            self.settled = asyncio.get_running_loop().create_future()
            self.ready.set_result(Verdict.LATE)

    @property
    def settles(self) -> bool:
        """Whether it says that the work is done, which stands even against a cancellation."""
        return self.patch.get("status") == "completed"

    def as_json(self) -> dict[str, Any]:
        """What the UPDATE of many rows takes of it; what is left out is null there."""
        about: dict[str, Any] = {
            "id": self.row_id,
            "queue": self.queue,
            "patch": orjson.Fragment(self.text),
        }
        if self.since is not None:
            about["since"] = self.since
        if self.fence is not None:
            about["fence"] = self.fence
        if self.settles:
            about["settles"] = True
        return about

    def as_parameters(self) -> list[bytes | None]:
        """What the UPDATE of one row takes of it, in the same order."""
        settles = "true" if self.settles else "false"
        texts = (self.row_id, self.queue, self.text, self.since, self.fence, settles)
        return [None if text is None else text.encode() for text in texts]


class Recorder(Protocol):
    """What a TaskWorker needs of whoever keeps the statuses."""

    def submit(self, write: Write) -> Write:
        """Put a write on its way; the caller awaits its `ready` or `settled`."""
        ...
