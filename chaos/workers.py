"""The worker processes: started, broken, and started again."""

import asyncio
import os
import random
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from chaos.effects import FOLDER_VARIABLE
from chaos.tasks import CHILD
from tests.support.process import WorkerProcess
from tests.support.until import until

ROOT = Path(__file__).parents[1]
Span = tuple[float, float]

LIFETIME = 3600.0
"""Seconds; no run takes as long."""

CHILD_PATIENCE = 10.0
"""Seconds after the last worker's end in which each child process of a worker has to be gone."""


@dataclass
class Life:
    """One worker process, from its start to its end.

    Attributes:
        killed_at, terminated_at: epoch seconds; None if that did not happen.
        stops: when it stood still, by SIGSTOP.
        in_use: something is being done to it.
        handed_back, left_behind: what its log says: jobs, and queues whose jobs it could not
            hand back in time.
    """

    process: WorkerProcess
    started_at: float = field(default_factory=time.time)
    ready: bool = False
    killed_at: float | None = None
    terminated_at: float | None = None
    ended_at: float | None = None
    exit_code: int | None = None
    stops: list[Span] = field(default_factory=list)
    in_use: bool = False
    handed_back: set[str] = field(default_factory=set)
    left_behind: set[str] = field(default_factory=set)

    @property
    def pid(self) -> int:
        return self.process.pid

    def __str__(self) -> str:
        parts = [f"worker {self.pid}: started {self.started_at:.3f}"]
        parts += [f"stopped {start:.3f} to {end:.3f}" for start, end in self.stops]
        for what in ("terminated", "killed", "ended"):
            if moment := getattr(self, f"{what}_at"):
                parts.append(f"{what} {moment:.3f}")
        return ", ".join(parts) + f", exit code {self.exit_code}"


class Crew:
    """Some worker processes; one that ends is replaced.

    Args:
        seats: how many run at once.
        folder: for their output and their effects.
        env: their settings.
        grace: seconds, their WORKER_SHUTDOWN_GRACE.
        rng: for the pauses before a start.
    """

    def __init__(
        self, seats: int, folder: Path, env: Mapping[str, str], grace: float, rng: random.Random
    ) -> None:
        self._seats = seats
        self._folder = folder
        self.effects = folder / "effects"
        self.effects.mkdir()
        self._env = worker_env(self.effects, grace) | dict(env)
        self._grace = grace
        self._rng = rng
        self._closing = False
        self._keepers: list[asyncio.Task[None]] = []
        self.lives: list[Life] = []
        self.faults: list[str] = []
        self.slowest_exit = 0.0

    def start(self) -> None:
        self._keepers = [asyncio.create_task(self._keep_seat()) for _ in range(self._seats)]

    def check(self) -> None:
        """Raise what ended a keeper of a seat."""
        for keeper in self._keepers:
            if keeper.done():
                keeper.result()

    async def _keep_seat(self) -> None:
        while not self._closing:
            life = self._start_one()
            await self._until_ready(life)
            await life.process.wait(LIFETIME)
            self._note_end(life)
            await asyncio.sleep(self._rng.uniform(0, 0.3))

    def _start_one(self) -> Life:
        folder = self._folder / f"worker-{len(self.lives) + 1}"
        folder.mkdir()
        life = Life(WorkerProcess(["start"], self._env, folder))
        self.lives.append(life)
        return life

    async def _until_ready(self, life: Life) -> None:
        def ready() -> bool:
            return not life.process.running or bool(life.process.logged("worker_started"))

        await until(ready, 60, message=life.process.report)
        life.ready = True

    def _note_end(self, life: Life) -> None:
        life.ended_at = time.time()
        life.exit_code = life.process.process.returncode
        for entry in life.process.logs:
            if entry.get("event") == "job_handed_back":
                life.handed_back.add(entry["task_id"])
            elif entry.get("event") == "jobs_not_handed_back":
                life.left_behind.add(entry["queue"])
            elif entry.get("event") == "attempt_broken":
                self.faults.append(f"{life}: {entry}")
        wanted = {-signal.SIGKILL} if life.killed_at else {0, 4} if life.terminated_at else set()
        if life.exit_code not in wanted:
            self.faults.append(f"{life}: its exit code is none of {wanted}{life.process.report()}")
        life.process.close()

    async def pick(self) -> Life:
        """Return a worker that works and is not in use, and mark it as in use."""
        while True:
            able = [x for x in self.lives if x.ready and not x.in_use and x.process.running]
            if able:
                life = self._rng.choice(able)
                life.in_use = True
                return life
            await asyncio.sleep(0.02)

    async def kill(self) -> None:
        """SIGKILL a worker."""
        life = await self.pick()
        life.killed_at = time.time()
        life.process.kill()

    async def terminate(self) -> None:
        """SIGTERM a worker; it has to end in time."""
        await self._terminate(await self.pick())

    async def _terminate(self, life: Life) -> None:
        if not life.process.running:
            return
        limit = self._grace + 2
        life.terminated_at = time.time()
        life.process.terminate()
        try:
            await until(lambda: not life.process.running, limit)
        except AssertionError:
            self.faults.append(f"{life}: not out within {limit} s{life.process.report()}")
            life.killed_at = time.time()
            life.process.kill()
        self.slowest_exit = max(self.slowest_exit, time.time() - life.terminated_at)

    async def stop_and_continue(self, seconds: float) -> None:
        """Let a worker stand still for a while."""
        life = await self.pick()
        began = time.time()
        life.process.send(signal.SIGSTOP)
        try:
            await asyncio.sleep(seconds)
        finally:
            life.process.send(signal.SIGCONT)
            life.stops.append((began, time.time()))
            life.in_use = False

    async def close(self) -> None:
        """Terminate every worker, and wait for their ends, and for those of their children."""
        self._closing = True
        alive = [life for life in self.lives if life.process.running]
        await asyncio.gather(*(self._terminate(life) for life in alive))
        await asyncio.gather(*self._keepers)
        try:
            await until(lambda: not children_left(self.effects), CHILD_PATIENCE)
        except AssertionError:
            for child in children_left(self.effects):
                self.faults.append(f"a child outlived its worker: {child}")
                child.kill()

    def destroy(self) -> None:
        """Kill the workers that are left."""
        for keeper in self._keepers:
            keeper.cancel()
        for life in self.lives:
            if life.ended_at is None:
                life.process.close()


def children_left(effects: Path) -> list[psutil.Process]:
    """Return the child processes of all workers that ever wrote into this folder."""
    return [process for process in psutil.process_iter() if _is_child(process, effects)]


def _is_child(process: psutil.Process, effects: Path) -> bool:
    try:
        if CHILD not in process.cmdline():
            return False
        return process.environ().get(FOLDER_VARIABLE) == str(effects)
    except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
        return False


def worker_env(effects: Path, grace: float) -> dict[str, str]:
    """The environment of a worker that runs `chaos.tasks`."""
    return {
        **os.environ,
        # The worker of this very tree, whatever else may be installed.
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")]),
        "TASKS_CONFIG": "chaos.tasks:tasks",
        "WORKER_SHUTDOWN_GRACE": str(grace),
        "LOG_FORMAT": "json",
        "LOG_LEVEL": "info",
        FOLDER_VARIABLE: str(effects),
    }
