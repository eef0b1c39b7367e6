"""`python -m chaos.failpoints`: kill workers at each point of a job's life, and compare the stores.

Each crash has a queue of its own with a few jobs of every kind. A worker of that queue dies when it
passes the point for the n-th time. Then another worker finishes the jobs of many such queues, and
every row has to agree with BullMQ.
"""

import asyncio
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
from redis.asyncio import Redis
from rich.console import Console
from rich.table import Table

from chaos.crash_points import CRASH_POINTS, VARIABLE
from chaos.mortal import CONCURRENCY, QUEUES_VARIABLE
from chaos.nursery import Nursery, Worker
from chaos.servers import own_servers
from tests.support.agreement import bull_jobs, differences
from tests.support.database import Connection, Database, new_task_id
from tests.support.node import Node, Scheduled
from tests.support.until import until

BATCH = 25
"""Crashes whose queues one successor takes over."""
BATCHES_AT_ONCE = 2
AT_ONCE = 4
"""Workers of one batch that run at the same time, until they die."""
LATEST_PASS = 6
"""A worker dies at its sixth pass at the latest: every queue has jobs for that many."""
PATIENCE = 60.0
"""Seconds that a batch has for each step, even on a slow machine."""

KEEP_ALL = {"removeOnComplete": False, "removeOnFail": False}
FATES = {  # kind: attempts allowed, attempts it takes, the status it ends with
    "plain": (3, 1, "completed"),
    "flaky": (3, 2, "completed"),
    "at once": (3, 2, "completed"),
    "doomed": (2, 2, "failed"),
    "final": (3, 1, "failed"),
    "invalid": (3, 1, "failed"),
}
JOBS = (*FATES, "plain", "plain", "plain")


