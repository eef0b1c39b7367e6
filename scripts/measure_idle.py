"""Measure how fast an idle worker wakes, how late delayed jobs start, and what being idle costs.

    .venv/bin/python -m scripts.measure_idle

This worker and the official `bullmq.Worker` side by side, each a process of its own, on servers
of their own. Takes about two minutes.
"""

import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.resources import files
from pathlib import Path
from typing import Any, Self

import psycopg
from bullmq import Job, Queue, Worker
from redis.asyncio import Redis

from autoflow_worker.local.embedded import EmbeddedPostgres, EmbeddedRedis, running

SPELLS = (1, 7, 13, 26, 60)
"""Seconds of idleness before a job."""

QUEUES = [f"idle-{spell}-{n}" for spell in SPELLS for n in range(3)]
TIMED = "timed"
DELAYED, RETRIED = 300, 200
CONCURRENCY = 50
DRAIN_DELAY = 5.0

TASKS = f"""
    import time
    from autoflow_worker import TaskOptions, define_task

    async def handler(payload, ctx):
        if payload.get("fails") and ctx.attempt == 1:
            raise ValueError
        return time.time() * 1000

    def task(queue, concurrency):
        return define_task(queue, handler, options=TaskOptions(concurrency=concurrency))

    tasks = [*(task(queue, 1) for queue in {QUEUES}), task("{TIMED}", {CONCURRENCY})]
    idle_1, idle_100 = [task("q", 1)], [task("q", 100)]
"""


async def plain(url: str, names: Sequence[str], concurrency: int) -> None:
    """Run official Workers for ever."""

    async def handler(job: Job, _token: str) -> dict[str, float]:
        if job.data.get("fails") and job.attemptsMade == 0:
            raise ValueError
        return {"output": time.time() * 1000}

    workers = [
        Worker(
            name, handler, {"connection": url, "concurrency": concurrency if name == TIMED else 1}
        )
        for name in names
    ]
    await asyncio.gather(*(asyncio.Event().wait() for _ in workers))


