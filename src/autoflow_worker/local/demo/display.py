"""What the demo prints, in 80 columns; on a terminal, the table of jobs is live."""

import shutil
import sys
from collections import Counter
from collections.abc import Mapping, Sequence

from autoflow_worker.local.demo.kinds import KINDS, Job

WIDTH = 80
_OVER_THE_TABLE = f"\x1b[{len(KINDS) + 1}F\x1b[J"
"""Moves the cursor to the table's first line, and clears the terminal from there on."""


def say(text: str) -> None:
    """Print a text."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def table(jobs: Sequence[Job], columns: Mapping[str, Sequence[str]]) -> str:
    """Make a table with a line for each kind.

    Args:
        columns: by heading, the status of each job.
    """
    lines = [["kind of job", "has to end as", *columns]]
    for kind in KINDS:
        of_kind = [n for n, job in enumerate(jobs) if job.kind is kind]
        counts = [Counter(column[n] for n in of_kind).items() for column in columns.values()]
        cells = [", ".join(f"{count} {status}" for status, count in each) for each in counts]
        lines.append([kind.name, kind.expected, *cells])
    texts = [f"{a:21}{b:22}{'  '.join(f'{c:17}' for c in rest)}" for a, b, *rest in lines]
    return "\n".join(text[:WIDTH].rstrip() for text in texts)


class LiveTable:
    """A table that is replaced by the next one, and by nothing at the end."""

    def __init__(self) -> None:
        self._is_live = sys.stdout.isatty() and shutil.get_terminal_size().columns >= WIDTH
        self._before = ""

    def show(self, jobs: Sequence[Job], statuses: Sequence[str]) -> None:
        """Show the status of each job's row."""
        if self._is_live:
            say(self._before + table(jobs, {"rows in PostgreSQL": statuses}))
            self._before = _OVER_THE_TABLE

    def remove(self) -> None:
        """Remove the table from the terminal."""
        sys.stdout.write(self._before)
