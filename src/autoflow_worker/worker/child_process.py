"""One process of handlers, as the worker sees it: started, given jobs, watched, and killed."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final, cast

import orjson
import structlog

from autoflow_worker.encoding.cleaner import MAX_SIZE
from autoflow_worker.encoding.results import EncodedValue
from autoflow_worker.logs.configure import relay_line
from autoflow_worker.tasks.context import TaskContext
from autoflow_worker.worker.child_errors import rebuilt
from autoflow_worker.worker.child_link import LINK_LOST
from autoflow_worker.worker.child_output import ChildOutput
from autoflow_worker.worker.frames import Decoder, Frame, FrameError, Kind, encode
from autoflow_worker.worker.runner import Outcome
from autoflow_worker.worker.time_limit import Wait, end

log = structlog.get_logger(__name__)

_CHILD: Final = "autoflow_worker.worker.child"

MAX_FRAMES: Final = 64
"""Frames of one process that are handled in one turn of the event loop."""

FLOOD_PAUSE: Final = 0.01
"""Seconds for which a process that sent more has to wait, so that its neighbours get their turn."""

EXIT_PATIENCE: Final = 10.0
"""Seconds that a process has to exit after its last job."""

LAST_WORDS_PATIENCE: Final = 0.2
"""Seconds between the end of a process and the end of its connection, whichever comes first.

