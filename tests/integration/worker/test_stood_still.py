"""A worker that stood still past its lock, with a claimed job on its way to it."""

from autoflow_worker import TaskContext, TaskDefinition, define_task
from tests.support.api import Api
from tests.support.proxy import Proxy
from tests.support.running import RunWorker, running

QUEUE = "reports-render"


def task_that_notes(runs: list[str]) -> TaskDefinition[dict[str, object]]:
    async def handler(payload: dict[str, object], ctx: TaskContext) -> None:
        runs.append(ctx.task_id)

    return define_task(
        QUEUE, handler, worker_options={"lockDuration": 1500, "stalledInterval": 500}
    )


async def test_a_claim_that_arrives_after_its_lock_expired_changes_nothing(
    api: Api, run_worker: RunWorker, redis_url: str, database_url: str, prefix: str
) -> None:
    of_the_late: list[str] = []
    of_the_other: list[str] = []
    first = await api.schedule(QUEUE)
    async with Proxy(redis_url) as proxy:
        fetching = proxy.hold_reply_to(b"lockDuration")
        urls = {"redis_url": proxy.url, "database_url": database_url, "prefix": prefix}
        async with running([task_that_notes(of_the_late)], **urls):
            await fetching.sprung.wait()
            async with run_worker([task_that_notes(of_the_other)]):
                done = await api.until_both_say(QUEUE, first, "completed")
            fetching.release()
            # It goes on with the next job, so it is done with the first.
            second = await api.schedule(QUEUE)
            await api.until_both_say(QUEUE, second, "completed")
    assert (of_the_late, of_the_other) == ([second], [first])
    assert await api.db.row(first) == done
