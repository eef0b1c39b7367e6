"""`python -m chaos.cancelling`: running tasks of each kind are cancelled at random moments."""

import asyncio
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Set
from pathlib import Path

import click
from redis.asyncio import Redis

from chaos.cancelling_tasks import FOLDER_VARIABLE, PER_KIND, tasks
from chaos.servers import Servers, own_servers
from chaos.workers import worker_env
from chaos.workload import KEEP_ALL
from tests.support.agreement import BullJob, bull_jobs
from tests.support.database import Database, open_database
from tests.support.node import Node, Scheduled
from tests.support.process import WorkerProcess
from tests.support.until import until

BAR_S = 2.0
SPREAD_S = 4.0
LIMIT_S = 240.0
PREFIX = "cancelling"

_CANCEL = """UPDATE tasks SET data = data || '{"status": "cancelled"}' WHERE id = %s"""


def read(folder: Path, what: str) -> dict[str, float]:
    """Return when each task noted this."""
    lines = [line for path in folder.glob(f"{what}-*") for line in path.read_text().splitlines()]
    return {task_id: float(at) for task_id, at in (line.split() for line in lines)}


async def cancel_all(
    db: Database, folder: Path, ids: Set[str], rng: random.Random
) -> dict[str, float]:
    """Cancel each task at a random moment after it began; return when each was."""
    at: dict[str, float] = {}

    async def cancel(task_id: str, delay: float) -> None:
        await asyncio.sleep(delay)
        await db.execute(_CANCEL, task_id)
        at[task_id] = time.time()

    seen: set[str] = set()
    async with asyncio.timeout(LIMIT_S), asyncio.TaskGroup() as group:
        while seen != ids:
            for task_id in read(folder, "began").keys() - seen:
                group.create_task(cancel(task_id, rng.uniform(0, SPREAD_S)))
                seen.add(task_id)
            await asyncio.sleep(0.02)
    return at


async def differences(servers: Servers, db: Database, queues: Mapping[str, str]) -> list[str]:
    """Return the ids of the tasks on whose end the two stores do not agree."""
    jobs: dict[str, BullJob] = {}
    async with Redis.from_url(servers.redis.url, decode_responses=True) as redis:
        for queue in set(queues.values()):
            jobs |= await bull_jobs(redis, PREFIX, queue)
    return [
        task_id
        for task_id in queues
        if await db.status(task_id) != "cancelled"
        or jobs[task_id].states != ["failed"]
        or jobs[task_id].fields["failedReason"] != "the task is cancelled"
    ]


async def run(folder: Path, seed: int) -> tuple[dict[str, list[float]], list[str]]:
    """Return the seconds until each handler was told, by queue, and what does not agree."""
    rng = random.Random(seed)
    jobs = {task.queue_name: [Scheduled(opts=KEEP_ALL) for _ in range(PER_KIND)] for task in tasks}
    queues = {job.task_id: queue for queue, scheduled in jobs.items() for job in scheduled}
    async with own_servers(rng) as servers, open_database(servers.postgres.url) as db:
        env = worker_env(folder, 1) | {
            "REDIS_URL": servers.redis.url,
            "DATABASE_URL": servers.postgres.url,
            "BULLMQ_PREFIX": PREFIX,
            "TASKS_CONFIG": "chaos.cancelling_tasks:tasks",
            FOLDER_VARIABLE: str(folder),
        }
        (folder / "worker").mkdir()
        worker = WorkerProcess(["start"], env, folder / "worker")
        try:
            async with Node(5, servers.redis.url, PREFIX) as node:
                for queue, scheduled in jobs.items():
                    await db.insert_tasks(queue, {job.task_id: {} for job in scheduled})
                    await node.schedule_all(queue, scheduled)
            cancelled = await cancel_all(db, folder, queues.keys(), rng)
            await until(lambda: read(folder, "told").keys() == queues.keys(), LIMIT_S)
            worker.terminate()
            await worker.wait()
        finally:
            worker.close()
        told = read(folder, "told")
        took = {
            queue: sorted(told[job.task_id] - cancelled[job.task_id] for job in scheduled)
            for queue, scheduled in jobs.items()
        }
        return took, await differences(servers, db, queues)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--seed", type=int, help="Draws the moments. [default: a new one]")
def main(seed: int | None) -> None:
    """Cancel running tasks of each kind, and measure how soon their handlers hear of it."""
    seed = random.randrange(10**6) if seed is None else seed
    print(f"seed {seed}", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    took, different = asyncio.run(run(folder, seed))
    shutil.rmtree(folder)
    for queue, seconds in took.items():
        middle = seconds[len(seconds) // 2]
        print(f"{queue}: told after {middle:.2f} s in the median, {seconds[-1]:.2f} s at most")
    print(f"{len(different)} tasks differ between the stores: {different[:5]}")
    if different or max(seconds[-1] for seconds in took.values()) > BAR_S:
        sys.exit(f"not all were told within {BAR_S:g} s, or the stores differ")


if __name__ == "__main__":
    main()
