"""The number of jobs, rounds and rows of a run."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """The sizes of one run.

    Attributes:
        jobs: in a queue whose throughput is measured.
        busy_jobs: whose handlers need the CPU, in a queue whose throughput is measured.
        seconds: that such a measurement takes, at most.
        rounds: of everything whose spread matters.
        samples: jobs whose latency is measured, in each case.
        backlog: jobs in the large backlog.
        flat_jobs: over which the memory has to stay flat.
        table_rows: in the large table.
        idle_seconds: for which 100 idle queues are watched.
    """

    jobs: int = 20_000
    busy_jobs: int = 450
    seconds: float = 5.0
    rounds: int = 3
    samples: int = 1_000
    backlog: int = 1_000_000
    flat_jobs: int = 1_000_000
    table_rows: int = 5_000_000
    idle_seconds: float = 30.0


FULL = Sizes()
QUICK = Sizes(
    jobs=2_000,
    busy_jobs=150,
    seconds=1.5,
    rounds=1,
    samples=100,
    backlog=100_000,
    flat_jobs=100_000,
    table_rows=200_000,
    idle_seconds=10.0,
)
