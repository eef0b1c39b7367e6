"""Jobs per second by the kind of handler: busy ones, and ones that do nothing."""

from dataclasses import replace

from bench.contestants import OURS, Contestant
from bench.draining import drain
from bench.handler_tasks import BUSY_S, PROCESSES
from bench.results import Results
from bench.servers import Servers
from bench.sizes import Sizes


def _ours(name: str, tasks: str, *arguments: str) -> Contestant:
    command = (*OURS.command, *arguments)
    return replace(OURS, name=name, command=command, tasks=f"bench.handler_tasks:{tasks}")


LOOP = _ours("in the loop", "busy_in_loop")
THREADS = _ours("in threads", "busy_in_threads")
CHILDREN = _ours(f"in {PROCESSES} child processes", "busy_in_processes")
WORKERS = _ours(
    f"in the loops of {PROCESSES} workers", "busy_in_loop", "--processes", str(PROCESSES)
)
BUSY = (LOOP, THREADS, CHILDREN, WORKERS)
BUSY_COLUMN = f"{BUSY_S * 1000:g} ms of CPU"

IDLE_LOOP = _ours("in the loop", "idle_in_loop")
IDLE_THREADS = _ours("in threads", "idle_in_threads")
IDLE_CHILDREN = _ours(f"in {PROCESSES} child processes", "idle_in_processes")
IDLE = (IDLE_LOOP, IDLE_THREADS, IDLE_CHILDREN)
CONCURRENCY = 50


def measure(servers: Servers, results: Results, sizes: Sizes) -> None:
    busy = results.table(
        "busy_handlers", "Handlers that need the CPU, by where they run", "jobs/s", LOOP.name
    )
    idle = results.table(
        "idle_handlers", "Handlers that do nothing, by where they run", "jobs/s", IDLE_LOOP.name
    )
    for number in range(sizes.rounds):
        # Every other round runs backwards, so that a slow spell of the machine hits everybody.
        turn = 1 if number % 2 == 0 else -1
        for contestant in BUSY[::turn]:
            # The second of two workers starts only when the first one works.
            found = drain(
                servers,
                contestant,
                PROCESSES,
                sizes.busy_jobs,
                sizes.seconds,
                warm_up=sizes.busy_jobs // 3,
            )
            busy.add(contestant.name, BUSY_COLUMN, found.rate)
        for contestant in IDLE[::turn]:
            found = drain(servers, contestant, CONCURRENCY, sizes.jobs, sizes.seconds)
            idle.add(contestant.name, f"concurrency {CONCURRENCY}", found.rate)
