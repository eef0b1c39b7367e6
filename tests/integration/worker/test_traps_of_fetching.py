"""The traps of bullmq 3.4's own `Worker` in waiting for jobs, and in fetching them.

docs/internals.md lists them. Where it can be shown, a test first runs the official Worker into
the trap, on the queue `plain`, and then this worker past it, on the queue `ours`.
"""

import itertools
from functools import partial
from typing import Any

from bullmq import Job, Worker
from redis.asyncio import Redis

from autoflow_worker import define_task
from tests.support.node import Node
from tests.support.plain import (
    blocked,
    clients,
    producer,
    state,
    until_idle,
)
from tests.support.proxy import Proxy
from tests.support.servers import OwnServer
from tests.support.stage import Stage, holds
from tests.support.until import until


async def test_01_an_idle_read_is_not_taken_for_a_dead_connection(stage: Stage) -> None:
    # The trap is a read timeout no longer than the blocking read: 5 s both, here less of both.
    url = f"{stage.redis_url}?socket_timeout=0.3"
    async with stage.run_plain(url=url, drainDelay=1):
        await until_idle(stage.redis, stage.plain_name)
        # It hangs up on a server that is well, and sleeps for seconds before it listens again.
        await until(partial(nobody_listens, stage))

    task = define_task("ours", stage.our_handler, worker_options={"drainDelay": 0.3})
    async with stage.run_ours(task, url=url):
        first = await until_idle(stage.redis, stage.our_name)

        async def has_read_twice_more() -> bool:
            [now] = await clients(stage.redis, stage.our_name)
            return int(now["tot-cmds"]) >= int(first["tot-cmds"]) + 2

        await until(has_read_twice_more)
        assert [c["id"] for c in await clients(stage.redis, stage.our_name)] == [first["id"]]
        await stage.ours.add("ours", {})
        await until(lambda: stage.ended)


async def nobody_listens(stage: Stage) -> bool:
    return not await blocked(stage.redis, stage.plain_name)


async def test_07_a_job_costs_one_round_trip(own_redis: OwnServer, stage: Stage) -> None:
    jobs, url, prefix = 80, own_redis.url, stage.prefix
    async with Redis.from_url(url, decode_responses=True) as redis:
        async with producer("plain", url, prefix) as queue:
            await queue.addBulk([{"name": "plain", "data": {}} for _ in range(jobs)])
        await redis.config_resetstat()
        async with stage.run_plain(url=url):
            await until(partial(holds, redis, stage.key("plain", "completed"), jobs))
        plain = await scripts_run(redis)

        async with producer("ours", url, prefix) as queue:
            await queue.addBulk([{"name": "ours", "data": {}} for _ in range(jobs)])
        await redis.config_resetstat()
        task = define_task("ours", stage.our_handler, worker_options={"stalledInterval": 60_000})
        async with stage.run_ours(task, url=url):
            await until(partial(holds, redis, stage.key("ours", "completed"), jobs))
        ours = await scripts_run(redis)
    assert plain >= 2 * jobs
    # Some twenty more examine the server at the start.
    assert jobs <= ours < 1.5 * jobs


async def scripts_run(redis: Redis) -> int:
    stats = await redis.info("commandstats")
    calls: int = stats["cmdstat_evalsha"]["calls"]
    return calls


async def test_08_delays_are_waited_for_to_the_millisecond(stage: Stage) -> None:
    delay = 1100
    async with Proxy(stage.redis_url) as proxy, stage.run_plain(url=proxy.url, drainDelay=60):
        await until_idle(stage.redis, stage.plain_name)
        await stage.plain.add("plain", {}, {"delay": delay})
        await until(lambda: stage.ended)
        waits = [command[2] for command in proxy.commands if command[0] == b"BZPOPMIN"]
    assert all(seconds.isdigit() for seconds in waits)  # whole seconds
    assert len(waits) > 1

    stage.next_act()
    task = define_task("ours", stage.our_handler, worker_options={"drainDelay": 60})
    async with Proxy(stage.redis_url) as proxy, stage.run_ours(task, url=proxy.url):
        await until_idle(stage.redis, stage.our_name)
        job = await stage.ours.add("ours", {}, {"jobId": "our-job", "delay": delay})
        await until(lambda: stage.ended)
        # Its own clock ends the wait.
        assert any(b"UNBLOCK" in command for command in proxy.commands)
    assert await started_at(stage, "ours", job) >= job.timestamp + delay


