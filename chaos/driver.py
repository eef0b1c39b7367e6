"""One run of chaos: jobs arrive, workers and servers break, all jobs end, and are checked."""

import asyncio
import random
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final, Literal

from redis.asyncio import Redis

from chaos.audit import Audit, audit
from chaos.effects import read_runs
from chaos.queues import left_over
from chaos.servers import POSTGRES, REDIS, Servers, own_servers
from chaos.tasks import LOCK_S, QUEUES
from chaos.workers import Crew
from chaos.workload import PlannedJob, Producer, draw_jobs
from tests.support.node import Node

PREFIX = "chaos"
VERSIONS: Final[tuple[Literal[5, 6], ...]] = (5, 6)


@dataclass(frozen=True)
class Plan:
    """The sizes of a run.

    Attributes:
        seconds: for which things break.
        limit: seconds that the whole run may take, with the start, the end and the checks.
        restarts, suspensions, cuts: of each server.
        grace: seconds, the workers' WORKER_SHUTDOWN_GRACE.
    """

    seed: int
    jobs: int = 5000
    workers: int = 3
    kills: int = 40
    terminations: int = 10
    stops: int = 10
    restarts: int = 5
    suspensions: int = 3
    cuts: int = 5
    seconds: float = 150.0
    limit: float = 360.0
    grace: float = 3.0


@dataclass
class Report:
    """The result of a run; `audit` is None if its jobs did not end in time."""

    plan: Plan
    jobs: Sequence[PlannedJob] = ()
    crew: Crew | None = None
    servers: Servers | None = None
    audit: Audit | None = None
    duration: float = 0.0
    settled_after: float = 0.0
    faults: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return self.audit is not None and not self.faults and not self.audit.faults


async def run(plan: Plan, folder: Path) -> Report:
    """Carry out the plan, within `plan.limit` seconds.

    Args:
        folder: an empty one, for the workers' output and the effects.
    """
    report = Report(plan)
    began = time.monotonic()
    try:
        async with asyncio.timeout(plan.limit):
            await _run(plan, folder, report)
    except TimeoutError:
        report.faults.append(f"not done within {plan.limit:g} s")
    report.duration = time.monotonic() - began
    return report


async def _run(plan: Plan, folder: Path, report: Report) -> None:
    async with AsyncExitStack() as stack:
        servers = await stack.enter_async_context(own_servers(_generator(plan, "servers")))
        env = {"BULLMQ_PREFIX": PREFIX}
        env |= {"REDIS_URL": servers.redis.url, "DATABASE_URL": servers.postgres.url}
        crew = Crew(plan.workers, folder, env, plan.grace, _generator(plan, "workers"))
        stack.callback(crew.destroy)
        nodes = [
            await stack.enter_async_context(Node(version, servers.redis.url, PREFIX, quiet=True))
            for version in VERSIONS
        ]
        jobs = draw_jobs(_generator(plan, "jobs"), plan.jobs)
        producer = Producer(nodes, servers.postgres.url)
        report.servers, report.crew, report.jobs = servers, crew, jobs
        await producer.add_numbered([job for job in jobs if job.numbered])
        crew.start()
        try:
            await _break_things(plan, crew, servers, producer, jobs)
            report.settled_after = await _settle(crew, servers)
        finally:
            report.faults += crew.faults
            report.audit = await audit(jobs, crew, servers, PREFIX)


async def _break_things(
    plan: Plan, crew: Crew, servers: Servers, producer: Producer, jobs: Sequence[PlannedJob]
) -> None:
    added_later = [job for job in jobs if not job.numbered]
    async with asyncio.TaskGroup() as group:
        watching = group.create_task(_watch(crew, len(jobs)))
        breaking = [
            group.create_task(_later(delay, act)) for delay, act in _schedule(plan, crew, servers)
        ]
        await producer.add_all(added_later, _generator(plan, "bursts"), plan.seconds * 0.9)
        await asyncio.wait(breaking)
        watching.cancel()


def _generator(plan: Plan, purpose: str) -> random.Random:
    """Return a generator for one purpose, so that timing does not change what a seed draws."""
    return random.Random(f"{plan.seed} {purpose}")


Act = Callable[[], Awaitable[None]]


def _schedule(plan: Plan, crew: Crew, servers: Servers) -> list[tuple[float, Act]]:
    """Return all acts that break something, each at a random moment."""
    rng = _generator(plan, "schedule")
    acts: list[Act] = [*[crew.kill] * plan.kills, *[crew.terminate] * plan.terminations]
    for number in range(plan.stops):
        # One in three stands still for longer than its locks last.
        lengths = (1.2, 2.0) if number % 3 == 0 else (0.01, 0.4)
        acts.append(partial(crew.stop_and_continue, LOCK_S * rng.uniform(*lengths)))
    for name in (REDIS, POSTGRES):
        acts += [partial(servers.restart, name)] * plan.restarts
        acts += [partial(servers.cut, name)] * plan.cuts
        for _ in range(plan.suspensions):
            acts.append(partial(servers.suspend, name, LOCK_S * rng.uniform(0.02, 1.2)))
    return [(rng.uniform(0.02, 1) * plan.seconds, act) for act in acts]


async def _later(delay: float, act: Act) -> None:
    await asyncio.sleep(delay)
    await act()


async def _watch(crew: Crew, jobs: int) -> None:
    """Print the progress now and then; raise if a worker can't be replaced."""
    began = time.monotonic()
    while True:
        for _ in range(100):
            crew.check()
            await asyncio.sleep(0.1)
        seen = len(read_runs(crew.effects))
        print(
            f"{time.monotonic() - began:4.0f} s: {len(crew.lives)} workers started, "
            f"{seen} of {jobs} jobs have run",
            file=sys.stderr,
            flush=True,
        )


async def _settle(crew: Crew, servers: Servers) -> float:
    """Let all jobs end, then stop the workers; return the seconds that the jobs took."""
    began = time.monotonic()
    async with Redis.from_url(servers.redis.url, decode_responses=True) as client:
        while await left_over(client, PREFIX, QUEUES):
            crew.check()
            await asyncio.sleep(0.2)
    took = time.monotonic() - began
    await crew.close()
    return took
