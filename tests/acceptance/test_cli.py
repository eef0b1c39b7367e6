"""The commands as processes: exit codes, messages, and what holds up an exit.

What a start refuses is in acceptance/test_start_errors.py.
"""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from tests.support.database import Database
from tests.support.node import Node
from tests.support.process import WorkerProcess, WorkerStarter
from tests.support.until import until

GOOD_TASKS = """
    from autoflow_worker import define_task

    async def handler(payload, ctx): ...

    tasks = [define_task("mails", handler), define_task("reports", handler)]
"""
UNREACHABLE = {"REDIS_URL": "redis://127.0.0.1:1", "WORKER_STARTUP_TIMEOUT": "0.2"}


async def one_message(worker: WorkerProcess, code: int) -> str:
    """The message of a worker that ends with this exit code; it has to be the only one."""
    assert await worker.wait() == code, worker.report()
    assert "Traceback" not in worker.stderr + worker.stdout
    assert worker.stderr.count("autoflow-worker: ") == 1, worker.report()
    return worker.stderr.removeprefix("autoflow-worker: ")


async def test_start_takes_the_command_line_before_the_environment(
    worker_process: WorkerStarter,
) -> None:
    worker = worker_process(
        GOOD_TASKS,
        *("--tasks", "tasks_config:tasks", "--queues", "reports"),
        TASKS_CONFIG="nowhere:tasks",
        WORKER_QUEUES="mails",
    )
    assert (await worker.until_logged("worker_started"))["queues"] == ["reports"]
    worker.send(signal.SIGINT)
    assert await worker.wait() == 0


async def test_variables_come_from_env_files(
    worker_process: WorkerStarter, tmp_path: Path, node5: Node, db: Database
) -> None:
    env = worker_process.env
    lines = [f"{name}={env[name]}\n" for name in ("REDIS_URL", "DATABASE_URL", "BULLMQ_PREFIX")]
    (tmp_path / ".env").write_text("".join(lines) + "TASKS_CONFIG=nowhere:tasks\n")
    (tmp_path / ".env.local").write_text("TASKS_CONFIG=tasks_config:tasks\nTHEIRS=hello\n")
    unset: dict[str, Any] = dict.fromkeys(("REDIS_URL", "DATABASE_URL", "BULLMQ_PREFIX"))
    worker = worker_process(
        """
        import os
        from autoflow_worker import define_task

        async def handler(payload, ctx):
            return os.environ["THEIRS"]

        tasks = [define_task("mails", handler)]
        """,
        **unset,
    )
    task_id = await db.insert_task("mails")
    await node5.schedule("mails", task_id=task_id)
    await db.until_status(task_id, "completed")
    result = (await db.task(task_id)).result
    assert result is not None
    assert result.output == "hello"
    [read] = worker.logged("env_files_read")
    assert read["files"] == [".env", ".env.local"]
    checked = worker_process(command="check", **unset)
    assert await checked.wait() == 0, checked.report()
    assert ".env read, .env.local read" in checked.stdout
    other = worker_process(command="check", **unset, TASKS_CONFIG="nothing:tasks")
    assert await other.wait() == 2
    assert "'nothing:tasks'" in other.stdout


async def test_variables_that_are_nearly_ours_are_named(worker_process: WorkerStarter) -> None:
    env = {"WORKER_CONCURENCY": "5", "REDIS_URI": "redis://:S3cr3t@h", "NODE_ENV": "prod"}
    worker = worker_process(GOOD_TASKS, **env)
    await worker.until_logged("worker_started")
    named = {
        "NODE_ENV=prod": "NODE_ENV=production",
        "REDIS_URI": "REDIS_URL",
        "WORKER_CONCURENCY": "WORKER_CONCURRENCY",
    }
    warnings = worker.logged("unknown_variable")
    assert {each["variable"]: each["nearest"] for each in warnings} == named
    assert {each["level"] for each in warnings} == {"warning"}
    checked = worker_process(command="check", **env)
    assert await checked.wait() == 0, checked.report()
    for variable, nearest in named.items():
        assert f"warning  {variable} is not known; the nearest is {nearest}" in checked.stdout
    assert "S3cr3t" not in worker.stdout + checked.stdout


