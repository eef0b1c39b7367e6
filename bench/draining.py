"""Measure from outside how fast a contestant empties a queue."""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from bench.contestants import Contestant
from bench.process import Measured
from bench.servers import Servers

LIMIT = 120.0
"""Seconds after which a wait fails."""


@dataclass(frozen=True)
class Drain:
    """The result of one measurement.

    Attributes:
        rate: jobs per second.
        redis_us: microseconds of Redis' CPU time per job.
        worker_us: the same of all the worker's processes.
        postgres_us: the same of PostgreSQL.
    """

    rate: float
    redis_us: float
    worker_us: float
    postgres_us: float

    @property
    def redis_load(self) -> float:
        """The part of one core that Redis used."""
        return self.rate * self.redis_us / 1e6


def drain(
    servers: Servers,
    contestant: Contestant,
    concurrency: int,
    jobs: int,
    seconds: float,
    *,
    queues: Sequence[str] = ("q",),
    processes: int = 1,
    warm_up: int = 0,
    payload: dict[str, Any] | None = None,
) -> Drain:
    """Fill the queues, and time how the contestant empties them.

    Args:
        jobs: in each queue.
        seconds: the measurement's length, at most; what is left then does not count.
        warm_up: jobs before the measurement begins, at least.
    """
    servers.reset()
    servers.add_jobs(queues, jobs, payload=payload or {})
    if contestant.records:
        servers.add_rows(queues, jobs, payload=payload)
    return timed(
        servers,
        contestant,
        concurrency,
        seconds,
        queues=queues,
        processes=processes,
        warm_up=warm_up,
    )


def timed(
    servers: Servers,
    contestant: Contestant,
    concurrency: int,
    seconds: float,
    *,
    queues: Sequence[str] = ("q",),
    processes: int = 1,
    warm_up: int = 0,
) -> Drain:
    """Start the contestant on the filled queues, and time it once all its processes work."""
    total = servers.jobs_left(queues)
    with ExitStack() as stack:
        workers = [contestant.start(servers, queues, concurrency, stack) for _ in range(processes)]
        # The first of several processes works long before the last one has started.
        skipped = min(total // 20, 2_000) if processes == 1 else total // 3
        warm = total - max(skipped, warm_up)
        first = until_left(servers, queues, workers, warm, LIMIT)
        began, before = time.perf_counter(), _cpu(servers, workers)
        last = until_left(servers, queues, workers, 0, seconds)
        took, after = time.perf_counter() - began, _cpu(servers, workers)
    done = first - last
    if done <= 0:
        raise RuntimeError(f"{contestant.name} did no job in {seconds} s")
    return Drain(done / took, *((b - a) / done * 1e6 for a, b in zip(before, after, strict=True)))


def until_left(
    servers: Servers,
    queues: Sequence[str],
    workers: Sequence[Measured],
    goal: int,
    seconds: float,
) -> int:
    """Wait until at most that many jobs are left or the time is over; return how many are left."""
    # Poll rarely, because polling takes CPU time from the contestant.
    pause = 0.02 * max(1, len(queues) / 20)
    deadline = time.perf_counter() + seconds
    while (left := servers.jobs_left(queues)) > goal and time.perf_counter() < deadline:
        for worker in workers:
            worker.check()
        time.sleep(pause)
    return left


def _cpu(servers: Servers, workers: Sequence[Measured]) -> tuple[float, float, float]:
    return (
        servers.redis_cpu_seconds(),
        sum(worker.cpu_seconds() for worker in workers),
        servers.postgres_cpu_seconds(),
    )
