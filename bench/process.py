"""Start, measure and kill a contestant's process."""

import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

ROOT = Path(__file__).parents[1]

# Kills the process when this one is killed.
_REAPER = 'read -r _ || kill -KILL "$1" 2>/dev/null'


class Measured:
    """A contestant's process; a context manager that kills it.

    Attributes:
        started_at: `time.perf_counter()` just before it was started.
    """

    def __init__(self, command: Sequence[str], env: Mapping[str, str]) -> None:
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - closed in __exit__
        self.started_at = time.perf_counter()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=self._output,
            cwd=ROOT,
            env=dict(env),
        )
        self._reaper = subprocess.Popen(
            ["/bin/sh", "-c", _REAPER, "sh", str(self._process.pid)],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        self._view = psutil.Process(self._process.pid)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        own = self._view.children(recursive=True)
        for process in (self._view, *own):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()
        psutil.wait_procs(own)
        self._reaper.communicate(b"\n")
        self._output.close()

    def check(self) -> None:
        """Raise if the process has ended by itself."""
        if self._process.poll() is not None:
            self._output.seek(0)
            tail = self._output.read().decode(errors="replace")[-2000:]
            raise RuntimeError(f"a contestant ended with {self._process.returncode}:\n{tail}")

    def cpu_seconds(self) -> float:
        return cpu_seconds(self._view)

    def resident_mb(self) -> float:
        return float(self._view.memory_info().rss) / 1e6


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)
