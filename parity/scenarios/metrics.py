"""Metrics, counts, and what else a dashboard reads."""

from parity.scenario import scenario
from parity.side import Side

# A minute may turn in the middle of a scenario.
BY_THE_MINUTE = ("q/metrics:*/prevCount", "q/metrics:*:data")


@scenario(metrics={"maxDataPoints": 10}, varies=BY_THE_MINUTE)
async def of_finished_jobs(s: Side) -> None:
    for name in "abc":
        await s.add(name)
    await s.add("d", {"throw": "x"})
    await s.start()
    await s.ended(*"abcd")
    for state in ("completed", "failed"):
        s.fact(state, (await s.queue("getMetrics", state))["meta"]["count"])


@scenario(metrics={"maxDataPoints": 10}, varies=BY_THE_MINUTE)
async def of_retried_jobs(s: Side) -> None:
    await s.add("a", {"throw": "x"}, {}, attempts=2)
    await s.add("b", {"throw": "x"}, {"throw": "y"}, attempts=2, backoff=20)
    await s.start()
    await s.ended("a", "b")


@scenario()
async def counts(s: Side) -> None:
    await s.add("a")
    await s.add("b", {"throw": "x"})
    await s.add("c", delay=3_600_000)
    await s.start()
    await s.ended("a", "b")
    s.fact("counts", await s.queue("getJobCounts"))
    s.fact("completed", [s.short(job["id"]) for job in await s.queue("getCompleted")])


@scenario()
async def what_the_api_reads_of_a_job(s: Side) -> None:
    await s.add("a", {"progress": 1, "throw": "x"}, {"return": {"n": 1}}, attempts=2, priority=2)
    await s.start()
    await s.ended("a")
    job = await s.queue("getJob", s.id("a"))
    times = {"processedOn", "finishedOn", "stacktrace"}
    s.fact("job", {name: value for name, value in job.items() if name not in times})


@scenario(concurrency=3)
async def workers(s: Side) -> None:
    await s.start()
    s.fact("workers", await s.queue("getWorkersCount"))


@scenario()
async def markers(s: Side) -> None:
    """An idle worker leaves no marker behind but that of the next delayed job."""
    await s.add("a", delay=3_600_000)
    await s.add("b")
    await s.start()
    await s.ended("b")
    s.fact("markers", await s.redis.zcard(s.key("marker")))
