"""The worker's goals, and whether this run reaches them."""

from collections.abc import Callable
from dataclasses import dataclass

from bench.contestants import (
    NODE_5,
    NODE_UPDATES,
    OURS,
    OURS_OFF,
    PLAIN,
    PLAIN_UVLOOP,
    Contestant,
)
from bench.results import Results
from bench.sections import handlers
from bench.sections.throughput import PAIR


@dataclass(frozen=True)
class Goal:
    """One line of the table of goals."""

    what: str
    wanted: str
    found: str
    verdict: str


def goals(results: Results) -> list[Goal]:
    """Return the goals of the sections that were measured."""
    return [goal for make in (_ratios, _handlers, _limits) for goal in make(results)]


def _ratios(results: Results) -> list[Goal]:
    rates, load = results.get("throughput"), results.get("redis_load")
    off, plain = OURS_OFF.name, (PLAIN.name, PLAIN_UVLOOP.name)
    plain_best = max((rates.best(name) or 0 for name in plain), default=0)
    found = [
        _goal(
            "not recording, best concurrency: against Node 5.65's best",
            1.1,
            _ratio(rates.best(off), rates.best(NODE_5.name)),
            "x",
        ),
        _goal("not recording: share of Redis's ceiling", 85, load.best(off), " %"),
        _goal(
            "not recording, concurrency 1: against Node 5.65",
            1.0,
            _ratio(rates.median(off, 1), rates.median(NODE_5.name, 1)),
            "x",
        ),
        *(
            _goal(
                f"recording, concurrency {n}: against Node with its UPDATEs",
                wanted,
                _ratio(rates.median(OURS.name, n), rates.median(NODE_UPDATES.name, n)),
                "x",
            )
            for n, wanted in ((50, 1.5), (1, 1.2))
        ),
        _goal(
            "recording, concurrency 200: against the best of plain Python, which records nothing",
            3,
            _ratio(rates.median(OURS.name, 200), plain_best),
            "x",
        ),
        _goal(
            "not recording against recording, at concurrency 200",
            2.2,
            _ratio(rates.median(off, 200), rates.median(OURS.name, 200)),
            "x",
            at_most=True,
        ),
        _goal(
            "two processes, not recording: against one",
            1.0,
            _ratio(rates.best(PAIR), rates.best(off)),
            "x",
        ),
    ]
    return [goal for goal in found if goal is not None]


def _handlers(results: Results) -> list[Goal]:
    busy, idle = results.get("busy_handlers"), results.get("idle_handlers")

    def of_busy(contestant: Contestant) -> float | None:
        return busy.median(contestant.name, handlers.BUSY_COLUMN)

    found = [
        *(
            _goal(
                f"handlers that need the CPU, {contestant.name}: against one loop",
                1.8,
                _ratio(of_busy(contestant), of_busy(handlers.LOOP)),
                "x",
            )
            for contestant in (handlers.CHILDREN, handlers.WORKERS)
        ),
        _goal(
            "sync handlers that do nothing: against async ones",
            0.5,
            _ratio(
                idle.best(handlers.IDLE_THREADS.name),
                idle.best(handlers.IDLE_LOOP.name),
            ),
            "x",
        ),
    ]
    return [goal for goal in found if goal is not None]


def _limits(results: Results) -> list[Goal]:
    idle, memory = results.get("idle"), results.get("memory")
    flat = results.get("flat_memory").cells.get(OURS.name, {})
    # Leave out the first portion, which fills caches and arenas.
    sizes = [values[0] for values in flat.values()][1:]
    growth = sizes[-1] - sizes[0] if sizes else None
    limit: Callable[[str, float, float | None, str], Goal | None]
    limit = lambda *args: _goal(*args, at_most=True)  # noqa: E731
    found = [
        limit("100 idle queues: CPU", 2, idle.median("CPU", "% of a core"), " % of a core"),
        limit("100 idle queues: connections", 102, idle.median("Redis connections", "number"), ""),
        limit("100 idle queues: Redis", 60, idle.median("Redis commands", "per second"), "/s"),
        limit(
            "100 idle queues: PostgreSQL connections with traffic",
            0,
            idle.median("PostgreSQL connections with traffic", "number"),
            "",
        ),
        limit("memory with 10 tasks", 70, memory.median(OURS.name, 10), " MB"),
        limit("memory with 100 tasks", 120, memory.median(OURS.name, 100), " MB"),
        limit(f"memory grows over {list(flat)[-1] if flat else 0} jobs", 2, growth, " MB"),
        limit(
            "process start to first job done",
            1.0,
            results.get("startup").median(OURS.name, "seconds"),
            " s",
        ),
    ]
    return [goal for goal in found if goal is not None]


def _goal(
    what: str, wanted: float, found: float | None, unit: str, *, at_most: bool = False
) -> Goal | None:
    if found is None:
        return None
    met = found <= wanted if at_most else found >= wanted
    sign = "≤" if at_most else "≥"
    return Goal(what, f"{sign} {wanted:g}{unit}", f"{found:.3g}{unit}", "met" if met else "missed")


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a and b else None
