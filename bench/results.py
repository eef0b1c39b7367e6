"""Tables of medians and spreads."""

from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any


@dataclass
class Table:
    """Values of one quantity, one cell for each row and column, one value for each round.

    Attributes:
        title: what it is about.
        unit: of the values.
        baseline: the row that the others are compared with, if any.
        run: when, where and at what sizes it was measured.
    """

    title: str
    unit: str
    baseline: str | None = None
    cells: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)

    def add(self, row: str, column: object, value: float) -> None:
        self.cells.setdefault(row, {}).setdefault(str(column), []).append(value)

    def median(self, row: str, column: object) -> float | None:
        values = self.cells.get(row, {}).get(str(column))
        return median(values) if values else None

    def best(self, row: str) -> float | None:
        """The row's best median, where more is better."""
        return max((median(values) for values in self.cells.get(row, {}).values()), default=None)

    @property
    def columns(self) -> list[str]:
        return list(dict.fromkeys(column for row in self.cells.values() for column in row))


class Results:
    """All tables by name, in the order in which they were begun.

    Args:
        run: when, where and at what sizes this is measured.
    """

    def __init__(self, run: dict[str, Any]) -> None:
        self.tables: dict[str, Table] = {}
        self._run = run

    def table(self, name: str, title: str, unit: str, baseline: str | None = None) -> Table:
        """Return the table of this name; make it if there is none."""
        return self.tables.setdefault(name, Table(title, unit, baseline, run=self._run))

    def get(self, name: str) -> Table:
        """Return the table of this name; an empty one if its section was not measured."""
        return self.tables.get(name) or Table("", "")

    def fill_up(self, earlier: dict[str, Any]) -> None:
        """Add those tables of an earlier run, in `as_json`'s form, that this run lacks."""
        for name, table in earlier.items():
            self.tables.setdefault(name, Table(**table))

    def as_json(self) -> dict[str, Any]:
        return {name: asdict(table) for name, table in self.tables.items()}
