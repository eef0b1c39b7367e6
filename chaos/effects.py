"""A record of what the handlers did: a line for each start and each end, a file per process.

A line is one `write` to a file opened with O_APPEND, so it is there, whole, whatever happens to
the process afterwards.
"""

import asyncio
import json
import os
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from autoflow_worker import TaskContext

FOLDER_VARIABLE = "CHAOS_EFFECTS"

Key = tuple[str, str]
"""A job: its queue and its id."""


@dataclass
class Run:
    """One run of a handler.

    Attributes:
        worker: the pid of the worker process.
        pid: of the process in which it ran: the worker, or a child of it.
        ended_at: None if it never ended, as its process was killed.
        how: "returned", "raised" or "cancelled"; empty without an end.
    """

    id: str
    queue: str
    job_id: str
    attempt: int
    worker: int
    pid: int
    started_at: float
    ended_at: float | None = None
    how: str = ""

    @property
    def key(self) -> Key:
        return self.queue, self.job_id

    @property
    def in_child(self) -> bool:
        """Whether it ran in a child process of the worker."""
        return self.pid != self.worker

    def __str__(self) -> str:
        end = f"{self.how} {self.ended_at:.3f}" if self.ended_at else "no end"
        where = f"{self.worker}'s child {self.pid}" if self.in_child else str(self.pid)
        return f"attempt {self.attempt} in {where}: started {self.started_at:.3f}, {end}"


class EffectLog:
    """A process's own file.

    Args:
        worker: the pid of the worker that this process is, or is a child of.
    """

    def __init__(self, folder: Path, worker: int) -> None:
        self._worker = worker
        path = folder / f"{os.getpid()}-{uuid4().hex}"
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    @contextmanager
    def run(self, context: TaskContext) -> Iterator[str]:
        """Log the start and the end of the block; yield the run's unique id."""
        run_id = uuid4().hex
        job = (context.queue_name, context.task_id, context.attempt)
        self._write("start", run_id, *job, self._worker, os.getpid())
        how = "raised"
        try:
            yield run_id
            how = "returned"
        except asyncio.CancelledError:
            how = "cancelled"
            raise
        finally:
            self._write("end", run_id, how)

    def _write(self, *fields: object) -> None:
        os.write(self._file, json.dumps([*fields, time.time()]).encode() + b"\n")


def read_runs(folder: Path) -> dict[Key, list[Run]]:
    """Return every run of every job so far, the earliest first."""
    runs: dict[str, Run] = {}
    for path in folder.iterdir():
        for line in path.read_text().splitlines():
            what, run_id, *fields = json.loads(line)
            if what == "start":
                runs[run_id] = Run(run_id, *fields)
            else:
                runs[run_id].how, runs[run_id].ended_at = fields
    by_job: dict[Key, list[Run]] = defaultdict(list)
    for run in sorted(runs.values(), key=lambda run: run.started_at):
        by_job[run.key].append(run)
    return by_job
