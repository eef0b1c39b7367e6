"""The worker programs that are measured, and how each is started."""

import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from bench.process import ROOT, Measured
from bench.servers import PREFIX, Servers

NODE = str(ROOT / "tests/node/node_modules/.node")
WORK = str(ROOT / "bench/node/work.mjs")


@dataclass(frozen=True)
class Contestant:
    """One worker program.

    Attributes:
        name: as the tables say it.
        command: its words; {redis}, {database}, {prefix}, {queue} and {concurrency} are filled in.
        records: whether it writes statuses, so that its jobs need rows.
        tasks: its task list, if it is this worker.
    """

    name: str
    command: Sequence[str] = field(repr=False)
    records: bool = False
    tasks: str = "bench.tasks:tasks"

    def start(
        self, servers: Servers, queues: Sequence[str], concurrency: int, stack: ExitStack
    ) -> Measured:
        """Start a process; it is killed when the stack closes."""
        words = {
            "redis": servers.redis_url,
            "database": servers.database_url,
            "prefix": PREFIX,
            "queue": queues[0],
            "concurrency": str(concurrency),
        }
        env = {
            **os.environ,
            "NODE_ENV": "production",
            "REDIS_URL": servers.redis_url,
            "DATABASE_URL": servers.database_url,
            "BULLMQ_PREFIX": PREFIX,
            "TASKS_CONFIG": self.tasks,
            "WORKER_CONCURRENCY": str(concurrency),
            "BENCH_QUEUES": ",".join(queues),
        }
        command = [word.format_map(words) for word in self.command]
        return stack.enter_context(Measured(command, env))


def _node(version: int, *more: str) -> list[str]:
    return [NODE, WORK, str(version), "{redis}", "{prefix}", "{queue}", "{concurrency}", *more]


_PLAIN = [sys.executable, "-m", "bench.plain", "{redis}", "{prefix}", "{queue}", "{concurrency}"]

OURS = Contestant("this worker", [sys.executable, "-m", "autoflow_worker", "start"], records=True)
OURS_OFF = Contestant(
    "this worker, not recording", [sys.executable, "-m", "bench.unrecorded", "start"]
)
NODE_5 = Contestant("Node 5.65, not recording", _node(5))
NODE_6 = Contestant("Node 6.7, not recording", _node(6))
NODE_UPDATES = Contestant("Node 5.65 with UPDATEs", _node(5, "{database}"), records=True)
PLAIN = Contestant("plain Python, not recording", _PLAIN)
PLAIN_UVLOOP = Contestant("plain Python, uvloop, not recording", [*_PLAIN, "--uvloop"])
