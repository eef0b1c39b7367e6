"""The worker's memory by the number of tasks, and its growth over very many jobs."""

from contextlib import ExitStack
from itertools import pairwise

from bench.contestants import OURS
from bench.draining import LIMIT, until_left
from bench.results import Results
from bench.servers import Servers
from bench.sizes import Sizes

FAILING = 10
"""Per cent of the jobs over which memory must not grow."""


def measure(servers: Servers, results: Results, sizes: Sizes) -> None:
    by_tasks = results.table("memory", "Memory by number of tasks, after 100 jobs each", "MB")
    for tasks in (1, 10, 100):
        queues = [f"q{i}" for i in range(tasks)]
        servers.reset()
        servers.add_jobs(queues, 100)
        for queue in queues:
            servers.add_rows([queue], 100)
        with ExitStack() as stack:
            worker = OURS.start(servers, queues, 10, stack)
            until_left(servers, queues, [worker], 0, LIMIT)
            by_tasks.add(OURS.name, tasks, worker.resident_mb())
    _measure_flatness(servers, results, sizes.flat_jobs)


def _measure_flatness(servers: Servers, results: Results, jobs: int) -> None:
    table = results.table("flat_memory", f"Memory over jobs, {FAILING} % failing", "MB")
    servers.reset()
    steps = [jobs * i // 20 for i in range(21)]
    with ExitStack() as stack:
        worker = None
        for first, end in pairwise(steps):
            # Add the next portion while the worker runs the last one.
            servers.add_rows(["q"], end - first, first=first)
            adding = servers.start_adding(["q"], end - first, first=first, failing=FAILING)
            if worker is None:
                worker = OURS.start(servers, ["q"], 50, stack)
            if adding.wait():
                raise RuntimeError("Node could not add the jobs")
            until_left(servers, ["q"], [worker], (end - first) // 10, 10 * LIMIT)
            table.add(OURS.name, end, worker.resident_mb())
