"""CPU time and Redis commands of a worker with 100 idle queues."""

import socket
import time
from contextlib import ExitStack, suppress
from urllib.parse import urlsplit

from bench.contestants import OURS
from bench.draining import LIMIT, until_left
from bench.results import Results
from bench.servers import Servers
from bench.sizes import Sizes

QUEUES = 100

# When each of the worker's PostgreSQL connections last ran a query.
_TRAFFIC = """
SELECT pid, state_change FROM pg_stat_activity WHERE application_name = 'autoflow-worker'
"""


def measure(servers: Servers, results: Results, sizes: Sizes) -> None:
    table = results.table("idle", f"{QUEUES} idle queues", "each its own")
    queues = [f"q{i}" for i in range(QUEUES)]
    servers.reset()
    servers.add_jobs(queues, 1)
    servers.add_rows(queues, 1)
    others = len(servers.redis.client_list())
    with ExitStack() as stack:
        worker = OURS.start(servers, queues, 10, stack)
        until_left(servers, queues, [worker], 0, LIMIT)
        time.sleep(5)  # leave out the start
        connections = len(servers.redis.client_list()) - others
        before = servers.database.execute(_TRAFFIC).fetchall()
        cpu, began = worker.cpu_seconds(), time.perf_counter()
        commands = _count_commands(servers, sizes.idle_seconds)
        took = time.perf_counter() - began
        table.add("CPU", "% of a core", (worker.cpu_seconds() - cpu) / took * 100)
        table.add("Redis connections", "number", connections)
        table.add("Redis commands", "per second", commands / took)
        changed = set(servers.database.execute(_TRAFFIC).fetchall()) - set(before)
        table.add("PostgreSQL connections with traffic", "number", len(changed))


def _count_commands(servers: Servers, seconds: float) -> int:
    """Count the commands of clients, without those that scripts call."""
    address = urlsplit(servers.redis_url)
    deadline = time.perf_counter() + seconds
    text = b""
    with socket.create_connection((address.hostname, address.port), timeout=0.5) as monitor:
        monitor.sendall(b"MONITOR\r\n")
        while time.perf_counter() < deadline:
            with suppress(TimeoutError):
                text += monitor.recv(1 << 20)
    lines = text.splitlines()[1:]  # the first one says OK
    return sum(b" lua] " not in line for line in lines)
