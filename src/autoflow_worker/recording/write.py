"""One patch on its way into one row, and what became of it."""

import asyncio
import enum
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import orjson


class Verdict(enum.Enum):
    """What became of a write."""

    WRITTEN = "written"
    CANCELLED = "cancelled"  # the row says so, and still does
    FINISHED = "finished"  # the row tells the job's end, and this is not to change it
    CONTESTED = "contested"  # the row shows another start than this attempt's
    MISSING = "missing"  # there is no row
    FOREIGN = "foreign"  # the row is that of another queue's task
    UNUSABLE = "unusable"  # the row's data is no object, so nothing can be merged into it
    WITHDRAWN = "withdrawn"  # the caller gave it up before it was written
    # Not the last word: the write stays on its way.
    LATE = "late"  # a start was waited for long enough
    PUT_OFF = "put off"  # PostgreSQL does not take an outcome now


@dataclass(frozen=True, slots=True)
class NewRow:
    """A row to make where there is none.

    Attributes:
        text: the whole `data`, as JSON.
        smallest: the same without the payload, in case that can't be stored.
    """

    text: str
    smallest: str


@dataclass(slots=True, eq=False, repr=False)
class Write:
    """One patch on its way into one row.

    Attributes:
        text: the patch as JSON.
        since: as in `statements`, like `fence` and `unfinished`.
        new_row: the row to make if there is none; may be given later, too.
        times_put_off: how often PostgreSQL did not take it. A write that was put off is in a batch
            of its own, so that it delays no others.
        is_put_off: it waits for its next try, so no lane may touch it.
        is_withdrawn: it is given up as soon as no statement holds it.
        puzzled: its row did not take it once, and shows no reason.
        is_smallest: its texts are left out already.
        ready: the first verdict. A start that was waited for long enough is LATE. An outcome that
            PostgreSQL does not take is PUT_OFF. Any other verdict is the last one.
        settled: the next verdict, the same future as `ready` until that is done. A start that is
            LATE may become PUT_OFF once; the verdict after that is the last one.
    """

    row_id: str
    queue: str
    patch: Mapping[str, Any]
    text: str
    _: KW_ONLY
    since: str | None = None
    fence: str | None = None
    unfinished: bool = False
    new_row: NewRow | None = None
    times_put_off: int = 0
    is_put_off: bool = False
    is_withdrawn: bool = False
    puzzled: bool = False
    is_smallest: bool = False
    created_at: float = field(init=False)
    ready: asyncio.Future[Verdict] = field(init=False)
    settled: asyncio.Future[Verdict] = field(init=False)

    def __post_init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.created_at = loop.time()
        self.ready = self.settled = loop.create_future()

    def settle(self, verdict: Verdict) -> None:
        """Set the last verdict."""
        if not self.settled.done():
            self.settled.set_result(verdict)

    def release(self, verdict: Verdict) -> None:
        """Tell the caller a verdict that is not the last; the write stays on its way."""
        if not self.settled.done():
            told, self.settled = self.settled, asyncio.get_running_loop().create_future()
            told.set_result(verdict)

    def put_off(self) -> None:
        """Note that PostgreSQL does not take the write now, and tell the caller the first time.

        The caller of a start is told once the start is LATE.
        """
        self.is_put_off = True
        self.times_put_off += 1
        if self.times_put_off == 1 and (self.ready.done() or not self.is_start):
            self.release(Verdict.PUT_OFF)

    @property
    def is_start(self) -> bool:
        return self.patch.get("status") == "active"

    @property
    def settles(self) -> bool:
        """Whether the patch replaces `cancelled` in its row: the work is done."""
        return self.patch.get("status") == "completed"

    def as_json(self) -> dict[str, Any]:
        """Return the record for the UPDATE of many rows; a missing key is null there."""
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
        if self.unfinished:
            about["unfinished"] = True
        return about

    def as_parameters(self) -> list[bytes | None]:
        """Return the parameters of the UPDATE of one row."""
        settles = "true" if self.settles else "false"
        unfinished = "true" if self.unfinished else None
        texts = (self.row_id, self.queue, self.text, self.since, self.fence, settles, unfinished)
        return [None if text is None else text.encode() for text in texts]
