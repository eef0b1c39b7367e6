"""Worker processes, as the supervisor and `dev` start, watch and end them.

A child is executed, not forked. It leads a process group of its own, so that the terminal's Ctrl-C
reaches it once, by its parent. Otherwise it would take two signals, and hand running jobs back at
once.
"""

import asyncio
import os
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Final, Self

import structlog

from autoflow_worker.process.signals import SAME_WITHIN
from autoflow_worker.process.supervised import Report

log = structlog.get_logger(__name__)

KILL_AFTER: Final = 4.0
"""Seconds past the grace after which a child that has not ended is killed."""

SIGNAL_LATENCY: Final = 0.5
"""Seconds by which a child may notice its first signal late."""


class Child:
    """One worker process; `Children` makes it.

    Attributes:
        pid: its process id, and its group's.
        ready: done once it takes jobs.
        worn: done once it asks for a fresh process in its place.
        ended: its exit code in the end; negative: the number of the signal that ended it.
    """

    def __init__(self, command: Sequence[str], env: Mapping[str, str]) -> None:
        self._loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[None] = self._loop.create_future()
        self.worn: asyncio.Future[None] = self._loop.create_future()
        self.ended: asyncio.Future[int] = self._loop.create_future()
        self._told_at: float | None = None
        self._socket, theirs = socket.socketpair()
        self._socket.setblocking(False)
        with theirs:
            try:
                # Its stdin is the socket of `Supervision`.
                self._process = subprocess.Popen(
                    command, env=env, stdin=theirs.fileno(), process_group=0
                )
            except OSError:
                self._socket.close()
                raise
        self.pid = self._process.pid
        self._loop.add_reader(self._socket, self._read)

    @property
    def is_over(self) -> bool:
        """Whether it has ended."""
        return self.ended.done()

    @property
    def exit_code(self) -> int:
        """Its exit code after the end; 1 if a signal ended it."""
        code = self.ended.result()
        if code == -signal.SIGTERM and not self.ready.done():
            return 0  # It was stopped before it could handle the signal.
        return code if code >= 0 else 1

    def send(self, number: signal.Signals) -> None:
        """Send it a signal, if it has not ended."""
        if not self.is_over:
            self._process.send_signal(number)

    async def end(self, abort: asyncio.Event, grace: float) -> int:
        """Stop it, and kill its group at the deadline; return its exit code.

        A later call waits for the deadline of the first.

        Args:
            abort: passes a second signal on, by which it hands its jobs back at once.
            grace: seconds that it may take for its jobs.
        """
        if self._told_at is None:
            self._told_at = self._loop.time()
            self.send(signal.SIGTERM)
        aborted = asyncio.create_task(abort.wait())
        try:
            await self._over_by(self._told_at + grace + KILL_AFTER, aborted)
            if aborted.done() and not self.is_over:
                # It counts a signal that follows sooner as the first one repeated.
                await self._over_by(self._told_at + SAME_WITHIN + SIGNAL_LATENCY)
                self.send(signal.SIGTERM)
                await self._over_by(self._loop.time() + KILL_AFTER)
        finally:
            aborted.cancel()
        if not self.is_over:
            log.error("process_killed", pid=self.pid, reason="it did not end at its deadline")
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            await asyncio.wait({self.ended})
        return self.exit_code

    async def _over_by(self, deadline: float, *others: asyncio.Future[Any]) -> None:
        left = max(0.0, deadline - self._loop.time())
        waits: set[asyncio.Future[Any]] = {self.ended, *others}
        await asyncio.wait(waits, timeout=left, return_when=asyncio.FIRST_COMPLETED)

    def look(self) -> None:
        """Notice its end."""
        code = self._process.poll()
        if code is None or self.is_over:
            return
        self._read()
        self._loop.remove_reader(self._socket)
        self._socket.close()
        self.ended.set_result(code)

    def _read(self) -> None:
        try:
            told = self._socket.recv(64)
        except BlockingIOError:
            return
        except OSError:
            told = b""
        if not told:
            self._loop.remove_reader(self._socket)
        for report, future in ((Report.READY, self.ready), (Report.WORN, self.worn)):
            if report.value in told and not future.done():
                future.set_result(None)


class Children:
    """The worker processes of this process, which sees their ends between `with` and its end.

    As process 1, it also reaps the processes whose parents have ended.

    Args:
        command: what each of them executes.
        env: their environment.

    Attributes:
        living: those that have not ended.
    """

    def __init__(self, command: Sequence[str], env: Mapping[str, str]) -> None:
        self._command = command
        self._env = env
        self.living: set[Child] = set()

    def start(self, *options: str) -> Child:
        """Start one more, with these options beside the command's.

        Raises:
            OSError: the machine has no memory or no process left.
        """
        child = Child([*self._command, *options], self._env)
        self.living.add(child)
        child.ended.add_done_callback(lambda _: self.living.discard(child))
        return child

    def __enter__(self) -> Self:
        asyncio.get_running_loop().add_signal_handler(signal.SIGCHLD, self._look)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.get_running_loop().remove_signal_handler(signal.SIGCHLD)

    def _look(self) -> None:
        for child in self.living:
            child.look()
        if os.getpid() == 1:
            self._reap_strangers()

    def _reap_strangers(self) -> None:
        own = {child.pid: child for child in self.living}
        with suppress(ChildProcessError):
            # WNOWAIT: look first, as the exit code of a child is the child's to take.
            while found := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                if found.si_pid in own:
                    own[found.si_pid].look()
                else:
                    os.waitpid(found.si_pid, 0)
                    log.debug("orphan_reaped", pid=found.si_pid)
