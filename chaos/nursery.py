"""Workers that live for a moment, forked from a process that has imported their libraries.

Starting Python and importing everything takes a worker most of a second of CPU time, which is too
long for a worker that is killed a moment later. The forked child imports the worker's own modules,
because these read the environment that the child gets.
"""

import asyncio
import gc
import importlib
import json
import os
import select
import signal
import sys
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self

LIBRARIES = (
    "bullmq",
    "click",
    "hiredis",
    "orjson",
    "psycopg",
    "pydantic",
    "pydantic_settings",
    "redis.asyncio",
    "structlog",
    "uvloop",
)
POLL = 0.02
"""Seconds between two looks for children that have ended."""


class Worker:
    """A forked `autoflow-worker start`.

    Attributes:
        exit_code: negative for the signal that ended it.
    """

    def __init__(self, pid: int, output: Path) -> None:
        self.pid = pid
        self.output = output
        self.exit_code: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def terminate(self) -> None:
        if not self.exit_code.done():
            os.kill(self.pid, signal.SIGTERM)


class Nursery:
    """Forks workers. At the end of its block it kills those that still run.

    Args:
        folder: for the workers' output.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ordered: deque[tuple[Path, asyncio.Future[Worker]]] = deque()
        self._workers: dict[int, Worker] = {}
        self._count = 0

    async def __aenter__(self) -> Self:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "chaos.nursery",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            cwd=Path(__file__).parents[1],
            start_new_session=True,
        )
        self._reader = asyncio.create_task(self._read())
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        await self._process.wait()
        await self._reader

    async def start(self, env: Mapping[str, str]) -> Worker:
        """Fork a worker with these environment variables in addition to our own."""
        self._count += 1
        output = self._folder / f"worker-{self._count}"
        worker: asyncio.Future[Worker] = asyncio.get_running_loop().create_future()
        self._ordered.append((output, worker))
        assert self._process.stdin is not None
        order = {"env": dict(env), "output": str(output)}
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        return await worker

    async def _read(self) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            what, pid, *status = json.loads(line)
            if what == "started":
                output, worker = self._ordered.popleft()
                self._workers[pid] = Worker(pid, output)
                worker.set_result(self._workers[pid])
            else:
                self._workers.pop(pid).exit_code.set_result(os.waitstatus_to_exitcode(*status))


def main() -> None:
    """Fork a worker for each line of stdin; at its end, kill the workers that are left."""
    for name in LIBRARIES:
        importlib.import_module(name)
    gc.freeze()
    children: set[int] = set()
    orders = b""
    while True:
        if select.select([0], [], [], POLL)[0]:
            data = os.read(0, 65536)
            if not data:
                break
            *lines, orders = (orders + data).split(b"\n")
            for line in lines:
                pid = _fork(json.loads(line))
                children.add(pid)
                _say("started", pid)
        while children and (ended := os.waitpid(-1, os.WNOHANG))[0]:
            children.discard(ended[0])
            _say("ended", *ended)
    for pid in children:
        os.kill(pid, signal.SIGKILL)


def _say(*words: object) -> None:
    os.write(1, json.dumps(words).encode() + b"\n")


def _fork(order: Mapping[str, str]) -> int:
    pid = os.fork()
    if pid == 0:
        _become_worker(order)
    return pid


def _become_worker(order: Mapping[str, str]) -> NoReturn:
    output = os.open(order["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(order["env"])  # type: ignore[arg-type]
    # Only now, as these modules read the environment.
    from autoflow_worker.cli import main as run  # noqa: PLC0415
    from chaos import crash_points  # noqa: PLC0415

    if spec := os.environ.get(crash_points.VARIABLE):
        crash_points.arm(spec)
    run(["start"])


if __name__ == "__main__":
    main()
