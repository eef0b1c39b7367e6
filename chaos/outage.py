"""`python -m chaos.outage`: PostgreSQL goes away in the middle of many jobs, and comes back.

Meanwhile the handlers that run finish, their outcomes wait in their slots, and nothing else starts:
so the worker's memory stays as it is. After its return every row has to tell what BullMQ tells.
"""

import asyncio
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import click
import psutil
from redis.asyncio import Redis
from rich.console import Console
from rich.table import Table

from chaos.servers import Servers, own_servers
from chaos.steady import CONCURRENCY_VARIABLE, QUEUE
from chaos.workers import worker_env
from chaos.workload import KEEP_ALL
from tests.support.agreement import bull_jobs, differences
from tests.support.database import Connection, Database, new_task_id
from tests.support.node import Node, Scheduled
from tests.support.process import WorkerProcess
from tests.support.until import until

PREFIX = "chaos"
GROWTH_LIMIT_MB = 20.0
RETURN_LIMIT_S = 10.0
PATIENCE = 300.0
"""Seconds for everything but the outage, even on a slow machine."""


@dataclass
class Measured:
    """The measurements.

    Attributes:
        before: jobs that had finished when PostgreSQL went away.
        held: jobs whose outcomes waited for it, each in its slot.
        unlocked: how many of these were without their lock at some time.
        growth_mb: of the worker's memory, from the outage's begin to its end and after.
        held_after_s: until the held outcomes were in both stores, from its return.
        done_after_s: until all jobs were, from its return.
        faults: of rows, jobs and the worker's exit.
    """

    before: int = 0
    held: int = 0
    unlocked: int = 0
    rss_mb: float = 0.0
    growth_mb: float = 0.0
    held_after_s: float = 0.0
    done_after_s: float = 0.0
    faults: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        within = self.growth_mb < GROWTH_LIMIT_MB and self.held_after_s < RETURN_LIMIT_S
        return within and not self.faults and not self.unlocked


class Observer:
    """The worker and its queue, seen from outside."""

    def __init__(self, redis: Redis, worker: WorkerProcess) -> None:
        self._redis = redis
        self._memory = psutil.Process(worker.pid).memory_info
        self._base = f"{PREFIX}:{QUEUE}:"
        self.peak_mb = 0.0

    def rss_mb(self) -> float:
        now: float = self._memory().rss / 1e6
        self.peak_mb = max(self.peak_mb, now)
        return now

    async def finished(self) -> set[str]:
        ids: set[str] = set()
        for state in ("completed", "failed"):
            ids.update(map(str, await self._redis.zrange(self._base + state, 0, -1)))
        return ids

    async def active(self) -> list[str]:
        return [str(i) for i in await self._redis.lrange(self._base + "active", 0, -1)]

    async def unlocked(self, ids: Sequence[str]) -> int:
        return len(ids) - int(
            await self._redis.exists(*(f"{self._base}{job_id}:lock" for job_id in ids))
        )

    async def until_finished(self, ids: set[str]) -> None:
        async def done() -> bool:
            self.rss_mb()
            return ids <= await self.finished()

        await until(done, PATIENCE)


async def measure(jobs: int, concurrency: int, seconds: float, folder: Path) -> Measured:
    """Run the jobs, with an outage of so many seconds in the middle."""
    async with own_servers(random.Random()) as servers:
        ids = await _schedule(servers, jobs)
        worker = _start(servers, folder, concurrency)
        try:
            async with Redis.from_url(servers.redis.url, decode_responses=True) as redis:
                measured = await _break(servers, Observer(redis, worker), ids, seconds)
                worker.terminate()
                if code := await worker.wait():
                    measured.faults.append(f"the worker ended with {code}{worker.report()}")
                known = await bull_jobs(redis, PREFIX, QUEUE)
        finally:
            worker.close()
        async with await Connection.connect(servers.postgres.url) as connection:
            rows = await Database(servers.postgres.url, connection).rows()
        measured.faults += differences(rows, known)
        wrong = [i for i in ids if rows.get(i, {}).get("status") not in ("completed", "failed")]
        measured.faults += [f"{task_id} is not finished" for task_id in wrong]
        return measured


