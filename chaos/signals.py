"""`python -m chaos.signals`: SIGTERM at every moment, and no job is stranded.

A busy worker is terminated at a random phase, an idle one in the very moment in which a job
arrives. After each exit no job may be active; in the end each has completed, in its first attempt,
in one run, without a stall.
"""

import asyncio
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import click
import psycopg
from redis.asyncio import Redis

from chaos.effects import read_runs
from chaos.queues import left_over, locks, read_jobs
from chaos.servers import Servers, own_servers
from chaos.tasks import QUICK
from chaos.workers import worker_env
from chaos.workload import KEEP_ALL
from tests.support.database import new_task_id
from tests.support.node import Node, Scheduled
from tests.support.process import WorkerProcess
from tests.support.until import until

GRACE = 5.0
BACKLOG = 150
"""Jobs that wait when a busy worker starts: more than it can do until its signal comes."""

START_S = 1.5
"""Seconds in which a start is interrupted; most are over by then."""


@dataclass
class Tally:
    """The counts so far; `faults` has to stay empty."""

    signals: Counter[str] = field(default_factory=Counter)
    exit_codes: Counter[int] = field(default_factory=Counter)
    jobs: int = 0
    left_waiting: int = 0
    slowest_exit: float = 0.0
    faults: list[str] = field(default_factory=list)


class Lane:
    """One queue, one worker at a time.

    Args:
        rng: draws the moments.
        folder: an empty one.
    """

    def __init__(
        self, name: str, servers: Servers, folder: Path, rng: random.Random, tally: Tally
    ) -> None:
        self._prefix = name
        self._servers = servers
        self._folder = folder
        self._rng = rng
        self._tally = tally
        self._effects = folder / "effects"
        self._effects.mkdir(parents=True)
        self._started = 0
        self._env = worker_env(self._effects, GRACE) | {
            "REDIS_URL": servers.redis.url,
            "DATABASE_URL": servers.postgres.url,
            "BULLMQ_PREFIX": name,
            "WORKER_QUEUES": QUICK,
        }
        self._ids: list[str] = []

    async def run(self, busy: int, idle: int) -> None:
        """Send so many signals to a busy worker, then so many to an idle one; check the jobs."""
        async with (
            Node(5, self._servers.redis.url, self._prefix) as self._node,
            Redis.from_url(self._servers.redis.url, decode_responses=True) as self._redis,
        ):
            for _ in range(busy):
                await self._stop_busy()
            for _ in range(idle):
                await self._stop_idle()
            worker = await self._start()
            await self._until_empty(worker)
            await self._terminate(worker, "last")
            await self._check_jobs()

    async def _stop_busy(self) -> None:
        waiting = sum(map(len, (await self._unfinished()).values()))
        await self._add(max(0, BACKLOG - waiting))
        if self._rng.random() < 0.1:
            worker = await self._start(until_ready=False)
            await self._terminate(worker, "starting")
        else:
            worker = await self._start()
            await asyncio.sleep(self._rng.uniform(0, 0.25))
            await self._terminate(worker, "busy")

    async def _stop_idle(self) -> None:
        worker = await self._start()
        await self._until_empty(worker)
        await asyncio.sleep(self._rng.uniform(0, 0.1))
        # The job's way through Node takes a millisecond or two.
        signal_after = self._rng.uniform(-0.02, 0.02) + 0.001
        adding = asyncio.create_task(self._later(-signal_after, self._add(1)))
        await self._later(signal_after, self._terminate(worker, "idle"))
        await adding
        await self._check_nothing_is_active()

    @staticmethod
    async def _later(delay: float, act: Awaitable[None]) -> None:
        await asyncio.sleep(max(0.0, delay))
        await act

    async def _add(self, count: int) -> None:
        jobs = [
            # Their rows are the worker's to make, so their ids are none of the API's.
            Scheduled(
                {"n": n, "run_ms": self._rng.randint(0, 40)},
                f"without-a-row-{new_task_id()}",
                opts=KEEP_ALL,
            )
            for n in range(count)
        ]
        self._ids += await self._node.schedule_all(QUICK, jobs)

    async def _start(self, *, until_ready: bool = True) -> WorkerProcess:
        self._started += 1
        folder = self._folder / f"worker-{self._started}"
        folder.mkdir()
        worker = WorkerProcess(["start"], self._env, folder)
        if until_ready:
            await worker.until_logged("worker_started")
        else:
            with suppress(AssertionError):
                await worker.until_logged("worker_started", self._rng.uniform(0, START_S))
        return worker

    async def _terminate(self, worker: WorkerProcess, phase: str) -> None:
        began = time.monotonic()
        worker.terminate()
        try:
            code = await worker.wait(GRACE + 2)
        except AssertionError as error:
            code = -1
            self._tally.faults.append(f"{phase}: not out within {GRACE + 2} s: {error}")
        took = time.monotonic() - began
        # Before the program's first lines, Python itself ends at the signal.
        if code not in (0, 4) and (code, phase) != (-signal.SIGTERM, "starting"):
            self._tally.faults.append(f"{phase}: exit code {code}{worker.report()}")
        self._tally.signals[phase] += 1
        self._tally.exit_codes[code] += 1
        self._tally.slowest_exit = max(self._tally.slowest_exit, took)
        worker.close()
        await self._check_nothing_is_active(worker)

    async def _check_nothing_is_active(self, worker: WorkerProcess | None = None) -> None:
        """No worker runs, so a job that is active is stranded."""
        left = await self._unfinished()
        for key, ids in left.items():
            if key.endswith((":active", ":stalled")):
                log = worker.report() if worker else ""
                self._tally.faults.append(f"stranded in {key}: {ids}{log}")
        if held := await locks(self._redis, self._prefix):
            self._tally.faults.append(f"locks that nobody holds: {held}")
        self._tally.left_waiting += bool(left)

    async def _unfinished(self) -> dict[str, list[str]]:
        return await left_over(self._redis, self._prefix, [QUICK])

    async def _until_empty(self, worker: WorkerProcess) -> None:
        async def empty() -> bool:
            assert worker.running, worker.report()
            return not await self._unfinished()

        await until(empty, 30, message=worker.report)

    async def _check_jobs(self) -> None:
        keys = [(QUICK, job_id) for job_id in self._ids]
        jobs = await read_jobs(self._redis, self._prefix, keys)
        runs = read_runs(self._effects)
        async with await psycopg.AsyncConnection.connect(self._servers.postgres.url) as connection:
            cursor = await connection.execute("SELECT id, data->>'status' FROM tasks")
            statuses: dict[str, str] = dict(await cursor.fetchall())
        self._tally.jobs += len(keys)
        for key in keys:
            job = jobs[key]
            told = (job.states, statuses.get(key[1]), job.attempts, job.fields.get("stc"))
            if told != (["completed"], "completed", 1, None) or len(runs.get(key, [])) != 1:
                self._tally.faults.append(f"{key[1]}: {told}, runs: {[*map(str, runs[key])]}")


