"""Several worker processes and their supervisor, which runs no job itself.

Each process is `start` in a place of its own. A place always has one process that works: when that
one ends, is worn or is to restart, another one takes the place.
"""

import asyncio
import signal
import sys
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import structlog

from autoflow_worker.errors import PartDiedError
from autoflow_worker.pauses import Pauses
from autoflow_worker.process.children import Child, Children
from autoflow_worker.process.signals import QUIET, TELL, WAKE, Calls, stop_on_signals
from autoflow_worker.settings import Settings

log = structlog.get_logger(__name__)

FIRST_PAUSE: Final = 0.5
"""Seconds until a process that died is replaced; doubled with each death in its place."""

LONGEST_PAUSE: Final = 30.0

MAX_DEATHS: Final = 5
"""Deaths within `DEATHS_WITHIN` that are made good; one more ends the supervisor."""

DEATHS_WITHIN: Final = 60.0
"""Seconds for which a death counts. A process older than that is replaced after the first pause."""

BETTER_FIRST: Final = (0, 4, 3, 2, 1)
"""Exit codes of processes, from the best to the worst. Any other code counts as 1."""


def supervise(
    settings: Settings, options: Sequence[str], env: Mapping[str, str], *, end_idle: bool
) -> int:
    """Run `worker_processes` worker processes until a signal.

    Args:
        options: the command line of `start` for each of them.
        env: their environment.
        end_idle: whether a process that ends with 0 was idle, and is not replaced.

    Returns:
        The worst exit code of those that ended when they were told to; the exit code of a process
        that ended before it ever worked.

    Raises:
        PartDiedError: processes died too often.
    """
    command = [sys.executable, "-m", "autoflow_worker", "start", "--supervised", *options]

    async def run() -> int:
        with Children(command, env) as children:
            supervisor = Supervisor(children, settings, end_idle=end_idle)
            with stop_on_signals(calls=supervisor.calls) as (stop, abort):
                return await supervisor.run(stop, abort)

    return asyncio.run(run())


def worst(codes: Iterable[int]) -> int:
    """Return the worst of these exit codes, 0 if there is none.

    A death (1) is worse than a refused start (2, 3). That is worse than jobs that were handed back
    (4), and those are worse than a clean end (0).
    """
    known = [code if code in BETTER_FIRST else 1 for code in codes]
    return max(known, key=BETTER_FIRST.index, default=0)


class NeverReadyError(Exception):
    """A process ended before it ever worked, and has said why."""


class Place:
    """One of the places for a process that works."""

    def __init__(self, child: Child) -> None:
        self.child = child
        self.lock = asyncio.Lock()
        self.pauses = Pauses(FIRST_PAUSE, LONGEST_PAUSE)
        self.started_at = time.monotonic()


