"""The worker as a process of its own, which gets real signals."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.support.until import PATIENCE, until

# Kills the process group when the test run dies without having said a word.
_REAPER = 'read -r _ || kill -KILL -- "-$1" 2>/dev/null'


class WorkerProcess:
    """A running `autoflow-worker`.

    Attributes:
        process: the process; its exit code after the end.
        folder: holds what it prints; its parent is the process's working directory.
    """

    def __init__(self, arguments: list[str], env: Mapping[str, str], folder: Path) -> None:
        self.folder = folder
        self._stdout, self._stderr = folder / "stdout", folder / "stderr"
        with self._stdout.open("wb") as out, self._stderr.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "autoflow_worker", *arguments],
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
        """What it has printed so far."""
        return self._stdout.read_text(errors="replace")

    @property
    def stderr(self) -> str:
        """What it has printed to stderr so far."""
        return self._stderr.read_text(errors="replace")

    @property
    def logs(self) -> list[dict[str, Any]]:
        """The log lines so far, from either output; other and unfinished lines are left out."""
        lines = (self.stdout + self.stderr).splitlines()
        return [json.loads(line) for line in lines if line[:1] == "{" and line[-1:] == "}"]

    def logged(self, event: str) -> list[dict[str, Any]]:
        """The log lines of one event so far."""
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
        """The end of what it printed, for a message."""
        return f"\n--- stdout\n{self.stdout[-4000:]}\n--- stderr\n{self.stderr[-4000:]}"

    def close(self) -> None:
        """Kill what is left of it, its children too."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.wait()
        self._reaper.communicate(b"\n")


class WorkerStarter:
    """Starts worker processes; called with a tasks module's text.

    Attributes:
        env: what each process gets on top of this process's own environment.
    """

    def __init__(self, folder: Path, env: Mapping[str, str]) -> None:
        self._folder = folder
        self.env = dict(env)
        self._started: list[WorkerProcess] = []

    def __call__(
        self, tasks: str | None = None, *arguments: str, command: str = "start", **env: str | None
    ) -> WorkerProcess:
        """Start `autoflow-worker COMMAND ARGUMENTS` in a folder with this `tasks_config.py`.

        Args:
            tasks: the module's text, indented as it may be; None leaves what is there.
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
        worker = WorkerProcess([command, *arguments], environment, folder)
        self._started.append(worker)
        return worker

    async def close(self) -> None:
        """Kill what still runs, and say what was printed: pytest shows it if the test failed."""
        for worker in self._started:
            await asyncio.to_thread(worker.close)
            print(worker.report())  # noqa: T201
