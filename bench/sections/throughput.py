"""Jobs per second of each contestant at each concurrency, and the servers' CPU time per job."""

from bench.contestants import (
    NODE_5,
    NODE_6,
    NODE_UPDATES,
    OURS,
    OURS_OFF,
    PLAIN,
    PLAIN_UVLOOP,
    Contestant,
)
from bench.draining import drain
from bench.results import Results
from bench.servers import Servers
from bench.sizes import Sizes

CASES: tuple[tuple[Contestant, int], ...] = (
    *((contestant, n) for n in (1, 10, 50) for contestant in (OURS_OFF, NODE_5, NODE_6)),
    (OURS_OFF, 200),
    *((contestant, n) for n in (1, 50) for contestant in (OURS, NODE_UPDATES)),
    *((OURS, n) for n in (10, 200)),
    *((contestant, n) for n in (1, 10, 50) for contestant in (PLAIN, PLAIN_UVLOOP)),
)
PAIR = "this worker, not recording, two processes"


def measure(servers: Servers, results: Results, sizes: Sizes) -> None:
    rates = results.table("throughput", "Throughput by concurrency", "jobs/s", NODE_5.name)
    redis = results.table("redis_cpu", "CPU of Redis", "µs/job")
    load = results.table("redis_load", "Share of Redis's ceiling: its one core is busy", "%")
    worker = results.table("worker_cpu", "CPU of the worker", "µs/job")
    postgres = results.table("postgres_cpu", "CPU of PostgreSQL", "µs/job")
    cases = [(case, n, 1) for case, n in CASES] + [(OURS_OFF, 50, 2), (OURS_OFF, 200, 2)]
    for number in range(sizes.rounds):
        # Every other round runs backwards, so that a slow spell of the machine hits everybody.
        for contestant, concurrency, processes in cases if number % 2 == 0 else cases[::-1]:
            name = contestant.name if processes == 1 else PAIR
            found = drain(
                servers,
                contestant,
                concurrency,
                sizes.jobs * processes,
                sizes.seconds,
                processes=processes,
            )
            rates.add(name, concurrency, found.rate)
            redis.add(name, concurrency, found.redis_us)
            load.add(name, concurrency, found.redis_load * 100)
            worker.add(name, concurrency, found.worker_us)
            if contestant.records:
                postgres.add(name, concurrency, found.postgres_us)
