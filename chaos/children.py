"""`python -m chaos.children`: processes of handlers are killed in the middle of their jobs.

A process is stopped first. Only if its handler is in the middle of the job then, it is killed. So
which attempts have to fail is known exactly.
"""

import asyncio
import os
import random
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import click
import psutil
from redis.asyncio import Redis

from chaos.effects import Run, read_runs
from chaos.servers import own_servers
from chaos.tasks import BATCH, PROCESS, PROCESS_ASYNC, QUICK, SYNC
from chaos.workers import children_left, worker_env
from chaos.workload import KEEP_ALL
from tests.support.agreement import BullJob, bull_jobs, differences
from tests.support.database import open_database
from tests.support.node import Node, Scheduled
from tests.support.process import WorkerProcess
from tests.support.until import until

PREFIX = "children"
VICTIMS, NEIGHBOURS = (PROCESS, PROCESS_ASYNC), (QUICK, SYNC, BATCH)
REASON = "the handler's process was killed by SIGKILL (out of memory?)"
LIMIT_S = 300.0
SPREAD_MS = 30_000
"""Over which the neighbours' jobs arrive."""


@dataclass
class Report:
    """What a run found.

    Attributes:
        killed: the runs of handlers whose processes were killed.
        states: how many jobs ended in each state.
    """

    killed: list[Run] = field(default_factory=list)
    states: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


def draw_jobs(rng: random.Random, jobs: int) -> dict[str, list[Scheduled]]:
    """Return the jobs of each queue: so many in processes, and a third of that beside them."""
    drawn: dict[str, list[Scheduled]] = {}
    for queue in VICTIMS:
        drawn[queue] = [
            Scheduled(
                {"n": n, "run_ms": rng.randint(50, 150)},
                attempts=rng.randint(1, 3),
                backoff=100,
                opts=KEEP_ALL,
            )
            for n in range(jobs // len(VICTIMS))
        ]
    for queue in NEIGHBOURS:
        drawn[queue] = [
            Scheduled({"n": n, "run_ms": 100}, delay=rng.randint(1, SPREAD_MS), opts=KEEP_ALL)
            for n in range(jobs // 9)
        ]
    return drawn


async def kill_children(effects: Path, moments: Sequence[int], rng: random.Random) -> list[Run]:
    """Kill one process whenever so many runs have ended; return the runs that were killed."""
    killed: dict[str, Run] = {}

    def in_processes() -> list[Run]:
        return [run for of_job in read_runs(effects).values() for run in of_job if run.in_child]

    async def kill_one(moment: int) -> bool:
        runs = in_processes()
        running = [run for run in runs if not run.how and run.id not in killed]
        if not running or sum(bool(run.how) for run in runs) < moment:
            return False
        victim = rng.choice(running)
        if is_killed := await _kill(victim, effects):
            killed[victim.id] = victim
        return is_killed

    for moment in moments:
        await until(partial(kill_one, moment), LIMIT_S)
    return list(killed.values())


async def _kill(run: Run, effects: Path) -> bool:
    """Kill the process of a run if its handler has not ended."""
    with suppress(ProcessLookupError, psutil.NoSuchProcess):
        process = psutil.Process(run.pid)
        os.kill(run.pid, signal.SIGSTOP)
        await until(lambda: process.status() == psutil.STATUS_STOPPED)
        is_running = all(each.id != run.id or not each.how for each in read_runs(effects)[run.key])
        os.kill(run.pid, signal.SIGKILL if is_running else signal.SIGCONT)
        return is_running
    return False


async def run(folder: Path, seed: int, jobs: int, kills: int) -> Report:
    """Run the jobs, kill processes meanwhile, and compare everything."""
    rng = random.Random(seed)
    drawn = draw_jobs(rng, jobs)
    moments = sorted(rng.sample(range(jobs * 9 // 10), kills))
    report = Report()
    effects, output = folder / "effects", folder / "worker"
    effects.mkdir()
    output.mkdir()
    async with (
        own_servers(rng) as servers,
        open_database(servers.postgres.url) as db,
        Redis.from_url(servers.redis.url, decode_responses=True) as redis,
    ):
        async with Node(5, servers.redis.url, PREFIX) as node:
            for queue, scheduled in drawn.items():
                for job in scheduled:
                    await db.insert_task(
                        queue, job.payload, task_id=job.task_id, maxAttempts=job.attempts
                    )
                await node.schedule_all(queue, scheduled)
        env = worker_env(effects, 5) | {
            "REDIS_URL": servers.redis.url,
            "DATABASE_URL": servers.postgres.url,
            "BULLMQ_PREFIX": PREFIX,
            "WORKER_QUEUES": ",".join(drawn),
        }
        worker = WorkerProcess(["start"], env, output)
        try:
            report.killed = await kill_children(effects, moments, rng)

            async def done() -> bool:
                statuses = await db.statuses()
                return statuses["completed"] + statuses["failed"] == statuses.total()

            await until(done, LIMIT_S, message=worker.report)
            worker.terminate()
            if code := await worker.wait():
                report.faults.append(f"the worker's exit code is {code}{worker.report()}")
            report.faults += [f"log: {line}" for line in worker.logged("attempt_broken")]
            with suppress(AssertionError):
                await until(lambda: not children_left(effects), 10)
            report.faults += [f"left behind: {child}" for child in children_left(effects)]
        finally:
            worker.close()
        found: dict[str, BullJob] = {}
        for queue in drawn:
            found |= await bull_jobs(redis, PREFIX, queue)
        report.faults += differences(await db.rows(), found)
        report.states.update(job.status for job in found.values())
        runs = read_runs(effects)
        for queue, scheduled in drawn.items():
            for job in scheduled:
                of_job = runs.get((queue, job.task_id), [])
                report.faults += _faults(job, of_job, found.get(job.task_id), report.killed)
    return report


def _faults(
    job: Scheduled, runs: Sequence[Run], found: BullJob | None, killed: Sequence[Run]
) -> Iterator[str]:
    """Yield how a job's runs and its end differ from what was done to it."""
    lost = [run for run in killed if run.job_id == job.task_id]
    completes = len(lost) < job.attempts
    expected = ["killed"] * len(lost) + ["returned"] * completes
    ends = [run.how or "killed" for run in runs]
    if ends != expected or [run.attempt for run in runs] != list(range(1, len(expected) + 1)):
        yield f"{job.task_id}: {list(map(str, runs))}, but killed were {list(map(str, lost))}"
    if found is None:
        yield f"{job.task_id} is not in Redis"
        return
    wanted: Mapping[str, str] = {"atm": str(len(expected))}
    if not completes:
        wanted = {**wanted, "failedReason": REASON}
    if found.status != ("completed" if completes else "failed") or not (
        wanted.items() <= found.fields.items()
    ):
        yield f"{job.task_id}: {found}, but {wanted}"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--seed", type=int, help="Draws the jobs and the moments. [default: a new one]")
@click.option("--jobs", default=500, show_default=True, help="In processes.")
@click.option("--kills", default=50, show_default=True)
def main(seed: int | None, jobs: int, kills: int) -> None:
    """Kill processes of handlers in the middle of jobs, and check every job."""
    seed = random.randrange(10**6) if seed is None else seed
    print(f"seed {seed}", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    report = asyncio.run(run(folder, seed, jobs, kills))
    print(f"{len(report.killed)} processes killed; jobs: {dict(report.states)}")
    if report.faults:
        sys.exit("\n".join([*report.faults, f"the worker's output and effects: {folder}"]))
    shutil.rmtree(folder)
    print("exactly the killed attempts failed, and both stores agree")


if __name__ == "__main__":
    main()
