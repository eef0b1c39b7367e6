"""Throughput by the size of payloads."""

import random
import string

from bench.contestants import NODE_UPDATES, OURS
from bench.draining import drain
from bench.results import Results
from bench.servers import Servers
from bench.sizes import Sizes

CONCURRENCY = 10
SIZES = {"100 B": 100, "10 kB": 10_000, "1 MB": 1_000_000}


def measure(servers: Servers, results: Results, sizes: Sizes) -> None:
    table = results.table(
        "payloads", "Throughput by payload, at concurrency 10", "jobs/s", NODE_UPDATES.name
    )
    letters = string.ascii_letters + string.digits
    for _ in range(sizes.rounds):
        for name, size in SIZES.items():
            # Random text, because PostgreSQL compresses repeated text to almost nothing.
            payload = {"text": "".join(random.choices(letters, k=size))}
            jobs = max(100, min(sizes.jobs // 2, sizes.jobs * 5_000 // size))
            for contestant in (OURS, NODE_UPDATES):
                found = drain(
                    servers, contestant, CONCURRENCY, jobs, max(sizes.seconds, 5), payload=payload
                )
                table.add(contestant.name, name, found.rate)
