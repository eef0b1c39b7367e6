"""What Node's QueueEvents says, heard by a listener beside the worker."""

from typing import Any

from parity.scenario import Json, scenario
from parity.side import Side


def story(s: Side) -> list[list[Any]]:
    """What was heard of the jobs, without what is said of the queue."""
    return [[event.name, event.args] for event in s.heard() if "jobId" in event.args]


async def heard(s: Side, *ends: str) -> None:
    """Wait until the listener knows the ends of these jobs."""

    async def complete() -> bool:
        over = [event.args.get("jobId") for event in s.heard() if event.name in ENDS]
        return all(s.id(name) in over for name in ends)

    await s.wait(complete, "the last event")
    s.fact("heard", story(s))


ENDS = ("completed", "failed")


@scenario(short=True)
async def of_a_job_that_completes(s: Side) -> None:
    await s.listen()
    await s.add("a", {"progress": {"pct": 50}, "log": "x", "return": {"sent": True}})
    await s.start()
    await heard(s, "a")


@scenario()
async def of_a_job_that_fails(s: Side) -> None:
    await s.listen()
    fails: Json = {"throw": "no"}
    await s.add("a", fails, fails, attempts=2, backoff=30)
    await s.start()
    await heard(s, "a")


@scenario()
async def of_a_delayed_job(s: Side) -> None:
    await s.listen()
    await s.add("a", {"delay": 50}, {"return": 1}, delay=100)
    await s.start()
    await heard(s, "a")


@scenario(queues=["child"])
async def of_a_parent(s: Side) -> None:
    await s.listen()
    await s.flow("p", {"return": 1}, children=[s.child("c", {"return": 2}, queue="child")])
    await s.start()
    await heard(s, "p")


@scenario()
async def of_a_job_that_is_waited_for(s: Side) -> None:
    """`job.waitUntilFinished`, by way of the job's own keys."""
    await s.add("a", {"return": {"a": 1}})
    await s.add("b", {"throw": "no"})
    await s.start()
    await s.ended("a", "b")
    for name in "ab":
        for question in ("isCompleted", "isFailed", "isActive", "isWaiting", "getState"):
            s.fact(f"{name} {question}", await s.job(name, question))


@scenario()
async def drained(s: Side) -> None:
    """The queue says once that nothing is left."""
    for name in "abc":
        await s.add(name)
    await s.start()
    await s.ended(*"abc")
    s.fact("drained", [e["event"] for e in await s.events()].count("drained"))


@scenario()
async def trimmed(s: Side) -> None:
    await s.add("a")
    await s.start()
    await s.ended("a")
    await s.queue("trimEvents", 0)
    await s.add("b")
    await s.ended("b")
