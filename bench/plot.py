"""Draw throughput against concurrency as an SVG."""

from collections.abc import Iterator
from math import log10

from bench.results import Table

WIDTH, HEIGHT = 760, 440
LEFT, RIGHT, TOP, BOTTOM = 64, 250, 20, 44
COLOURS = ("#0b6e4f", "#3fa34d", "#c1121f", "#e07a1f", "#780000", "#3d5a80", "#98c1d9", "#7b2cbf")
CONCURRENCIES = (1, 10, 50, 200)
_NAMESPACE = 'xmlns="http://www.w3.org/2000/svg"'
_FONT = 'font-family="sans-serif" font-size="12"'


def throughput(table: Table) -> str:
    """One line for each row of the table; both axes are logarithmic."""
    values = [
        table.median(row, n) or 1.0 for row, cells in table.cells.items() for n in map(int, cells)
    ]
    low, high = 10 ** int(log10(min(values))), max(values) * 1.2
    return "\n".join(
        (
            f'<svg {_NAMESPACE} viewBox="0 0 {WIDTH} {HEIGHT}" {_FONT}>',
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
            *_axes(low, high),
            *_curves(table, low, high),
            "</svg>\n",
        )
    )


def _x(concurrency: int) -> float:
    return LEFT + log10(concurrency) / log10(CONCURRENCIES[-1]) * (WIDTH - LEFT - RIGHT)


def _y(rate: float, low: float, high: float) -> float:
    share = log10(rate / low) / log10(high / low)
    return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def _axes(low: float, high: float) -> Iterator[str]:
    rates = [step * 10**power for power in range(1, 6) for step in (1, 2, 5)]
    for rate in (rate for rate in rates if low <= rate <= high):
        y = _y(rate, low, high)
        yield f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>'
        yield f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{rate:,}</text>'
    bottom = HEIGHT - BOTTOM
    for concurrency in CONCURRENCIES:
        x = _x(concurrency)
        yield f'<path d="M{x:.1f} {TOP}V{bottom}" stroke="#ddd"/>'
        yield f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{concurrency}</text>'
    middle = (LEFT + WIDTH - RIGHT) / 2
    yield f'<text x="{middle:.0f}" y="{HEIGHT - 8}" text-anchor="middle">concurrency</text>'
    yield f'<text x="4" y="{TOP - 6}">jobs/s</text>'


def _curves(table: Table, low: float, high: float) -> Iterator[str]:
    for index, (row, cells) in enumerate(table.cells.items()):
        colour = COLOURS[index % len(COLOURS)]
        points = [
            (_x(n), _y(table.median(row, n) or low, low, high)) for n in sorted(map(int, cells))
        ]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        yield f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>'
        for x, y in points:
            yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>'
        y_legend = TOP + 20 + index * 20
        x_legend = WIDTH - RIGHT + 16
        yield f'<path d="M{x_legend} {y_legend - 4}h14" stroke="{colour}" stroke-width="3"/>'
        yield f'<text x="{x_legend + 20}" y="{y_legend}">{row}</text>'
