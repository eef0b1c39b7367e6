"""A process of handlers: `python -m autoflow_worker.worker.child DESCRIPTOR`.

The handler has the main thread, so a signal can interrupt it. A thread reads the worker's frames.
An event loop runs between the jobs and, for an `async def`, during them.
"""

import asyncio
import contextvars
import ctypes
import faulthandler
import gc
import inspect
import io
import json
import os
import resource
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, cast

from autoflow_worker.encoding.results import encoded
from autoflow_worker.logs.attempt_fields import running_attempt
from autoflow_worker.logs.configure import configure_logging
from autoflow_worker.process.event_loop import new_event_loop
from autoflow_worker.process.forks import Forked, end_of_child, guard_forks
from autoflow_worker.tasks.context import TaskContext
from autoflow_worker.tasks.definition import TaskDefinition
from autoflow_worker.tasks.loader import load_tasks
from autoflow_worker.worker.child_attempt import ChildAttempt
from autoflow_worker.worker.child_errors import described
from autoflow_worker.worker.child_link import InterruptedHandlerError, Interrupts, WorkerLink
from autoflow_worker.worker.frames import Frame, Kind
from autoflow_worker.worker.handler import HandlerCancelledError, call_plain, call_within
from autoflow_worker.worker.handler_tasks import contain_tasks
from autoflow_worker.worker.resources import Resources
from autoflow_worker.worker.returned import output_of
from autoflow_worker.worker.threads import HandlerExitError

_PR_SET_PDEATHSIG: Final = 1
LEAVE_PATIENCE: Final = 5.0
"""Seconds that a process which is replaced has to leave its task's lifespan."""

_IGNORED: Final = (
    *(signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT),
    *(signal.SIGUSR2, signal.SIGTSTP),
)
"""A supervisor may signal all processes of a service; when to stop is the worker's decision."""


class Child:
    """Runs the jobs of one task, one after the other, as the worker says."""

    def __init__(
        self,
        task: TaskDefinition[Any],
        link: WorkerLink,
        interrupts: Interrupts,
        loop: asyncio.AbstractEventLoop,
        resources: Resources,
    ) -> None:
        self._task = task
        self._link = link
        self._interrupts = interrupts
        self._loop = loop
        self._inbox: asyncio.Queue[Frame] = asyncio.Queue()
        self._attempt: ChildAttempt | None = None
        self._handler: asyncio.Task[Any] | None = None
        self._to_cancel: int | None = None
        self._is_stopping = False
        self._jobs = 0
        self._resources = resources

    def serve(self) -> float:
        """Run jobs until the worker says QUIT, or until this process is to be replaced.

        Returns:
            Seconds for leaving the task's lifespan.
        """
        threading.Thread(target=self._read, name="frames", daemon=True).start()
        self._link.send(Kind.READY, {})
        is_last = False
        while not is_last:
            frame = self._loop.run_until_complete(self._inbox.get())
            if frame.kind is Kind.QUIT:
                return float(frame.head["patience"])
            is_last = self._run(frame)
        return LEAVE_PATIENCE

    # -- in the thread that reads -----------------------------------------------------------------

    def _read(self) -> None:
        while True:
            frame = self._link.receive()
            if frame.kind is Kind.CANCEL:
                self._cancel(**frame.head)
            elif frame.kind is Kind.STOP:
                self._is_stopping = True
                if (attempt := self._attempt) is not None:
                    attempt.is_stopping = True
            else:
                self._loop.call_soon_threadsafe(self._inbox.put_nowait, frame)

    def _cancel(self, job: int, is_cancelled: bool) -> None:
        self._to_cancel = job
        attempt = self._attempt  # None: the job waits in the inbox.
        if is_cancelled and attempt is not None and attempt.number == job:
            attempt.cancel()
        self._interrupts.request(job)
        self._loop.call_soon_threadsafe(self._cancel_handler)

    def _cancel_handler(self) -> None:
        attempt, handler = self._attempt, self._handler
        if attempt is not None and attempt.number == self._to_cancel and handler is not None:
            handler.cancel()

    # -- one job ----------------------------------------------------------------------------------

    def _run(self, frame: Frame) -> bool:
        """Run one job, and send its outcome; return whether this process ends with it."""
        head, number = frame.head, frame.head["job"]
        self._attempt = attempt = ChildAttempt(
            number,
            head,
            self._link,
            self._interrupts,
            self._loop,
            resources=self._resources.of(self._task.lifespan),
            is_stopping=self._is_stopping,
        )
        self._link.send(Kind.TAKEN, {"job": number})
        context: TaskContext[Any] = TaskContext(running=attempt, **head["context"])
        kind, outcome, body = Kind.DONE, {}, b""
        began = time.perf_counter()
        try:
            payload = self._task.parse_payload(
                json.loads(frame.body.decode(errors="surrogatepass"))
            )
            value = self._call(payload, context)
            duration_ms = round((time.perf_counter() - began) * 1000)
            output, duration = output_of(value, duration_ms)
            outcome, body = {"duration": duration}, encoded(output)
        except BaseException as error:  # Whatever it is, it is the outcome of this one job.
            if Forked.here:
                end_of_child()
            kind, outcome = Kind.FAILED, described(error)
            outcome["duration"] = round((time.perf_counter() - began) * 1000)
        attempt.flush()
        self._flush_streams()
        self._jobs += 1
        is_last = self._is_worn()
        self._attempt = self._handler = None
        self._link.send(kind, {"job": number, "last": is_last, **outcome}, body)
        return is_last

    def _call(self, payload: Any, context: TaskContext[Any]) -> Any:
        """Call the handler; a `SystemExit` of it is an error like any other."""
        attempt = cast(ChildAttempt, self._attempt)
        try:
            if self._task.is_async:
                return self._await(self._call_async(payload, context), context)
            value = contextvars.copy_context().run(self._call_plain, attempt, payload, context)
            return self._await(value, context) if inspect.isawaitable(value) else value
        except asyncio.CancelledError as error:
            raise HandlerCancelledError("the handler was cancelled from inside") from error
        except (Exception, InterruptedHandlerError):
            raise
        except BaseException as error:
            raise HandlerExitError(error) from error

    def _call_plain(self, attempt: ChildAttempt, payload: Any, context: TaskContext[Any]) -> Any:
        self._interrupts.begin(attempt.number)
        try:
            value = call_plain(self._task, payload, context)
        finally:
            self._interrupts.end()
        if Forked.here:
            end_of_child()
        return value

    def _call_async(self, payload: Any, context: TaskContext[Any]) -> Any:
        task = self._task
        if task.around is None and task.around_async is None:
            return task.handler(payload, context)
        return call_within(task, payload, context)

    def _await(self, awaitable: Any, context: TaskContext[Any]) -> Any:
        async def call() -> Any:
            running_attempt.set(context)
            return await awaitable

        self._handler = self._loop.create_task(call())
        self._cancel_handler()
        return self._loop.run_until_complete(self._handler)

    def _flush_streams(self) -> None:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError, AttributeError):
                stream.flush()

    def _is_worn(self) -> bool:
        """Whether a fresh process is to take the next job."""
        if self._handler is not None and not self._handler.done():
            return True  # A callback that raised SystemExit has ended the loop under it.
        if any(lifespan.done() for lifespan in self._resources.deaths()):
            return True
        options = self._task.options
        most, limit_mb = options.recycle_after_jobs, options.recycle_above_mb
        if most is not None and self._jobs >= most:
            return True
        return limit_mb is not None and resident_bytes() > limit_mb * 1_000_000