class Supervisor:
    """Keeps one process in each place.

    Args:
        children: starts them.
        settings: how many, and their grace.
        end_idle: as for `supervise`.

    Attributes:
        calls: what each signal does beside stopping, for `stop_on_signals`.
    """

    def __init__(self, children: Children, settings: Settings, *, end_idle: bool) -> None:
        self._children = children
        self._end_idle = end_idle
        self._count = settings.worker_processes
        self._grace = settings.worker_shutdown_grace
        self._places: list[Place] = []
        self._deaths: deque[float] = deque(maxlen=MAX_DEATHS + 1)
        self._restart = asyncio.Event()
        self._abort = asyncio.Event()
        self._is_quiet = False
        self.calls: Calls = {
            signal.SIGHUP: self._restart.set,
            TELL: self._tell,
            QUIET: lambda: self._set_quiet(True),
            WAKE: lambda: self._set_quiet(False),
        }

    async def run(self, stop: asyncio.Event, abort: asyncio.Event) -> int:
        """Keep the processes until `stop`, or until each has ended as it was told to.

        Returns:
            As `supervise`.

        Raises:
            PartDiedError: processes died too often; all of them have ended.
        """
        log.info("supervisor_started", processes=self._count)
        self._abort = abort
        codes: list[int] = []
        try:
            await _first_of(stop.wait(), self._keep())
        except NeverReadyError as error:
            codes += error.args
        finally:
            log.info("supervisor_stopping", processes=len(self._children.living))
            ends = (child.end(abort, self._grace) for child in self._children.living)
            codes += await asyncio.gather(*ends)
            log.info("supervisor_stopped", exit_code=worst(codes))
        return worst(codes)

    async def _keep(self) -> None:
        """Fill the places, then keep them filled; return when all processes ended by themselves."""
        # The first one alone: what is wrong with the start is wrong with each, and is said once.
        first = await self._first_child()
        others = [self._first_child() for _ in range(self._count - 1)]
        self._places = [Place(child) for child in (first, *await asyncio.gather(*others))]
        log.info("all_processes_ready", pids=[place.child.pid for place in self._places])
        try:
            async with asyncio.TaskGroup() as tasks:
                restarting = tasks.create_task(self._restart_when_asked())
                await asyncio.wait(
                    [tasks.create_task(self._keep_place(place)) for place in self._places]
                )
                restarting.cancel()
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None

    # -- processes -------------------------------------------------------------------------------

    def _start(self) -> Child | None:
        """Start a process; None if the machine has none to give."""
        try:
            child = self._children.start(*["--quiet"] * self._is_quiet)
        except OSError as error:
            log.error("process_not_started", reason=str(error))
            return None
        log.info("process_started", pid=child.pid)
        child.ready.add_done_callback(lambda _: self._note_ready(child))
        child.ended.add_done_callback(lambda _: self._note_end(child))
        return child

    async def _first_child(self) -> Child:
        child = self._start()
        if child is None:
            raise PartDiedError("the machine gives no process; the log says why")
        if not await _until_ready(child):
            raise NeverReadyError(child.exit_code)
        return child

    def _note_ready(self, child: Child) -> None:
        log.info("process_ready", pid=child.pid)
        if self._is_quiet:
            child.send(QUIET)

    def _note_end(self, child: Child) -> None:
        code = child.ended.result()
        how = {"exit_code": code} if code >= 0 else {"signal": signal.Signals(-code).name}
        log.info("process_ended", pid=child.pid, **how)

    # -- places ----------------------------------------------------------------------------------

    async def _keep_place(self, place: Place) -> None:
        """Keep a process in the place; return when it has ended with 0, as an idle one does."""
        while True:
            child = place.child
            waits: list[asyncio.Future[Any]] = [child.ended, child.worn]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            async with place.lock:
                if child is not place.child:
                    continue
                if child.is_over and self._end_idle and child.exit_code == 0:
                    return
                if child.is_over:
                    await self._make_good(place)
                    continue
                log.info("process_worn", pid=child.pid)
                if await self._replace(place):
                    # It ends by itself when nothing runs any more. A deadline would cut off jobs.
                    child.send(QUIET)
                    continue
            await place.pauses.sleep()

    async def _make_good(self, place: Place) -> None:
        """Replace a process that died, after a pause."""
        now = time.monotonic()
        self._deaths.append(now)
        if len(self._deaths) > MAX_DEATHS and now - self._deaths[0] < DEATHS_WITHIN:
            raise PartDiedError(
                f"{len(self._deaths)} worker processes died within {DEATHS_WITHIN:g} s, the last "
                f"by {_how_it_ended(place.child)}; the log says why"
            )
        if now - place.started_at > DEATHS_WITHIN:
            place.pauses.restart()
        pause = place.pauses.take()
        log.error("process_died", pid=place.child.pid, replaced_in_s=round(pause, 1))
        await asyncio.sleep(pause)
        if (child := self._start()) is not None:
            self._fill(place, child)

    async def _replace(self, place: Place) -> bool:
        """Start another process for the place; return whether it works, and so has the place."""
        child = self._start()
        if child is None or not await _until_ready(child):
            log.error("process_not_replaced", pid=place.child.pid)
            return False
        self._fill(place, child)
        return True

    def _fill(self, place: Place, child: Child) -> None:
        place.child, place.started_at = child, time.monotonic()

    async def _restart_when_asked(self) -> None:
        """Replace all processes at each SIGHUP: one after the other, each by one that works."""
        while True:
            await self._restart.wait()
            self._restart.clear()
            log.info("rolling_restart_began", processes=len(self._places))
            for place in self._places:
                async with place.lock:
                    old = place.child
                    # The place of one that died gets a fresh process anyway.
                    if not old.is_over and not await self._replace(place):
                        log.error("rolling_restart_broken_off", reason="a process did not start")
                        break
                await old.end(self._abort, self._grace)
            else:
                log.info("rolling_restart_ended")

    # -- signals ---------------------------------------------------------------------------------

    def _tell(self) -> None:
        self._pass_on(TELL, self._children.living)

    def _set_quiet(self, quiet: bool) -> None:
        self._is_quiet = quiet
        # A worn process that has been replaced stays quiet.
        replaced = {child for child in self._children.living if child.worn.done()}
        replaced -= {place.child for place in self._places}
        self._pass_on(QUIET if quiet else WAKE, self._children.living - replaced)

    def _pass_on(self, number: signal.Signals, children: Iterable[Child]) -> None:
        """Send a signal to the processes that handle it: those that are ready."""
        for child in children:
            if child.ready.done():
                child.send(number)


def _how_it_ended(child: Child) -> str:
    code = child.ended.result()
    return f"exit code {code}" if code >= 0 else signal.Signals(-code).name


async def _until_ready(child: Child) -> bool:
    """Wait until a process works, or has ended; return whether it works."""
    waits: list[asyncio.Future[Any]] = [child.ready, child.ended]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    return not child.is_over


async def _first_of(*work: Any) -> None:
    """Wait until one of these is done, and cancel the others; raise its error."""
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()
