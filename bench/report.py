"""The results as Markdown tables."""

from collections.abc import Iterable, Sequence
from statistics import median

from bench.goals import Goal
from bench.results import Results, Table


def as_markdown(results: Results, goals: Sequence[Goal]) -> str:
    parts = [_goals(goals)] if goals else []
    parts += [f"### {table.title} ({table.unit})\n\n{_table(table)}" for table in _all(results)]
    return "\n\n".join(parts) + "\n"


def _all(results: Results) -> Iterable[Table]:
    return results.tables.values()


def _goals(goals: Sequence[Goal]) -> str:
    rows = [[goal.what, goal.wanted, goal.found, goal.verdict] for goal in goals]
    return "### Goals\n\n" + _lines(["", "wanted", "found", ""], rows)


def _table(table: Table) -> str:
    rows = [[row, *(_cell(table, row, column) for column in table.columns)] for row in table.cells]
    return _lines(["", *table.columns], rows)


def _cell(table: Table, row: str, column: str) -> str:
    values = table.cells[row].get(column)
    if not values:
        return ""
    middle = median(values)
    text = number(middle)
    if len(values) > 1 and middle:
        text += f" ±{(max(values) - min(values)) / 2 / middle:.0%}"
    baseline = table.median(table.baseline, column) if table.baseline else None
    if baseline and row != table.baseline:
        text += f" ({middle / baseline:.2f}x)"
    return text


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def _lines(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    columns = zip(head, *rows, strict=True)
    widths = [max(3, *(len(cell) for cell in column)) for column in columns]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    )
