"""Jobs whose ids no sound producer makes: each costs itself, and neither others nor the worker.

They are written straight into Redis, as BullMQ would refuse to make some of them.
"""

from typing import Any

from autoflow_worker import define_task
from tests.support.plain import until_renewed
from tests.support.poisoned import OPTIONS, QUEUE, Poisoned
from tests.support.process import WorkerStarter
from tests.support.running import RunWorker
from tests.support.until import until

IDS = [
    *("a b", "\U0001f600", "ü", " ", "\n", "\0", "a\0b", "\x1b[31m", "x" * 5000),
    *("a:b", ":", "::", "repeat:x:5", "{x}", "..", "*", "%s", "'; drop table tasks; --"),
    *("0", "01", "-1", "1e3", "1" * 16, "1" * 17, "undefined", "null", "lock"),
]


NOT_UTF8 = [b"\xff\xfe", b"a\xc3", b"\xed\xa0\x80"]


async def test_ids_with_odd_characters(run_worker: RunWorker, poisoned: Poisoned) -> None:
    for job_id in IDS:
        await poisoned.add(job_id)
    async with run_worker([poisoned.task()]):
        await poisoned.until_all_ended()
    for job_id in IDS:
        await poisoned.check_completed(job_id)


async def test_ids_outside_of_utf8(poisoned: Poisoned, worker_process: WorkerStarter) -> None:
    """In a process of its own: what it logs has to pass its output, too."""
    for job_id in NOT_UTF8:
        await poisoned.add(job_id)
    await poisoned.add("a-scheduler", {"rjk": b"\xff"})
    tasks = f"""
        from autoflow_worker import define_task

        async def handler(payload, ctx):
            pass

        tasks = [define_task("{QUEUE}", handler, worker_options={OPTIONS})]
    """
    for log_format in ("json", "console"):
        worker = worker_process(tasks, LOG_FORMAT=log_format)
        await poisoned.add(f"after-{log_format}")
        await poisoned.db.until_status(f"after-{log_format}", "completed")
        for job_id in NOT_UTF8:
            await poisoned.check_failed(job_id, "its id is not UTF-8")
        worker.terminate()
        assert await worker.wait() == 0, worker.report()
        for job_id in NOT_UTF8:
            await poisoned.raw.zrem(poisoned.base + b"failed", job_id)
            await poisoned.raw.delete(poisoned.base + job_id, poisoned.base + b"events")
            await poisoned.add(job_id)
        await poisoned.db.execute("DELETE FROM tasks")


async def test_the_lock_of_an_id_outside_of_utf8_is_renewed(
    run_worker: RunWorker, poisoned: Poisoned
) -> None:
    options: Any = {"lockDuration": 600, "stalledInterval": 200}
    task = define_task(QUEUE, poisoned.handler, worker_options=options)
    async with run_worker([task]):
        async with poisoned.db.connection.transaction():
            # It can't be recorded, so it is held.
            await poisoned.db.execute("LOCK TABLE tasks IN ACCESS EXCLUSIVE MODE")
            await poisoned.add(NOT_UTF8[0])
            lock: Any = poisoned.base + NOT_UTF8[0] + b":lock"
            await until(lambda: poisoned.raw.exists(lock))
            for _ in range(3):
                await until_renewed(poisoned.raw, lock)
        await poisoned.until_all_ended()
    await poisoned.check_failed(NOT_UTF8[0], "its id is not UTF-8")
