"""Time from a job's start, or its handler's end, to the commit of the row that says so.

PostgreSQL tells when a row's last transaction was committed, if it was started so.
"""

import time
from contextlib import ExitStack
from statistics import quantiles

from bench.contestants import NODE_UPDATES, OURS, Contestant
from bench.draining import LIMIT, until_left
from bench.results import Results, Table
from bench.servers import Servers, own_servers
from bench.sizes import Sizes

SLEEP = 2.0
"""Seconds that each handler takes: long enough to see all rows of a burst active at once."""

CASES = {"idle": 40.0, "500 jobs/s": 2.0}

_STARTS = """
SELECT extract(epoch FROM pg_xact_commit_timestamp(xmin) - (data->>'startedAt')::timestamptz) * 1000
FROM tasks WHERE data->>'status' = 'active'
"""
_ENDS = """
SELECT extract(epoch FROM pg_xact_commit_timestamp(xmin)) * 1000
  - (data->'result'->'output'->>'endedAt')::float
FROM tasks WHERE data->'result'->'output' ? 'endedAt'
"""


def measure(_servers: Servers, results: Results, sizes: Sizes) -> None:
    table = results.table("status_delay", "From event to committed row", "ms", NODE_UPDATES.name)
    with own_servers(track_commit_timestamp="on") as servers:
        for _ in range(sizes.rounds):
            for case, every in CASES.items():
                for contestant in (OURS, NODE_UPDATES):
                    _measure(servers, table, contestant, case, every)


def _measure(
    servers: Servers, table: Table, contestant: Contestant, case: str, every: float
) -> None:
    servers.reset()
    warm_up = 300
    # Add all jobs within half of a handler's time.
    count = int(SLEEP * 1000 / 2 / every)
    payload = {"sleep": SLEEP}
    servers.add_jobs(["q"], warm_up)
    servers.add_rows(["q"], warm_up + count)
    with ExitStack() as stack:
        worker = contestant.start(servers, ["q"], count + 10, stack)
        until_left(servers, ["q"], [worker], 0, LIMIT)
        servers.add_jobs(["q"], count, first=warm_up, every=every, payload=payload)
        deadline = time.perf_counter() + SLEEP * 0.4
        while time.perf_counter() < deadline:
            starts = [float(row[0]) for row in servers.database.execute(_STARTS).fetchall()]
            if len(starts) >= count:
                break
            time.sleep(0.02)
        until_left(servers, ["q"], [worker], 0, LIMIT)
    ends = [float(row[0]) for row in servers.database.execute(_ENDS).fetchall()]
    for event, delays in (("start", starts), ("end", ends)):
        if len(delays) < 2:
            continue
        table.add(contestant.name, f"{event}, {case}, p50", quantiles(delays, n=100)[49])
        table.add(contestant.name, f"{event}, {case}, p99", quantiles(delays, n=100)[98])
