"""`python -m chaos.recovery`: how long until the jobs of a killed worker run again.

The workers have BullMQ's default options: a lock lasts 30 s, and each worker looks every 30 s for
jobs without a lock. Some killed workers have a neighbour that lives on, some get a successor.
"""

import asyncio
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

import click

from chaos.effects import read_runs
from chaos.servers import Servers, own_servers
from chaos.tasks import DEFAULTS_VARIABLE, SLOW
from chaos.workers import worker_env
from chaos.workload import KEEP_ALL
from tests.support.node import Node, Scheduled
from tests.support.process import WorkerProcess
from tests.support.until import until

BAR_S = 90.0
JOBS = 5
FOR_EVER_MS = 3_600_000


async def measure(
    name: str, servers: Servers, folder: Path, *, neighbour_for: float | None
) -> float:
    """Kill a worker with running jobs; seconds until the last of them runs again.

    Args:
        name: the lane's; its key prefix.
        neighbour_for: how many seconds before the kill a second worker starts; None: one starts
            right after the kill.
    """
    effects = folder / name / "effects"
    effects.mkdir(parents=True)
    env = worker_env(effects, 1) | {
        "REDIS_URL": servers.redis.url,
        "DATABASE_URL": servers.postgres.url,
        "BULLMQ_PREFIX": name,
        "WORKER_QUEUES": SLOW,
        DEFAULTS_VARIABLE: "1",
    }

    def start(number: int) -> WorkerProcess:
        own = folder / name / f"worker-{number}"
        own.mkdir()
        return WorkerProcess(["start"], env, own)

    def runs_of(worker: WorkerProcess) -> list[float]:
        runs = [run for of_job in read_runs(effects).values() for run in of_job]
        return [run.started_at for run in runs if run.pid == worker.pid]

    async with Node(5, servers.redis.url, name) as node:
        jobs = [Scheduled({"n": n, "run_ms": FOR_EVER_MS}, opts=KEEP_ALL) for n in range(JOBS)]
        await node.schedule_all(SLOW, jobs)
    workers = [start(1)]
    try:
        await until(lambda: len(runs_of(workers[0])) == JOBS, 30, message=workers[0].report)
        if neighbour_for is not None:
            workers.append(start(2))
            await workers[1].until_logged("worker_started")
            await asyncio.sleep(neighbour_for)
        workers[0].kill()
        killed_at = time.time()
        if neighbour_for is None:
            workers.append(start(2))
        await until(lambda: len(runs_of(workers[1])) == JOBS, 3 * BAR_S, message=workers[1].report)
        return max(runs_of(workers[1])) - killed_at
    finally:
        for worker in workers:
            worker.close()


async def run(folder: Path, seed: int) -> list[tuple[str, float]]:
    """Several measurements at the same time; the name of each, and its seconds."""
    rng = random.Random(seed)
    neighbours = [None, None, *sorted(round(rng.uniform(0, 25)) for _ in range(4))]
    names = [
        "a successor" if seconds is None else f"a neighbour for {seconds} s"
        for seconds in neighbours
    ]
    async with own_servers(rng) as servers:
        took = await asyncio.gather(
            *(
                measure(f"recovery-{n}", servers, folder, neighbour_for=seconds)
                for n, seconds in enumerate(neighbours)
            )
        )
    return list(zip(names, took, strict=True))


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--seed", type=int, help="Draws the moments. [default: a new one]")
def main(seed: int | None) -> None:
    """Measure how long until the jobs of a killed worker run again, with default settings."""
    seed = random.randrange(10**6) if seed is None else seed
    print(f"seed {seed}", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    results = asyncio.run(run(folder, seed))
    shutil.rmtree(folder)
    for name, seconds in results:
        print(f"killed, with {name}: its {JOBS} jobs ran again after {seconds:.1f} s")
    if max(seconds for _, seconds in results) >= BAR_S:
        sys.exit(f"that is not within {BAR_S:g} s")


if __name__ == "__main__":
    main()
