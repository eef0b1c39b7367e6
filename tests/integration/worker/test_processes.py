"""Handlers in processes: what ends a process costs one attempt, and what it says arrives."""

import asyncio
import io
import json
import os
import signal
from collections.abc import Collection
from contextlib import suppress
from typing import Any

import psutil
import pytest

from autoflow_worker import TaskOptions, define_task
from autoflow_worker.errors import TaskListError
from autoflow_worker.logs.configure import configure_logging, flush_logs
from autoflow_worker.worker.processes import ProcessRunner
from tests.support.api import Api
from tests.support.process_tasks import FAILS_TO_IMPORT, LIST, named
from tests.support.running import Running, RunWorker
from tests.support.until import PATIENCE, until

Json = dict[str, Any]


def runner_of(worker: Running, index: int = 0) -> ProcessRunner:
    runner = worker.service.workers[index]._runner
    assert isinstance(runner, ProcessRunner)
    return runner


def processes_of(worker: Running) -> list[psutil.Process]:
    return [
        psutil.Process(child.pid)
        for index in range(len(worker.service.workers))
        for child in runner_of(worker, index)._children
    ]


def patience(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Set how long a handler may take to end, and all that waits for it."""
    monkeypatch.setattr("autoflow_worker.worker.processes.UNWIND_PATIENCE", seconds)
    monkeypatch.setattr("autoflow_worker.worker.task_worker.CUT_OFF_PATIENCE", seconds)
    monkeypatch.setattr("autoflow_worker.service.CLOSE_TIMEOUT", seconds)


async def until_ended(*pids: int) -> None:
    await until(lambda: not any(psutil.pid_exists(pid) for pid in pids))


async def outcome(api: Api, queue: str, task_id: str) -> object:
    """Wait until both stores agree on the end of a job; return its output or its reason."""

    async def status() -> str | None:
        found = await api.db.status(task_id)
        return found if found in {"completed", "failed"} else None

    row = await api.until_both_say(queue, task_id, await until(status, message=task_id))
    assert row["attempts"] == 1
    return row["result"]["output"] if row["status"] == "completed" else row["error"]["reason"]


async def logs(api: Api, queue: str, task_id: str) -> list[str]:
    found: list[str] = (await api.node.queue(queue, "getJobLogs", task_id))["logs"]
    return found


ABORTED = "the handler's process was killed by SIGABRT"
CLOSED = "the handler closed its process's connection to the worker"
ENDS = {
    "kill": "the handler's process was killed by SIGKILL (out of memory?)",
    "leave_a_program_and_die": "the handler's process was killed by SIGKILL (out of memory?)",
    "segfault": "the handler's process was killed by SIGSEGV",
    "leave": "the handler's process ended with exit code 3",
    "exit_as_scripts_do": "the handler raised SystemExit: 4",
    "fork": "the parent's; 1",
    "fill_memory": "MemoryError",
    "close_descriptors": CLOSED,
    "write_to_descriptors": "the handler wrote to its process's connection to the worker",
    "give_up": "never again",
    "not_storable": "a value can't be stored: at ['here'][0]: object has no form in JSON",
    "no_such": "KeyError: 'no_such'",
}


# What an event loop could make a difference to.
ASYNC_ENDS = ("kill", "exit_as_scripts_do", "fork", "close_descriptors", "write_to_descriptors")


@pytest.mark.parametrize(("queue", "ends"), [("plain", ENDS), ("async", ASYNC_ENDS)])
async def test_whatever_ends_a_process_costs_one_attempt(
    queue: str, ends: Collection[str], api: Api, run_worker: RunWorker
) -> None:
    async with run_worker(named(queue, "two"), tasks_config=LIST):
        jobs = {do: await api.schedule(queue, {"do": do}, attempts=1) for do in ends}
        neighbours = [await api.schedule("two", {"do": "echo", "text": str(n)}) for n in range(20)]
        for do, task_id in jobs.items():
            found = await outcome(api, queue, task_id)
            # uvloop aborts when it finds its own descriptors closed.
            is_abort = do == "close_descriptors" and found == ABORTED
            assert found == ENDS[do] or is_abort, do
        for number, task_id in enumerate(neighbours):
            assert await outcome(api, "two", task_id) == str(number)
        if "leave_a_program_and_die" in jobs:
            [left_behind] = await logs(api, queue, jobs["leave_a_program_and_die"])
            await until_ended(int(left_behind))


async def test_what_a_handler_reports_arrives(api: Api, run_worker: RunWorker) -> None:
    stream = io.StringIO()
    configure_logging("info", "json", stream)
    async with run_worker(named("plain"), tasks_config=LIST):
        task_id = await api.schedule("plain", {"do": "report"}, correlation_id="c-1")
        output = await outcome(api, "plain", task_id)
        assert output == {"time_left": None, "stopping": False, "cancelled": False}
        job = await api.node.get_job("plain", task_id)
        assert job is not None
        assert job["progress"] == {"done": 1000}
        assert await logs(api, "plain", task_id) == ["first", "second"]
        retried = await api.schedule("plain", {"do": "fail_once", "text": "here"}, attempts=2)
        row = await api.until_both_say("plain", retried, "completed")
        assert row["result"]["output"] == {"reached": "here"}
        back = await api.schedule("plain", {"do": "come_back"}, attempts=1)
        assert await outcome(api, "plain", back) == "back"
        nested = await api.schedule("plain", {"do": "nest_a_loop"})
        assert await outcome(api, "plain", nested) == "nested"
        without_job = await api.schedule("plain", {"do": "ask_for_job"}, attempts=1)
        assert "use ctx.task_id" in str(await outcome(api, "plain", without_job))
        invalid = await api.schedule("plain", {"dont": "echo"}, attempts=3)
        assert await outcome(api, "plain", invalid) == (
            "payload does not validate: do: Field required; dont: Extra inputs are not permitted"
        )
        row = await api.until_both_say("plain", invalid, "failed")
        assert "PayloadError" in row["error"]["stackTrace"]
    assert flush_logs(10)
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    about = {"queue": "plain", "task_id": task_id, "correlation_id": "c-1", "attempt": 1}
    named_lines = [line for line in lines if about.items() <= line.items()]
    events = [line["event"] for line in named_lines]
    for event in ("by_logger", "by_structlog", "by logging"):
        assert event in events
    assert {line.get("line") for line in named_lines} >= {"printed", "written"}
    [by_logging] = [line for line in named_lines if line["event"] == "by logging"]
    assert (by_logging["level"], by_logging["logger"]) == ("warning", "library")


async def test_large_values_pass(api: Api, run_worker: RunWorker) -> None:
    text = "ä\\u0000\n" * 500_000
    async with run_worker(named("plain"), tasks_config=LIST):
        task_id = await api.schedule("plain", {"do": "echo", "text": text})
        assert await outcome(api, "plain", task_id) == text
        job = await api.node.get_job("plain", task_id)
        assert job is not None
        assert job["returnvalue"]["output"] == text


async def test_a_time_limit_is_told_and_then_kills(
    api: Api, run_worker: RunWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = "the handler ran past its time limit of 500 ms"
    async with run_worker(named("limited", "wrapped"), tasks_config=LIST) as worker:
        polite, second = (runner_of(worker, index)._idle[0] for index in (0, 1))
        for queue, do in (("limited", "sleep"), ("wrapped", "sleep"), ("limited", "swallow")):
            patience(monkeypatch, 0.1 if do == "swallow" else PATIENCE)
            task_id = await api.schedule(queue, {"do": do}, attempts=1)
            assert await outcome(api, queue, task_id) == reason
            # Only a process whose handler does not listen is replaced.
            assert polite.gone.done() == (do == "swallow")
        assert not second.gone.done()
        # The time that a fresh process needs is not the next handler's.
        task_id = await api.schedule("limited", {"do": "echo", "text": "a"}, attempts=1)
        assert await outcome(api, "limited", task_id) == "a"


@pytest.mark.parametrize(
    ("queue", "do"), [("plain", "sleep"), ("async", "sleep"), ("plain", "swallow")]
)
async def test_a_cancelled_task_reaches_its_process(
    queue: str, do: str, api: Api, run_worker: RunWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    patience(monkeypatch, 0.1 if do == "swallow" else PATIENCE)
    stream = io.StringIO()
    configure_logging("info", "json", stream)
    async with run_worker(named(queue), tasks_config=LIST) as worker:
        [child] = runner_of(worker)._idle
        task_id = await api.schedule(queue, {"do": do}, attempts=3)
        await api.until_both_say(queue, task_id, "active")
        await until(lambda: child._job is not None and child._job.is_taken)
        await api.db.execute(
            """UPDATE tasks SET data = data || '{"status": "cancelled"}' WHERE id = %s""", task_id
        )
        await until(lambda: child._job is None)
        next_id = await api.schedule(queue, {"do": "echo", "text": "a"})
        assert await outcome(api, queue, next_id) == "a"
        assert await api.db.status(task_id) == "cancelled"
        assert await api.node.get_state(queue, task_id) == "failed"
        assert child.gone.done() == (do == "swallow")
    assert flush_logs(10)
    lines = [json.loads(line).get("line") for line in stream.getvalue().splitlines()]
    assert ("cleaned up True" in lines) == (do == "sleep")


async def test_the_deadline_hands_back_what_runs(
    api: Api, run_worker: RunWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    patience(monkeypatch, PATIENCE)
    async with run_worker(named("plain", "async", "two"), tasks_config=LIST) as worker:
        processes = processes_of(worker)
        assert len(processes) == 4
        jobs = [
            ("plain", "sleep", "pending"),
            ("async", "sleep", "pending"),
            ("two", "sleep", "pending"),
            ("two", "be_interrupted_late", "completed"),
        ]
        ids = [await api.schedule(queue, {"do": do}) for queue, do, _ in jobs]
        for (queue, _, _), task_id in zip(jobs, ids, strict=True):
            await api.until_both_say(queue, task_id, "active")
        children = [c for index in range(3) for c in runner_of(worker, index)._children]
        await until(lambda: all(c._job is not None and c._job.is_taken for c in children))
        assert await worker.abort() == 4
        await until_ended(*(process.pid for process in processes))
    for (queue, do, status), task_id in zip(jobs, ids, strict=True):
        assert await api.db.status(task_id) == status, do
        state = await api.node.get_state(queue, task_id)
        assert state == ("completed" if status == "completed" else "delayed"), do


async def test_killed_processes_cost_their_own_attempts(api: Api, run_worker: RunWorker) -> None:
    """Processes are killed in the middle of jobs, and others while they have none."""
    async with run_worker(named("two"), tasks_config=LIST) as worker:
        victims = [await api.schedule("two", {"do": "sleep"}, attempts=1) for _ in range(4)]
        others = [await api.schedule("two", {"do": "echo", "text": "a"}) for _ in range(100)]
        runner = runner_of(worker)
        killed: set[str] = set()
        while len(killed) < len(victims):
            for child in list(runner._children):
                job = child._job
                if job is not None and job.is_taken and job.context.task_id in victims:
                    killed.add(job.context.task_id)
                    with suppress(ProcessLookupError):
                        os.kill(child.pid or 0, signal.SIGKILL)
                    await asyncio.wait({child.gone})
            await asyncio.sleep(0.01)
        for child in list(runner._idle):
            os.kill(child.pid or 0, signal.SIGKILL)
        more = [await api.schedule("two", {"do": "echo", "text": "a"}) for _ in range(10)]
        for task_id in (*others, *more):
            assert await outcome(api, "two", task_id) == "a"
        for task_id in victims:
            assert await outcome(api, "two", task_id) == ENDS["kill"]


async def test_processes_are_recycled(api: Api, run_worker: RunWorker) -> None:
    async def pids(queue: str, jobs: int) -> list[object]:
        ids = [await api.schedule(queue, {"do": "pid"}) for _ in range(jobs)]
        return [await outcome(api, queue, task_id) for task_id in ids]

    async with run_worker(named("recycled", "forgetful"), tasks_config=LIST):
        one, two, three = await pids("recycled", 3)
        assert one == two != three
        assert len(set(await pids("forgetful", 2))) == 2


async def test_each_process_enters_the_lifespan(api: Api, run_worker: RunWorker) -> None:
    stream = io.StringIO()
    configure_logging("info", "json", stream)
    async with run_worker(named("furnished", "furnished-async"), tasks_config=LIST) as worker:
        for index, queue in enumerate(["furnished", "furnished-async"]):
            [child] = runner_of(worker, index)._children
            task_id = await api.schedule(queue, {"do": "resources"})
            assert await outcome(api, queue, task_id) == [f"of process {child.pid}", task_id]
    assert flush_logs(10)
    lines = [json.loads(line).get("line") for line in stream.getvalue().splitlines()]
    assert lines.count("lifespan left") == 2


async def test_threads_of_libraries_are_bounded(
    api: Api, run_worker: RunWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("autoflow_worker.worker.processes._cores", lambda: 6)
    async with run_worker(named("two"), tasks_config=LIST):
        task_id = await api.schedule("two", {"do": "threads"})
        assert await outcome(api, "two", task_id) == "3"


async def test_a_list_that_only_fails_in_the_process_ends_the_start(
    run_worker: RunWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FAILS_TO_IMPORT, "1")
    with pytest.raises(TaskListError, match="importing it raised RuntimeError: not in this"):
        async with run_worker(named("plain"), tasks_config=LIST):
            pass


async def test_a_list_without_a_name_is_refused(run_worker: RunWorker) -> None:
    def handler(payload: Json, ctx: object) -> None: ...

    task = define_task("q", handler, TaskOptions(run_in="process"))
    for name in (LIST, "no.such:tasks", "__main__:tasks"):
        with pytest.raises(TaskListError, match="this task is not in it"):
            async with run_worker([task], tasks_config=name):
                pass