@dataclass
class Crash:
    """One worker's death, and what became of its jobs.

    Attributes:
        number: of the pass at which it dies.
        expected: the status and the attempts that each job has to end with, by id.
        faults: what is wrong in the end.
    """

    point: str
    number: int
    queue: str
    expected: dict[str, tuple[str, int]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


class Field:
    """Two servers, a producer and a nursery, with which workers are made to die."""

    def __init__(
        self, redis_url: str, database_url: str, prefix: str, node: Node, nursery: Nursery
    ) -> None:
        self._redis_url = redis_url
        self._database_url = database_url
        self._prefix = prefix
        self._node = node
        self._nursery = nursery

    async def run(self, crashes: Sequence[Crash]) -> None:
        """Let a worker die for each crash, let a successor finish, and note the faults."""
        turns = asyncio.Semaphore(AT_ONCE)

        async def crash_one(crash: Crash) -> None:
            async with turns:
                await self._crash(crash)

        await asyncio.gather(*(self._schedule(crash) for crash in crashes))
        await asyncio.gather(*(crash_one(crash) for crash in crashes))
        successor = await self._start([crash.queue for crash in crashes])
        await self._until_settled(crashes, successor)
        successor.terminate()
        code = await asyncio.wait_for(successor.exit_code, PATIENCE)
        for crash in crashes:
            if code:
                crash.faults.append(f"the successor ended with {code}")
            await self._compare(crash)

    async def _schedule(self, crash: Crash) -> None:
        jobs = []
        for number, kind in enumerate(JOBS, 1):
            allowed, attempts, status = FATES[kind]
            job = Scheduled(
                {"kind": kind} if kind != "invalid" else {"kind": 5},
                # One job is another producer's, without a row; its worker makes it.
                new_task_id() if number < len(JOBS) else f"without-a-row-{new_task_id()}",
                attempts=allowed,
                backoff=0 if kind == "at once" else 20,
                opts=KEEP_ALL,
            )
            jobs.append(job)
            crash.expected[job.task_id] = (status, attempts)
        async with await Connection.connect(self._database_url, autocommit=True) as connection:
            rows = {job.task_id: job.payload for job in jobs[:-1]}
            await Database(self._database_url, connection).insert_tasks(crash.queue, rows)
        await self._node.schedule_all(crash.queue, jobs)

    async def _crash(self, crash: Crash) -> None:
        spec = f"{crash.point}:{crash.number}"
        worker = await self._start([crash.queue], **{VARIABLE: spec})
        try:
            code = await asyncio.wait_for(asyncio.shield(worker.exit_code), PATIENCE)
        except TimeoutError:
            worker.terminate()
            crash.faults.append(f"it never passed the point: {worker.output}")
            return
        if code != -signal.SIGKILL:
            crash.faults.append(f"it ended with {code}: {worker.output}")

    async def _start(self, queues: Sequence[str], **env: str) -> Worker:
        return await self._nursery.start(
            {
                "REDIS_URL": self._redis_url,
                "DATABASE_URL": self._database_url,
                "BULLMQ_PREFIX": self._prefix,
                "TASKS_CONFIG": "chaos.mortal:tasks",
                "LOG_FORMAT": "json",
                QUEUES_VARIABLE: ",".join(queues),
                **env,
            }
        )

    async def _until_settled(self, crashes: Sequence[Crash], successor: Worker) -> None:
        async with Redis.from_url(self._redis_url) as client:

            async def settled() -> bool:
                async with client.pipeline(transaction=False) as pipeline:
                    for crash in crashes:
                        for state in ("completed", "failed"):
                            pipeline.zcard(f"{self._prefix}:{crash.queue}:{state}")
                    counts = await pipeline.execute()
                return sum(counts) == len(crashes) * len(JOBS) or successor.exit_code.done()

            try:
                await until(settled, PATIENCE)
            except AssertionError:
                crashes[0].faults.append(f"not everything was finished: {successor.output}")

    async def _compare(self, crash: Crash) -> None:
        async with Redis.from_url(self._redis_url, decode_responses=True) as client:
            jobs = await bull_jobs(client, self._prefix, crash.queue)
        async with await Connection.connect(self._database_url) as connection:
            query = "SELECT id, data FROM tasks WHERE data->>'taskName' = %s"
            found = await (await connection.execute(query, (crash.queue,))).fetchall()
        rows: dict[str, Any] = dict(found)
        crash.faults += differences(rows, jobs)
        for task_id, expected in crash.expected.items():
            row = rows.get(task_id, {})
            if (row.get("status"), row.get("attempts")) != expected:
                crash.faults.append(f"{task_id} should be {expected}, its row is {row}")


def draw(rng: random.Random, points: Sequence[str], each: int) -> list[Crash]:
    """Draw crashes at each of these points, in a random order."""
    crashes = [
        Crash(point, rng.randint(1, LATEST_PASS), f"{point}-{number}")
        for point in points
        for number in range(each)
    ]
    rng.shuffle(crashes)
    return crashes


async def run(rng: random.Random, points: Sequence[str], each: int, folder: Path) -> list[Crash]:
    """Crash, recover and compare on servers of our own."""
    crashes = draw(rng, points, each)
    async with (
        own_servers(rng) as servers,
        Node(5, servers.redis.url, "chaos") as node,
        Nursery(folder) as nursery,
    ):
        stage = Field(servers.redis.url, servers.postgres.url, "chaos", node, nursery)
        batches = [crashes[start : start + BATCH] for start in range(0, len(crashes), BATCH)]
        # While the locks of one batch's dead workers expire, another batch runs.
        turns = asyncio.Semaphore(BATCHES_AT_ONCE)

        async def run_batch(batch: Sequence[Crash]) -> None:
            async with turns:
                await stage.run(batch)
                print(".", end="", flush=True)

        await asyncio.gather(*map(run_batch, batches))
    print()
    return crashes


def print_table(crashes: Sequence[Crash], seconds: float) -> None:
    """Print, for each point, how many crashes there were and after how many the stores agree."""
    table = Table(title=f"{len(crashes)} crashes in {seconds:.0f} s, {len(JOBS)} jobs beside each")
    for heading in ("crash point", "crashes", "stores agree", "passes"):
        table.add_column(heading, justify="left" if heading == "crash point" else "right")
    for point in CRASH_POINTS:
        here = [crash for crash in crashes if crash.point == point]
        passes = Counter(crash.number for crash in here)
        spread = " ".join(f"{passes[n]}" for n in range(1, LATEST_PASS + 1))
        if here:
            agree = sum(not crash.faults for crash in here)
            table.add_row(point, str(len(here)), str(agree), spread)
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    for crash in [crash for crash in crashes if crash.faults][:10]:
        for fault in crash.faults[:10]:
            console.print(f"{crash.point}:{crash.number}, {crash.queue}: {fault}", markup=False)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--each", default=100, show_default=True, help="Crashes at each point.")
@click.option(
    "--point", "points", multiple=True, type=click.Choice([*CRASH_POINTS]), help="[default: all]"
)
@click.option("--seed", type=int, help="Draws the passes and the order. [default: a new one]")
def main(each: int, points: tuple[str, ...], seed: int | None) -> None:
    """Kill workers at every crash point; the exit code is 0 if the stores agree after each."""
    seed = random.randrange(10**6) if seed is None else seed
    print(f"seed {seed}; {CONCURRENCY} slots", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="failpoints-"))
    began = time.monotonic()
    crashes = asyncio.run(run(random.Random(seed), points or [*CRASH_POINTS], each, folder))
    print_table(crashes, time.monotonic() - began)
    if any(crash.faults for crash in crashes):
        print(f"the workers' output: {folder}")
        sys.exit(1)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
