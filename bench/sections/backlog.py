"""Throughput must not fall with the number of jobs that wait."""

from bench.contestants import NODE_5, OURS_OFF
from bench.draining import drain, timed
from bench.results import Results
from bench.servers import Servers
from bench.sizes import Sizes

CONCURRENCY = 50
SMALL = 10_000


def measure(servers: Servers, results: Results, sizes: Sizes) -> None:
    table = results.table(
        "backlog", "Throughput by backlog, at concurrency 50", "jobs/s", NODE_5.name
    )
    both = (OURS_OFF, NODE_5)
    for _ in range(sizes.rounds):
        for contestant in both:
            found = drain(servers, contestant, CONCURRENCY, SMALL, sizes.seconds)
            table.add(contestant.name, f"{SMALL:,}", found.rate)
    servers.reset()
    servers.add_jobs(["q"], sizes.backlog)
    for _ in range(sizes.rounds):
        for contestant in both:
            # Each round takes a small part of the same backlog.
            rate = timed(servers, contestant, CONCURRENCY, min(sizes.seconds, 3.0)).rate
            table.add(contestant.name, f"{sizes.backlog:,}", rate)