async def test_a_signal_during_the_imports_is_a_clean_stop(worker_process: WorkerStarter) -> None:
    worker = worker_process(
        """
        import os, signal
        from autoflow_worker import define_task

        async def handler(payload, ctx): ...

        tasks = [define_task("mails", handler)]
        os.kill(os.getpid(), signal.SIGTERM)
        """
    )
    assert await worker.wait() == 0
    assert worker.logged("signal_received")


async def test_a_closed_output_does_not_end_the_worker(
    worker_process: WorkerStarter, db: Database, node5: Node, tmp_path: Path
) -> None:
    (tmp_path / "tasks_config.py").write_text(
        dedent(
            """
            from autoflow_worker import define_task

            async def handler(payload, ctx):
                ctx.logger.info("a_line")
                print("another")

            tasks = [define_task("mails", handler)]
            """
        )
    )
    task_id = await db.insert_task("mails")
    await node5.schedule("mails", task_id=task_id)
    process = await asyncio.create_subprocess_exec(
        *("/bin/sh", "-c", f"exec {sys.executable} -m autoflow_worker start >&- 2>&-"),
        cwd=tmp_path,
        env=os.environ | worker_process.env,
    )
    await db.until_status(task_id, "completed")
    process.terminate()
    assert await process.wait() == 0


@pytest.mark.parametrize(
    "text",
    [
        "import threading, time; threading.Thread(target=time.sleep, args=[600]).start()",
        "import atexit, time; atexit.register(time.sleep, 600)",
    ],
    ids=["thread", "exit hook"],
)
async def test_nothing_holds_the_exit(worker_process: WorkerStarter, text: str) -> None:
    worker = worker_process(GOOD_TASKS + f"\n    {text}\n")
    await worker.until_logged("worker_started")
    worker.terminate()
    assert await worker.wait() == 0


async def test_handlers_that_do_not_end_do_not_hold_the_exit(
    worker_process: WorkerStarter, node5: Node
) -> None:
    worker = worker_process(
        """
        import asyncio, time
        from autoflow_worker import define_task

        async def stubborn(payload, ctx):
            ctx.logger.info("running")
            while True:
                try:
                    await asyncio.sleep(600)
                except asyncio.CancelledError:
                    pass

        async def threaded(payload, ctx):
            ctx.logger.info("running")
            await asyncio.to_thread(time.sleep, 600)

        def blocking(payload, ctx):
            ctx.logger.info("running")
            time.sleep(600)  # what can't be interrupted

        tasks = [define_task(f.__name__, f) for f in (stubborn, threaded, blocking)]
        """,
        WORKER_SHUTDOWN_GRACE="0.1",
    )
    for queue in ("stubborn", "threaded", "blocking"):
        await node5.schedule(queue)
    await until(lambda: len(worker.logged("running")) == 3, message=worker.report)
    worker.terminate()
    assert await worker.wait() == 4


async def test_check_when_all_is_well(worker_process: WorkerStarter) -> None:
    worker = worker_process(GOOD_TASKS, command="check")
    assert await worker.wait() == 0, worker.report()
    lines = worker.stdout.splitlines()
    settings, tasks, *table, redis, postgres = lines
    found = [line.split(" ")[0] for line in (settings, tasks, redis, postgres)]
    assert found == ["settings", "task", "Redis", "PostgreSQL"]
    assert all(" ok " in line for line in (settings, tasks, redis, postgres))
    assert tasks.endswith("2 tasks in 'tasks_config:tasks'")
    assert [line.split()[0] for line in table] == ["queue", "mails", "reports"]
    assert table[1].endswith("dict (no annotation)")
    assert worker.stderr == ""


async def test_check_warns_of_a_paused_queue_that_two_bullmqs_use(
    worker_process: WorkerStarter, node5: Node, node6: Node
) -> None:
    await node5.pause("mails")
    for node in (node5, node5, node6):
        await node.add("mails", {})
    worker = worker_process(GOOD_TASKS, command="check")
    assert await worker.wait() == 0, worker.report()
    [warning] = [line for line in worker.stdout.splitlines() if "warning" in line]
    assert "mails is paused, and has jobs both in BullMQ 5's list 'paused' (2)" in warning
    assert "in BullMQ 6's 'wait' (1)" in warning


