"""Throughput of many small queues against one large queue."""

from bench.contestants import OURS, OURS_OFF
from bench.draining import drain
from bench.results import Results
from bench.servers import Servers
from bench.sizes import Sizes


def measure(servers: Servers, results: Results, sizes: Sizes) -> None:
    table = results.table("queues", "Throughput by queues, 100 slots in all", "jobs/s")
    for _ in range(sizes.rounds):
        for contestant in (OURS, OURS_OFF):
            jobs = min(sizes.jobs, 10_000)
            one = drain(servers, contestant, 100, jobs, sizes.seconds)
            table.add(contestant.name, f"1 x {jobs:,} jobs", one.rate)
            queues = [f"q{i}" for i in range(100)]
            many = drain(servers, contestant, 1, jobs // 100, sizes.seconds, queues=queues)
            table.add(contestant.name, f"100 x {jobs // 100:,} jobs", many.rate)
