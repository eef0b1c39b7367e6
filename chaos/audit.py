"""The comparison at the end: effects, rows and BullMQ's jobs have to agree."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import psycopg
from pydantic import ValidationError
from redis.asyncio import Redis

from chaos.effects import Key, Run, read_runs
from chaos.queues import BullJob, left_over, locks, read_jobs
from chaos.reruns import Causes
from chaos.servers import Servers
from chaos.tasks import QUEUES
from chaos.workers import Crew
from chaos.workload import PlannedJob
from tests.support.row import TaskRow

Row = dict[str, Any]


@dataclass
class Story:
    """One job: as planned, as run, as recorded, and as BullMQ has it."""

    planned: PlannedJob
    runs: list[Run]
    row: Row | None
    job: BullJob


@dataclass
class Audit:
    """The findings of the comparison.

    Attributes:
        faults: by job; those of a whole queue are under a key without an id.
        reruns: repeated runs, counted by cause.
        stories: of the jobs with faults.
    """

    faults: dict[Key, list[str]] = field(default_factory=dict)
    reruns: Counter[str] = field(default_factory=Counter)
    states: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    runs_in_children: int = 0
    stories: dict[Key, Story] = field(default_factory=dict)

    def note(self, key: Key, faults: Sequence[str]) -> None:
        if faults:
            self.faults.setdefault(key, []).extend(faults)


async def audit(jobs: Sequence[PlannedJob], crew: Crew, servers: Servers, prefix: str) -> Audit:
    """Compare everything. All workers have ended."""
    result = Audit()
    runs = read_runs(crew.effects)
    rows = await _read_rows(servers.postgres.url)
    async with Redis.from_url(servers.redis.url, decode_responses=True) as client:
        known = await read_jobs(client, prefix, [job.key for job in jobs])
        for key, ids in (await left_over(client, prefix, QUEUES)).items():
            result.note((key, ""), [f"{len(ids)} jobs are left, such as {ids[:5]}"])
        if held := await locks(client, prefix):
            result.note(("locks", ""), [f"{len(held)} locks are held, such as {held[:5]}"])
    causes = Causes(crew.lives, servers.outages)
    for planned in jobs:
        story = Story(
            planned, runs.get(planned.key, []), rows.get(planned.row_id), known[planned.key]
        )
        faults = list(_differences(story))
        for run, cause in causes.of_repeated(story.runs):
            result.reruns[cause or "none"] += 1
            if cause is None:
                faults.append(f"was run again without a cause after the run {run}")
        result.note(planned.key, faults)
        if faults:
            result.stories[planned.key] = story
        result.states.update(story.job.states)
    every = [run for of_job in runs.values() for run in of_job]
    result.runs = len(every)
    result.runs_in_children = sum(run.in_child for run in every)
    _note_strangers(result, jobs, runs, rows, known)
    return result


def _note_strangers(
    result: Audit,
    jobs: Sequence[PlannedJob],
    runs: Mapping[Key, object],
    rows: Mapping[str, object],
    known: Mapping[Key, object],
) -> None:
    """Note jobs and rows that nobody planned."""
    keys, row_ids = {job.key for job in jobs}, {job.row_id for job in jobs}
    for key in (runs.keys() | known.keys()) - keys:
        result.note(key, ["nobody added this job"])
    for row_id in rows.keys() - row_ids:
        result.note(("rows", row_id), ["nobody wanted this row"])


async def _read_rows(url: str) -> dict[str, Row]:
    async with await psycopg.AsyncConnection.connect(url) as connection:
        cursor = await connection.execute("SELECT id, data FROM tasks")
        return dict(await cursor.fetchall())


def _differences(story: Story) -> Iterator[str]:
    """Yield the faults of one job."""
    planned, row, job = story.planned, story.row, story.job
    state = "completed" if planned.completes else "failed"
    if not story.runs:
        yield "never ran"
    if job.states != [state]:
        yield f"is {job.states} in BullMQ, not {state}"
    if row is None:
        yield "has no row"
        return
    if row["status"] != state:
        yield f"its row says {row['status']}, not {state}"
    if not row["attempts"] == job.attempts == planned.attempts:
        yield (
            f"took {planned.attempts} attempts; its row says {row['attempts']}, "
            f"BullMQ {job.attempts}"
        )
    if planned.has_row and row["externalId"] != planned.row_id:
        yield f"its row lost what the API wrote: externalId is {row['externalId']}"
    if row["payload"] != {**planned.job.payload}:
        yield f"its row's payload is {row['payload']}"
    try:
        TaskRow.model_validate(row)
    except ValidationError as error:
        yield f"the API refuses its row: {error}"
    yield from _differences_of_end(story, row, job)


def _differences_of_end(story: Story, row: Row, job: BullJob) -> Iterator[str]:
    returned = {run.id for run in story.runs if run.how == "returned"}
    if story.planned.completes:
        result = row["result"] or {}
        if result != job.return_value:
            yield f"its row's result is {result}, BullMQ's {job.return_value}"
        if (result.get("output") or {}).get("run") not in returned:
            yield f"its result is of no run that returned: {result}"
        if row["error"] is not None or row["failedAt"] is not None or row["completedAt"] is None:
            yield "its row is not that of a completed job"
    else:
        error = row["error"] or {}
        if error.get("reason") != job.fields.get("failedReason"):
            yield f"its row's reason is {error.get('reason')}, BullMQ's {job.fields}"
        if [error.get("stackTrace")] != job.stack_traces[-1:]:
            yield "its row's stack trace is not BullMQ's last"
        if row["result"] is not None or row["completedAt"] is not None or row["failedAt"] is None:
            yield "its row is not that of a failed job"