async def run(folder: Path, seed: int, busy: int, idle: int, lanes: int = 2) -> Tally:
    """Send all the signals, in lanes at the same time."""
    tally = Tally()
    async with own_servers(random.Random(seed)) as servers, asyncio.TaskGroup() as group:
        for n in range(lanes):
            name = f"signals-{n}"
            lane = Lane(name, servers, folder / name, random.Random(f"{seed} {n}"), tally)
            shares = ((count + lanes - 1 - n) // lanes for count in (busy, idle))
            group.create_task(lane.run(*shares))
    return tally


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--seed", type=int, help="Draws the moments. [default: a new one]")
@click.option("--busy", default=200, show_default=True, help="Signals to a busy worker.")
@click.option("--idle", default=200, show_default=True, help="Signals as a job arrives.")
def main(seed: int | None, busy: int, idle: int) -> None:
    """Terminate workers at random moments, and check that no job is stranded."""
    seed = random.randrange(10**6) if seed is None else seed
    print(f"seed {seed}", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    began = time.monotonic()
    tally = asyncio.run(run(folder, seed, busy, idle))
    print(f"signals: {dict(tally.signals)}, exit codes {dict(tally.exit_codes)}")
    print(f"slowest exit: {tally.slowest_exit:.2f} s, with a grace of {GRACE:g} s")
    print(f"jobs: {tally.jobs}; exits that left jobs waiting: {tally.left_waiting}")
    print(f"{len(tally.faults)} faults in {time.monotonic() - began:.0f} s")
    for fault in tally.faults[:10]:
        print(f"FAULT: {fault}")
    if tally.faults:
        sys.exit(1)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
