"""The worker as a process, which receives real signals."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from tests.support.until import PATIENCE, until

# Kills the worker's process group when the test run itself is killed.
_REAPER = 'read -r _ || kill -KILL -- "-$1" 2>/dev/null'


class WorkerProcess:
    """A running `autoflow-worker`.

    Attributes:
        process: the `Popen`, which has the exit code after the end.
        folder: holds the process's output; its parent is the working directory.
    """

    def __init__(
        self,
        arguments: list[str],
        env: Mapping[str, str],
        folder: Path,
        launcher: Sequence[str] = (),
    ) -> None:
        self.folder = folder
        self._stdout, self._stderr = folder / "stdout", folder / "stderr"
        with self._stdout.open("wb") as out, self._stderr.open("wb") as err:
            self.process = subprocess.Popen(
                [*launcher, sys.executable, "-m", "autoflow_worker", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=env,
                cwd=folder.parent,
                start_new_session=True,
            )
        self._reaper = subprocess.Popen(
            ["/bin/sh", "-c", _REAPER, "sh", str(self.process.pid)],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    @property
    def stdout(self) -> str:
        """The stdout so far."""
        return self._stdout.read_text(errors="replace")

    @property
    def stderr(self) -> str:
        """The stderr so far."""
        return self._stderr.read_text(errors="replace")

    @property
    def logs(self) -> list[dict[str, Any]]:
        """The complete log lines so far, of both outputs."""
        lines = (self.stdout + self.stderr).splitlines()
        return [json.loads(line) for line in lines if line[:1] == "{" and line[-1:] == "}"]

    def logged(self, event: str) -> list[dict[str, Any]]:
        """Return the log lines of one event so far."""
        return [entry for entry in self.logs if entry.get("event") == event]

    async def until_logged(self, event: str, timeout: float = PATIENCE) -> dict[str, Any]:
        """Wait for an event in the log and return its first line; fails if the process ends."""

        def seen() -> list[dict[str, Any]]:
            ended = not self.running
            found = self.logged(event)
            assert found or not ended, f"ended with {self.process.returncode}: {self.report()}"
            return found

        found: list[dict[str, Any]] = await until(
            seen, timeout, message=lambda: f"log event {event!r}: {self.report()}"
        )
        return found[0]

    def send(self, sig: signal.Signals) -> None:
        """Send it a signal."""
        self.process.send_signal(sig)

    def terminate(self) -> None:
        self.send(signal.SIGTERM)

    def kill(self) -> None:
        self.send(signal.SIGKILL)

    async def wait(self, timeout: float = PATIENCE) -> int:
        """Wait for its end, and return its exit code (negative: the signal that ended it)."""
        await until(lambda: not self.running, timeout, message=self.report)
        return self.process.returncode

    def report(self) -> str:
        """Return the end of both outputs, for a message."""
        return f"\n--- stdout\n{self.stdout[-4000:]}\n--- stderr\n{self.stderr[-4000:]}"

    def children(self) -> list[psutil.Process]:
        """Return the processes that it has started and that have not ended."""
        return psutil.Process(self.pid).children()

    def close(self) -> None:
        """Kill the process and its children."""
        # Those of a supervisor lead groups of their own.
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.pid).children(recursive=True):
                child.kill()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.wait()
        self._reaper.communicate(b"\n")


class WorkerStarter:
    """Starts worker processes; called with a tasks module's text.

    Attributes:
        env: variables that each process gets beside this process's own.
        launcher: the command that starts each process, as its first words.
    """

    def __init__(self, folder: Path, env: Mapping[str, str]) -> None:
        self._folder = folder
        self.env = dict(env)
        self.launcher: Sequence[str] = ()
        self._started: list[WorkerProcess] = []

    def __call__(
        self, tasks: str | None = None, *arguments: str, command: str = "start", **env: str | None
    ) -> WorkerProcess:
        """Start `autoflow-worker COMMAND ARGUMENTS` in a folder with this `tasks_config.py`.

        Args:
            tasks: the module's text, with any indentation; None keeps the file.
            arguments: more words of the command line.
            command: which command.
            env: environment variables on top of `self.env`; None unsets one.
        """
        if tasks is not None:
            (self._folder / "tasks_config.py").write_text(textwrap.dedent(tasks))
        folder = self._folder / f"worker-{len(self._started) + 1}"
        folder.mkdir()
        merged = {**os.environ, **self.env, **env}
        environment = {key: value for key, value in merged.items() if value is not None}
        worker = WorkerProcess([command, *arguments], environment, folder, self.launcher)
        self._started.append(worker)
        return worker

    async def close(self) -> None:
        """Kill all processes and print their output, which pytest shows if the test failed."""
        for worker in self._started:
            await asyncio.to_thread(worker.close)
            print(worker.report())  # noqa: T201