async def started_at(stage: Stage, queue: str, job: Job) -> int:
    return int(await stage.redis.hget(stage.key(queue, job.id), "processedOn") or 0)


async def test_09_the_next_job_starts_when_the_rate_limit_ends(stage: Stage) -> None:
    duration = 200
    options: Any = {"limiter": {"max": 1, "duration": duration}, "drainDelay": 60}

    async def oversleeps() -> bool:
        """Whether the limit has ended, jobs wait, and the worker does so too."""
        limited = not await stage.is_missing(stage.key("plain", "limiter"))
        waiting = await stage.redis.llen(stage.key("plain", "wait"))
        return not limited and waiting > 0 and bool(await blocked(stage.redis, stage.plain_name))

    for _ in range(3):
        await stage.plain.add("plain", {})
    async with stage.run_plain(**options):
        await until(lambda: stage.ended)
        await until(oversleeps)

    stage.next_act()
    jobs = [await stage.ours.add("ours", {}, {"jobId": f"job-{n}"}) for n in range(3)]
    task = define_task("ours", stage.our_handler, worker_options=options)
    async with stage.run_ours(task):
        await until(lambda: len(stage.ended) == 3)
    began = [await started_at(stage, "ours", job) for job in jobs]
    gaps = [later - earlier for earlier, later in itertools.pairwise(began)]
    assert all(duration - 2 <= gap for gap in gaps)


async def test_10_stalled_jobs_are_looked_for_at_once(stage: Stage) -> None:
    for name, queue in (("plain", stage.plain), ("ours", stage.ours)):
        await queue.add(name, {}, {"jobId": f"{name}-job"})
        # A worker claims it, looks for stalled jobs, and dies.
        options = {"lockDuration": 50, "stalledInterval": 50}
        client = Redis.from_url(stage.redis_url, decode_responses=True)
        dead = Worker(name, None, {"connection": client, "prefix": stage.prefix, **options})
        assert await dead.getNextJob("the dead one's token") is not None
        await dead.runStalledJobsCheck()
        await dead.close()
        await until(partial(stage.is_missing, stage.key(name, f"{name}-job:lock")))
        await until(partial(stage.is_missing, stage.key(name, "stalled-check")))

    async with stage.run_plain(stalledInterval=600_000):
        await until_idle(stage.redis, stage.plain_name)
        # Nobody would look at it for ten minutes.
        assert await stage.is_missing(stage.key("plain", "stalled-check"))
        assert await state(stage.redis, stage.prefix, "plain", "plain-job") == "active"

    task = define_task("ours", stage.our_handler, worker_options={"stalledInterval": 600_000})
    async with stage.run_ours(task):
        await until(lambda: stage.ended == ["ours-job"])


async def test_16_nodes_get_workers_sees_the_workers(stage: Stage, node: Node) -> None:
    async with stage.run_plain(), stage.run_plain(name="named"):
        await until_idle(stage.redis, stage.plain_name)
        await until_idle(stage.redis, f"{stage.plain_name}:w:named")
        assert await node.get_workers("plain") == []

    unnamed = define_task("ours", stage.our_handler)
    named = define_task("ours", stage.our_handler, worker_options={"name": "the-first"})
    async with stage.run_ours(unnamed), stage.run_ours(named):
        seen = await node.get_workers("ours")
        # One connection each, though each worker has two.
        assert len(seen) == 2
        assert {worker["rawname"] for worker in seen} == {
            stage.our_name,
            f"{stage.our_name}:w:the-first",
        }
        assert {worker["name"] for worker in seen} == {"ours"}
    assert await node.get_workers("ours") == []
