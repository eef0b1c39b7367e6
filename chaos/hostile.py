"""`python -m chaos.hostile`: one job in a hundred is hostile, and the others are not late.

Several rounds of the same jobs, each once without and once with hostile ones among them. Every job
has to end in both stores with equal content; how late the others' statuses are is printed side by
side: of a start, from the claim to the handler's first line; of an outcome, from the handler's end
to BullMQ's acknowledgement, with the row's commit in between.
"""

import asyncio
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import cycle
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import click
from redis.asyncio import Redis
from rich.console import Console
from rich.table import Table

from chaos.hostile_tasks import FAILING, OUTPUTS, QUEUE, SECRET
from chaos.servers import Servers, own_servers
from chaos.workers import worker_env
from chaos.workload import KEEP_ALL
from tests.support.agreement import BullJob, bull_jobs, differences
from tests.support.database import Connection, Database, new_task_id
from tests.support.node import Node, Scheduled
from tests.support.process import WorkerProcess
from tests.support.row import TaskRow
from tests.support.until import until

PREFIX = "chaos"
RUN_MS = 40
ONE_IN = 100
PATIENCE = 200.0

Row = Mapping[str, Any]

# What a producer, or a person by mistake, may leave in a job's hash.
POISON: dict[str, dict[Any, Any]] = {
    "data cut off": {"data": '{"n": 1'},
    "data is an array": {"data": "[]"},
    "data of 100,000 levels": {"data": '{"a":' * 100_000 + "1" + "}" * 100_000},
    "options cut off": {"opts": "{"},
    "attempts is a text": {"opts": '{"attempts": "3"}'},
    "parent is a number": {"parent": "5", "parentKey": "p"},
    "payload of a wrong type": {"data": '{"n": "x", "run_ms": [], "correlationId": 7}'},
}
ODD_ID = "an odd id ☃ / * {}"
CASES = (*OUTPUTS, *FAILING, *POISON, ODD_ID)


@dataclass
class Round:
    """The results of one run of the jobs.

    Attributes:
        starts_ms, ends_ms: delays of the statuses of jobs that are not hostile.
        seconds: from the worker's start to the last job's end.
        faults: jobs that did not end as they have to, or not in both stores.
    """

    hostile: int
    starts_ms: list[float] = field(default_factory=list)
    ends_ms: list[float] = field(default_factory=list)
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)


async def run_round(
    servers: Servers, node: Node, count: int, kinds: Sequence[str], folder: Path
) -> Round:
    """Run the jobs once, on empty stores."""
    async with (
        Redis.from_url(servers.redis.url, decode_responses=True) as redis,
        await Connection.connect(servers.postgres.url, autocommit=True) as connection,
    ):
        await redis.flushall()
        await connection.execute("TRUNCATE tasks")
        database = Database(servers.postgres.url, connection)
        jobs, cases = draw(count, kinds)
        await database.insert_tasks(QUEUE, {job.task_id: job.payload for job in jobs})
        await node.schedule_all(QUEUE, jobs)
        for task_id, case in cases.items():
            if case in POISON:
                await redis.hset(f"{PREFIX}:{QUEUE}:{task_id}", mapping=POISON[case])
        result = Round(len(cases))
        began = time.monotonic()
        output = await run_worker(servers, redis, count, folder, result)
        result.seconds = time.monotonic() - began
        if SECRET in output:
            result.faults.append("a password is in the worker's output")
        compare(result, await database.rows(), await bull_jobs(redis, PREFIX, QUEUE), cases)
        return result


def draw(count: int, kinds: Sequence[str]) -> tuple[list[Scheduled], dict[str, str]]:
    """Return the jobs, and the kind of each hostile one; without kinds none is hostile."""
    turns = cycle(kinds)
    jobs, cases = [], {}
    for n in range(count):
        payload: dict[str, Any] = {"n": n, "run_ms": RUN_MS}
        task_id = new_task_id()
        if kinds and n % ONE_IN == ONE_IN // 2:
            case = next(turns)
            task_id = f"{ODD_ID} {n}" if case == ODD_ID else task_id
            cases[task_id] = case
            payload |= {"case": case} if case in OUTPUTS or case in FAILING else {}
        jobs.append(Scheduled(payload, task_id, attempts=1, opts=KEEP_ALL))
    return jobs, cases