async def _break(servers: Servers, observer: Observer, ids: set[str], seconds: float) -> Measured:
    async def some_done() -> bool:
        return len(await observer.finished()) > len(ids) * 0.4

    measured = Measured()
    await until(some_done, PATIENCE)
    measured.rss_mb = observer.rss_mb()
    observer.peak_mb = 0.0
    # As `pg_ctl stop -m immediate`.
    await asyncio.to_thread(servers.postgres.server.stop, signal.SIGQUIT)
    measured.before = len(await observer.finished())
    ends = time.monotonic() + seconds
    while (left := ends - time.monotonic()) > 0:
        await asyncio.sleep(min(left, 0.5))
        observer.rss_mb()
        held = await observer.active()
        measured.unlocked = max(measured.unlocked, await observer.unlocked(held) if held else 0)
    held = await observer.active()
    measured.held = len(held)
    await servers.postgres.start()
    returned = time.monotonic()
    await observer.until_finished(set(held))
    measured.held_after_s = time.monotonic() - returned
    await observer.until_finished(ids)
    measured.done_after_s = time.monotonic() - returned
    measured.growth_mb = observer.peak_mb - measured.rss_mb
    return measured


async def _schedule(servers: Servers, count: int) -> set[str]:
    jobs = [
        # One in ten fails once, one in fifty for good.
        Scheduled(
            {"n": n, "run_ms": 20, "failures": 3 if n % 50 == 7 else int(n % 10 == 3)},
            new_task_id(),
            attempts=3,
            backoff=100,
            opts=KEEP_ALL,
        )
        for n in range(count)
    ]
    async with await Connection.connect(servers.postgres.url, autocommit=True) as connection:
        database = Database(servers.postgres.url, connection)
        await database.insert_tasks(QUEUE, {job.task_id: job.payload for job in jobs})
    async with Node(5, servers.redis.url, PREFIX) as node:
        return set(await node.schedule_all(QUEUE, jobs))


def _start(servers: Servers, folder: Path, concurrency: int) -> WorkerProcess:
    env = worker_env(folder, 25) | {
        "REDIS_URL": servers.redis.url,
        "DATABASE_URL": servers.postgres.url,
        "BULLMQ_PREFIX": PREFIX,
        "TASKS_CONFIG": "chaos.steady:tasks",
        CONCURRENCY_VARIABLE: str(concurrency),
    }
    output = folder / "worker"
    output.mkdir()
    return WorkerProcess(["start"], env, output)


def print_table(measured: Measured, jobs: int, seconds: float) -> None:
    """Print the figures, with their limits."""
    table = Table(title=f"PostgreSQL away for {seconds:g} s in the middle of {jobs} jobs")
    table.add_column("what")
    table.add_column("seen", justify="right")
    table.add_column("limit", justify="right")
    for what, seen, limit in (
        ("jobs finished before", f"{measured.before}", ""),
        ("outcomes held meanwhile", f"{measured.held}", ""),
        ("of these, without their lock at some time", f"{measured.unlocked}", "0"),
        ("rows missing or wrong, other faults", f"{len(measured.faults)}", "0"),
        ("memory before, MB", f"{measured.rss_mb:.1f}", ""),
        ("its growth at the most, MB", f"{measured.growth_mb:.1f}", f"{GROWTH_LIMIT_MB:g}"),
        ("held outcomes in both stores after, s", f"{measured.held_after_s:.2f}", "10"),
        ("all jobs finished after, s", f"{measured.done_after_s:.2f}", ""),
    ):
        table.add_row(what, seen, limit)
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    for fault in measured.faults[:20]:
        console.print(fault, markup=False)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--jobs", default=5000, show_default=True)
@click.option("--concurrency", default=100, show_default=True)
@click.option("--seconds", default=60.0, show_default=True, help="Of the outage.")
def main(jobs: int, concurrency: int, seconds: float) -> None:
    """Take PostgreSQL away in the middle; the exit code is 0 if all is within its limits."""
    folder = Path(tempfile.mkdtemp(prefix="outage-"))
    measured = asyncio.run(measure(jobs, concurrency, seconds, folder))
    print_table(measured, jobs, seconds)
    if not measured.ok:
        print(f"the worker's output: {folder}")
        sys.exit(1)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