A fork of it may hold the connection open.
"""

LINK_CLOSED: Final = "the handler closed its process's connection to the worker"


class ProcessDiedError(Exception):
    """The process of a handler ended in the middle of a job."""


@dataclass(slots=True, eq=False)
class ChildJob:
    """A job that a process has.

    Attributes:
        is_taken: whether the process has got it.
        outcome: what it came to; None as long as it runs, and if the process ended without it.
        settled: done when the process has nothing more to say of it.
    """

    number: int
    context: TaskContext[Any]
    wait: Wait
    settled: asyncio.Future[None]
    started: float = field(default_factory=time.perf_counter)
    is_taken: bool = False
    outcome: Outcome | None = None

    def settle(self, value: Any, error: BaseException | None, duration_ms: object = None) -> None:
        """Note what it came to."""
        if not self.settled.done():
            if not isinstance(duration_ms, int | float):
                duration_ms = (time.perf_counter() - self.started) * 1000
            self.outcome = Outcome(value, error, round(duration_ms))
            self.leave()

    def ended_by(self, error: BaseException) -> Outcome:
        """Return the outcome of a job that was ended."""
        return Outcome(None, error, round((time.perf_counter() - self.started) * 1000))

    def leave(self) -> None:
        """Note that nothing more comes."""
        if not self.settled.done():
            self.settled.set_result(None)
            end(self.wait.ended, None)


class ChildProcess(asyncio.Protocol):
    """A process of handlers.

    Args:
        init: the head of its first frame.
        environment: all of its variables.

    Attributes:
        ready: done when it takes jobs (None), or when it has ended before (why).
        gone: done when it has ended, and all that it said was read.
        jobs: how many it was given.
        reason: why it has ended.
        init_failed: whether the task list's code raised in it.
    """

    def __init__(self, queue: str, init: Mapping[str, Any], environment: Mapping[str, str]) -> None:
        self._queue = queue
        self._init = dict(init)
        self._environment = environment
        self._loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[str | None] = self._loop.create_future()
        self.gone: asyncio.Future[None] = self._loop.create_future()
        self.jobs = 0
        self.reason = ""
        self.init_failed = False
        self._decoder = Decoder(MAX_SIZE)
        self._job: ChildJob | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._transport: asyncio.Transport | None = None
        self._output: ChildOutput | None = None
        self._is_leaving = False
        self._is_paused = False

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    @property
    def is_usable(self) -> bool:
        """Whether it can take a job."""
        return self._job is None and not (self._is_leaving or self.gone.done())

    @property
    def was_told_to_end(self) -> bool:
        """Whether its end, past or to come, was asked for."""
        return self._is_leaving

    # -- life -------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the process; `ready` says when it takes jobs.

        Raises:
            OSError: the machine gives no process, no memory or no descriptor.
        """
        ours = self._spawn()
        ours.setblocking(False)
        transport, _ = await self._loop.create_connection(lambda: self, sock=ours)
        self._transport = transport
        self._send(Kind.INIT, self._init)

    def _spawn(self) -> socket.socket:
        """Start the process; return this end of its connection."""
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                self._output = output = ChildOutput(self._on_line)
                try:
                    # Not asyncio's own subprocesses: uvloop's run fork hooks in the new process.
                    self._process = subprocess.Popen(
                        # Without -P, files in the working directory would hide Python's modules.
                        [sys.executable, "-P", "-m", _CHILD, str(theirs.fileno())],
                        stdin=subprocess.DEVNULL,
                        stdout=output.descriptor,
                        stderr=output.descriptor,
                        env=self._environment,
                        pass_fds=[theirs.fileno()],
                        process_group=0,
                    )
                except BaseException:
                    output.abandon()
                    raise
                output.read()
                _watch(self._process, self._on_exit)
            except BaseException:
                ours.close()
                raise
        return ours

    def run(
        self, body: bytes, head: dict[str, Any], context: TaskContext[Any], wait: Wait
    ) -> ChildJob:
        """Give it a job."""
        self.jobs += 1
        job = ChildJob(self.jobs, context, wait, self._loop.create_future())
        self._job = job
        fields = {
            "task_id": context.task_id,
            "correlation_id": context.correlation_id,
            "queue_name": context.queue_name,
            "attempt": context.attempt,
            "max_attempts": context.max_attempts,
        }
        self._send(Kind.RUN, {"job": job.number, "context": fields, **head}, body)
        return job

    def cancel(self, job: ChildJob, *, is_cancelled: bool) -> None:
        """Have its handler end; it may go on all the same."""
        self._send(Kind.CANCEL, {"job": job.number, "is_cancelled": is_cancelled})

    def stop(self) -> None:
        """Tell its handler that the worker is stopping."""
        self._send(Kind.STOP, {})

    def quit(self, patience: float) -> None:
        """Have the process exit when it has no job.

        Args:
            patience: seconds for leaving the task's lifespan.
        """
        self._is_leaving = True
        self._send(Kind.QUIT, {"patience": patience})

    def kill(self, reason: str = "") -> None:
        """End the process, and those that it started."""
        self._is_leaving = True
        if self._process is not None and self._process.returncode is None:
            self.reason = self.reason or reason
            _kill_group(self._process.pid)

    def _send(self, kind: Kind, head: dict[str, Any], body: bytes = b"") -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(encode(kind, head, body))

    # -- what it says -----------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Handle what has arrived."""
        self._decoder.feed(data)
        if not self._is_paused:
            self._handle()

    def _handle(self, most: float = MAX_FRAMES) -> None:
        handled = 0
        try:
            while (frame := self._decoder.next()) is not None:
                self._on_frame(frame)
                handled += 1
                if handled >= most:
                    self._pause()
                    return
        except (FrameError, UnicodeDecodeError):
            self.kill("the handler wrote to its process's connection to the worker")

    def _pause(self) -> None:
        self._is_paused = True
        if self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()
        self._loop.call_later(FLOOD_PAUSE, self._go_on)

    def _go_on(self) -> None:
        self._is_paused = False
        if self.gone.done():
            return
        self._handle()
        transport = self._transport
        if not self._is_paused and transport is not None and not transport.is_closing():
            transport.resume_reading()

    def _on_frame(self, frame: Frame) -> None:
        kind, head, body = frame
        if kind is Kind.READY and not self.ready.done():
            self.ready.set_result(None)
        elif kind is Kind.INIT_FAILED:
            self.init_failed = True
            self.reason = str(head.get("reason"))
            log.error("handler_process_failed", queue=self._queue, exception=str(head.get("stack")))
        elif kind is Kind.LINE:
            self._on_log_line(body)
        elif (job := self._job) is not None and head.get("job") == job.number:
            self._on_job_frame(job, kind, head, body)

    def _on_job_frame(self, job: ChildJob, kind: Kind, head: dict[str, Any], body: bytes) -> None:
        if kind is Kind.TAKEN:
            job.is_taken = True
        elif kind is Kind.PROGRESS:
            job.context.progress(EncodedValue(body.decode()))
        elif kind is Kind.LOG:
            job.context.log(body.decode(errors="replace"))
        elif kind in (Kind.DONE, Kind.FAILED):
            if self._output is not None:
                self._output.drain()  # What it printed belongs to this job.
            self._job = None
            if head.get("last"):
                self._is_leaving = True
                self._loop.call_later(EXIT_PATIENCE, self.kill)
            if kind is Kind.DONE:
                job.settle(EncodedValue(body.decode()), None, head.get("duration"))
            else:
                job.settle(None, rebuilt(head), head.get("duration"))

    def _on_log_line(self, body: bytes) -> None:
        with suppress(ValueError):
            line = orjson.loads(body)
            if isinstance(line, dict):
                relay_line(line)

    def _on_line(self, text: str) -> None:
        fields = {"queue": self._queue} if self._job is None else self._job.context.log_fields()
        log.info("handler_output", line=text, pid=self.pid, **fields)

    # -- its end ----------------------------------------------------------------------------------

    def connection_lost(self, exc: Exception | None) -> None:
        """End a process that has closed its connection; hear the last of one that has ended."""
        del exc
        if self._process is not None and self._process.returncode is not None:
            self._finish()
        else:  # A process that ends closes its connection first.
            self._loop.call_later(LAST_WORDS_PATIENCE, self.kill, LINK_CLOSED)

    def _on_exit(self) -> None:
        """Take note that the process has ended; what it said before may still arrive."""
        process = cast("subprocess.Popen[bytes]", self._process)
        _kill_group(process.pid)  # Nobody waits for what it started.
        process.wait()
        if self._transport is None or self._transport.is_closing():
            self._finish()
        else:
            self._loop.call_later(LAST_WORDS_PATIENCE, self._finish)

    def _finish(self) -> None:
        if self.gone.done():
            return
        self._is_paused = False
        self._handle(most=float("inf"))
        if self._output is not None:
            self._output.close()
        if self._transport is not None:
            self._transport.abort()
        code = 0 if self._process is None else self._process.returncode
        self.reason = self.reason or _words(code)
        if not self.ready.done():
            self.ready.set_result(self.reason)
        self.gone.set_result(None)
        job, self._job = self._job, None
        if job is not None and job.is_taken:
            job.settle(None, ProcessDiedError(self.reason))
        elif job is not None:
            job.leave()