async def run_worker(
    servers: Servers, redis: Redis, count: int, folder: Path, result: Round
) -> str:
    """Run a worker until every job has ended; return its output."""
    env = worker_env(folder, 25) | {
        "REDIS_URL": servers.redis.url,
        "DATABASE_URL": servers.postgres.url,
        "BULLMQ_PREFIX": PREFIX,
        "TASKS_CONFIG": "chaos.hostile_tasks:tasks",
        "LOG_LEVEL": "warning",
    }
    worker = WorkerProcess(["start"], env, folder)

    async def ended() -> bool:
        counts = [
            await redis.zcard(f"{PREFIX}:{QUEUE}:{state}") for state in ("completed", "failed")
        ]
        return sum(counts) == count or not worker.running

    try:
        await until(ended, PATIENCE)
        worker.terminate()
        if code := await worker.wait():
            result.faults.append(f"the worker ended with {code}{worker.report()}")
    except AssertionError as error:
        result.faults.append(f"not all jobs have ended: {error}{worker.report()}")
    finally:
        worker.close()
    return worker.stdout + worker.stderr


def compare(
    result: Round, rows: Mapping[str, Row], jobs: Mapping[str, BullJob], cases: Mapping[str, str]
) -> None:
    """Note the faults, and how late the statuses of the other jobs are."""
    for fault in differences(rows, jobs):
        case = cases.get(fault.split(":")[0], "not hostile")
        result.faults.append(f"{case}, {fault}")
    for task_id, row in rows.items():
        case = cases.get(task_id, "")
        wanted = "failed" if case in FAILING or case in POISON else "completed"
        if row["status"] != wanted:
            result.faults.append(f"{task_id}, {case}: {row['status']} {str(row['error'])[:500]}")
        if SECRET in json.dumps(row):
            result.faults.append(f"{task_id}: a password is in its row")
        TaskRow.model_validate(row)
        if not case and row["status"] == "completed":
            result.starts_ms.append(row["result"]["output"]["beganMs"] - _ms(row["startedAt"]))
            finished = int(jobs[task_id].fields["finishedOn"])
            result.ends_ms.append(finished - _ms(row["completedAt"]))


def _ms(date: str) -> float:
    return datetime.fromisoformat(date).timestamp() * 1000


async def measure(count: int, rounds: int, kinds: Sequence[str], folder: Path) -> list[Round]:
    """Run the jobs without and with hostile ones, in turns."""
    results = []
    async with (
        own_servers(random.Random(), appendonly=False) as servers,
        Node(5, servers.redis.url, PREFIX) as node,
    ):
        for number in range(2 * rounds):
            place = folder / f"round-{number + 1}"
            place.mkdir()
            hostile = kinds if number % 2 else ()
            results.append(await run_round(servers, node, count, hostile, place))
            print(".", end="", flush=True)
    print()
    return results


def print_table(results: Sequence[Round], count: int) -> None:
    """Print each round, and the medians of those without and with hostile jobs."""
    table = Table(
        title=f"{count} jobs; delays of the statuses of those that are not hostile, in ms"
    )
    table.add_column("round")
    headings = ("start p50", "p99", "max", "outcome p50", "p99", "max", "jobs/s", "faults")
    for heading in headings:
        table.add_column(heading, justify="right")
    for number, result in enumerate(results, 1):
        name = f"{number}, {result.hostile} hostile" if result.hostile else f"{number}, none"
        table.add_row(
            name,
            *(f"{value:.0f}" for value in _figures(result, count)),
            str(len(result.faults)),
            end_section=number == len(results),
        )
    for name, some in (
        ("median without", [r for r in results if not r.hostile]),
        ("median with", [r for r in results if r.hostile]),
    ):
        columns = zip(*(_figures(result, count) for result in some), strict=True)
        table.add_row(name, *(f"{median(column):.0f}" for column in columns), "")
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    for result in results:
        for fault in result.faults[:10]:
            console.print(fault[:3000], markup=False)


def _figures(result: Round, count: int) -> list[float]:
    figures: list[float] = []
    for delays in (result.starts_ms, result.ends_ms):
        percentiles = quantiles(delays, n=100)
        figures += [percentiles[49], percentiles[98], max(delays)]
    return [*figures, count / result.seconds]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--jobs", default=5000, show_default=True)
@click.option("--rounds", default=3, show_default=True, help="Each without and with hostile jobs.")
@click.option("--case", "cases", multiple=True, type=click.Choice(CASES), help="[default: all]")
def main(jobs: int, rounds: int, cases: tuple[str, ...]) -> None:
    """Run hostile jobs among others; the exit code is 0 if every job ends as it has to."""
    folder = Path(tempfile.mkdtemp(prefix="hostile-"))
    results = asyncio.run(measure(jobs, rounds, cases or CASES, folder))
    print_table(results, jobs)
    if any(result.faults for result in results):
        print(f"the workers' output: {folder}")
        sys.exit(1)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