class Contestant:
    """A Redis server and a worker on it.

    Args:
        tasks: of this worker the name of the list; None: the official one.
    """

    def __init__(
        self, stack: ExitStack, database_url: str, folder: Path, tasks: str | None
    ) -> None:
        self.url = stack.enter_context(running(EmbeddedRedis()))
        command = ["-m", "autoflow_worker", "start", "--tasks", f"tasks_config:{tasks}"]
        if tasks is None:
            command = ["-m", "scripts.measure_idle", "plain", self.url]
        root = Path(__file__).parents[1]
        env = {"REDIS_URL": self.url, "DATABASE_URL": database_url, "PYTHONPATH": str(root)}
        worker = subprocess.Popen(
            [sys.executable, *command],
            env={**os.environ, **env},
            cwd=folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        stack.callback(worker.wait)
        stack.callback(worker.kill)

    async def __aenter__(self) -> Self:
        self.redis = Redis.from_url(self.url, decode_responses=True)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.redis.aclose()

    async def started_at(self, queue: str, job_id: str, *, allow: float = 60) -> float:
        """Return when the handler started, in epoch ms."""
        deadline = time.monotonic() + allow
        while time.monotonic() < deadline:
            if value := await self.redis.hget(f"bull:{queue}:{job_id}", "returnvalue"):
                return float(json.loads(value)["output"])
            await asyncio.sleep(0.05)
        raise TimeoutError(f"{job_id} of {queue} did not run")

    async def lateness_after(self, queue: str, seconds: float) -> float:
        """Run a job, stay idle, add another; return the ms until its handler starts."""
        producer = Queue(queue, {"connection": self.url})
        await producer.add(queue, {}, {"jobId": "first"})
        await self.started_at(queue, "first")
        await asyncio.sleep(seconds)
        added = time.time() * 1000
        await producer.add(queue, {}, {"jobId": "second"})
        late = await self.started_at(queue, "second") - added
        await producer.close()
        return late

    async def lateness_of_timed(self) -> tuple[list[float], list[float]]:
        """Return how many ms late delayed jobs start, and attempts after a backoff."""
        draw = random.Random(1)
        producer = Queue(TIMED, {"connection": self.url})
        delayed = []
        for n in range(DELAYED):
            delay = draw.randrange(500, 8000)
            job = await producer.add(TIMED, {}, {"jobId": f"delayed-{n}", "delay": delay})
            delayed.append((job.id, job.timestamp + delay))
        late = [await self.started_at(TIMED, name) - due for name, due in delayed]
        for n in range(RETRIED):
            backoff = {"type": "fixed", "delay": draw.randrange(200, 3000)}
            options = {"jobId": f"retried-{n}", "attempts": 2, "backoff": backoff}
            await producer.add(TIMED, {"fails": True}, options)
        due_at = await self._due_times([f"retried-{n}" for n in range(RETRIED)])
        retried = [await self.started_at(TIMED, name) - due for name, due in due_at.items()]
        await producer.close()
        return late, retried

    async def _due_times(self, names: Sequence[str]) -> dict[str, float]:
        """Return when each job is due; only the queue's events still say so afterwards."""
        found: dict[str, float] = {}
        last = "0-1"
        while len(found) < len(names):
            entries: Any = await self.redis.xrange(f"bull:{TIMED}:events", f"({last}")
            for number, event in entries:
                last = number
                if event["event"] == "delayed" and event["jobId"] in names:
                    found[event["jobId"]] = float(event["delay"])
            await asyncio.sleep(0.05)
        return found

    async def until_idle(self) -> None:
        """Wait until the worker's read has timed out, and count commands from then on."""
        while await self._calls("bzpopmin") < 2:  # noqa: ASYNC110 - another process's doing
            await asyncio.sleep(0.1)
        await self.redis.config_resetstat()

    async def commands(self) -> int:
        """Return how many commands the worker has sent, without those that scripts call."""
        return await self._calls("bzpopmin", "evalsha", "client|unblock", "ping")

    async def _calls(self, *names: str) -> int:
        stats: Any = await self.redis.info("commandstats")
        return sum(stats.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in names)


async def measure() -> None:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (folder / "tasks_config.py").write_text(textwrap.dedent(TASKS))
        database_url = stack.enter_context(running(EmbeddedPostgres()))
        with psycopg.connect(database_url) as connection:
            connection.execute(
                files("autoflow_worker.recording").joinpath("schema.sql").read_text()
            )
        ours, official, idle_1, idle_100 = (
            Contestant(stack, database_url, folder, tasks)
            for tasks in ("tasks", None, "idle_1", "idle_100")
        )
        async with ours, official, idle_1, idle_100:
            await asyncio.gather(idle_1.until_idle(), idle_100.until_idle())
            began = time.monotonic()
            rows = await asyncio.gather(_wake(ours), _wake(official))
            counts = [await c.commands() for c in (idle_1, idle_100)]
            spans = (time.monotonic() - began) / DRAIN_DELAY
            print(
                f"\n{'ms from adding a job to its start':48}{'this worker':>16}  {'official':>20}"
            )
            for spell in SPELLS:
                mine, theirs = (", ".join(f"{ms:.0f}" for ms in row[spell]) for row in rows)
                print(f"{f'  after {spell} s of idleness':48}{mine:>16}  {theirs:>20}")
            for contestant, name in ((ours, "this worker"), (official, "official")):
                for kind, late in zip(
                    ("delayed jobs", "retries"), await contestant.lateness_of_timed(), strict=True
                ):
                    ranks = statistics.quantiles(late, n=100)
                    print(
                        f"ms late, {len(late)} {kind}, {name:15}"
                        f"p50 {ranks[49]:8.1f}   p99 {ranks[98]:8.1f}   worst {max(late):8.1f}"
                    )
            for concurrency, count in zip((1, 100), counts, strict=True):
                each = count / spans
                print(f"commands per drainDelay, idle, concurrency {concurrency:3}: {each:.2f}")


async def _wake(contestant: Contestant) -> dict[int, list[float]]:
    late = await asyncio.gather(
        *(contestant.lateness_after(queue, int(queue.split("-")[1])) for queue in QUEUES)
    )
    found: dict[int, list[float]] = {spell: [] for spell in SPELLS}
    for queue, ms in zip(QUEUES, late, strict=True):
        found[int(queue.split("-")[1])].append(ms)
    return found


if __name__ == "__main__":
    if sys.argv[1:2] == ["plain"]:
        asyncio.run(plain(sys.argv[2], [*QUEUES, TIMED], CONCURRENCY))
    else:
        asyncio.run(measure())
