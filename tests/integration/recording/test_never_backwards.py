"""Whatever order claims, writes, stalls, cancels and retries come in, a row never goes backwards.

A model of one job (who holds it, what its row has to say) is driven through random interleavings,
each against a row of its own in a real PostgreSQL, written by the real `JobHistory` and
`StatusRecorder`. `make interleavings` runs 10,000 of them.

Where the workers' clocks differ by more than a lock lasts, one thing more can happen: an attempt
that stood still for its whole lock covers the start of a newer one. What holds even then is that
the newer attempt's outcome gets into the row. (A worker asks Redis before it records a start if its
lock may be over; so this takes a process that stands still in the moment after that.)
"""

import asyncio
import itertools
import os
from dataclasses import dataclass
from typing import Any, LiteralString, cast

import pytest
from hypothesis import HealthCheck, assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from psycopg.types.json import Jsonb

from autoflow_worker.broker.claim import Claim, LockLostError
from autoflow_worker.broker.job_queue import JobQueue
from autoflow_worker.recording import patches
from autoflow_worker.recording.recorder import StatusRecorder
from autoflow_worker.recording.write import Verdict
from autoflow_worker.worker.history import JobHistory
from tests.support.database import Connection

QUEUE = "reports-render"
EXAMPLES = int(os.environ.get("INTERLEAVINGS", "75"))
NOW_MS = 1_790_000_000_000
LOCK_MS = 30_000
"""BullMQ's lockDuration: nobody takes a job over earlier."""
FAR_OFF_MS = (-90_000, -31_000, 31_000, 90_000)
"""How far clocks are off that differ by more than a lock lasts."""

Row = dict[str, Any]

FAILURE = patches.error_record("it did not work", NOW_MS)
OUTCOMES: dict[str, Row] = {
    "completed": patches.completed_patch(now_ms=NOW_MS, result=patches.success_result(1, 2)),
    "failed": patches.failed_patch(now_ms=NOW_MS, attempt=1, error=FAILURE),
    "delayed": patches.delayed_patch(until_ms=NOW_MS, attempt=1, error=FAILURE),
    "pending": patches.pending_patch(attempt=1, error=FAILURE),
    "handed back": patches.handed_back_patch(),
}


@dataclass(eq=False)
class Attempt:
    history: JobHistory
    claim: Claim
    clock_ms: int
    skew_ms: int
    started: bool = False

    @property
    def start(self) -> Row:
        """What its start writes."""
        return patches.active_patch(now_ms=self.clock_ms, attempt=1)


class Stores:
    """A recorder and the API's connection, on a loop of their own, for all interleavings."""

    def __init__(self, runner: asyncio.Runner, database_url: str) -> None:
        self.run = runner.run
        self.numbers = itertools.count()
        self.recorder = StatusRecorder(database_url)
        self.run(self.recorder.open(10))
        self.connection = self.run(Connection.connect(database_url, autocommit=True))

    def execute(self, statement: LiteralString, *arguments: object) -> list[tuple[Any, ...]]:
        async def execute() -> list[tuple[Any, ...]]:
            cursor = await self.connection.execute(statement, arguments)
            return await cursor.fetchall() if cursor.description else []

        return self.run(execute())

    def close(self) -> None:
        self.run(self.recorder.close(1))
        self.run(self.connection.close())


