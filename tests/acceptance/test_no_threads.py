"""A machine that gives no thread: sync jobs wait or go back, and none fails for it."""

from collections import Counter

from redis.asyncio import Redis

from tests.support.api import Api
from tests.support.node import Scheduled
from tests.support.plain import state
from tests.support.process import WorkerStarter
from tests.support.until import until

QUEUE = "q"

# The stack of a thread is as large as all that the process may add to its memory.
TASKS = """
    import resource, threading, time
    from autoflow_worker import TaskOptions, define_task

    STACK = 256 * 1024 * 1024

    def leave_room_for(threads):
        with open("/proc/self/statm") as statm:
            used = int(statm.read().split()[0]) * resource.getpagesize()
        threading.stack_size(STACK)
        limit = used + threads * STACK + STACK // 2
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))

    def handler(payload, ctx):
        time.sleep(0.01)
        return threading.current_thread().native_id

    async def other(payload, ctx):
        if "room" in payload:
            leave_room_for(payload["room"])
        return "fine"

    tasks = [
        define_task("q", handler, TaskOptions(concurrency=500)),
        define_task("other", other),
    ]
"""


async def test_few_threads_cost_no_job(
    worker_process: WorkerStarter, api: Api, redis: Redis, prefix: str
) -> None:
    worker = worker_process(TASKS)
    await api.until_both_say("other", await api.schedule("other", {"room": 2}), "completed")
    jobs = [Scheduled(attempts=1, opts={"removeOnComplete": 1_000}) for _ in range(500)]
    await api.db.insert_tasks(QUEUE, {job.task_id: {} for job in jobs})
    await api.node.schedule_all(QUEUE, jobs)

    async def all_ended() -> bool:
        statuses = await api.db.statuses()
        return statuses["completed"] + statuses["failed"] == 501

    await until(all_ended, 50, message=worker.report)
    assert await api.db.statuses() == Counter(completed=501)
    rows = (await api.db.rows()).values()
    threads = {row["result"]["output"] for row in rows if row["queueName"] == QUEUE}
    assert len(threads) < 10, "there were threads enough, so this tested nothing"
    worker.terminate()
    assert await worker.wait() == 0, worker.report()


async def test_no_thread_at_all_ends_the_service_and_fails_no_job(
    worker_process: WorkerStarter, api: Api, redis: Redis, prefix: str
) -> None:
    worker = worker_process(TASKS)
    await api.until_both_say("other", await api.schedule("other", {"room": 0}), "completed")
    ids = [await api.schedule(QUEUE, attempts=1) for _ in range(20)]
    other = await api.schedule("other")
    assert await worker.wait() == 1, worker.report()
    assert "broke 5 times in a row" in worker.stderr
    assert "can't start new thread" in worker.stderr
    await api.until_both_say("other", other, "completed")
    for task_id in ids:
        assert await state(redis, prefix, QUEUE, task_id) in ("prioritized", "delayed")
        assert (await api.db.task(task_id)).status == "pending"