async def test_check_tells_everything_that_is_wrong(
    worker_process: WorkerStarter, db: Database
) -> None:
    await db.execute("DROP TABLE tasks")
    worker = worker_process("tasks = []", command="check", REDIS_URL="redis://:S3cr3t@127.0.0.1:1")
    assert await worker.wait() == 2
    settings, tasks, redis, postgres = worker.stdout.splitlines()
    assert " ok " in settings
    assert " failed " in tasks
    assert "is empty" in tasks
    assert "Redis can't be reached" in redis
    assert "no table 'tasks'" in postgres
    assert "S3cr3t" not in worker.stdout + worker.stderr


async def test_check_leaves_out_what_the_settings_rule_out(worker_process: WorkerStarter) -> None:
    worker = worker_process(GOOD_TASKS, command="check", REDIS_URL="http://x", LOG_LEVEL="loud")
    assert await worker.wait() == 2
    assert "LOG_LEVEL='loud'" in worker.stdout
    assert "skipped  REDIS_URL is missing or wrong" in worker.stdout
    assert "ok       PostgreSQL" not in worker.stdout.split("skipped")[0]
    assert "PostgreSQL  ok" in worker.stdout


async def test_check_ends_with_the_code_of_the_first_failure(
    worker_process: WorkerStarter,
) -> None:
    worker = worker_process(GOOD_TASKS, command="check", **UNREACHABLE)
    assert await worker.wait() == 3


async def test_init_db(worker_process: WorkerStarter, db: Database) -> None:
    await db.execute("DROP TABLE tasks")
    for _ in range(2):
        worker = worker_process(command="init-db", REDIS_URL=None)
        assert await worker.wait() == 0, worker.report()
    assert await db.rows() == {}
    worker = worker_process(command="init-db", DATABASE_URL="postgresql://x:S3cr3t@127.0.0.1:1/x")
    message = await one_message(worker, 3)
    assert "PostgreSQL can't be reached" in message
    assert "S3cr3t" not in message


async def test_schedule(worker_process: WorkerStarter, db: Database, node5: Node) -> None:
    words = ("mails", '{"to": "a@b.c"}', "--user-id", "u1", "--correlation-id", "c1")
    scheduling = worker_process(GOOD_TASKS, *words, command="schedule")
    assert await scheduling.wait() == 0, scheduling.report()
    task_id = scheduling.stdout.strip()
    row = await db.task(task_id)
    assert (row.status, row.payload, row.userId) == ("pending", {"to": "a@b.c"}, "u1")
    job = await node5.get_job("mails", task_id)
    assert job is not None
    assert job["data"] == {"to": "a@b.c", "correlationId": "c1"}
    worker = worker_process()
    await db.until_status(task_id, "completed")
    worker.terminate()
    assert await worker.wait() == 0


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["nothing", "{}"], "no task in 'tasks_config:tasks' has the queue 'nothing'"),
        (["mails", "{"], "not JSON"),
        (["mails", "-"], "not JSON"),
        (["mails", "[]"], "must be a JSON object"),
        (["mails", "{}", "--delay-ms", "-1"], "--delay-ms"),
        (["mails", "{}", "--delay-ms", "9999999999999999"], "--delay-ms"),
        (["mails", '{"correlationId": "x"}'], "correlationId"),
    ],
)
async def test_schedule_refuses(
    worker_process: WorkerStarter, db: Database, words: list[str], reason: str
) -> None:
    worker = worker_process(GOOD_TASKS, *words, command="schedule")
    assert await worker.wait() == 2
    assert reason in worker.stderr
    assert "Traceback" not in worker.stderr
    assert await db.rows() == {}


def test_schedule_refuses_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "tasks_config.py").write_text(dedent(GOOD_TASKS))
    done = subprocess.run(
        [sys.executable, "-m", "autoflow_worker", "schedule", "mails", "-"],
        cwd=tmp_path,
        env=os.environ | {"REDIS_URL": "127.0.0.1:1", "DATABASE_URL": "postgresql://127.0.0.1:1"},
        input=b'{"name": "\xff"}',
        capture_output=True,
        check=False,
    )
    assert done.returncode == 2
    assert b"not JSON" in done.stderr
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--help"], 0, "init-db"),
        (["start", "-h"], 0, "--queues"),
        (["--version"], 0, "autoflow-worker"),
        (["strat"], 2, "Did you mean"),
        (["start", "--nothing"], 2, "--nothing"),
        (["schedule"], 2, "Missing argument"),
        ([], 2, "Commands:"),
    ],
)
def test_words_on_the_command_line(arguments: list[str], code: int, text: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "autoflow_worker", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code
    assert text in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