class FrameWriter:
    """Sends this process's log lines to the worker."""

    def __init__(self, link: WorkerLink) -> None:
        self._link = link

    def msg(self, line: str) -> None:
        """Send a line; a process that the handler forked prints it."""
        if self._link.is_ours:
            self._link.send(Kind.LINE, {}, line.encode("utf-8", "backslashreplace"))
        elif sys.stderr is not None:
            sys.stderr.write(line + "\n")

    debug = info = warning = error = critical = msg

    def flush(self, timeout: float) -> bool:
        """Return at once: what is sent is sent."""
        del timeout
        return True


def resident_bytes() -> int:
    """Return the memory that this process takes; where that is not known, the most that it took."""
    with suppress(OSError, ValueError, IndexError):
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * resource.getpagesize()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def die_with_parent() -> None:
    """Have the kernel end this process when the worker ends, also if no thread of it runs."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))


def ignore_signals() -> None:
    """Leave all requests to stop to the worker; programs and forks have the defaults again."""
    for number in _IGNORED:
        # Not SIG_IGN, which programs that the handler starts would inherit.
        signal.signal(number, _ignore)
    os.register_at_fork(after_in_child=_restore_signals)


def _ignore(*_: object) -> None:
    pass


def _restore_signals() -> None:
    signal.set_wakeup_fd(-1)
    for number in _IGNORED:
        if signal.getsignal(number) is _ignore:
            signal.signal(number, signal.SIG_DFL)


def main() -> None:
    """Load the task, and serve its jobs."""
    die_with_parent()
    ignore_signals()
    faulthandler.enable()
    for stream in (sys.stdout, sys.stderr):
        # Pipes to the worker, which takes UTF-8, and each line as soon as it is whole.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)
    connection = socket.socket(fileno=int(sys.argv[1]))
    connection.set_inheritable(False)
    interrupts = Interrupts()
    link = WorkerLink(connection, interrupts)
    init = link.receive().head
    configure_logging(init["log_level"], "json", writer=FrameWriter(link))
    sys.path[:] = init["path"]
    loop = new_event_loop()
    asyncio.set_event_loop(loop)
    guard_forks(loop)
    contain_tasks(loop)
    try:
        [task] = load_tasks(init["tasks_config"], [init["queue"]])
        resources = Resources([task.lifespan])
        loop.run_until_complete(resources.open(init["patience"]))
    except BaseException as error:  # User code runs here, and may exit.
        link.send(Kind.INIT_FAILED, described(error))
        sys.exit(1)
    gc.freeze()
    patience = Child(task, link, interrupts, loop, resources).serve()
    loop.run_until_complete(resources.close(patience))


if __name__ == "__main__":
    main()