def _words(code: int) -> str:
    if code == LINK_LOST:
        return LINK_CLOSED
    if code >= 0:
        return f"the handler's process ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = " (out of memory?)" if -code == signal.SIGKILL else ""
    return f"the handler's process was killed by {name}{hint}"


def _kill_group(pid: int) -> None:
    # PermissionError: macOS has it for a group of zombies.
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _watch(process: "subprocess.Popen[bytes]", on_exit: Callable[[], None]) -> None:
    """Call a function in the event loop when the process has ended."""
    loop = asyncio.get_running_loop()
    try:
        descriptor = os.pidfd_open(process.pid)
    except (AttributeError, OSError):  # not on Linux, or without a descriptor
        _watch_in_thread(process, loop, on_exit)
        return

    def ended() -> None:
        loop.remove_reader(descriptor)
        os.close(descriptor)
        on_exit()

    loop.add_reader(descriptor, ended)


def _watch_in_thread(
    process: "subprocess.Popen[bytes]",
    loop: asyncio.AbstractEventLoop,
    on_exit: Callable[[], None],
) -> None:
    def wait() -> None:
        process.wait()
        with suppress(RuntimeError):  # The loop is closed.
            loop.call_soon_threadsafe(on_exit)

    threading.Thread(target=wait, name=f"process {process.pid}", daemon=True).start()
