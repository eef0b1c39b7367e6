"""The causes for which an attempt may run twice: what was done to its first worker."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

from chaos.effects import Run
from chaos.servers import REDIS, Outage
from chaos.tasks import LOCK_S
from chaos.workers import Life, Span

ACKNOWLEDGE_S = 3.0
"""Seconds from a handler's end to its acknowledgement, at most, if no server is away."""

SAFE_SILENCE_S = LOCK_S / 2
"""A worker that could not renew its locks for fewer seconds has not lost one."""


class Causes:
    """Finds the cause of each repeated run in what happened to the processes and the servers."""

    def __init__(self, lives: Iterable[Life], outages: Sequence[Outage]) -> None:
        self._lives = {life.pid: life for life in lives}
        self._outages = outages

    def of_repeated(self, runs: Sequence[Run]) -> Iterator[tuple[Run, str | None]]:
        """Yield each run whose attempt ran again, and the cause; None if there was none."""
        for run, following in pairwise(sorted(runs, key=lambda run: (run.attempt, run.started_at))):
            if run.attempt == following.attempt:
                yield run, self._cause(run) or self._cause_of_late(following)

    def _cause(self, run: Run) -> str | None:
        life = self._lives[run.worker]
        if life.killed_at is not None and self._unfinished_at(life.killed_at, run, life):
            return "killed"
        if run.job_id in life.handed_back:
            return "handed back"
        if run.queue in life.left_behind:
            return "left behind at the deadline, with a server away"
        if any(_overlap(silence, self._held(run)) for silence in self._silences(life)):
            return "its lock expired in a silence"
        return None

    def _cause_of_late(self, run: Run) -> str | None:
        """Return why a run may have begun after another worker took its job over."""
        for _, ended in self._silences(self._lives[run.worker]):
            if 0 <= run.started_at - ended < ACKNOWLEDGE_S:
                return "its worker stood still before it began"
        return None

    def _unfinished_at(self, moment: float, run: Run, life: Life) -> bool:
        if run.ended_at is None or moment - run.ended_at < ACKNOWLEDGE_S:
            return True
        # What holds an acknowledgement up; and after it everything that has waited is next.
        spans = [(outage.began_at, outage.ended_at) for outage in self._outages] + life.stops
        return any(
            began <= moment and ended >= run.ended_at - 0.5 and moment - ended < ACKNOWLEDGE_S
            for began, ended in spans
        )

    def _held(self, run: Run) -> Span:
        return run.started_at - 1, (run.ended_at or float("inf")) + ACKNOWLEDGE_S

    def _silences(self, life: Life) -> list[Span]:
        """Return the spans in which this worker could not renew a lock in time to keep it."""
        spans = [(o.began_at, o.ended_at) for o in self._outages if o.server == REDIS]
        merged: list[Span] = []
        for began, ended in sorted(spans + life.stops):
            if merged and began - merged[-1][1] < SAFE_SILENCE_S:
                merged[-1] = (merged[-1][0], max(merged[-1][1], ended))
            else:
                merged.append((began, ended))
        return [span for span in merged if span[1] - span[0] > SAFE_SILENCE_S]


def _overlap(one: Span, other: Span) -> bool:
    return one[0] <= other[1] and other[0] <= one[1]
