"""What the demo shows: a table that changes, plain lines if it is no terminal, and the verdict."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Final, Self

from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table

from autoflow_worker.local.demo.kinds import FINAL, Kind

STATUSES: Final = ("pending", "delayed", "active", "completed", "failed", "cancelled")
STYLES: Final = {
    "pending": "dim",
    "delayed": "magenta",
    "active": "yellow",
    "completed": "green",
    "failed": "red",
    "cancelled": "blue",
}
LINE_INTERVAL: Final = 1.0
"""Seconds between two plain lines, at least."""

LINE_WIDTH: Final = 110
MAX_FAULTS: Final = 20

Tally = Mapping[Kind, Counter[str]]


class Display:
    """Shows how the jobs get on; a context manager."""

    def __init__(self) -> None:
        self._console = Console(highlight=False)
        if not self._console.is_terminal:
            self._console.width = LINE_WIDTH
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._started = time.monotonic()
        self._next_line = 0.0

    def __enter__(self) -> Self:
        self._started = time.monotonic()
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._live.stop()

    def say(self, text: str) -> None:
        """Print one line."""
        self._console.print(text, markup=False, soft_wrap=True)

    def show(self, tally: Tally) -> None:
        """Show how far the jobs are."""
        if self._console.is_terminal:
            self._live.update(_progress(tally), refresh=True)
            return
        now = time.monotonic()
        if now < self._next_line:
            return
        self._next_line = now + LINE_INTERVAL
        total: Counter[str] = sum(tally.values(), Counter())
        counts = ", ".join(f"{total[status]} {status}" for status in STATUSES if total[status])
        self.say(f"{now - self._started:5.1f} s  {counts or 'no jobs yet'}")

    def verdict(
        self,
        tally: Tally,
        states: Mapping[Kind, Counter[str]],
        faults: Mapping[Kind, Sequence[str]],
    ) -> None:
        """Print what became of the jobs, and whatever is not as it has to be."""
        self._live.stop()
        self._console.print(_verdict(tally, states, faults))
        every = [fault for of_kind in faults.values() for fault in of_kind]
        for fault in every[:MAX_FAULTS]:
            self.say(f"wrong: {fault}")
        if len(every) > MAX_FAULTS:
            self.say(f"... and {len(every) - MAX_FAULTS} more")
        if not every:
            jobs = sum(kind.count for kind in tally)
            self.say(f"{jobs} jobs: every row and every BullMQ state is as it has to be.")


def _progress(tally: Tally) -> Table:
    table = _table("jobs", *STATUSES, "")
    for kind, counts in tally.items():
        done = sum(counts[status] for status in FINAL)
        cells = [_count(status, counts[status]) for status in STATUSES]
        table.add_row(kind.name, str(kind.count), *cells, _bar(done, kind.count))
    return table


def _verdict(
    tally: Tally, states: Mapping[Kind, Counter[str]], faults: Mapping[Kind, Sequence[str]]
) -> Table:
    table = _table("jobs")
    for column in ("expected", "rows in PostgreSQL", "jobs in BullMQ", ""):
        table.add_column(column)
    for kind, counts in tally.items():
        right = "[red]wrong" if faults[kind] else "[green]ok"
        rows, jobs = _counts(counts), _counts(states[kind])
        table.add_row(kind.name, str(kind.count), kind.expected, rows, jobs, right)
    return table


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE, pad_edge=False)
    table.add_column("kind", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _counts(counts: Counter[str]) -> str:
    return ", ".join(_count(status, count) + f" {status}" for status, count in counts.items())


def _count(status: str, count: int) -> str:
    return f"[{STYLES.get(status, 'bold')}]{count}[/]" if count else ""


def _bar(done: int, total: int, width: int = 20) -> str:
    filled = width * done // total
    return f"[green]{'#' * filled}[/][dim]{'.' * (width - filled)}[/]"
