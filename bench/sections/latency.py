"""Time from the producer's `add` to the handler's first line."""

import json
from contextlib import ExitStack
from statistics import quantiles
from typing import Any

from bench.contestants import NODE_5, NODE_UPDATES, OURS, OURS_OFF, Contestant
from bench.draining import LIMIT, until_left
from bench.results import Results, Table
from bench.servers import PREFIX, Servers
from bench.sizes import Sizes

CONCURRENCY = 10
# ms between two jobs. 500 jobs/s is about half of a recording worker's throughput.
CASES = {"idle": 20.0, "500 jobs/s": 2.0}


def measure(servers: Servers, results: Results, sizes: Sizes) -> None:
    table = results.table("latency", "Enqueue to start, at concurrency 10", "ms", NODE_5.name)
    for _ in range(sizes.rounds):
        for case in CASES:
            for contestant in (OURS_OFF, NODE_5, OURS, NODE_UPDATES):
                _measure(servers, table, contestant, case, samples=sizes.samples)


def _measure(
    servers: Servers, table: Table, contestant: Contestant, case: str, *, samples: int
) -> None:
    every = CASES[case]
    count = samples if every < 10 else min(samples, 200)
    servers.reset()
    warm_up = 300
    servers.add_jobs(["q"], warm_up)
    servers.add_rows(["q"], warm_up + count)
    with ExitStack() as stack:
        worker = contestant.start(servers, ["q"], CONCURRENCY, stack)
        until_left(servers, ["q"], [worker], 0, LIMIT)
        keep: dict[str, Any] = {"opts": {"removeOnComplete": False}}
        servers.add_jobs(["q"], count, first=warm_up, every=every, **keep)
        until_left(servers, ["q"], [worker], 0, LIMIT)
    waited = _waited_ms(servers)
    table.add(contestant.name, f"{case}, p50", quantiles(waited, n=100)[49])
    table.add(contestant.name, f"{case}, p99", quantiles(waited, n=100)[98])


def _waited_ms(servers: Servers) -> list[float]:
    pipeline = servers.redis.pipeline(transaction=False)
    for job_id in servers.redis.zrange(f"{PREFIX}:q:completed", 0, -1):
        pipeline.hget(f"{PREFIX}:q:{job_id!s}", "returnvalue")
    outputs = [json.loads(value)["output"] for value in pipeline.execute()]
    return [output["waitedMs"] for output in outputs if "waitedMs" in output]
