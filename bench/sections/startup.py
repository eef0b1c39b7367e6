"""Time from the start of the process to its first finished job, with warm servers."""

import time
from contextlib import ExitStack

from bench.contestants import NODE_5, OURS, Contestant
from bench.draining import LIMIT
from bench.results import Results
from bench.servers import PREFIX, Servers
from bench.sizes import Sizes


def measure(servers: Servers, results: Results, sizes: Sizes) -> None:
    table = results.table("startup", "Process start to first job done", "s", NODE_5.name)
    for _ in range(2 * sizes.rounds + 1):
        for contestant in (OURS, NODE_5):
            table.add(contestant.name, "seconds", _first_job_done(servers, contestant))


def _first_job_done(servers: Servers, contestant: Contestant) -> float:
    servers.reset()
    servers.add_jobs(["q"], 1)
    servers.add_rows(["q"], 1)
    with ExitStack() as stack:
        worker = contestant.start(servers, ["q"], 1, stack)
        while not servers.redis.zcard(f"{PREFIX}:q:completed"):
            worker.check()
            if time.perf_counter() - worker.started_at > LIMIT:
                raise RuntimeError(f"{contestant.name} does nothing")
            time.sleep(0.002)
        return time.perf_counter() - worker.started_at