class Interleaving(RuleBasedStateMachine):
    """One job, the API, and every worker that ever held the job."""

    def __init__(self, stores: Stores) -> None:
        super().__init__()
        self.stores = stores
        self.row_id = f"job-{next(stores.numbers)}"
        self.attempts: list[Attempt] = []
        self.holder: Attempt | None = None
        self.waiting = True
        self.clock_ms = NOW_MS
        self.user_id = "ann"
        row = new_row() | {"userId": self.user_id}
        stores.execute("INSERT INTO tasks (id, data) VALUES (%s, %s)", self.row_id, Jsonb(row))

    def teardown(self) -> None:
        self.stores.execute("DELETE FROM tasks WHERE id = %s", self.row_id)

    @property
    def row(self) -> Row:
        [(data,)] = self.stores.execute("SELECT data FROM tasks WHERE id = %s", self.row_id)
        row: Row = data
        return row

    @property
    def unstarted(self) -> list[Attempt]:
        return [attempt for attempt in self.attempts if not attempt.started]

    @property
    def stale(self) -> list[Attempt]:
        return [a for a in self.attempts if a.started and a is not self.holder]

    # -- the locks in Redis ----------------------------------------------------------------------

    @property
    def name(self) -> str:
        return QUEUE

    async def make_sure_of(self, claim: Claim) -> None:
        if self.holder is None or self.holder.claim is not claim:
            raise LockLostError("another worker took the job over")

    # -- workers ---------------------------------------------------------------------------------

    @rule(skew_ms=st.integers(-5_000, 5_000) | st.sampled_from(FAR_OFF_MS))
    @precondition(lambda self: self.waiting)
    def claim(self, skew_ms: int) -> None:
        """A worker whose clock is off by so much fetches the job."""
        # Two claims of one job in the same millisecond can't be told apart; their locks can.
        assume(self.clock_ms + 1 + skew_ms not in {a.clock_ms for a in self.attempts})
        self.take(skew_ms)

    def take(self, skew_ms: int) -> None:
        self.clock_ms += 1
        claim = Claim(None, {"name": QUEUE}, self.row_id, "token", 0.0)
        claim.claimed_ms, claim.attempt = self.clock_ms + skew_ms, 1
        claim.attempts_started = len(self.attempts) + 1
        queue, held = cast(JobQueue, self), asyncio.Semaphore(1)
        history = JobHistory(self.stores.recorder, queue, claim, held, record_unknown_jobs=False)
        attempt = Attempt(history, claim, self.clock_ms + skew_ms, skew_ms)
        self.attempts.append(attempt)
        self.holder, self.waiting = attempt, False

    @rule(data=st.data())
    @precondition(lambda self: self.unstarted)
    def start(self, data: st.DataObject) -> None:
        """An attempt records its start; one that lost its job meanwhile may do so late."""
        attempt = data.draw(st.sampled_from(self.unstarted), label="attempt")
        attempt.started = True
        before = self.row
        try:
            verdict = self.stores.run(attempt.history.start())
        except LockLostError:
            assert attempt is not self.holder
            assert self.row == before, "a stale attempt changes nothing"
            return
        if verdict is Verdict.CANCELLED:
            assert before["status"] == "cancelled"
            assert self.row == before
            if attempt is self.holder:  # the job fails in BullMQ, and its handler never runs
                self.holder = None
        else:
            assert verdict is Verdict.WRITTEN
            assert self.row == before | attempt.start
            for newer in self.attempts[self.attempts.index(attempt) + 1 :]:
                if before["startedAt"] == newer.start["startedAt"]:
                    assert attempt.skew_ms - newer.skew_ms > LOCK_MS, "only clocks can cause this"

    @rule(outcome=st.sampled_from(sorted(OUTCOMES)))
    @precondition(lambda self: self.holder is not None and self.holder.started)
    def finish(self, outcome: str) -> None:
        """The holder records what came of it; then BullMQ follows."""
        if self.record(outcome) is Verdict.WRITTEN:
            self.waiting = outcome in ("delayed", "pending", "handed back")
        self.holder = None

    @rule(outcome=st.sampled_from(sorted(OUTCOMES)))
    @precondition(lambda self: self.holder is not None and self.holder.started)
    def finish_and_die(self, outcome: str) -> None:
        """The holder records what came of it, and dies before BullMQ is told."""
        self.record(outcome)
        self.stall()

    def record(self, outcome: str) -> Verdict:
        assert self.holder is not None
        before, patch = self.row, OUTCOMES[outcome]
        verdict = self.stores.run(self.holder.history.finish(patch))
        if before["status"] == "cancelled" and outcome != "completed":
            assert verdict is Verdict.CANCELLED
            assert self.row == before
        else:
            assert verdict is Verdict.WRITTEN
            # Its start is there as a rule, and written along if another one covers it.
            assert self.row == before | self.holder.start | patch
        return verdict

    @rule(data=st.data(), outcome=st.sampled_from(sorted(OUTCOMES)))
    @precondition(lambda self: self.stale and self.holder is not None and self.holder.started)
    def finish_late(self, data: st.DataObject, outcome: str) -> None:
        """An attempt that lost its job records its outcome all the same."""
        attempt = data.draw(st.sampled_from(self.stale), label="attempt")
        before = self.row
        try:
            verdict = self.stores.run(attempt.history.finish(OUTCOMES[outcome]))
        except LockLostError:
            verdict = Verdict.CONTESTED
        if verdict is Verdict.WRITTEN:
            assert self.holder is not None
            assert before["startedAt"] == attempt.start["startedAt"], "it covers the holder's start"
            assert attempt.skew_ms - self.holder.skew_ms > LOCK_MS, "only clocks can cause this"
        else:
            assert verdict in (Verdict.CONTESTED, Verdict.CANCELLED)
            assert self.row == before, "a stale attempt changes nothing"

    @rule()
    @precondition(lambda self: self.holder is not None)
    def stall(self) -> None:
        """The holder's lock expires, and BullMQ gives the job to whoever asks next."""
        self.clock_ms += LOCK_MS
        self.holder, self.waiting = None, True

    # -- the API ---------------------------------------------------------------------------------

    def merge(self, patch: Row) -> None:
        self.stores.execute(
            "UPDATE tasks SET data = data || %s WHERE id = %s", Jsonb(patch), self.row_id
        )

    @rule()
    @precondition(lambda self: self.row["status"] in ("pending", "delayed", "active"))
    def cancel(self) -> None:
        self.merge({"status": "cancelled"})

    @rule()
    @precondition(
        lambda self: (
            self.holder is None
            and not self.waiting
            and self.row["status"] in ("failed", "cancelled")
        )
    )
    def retry(self) -> None:
        """The row is reset, and the job added again."""
        self.merge({"status": "pending", "attempts": 0, "failedAt": None, "error": None})
        self.waiting = True

    @rule(user_id=st.sampled_from(["ann", "bob"]))
    def touch(self, user_id: str) -> None:
        self.user_id = user_id
        self.merge({"userId": user_id})

    @invariant()
    def the_row_is_in_itself_right(self) -> None:
        row = self.row
        assert row["userId"] == self.user_id, "the API's keys are merged with"
        if row["status"] != "completed":
            assert (row["result"], row["completedAt"]) == (None, None)
        if row["status"] != "failed":
            assert row["failedAt"] is None


@pytest.mark.timeout(3600)
def test_no_interleaving_takes_a_row_back(database_url: str) -> None:
    with asyncio.Runner() as runner:
        stores = Stores(runner, database_url)
        try:
            run_state_machine_as_test(
                lambda: Interleaving(stores),  # type: ignore[arg-type]  # any factory will do
                settings=settings(
                    max_examples=EXAMPLES,
                    stateful_step_count=25,
                    deadline=None,
                    suppress_health_check=list(HealthCheck),
                ),
            )
        finally:
            stores.close()


def test_a_clock_that_is_off_by_more_than_a_lock_takes_no_outcome_away(database_url: str) -> None:
    """The late start of an attempt that lost its job covers a newer one, whose outcome follows."""
    with asyncio.Runner() as runner:
        stores = Stores(runner, database_url)
        job = Interleaving(stores)
        job.take(FAR_OFF_MS[-1])
        job.stall()
        job.take(0)
        stale, holder = job.attempts
        assert runner.run(holder.history.start()) is Verdict.WRITTEN
        assert runner.run(stale.history.start()) is Verdict.WRITTEN
        assert job.row["startedAt"] == stale.start["startedAt"]
        holder.started = True
        assert job.record("completed") is Verdict.WRITTEN
        with pytest.raises(LockLostError):
            runner.run(stale.history.finish(OUTCOMES["failed"]))
        assert job.row["status"] == "completed"
        job.teardown()
        stores.close()


def new_row() -> Row:
    return patches.unknown_job_row(QUEUE, data={}, options={}, timestamp=NOW_MS)
