"""The order in which jobs are picked up."""

from parity.scenario import scenario
from parity.side import Side


@scenario()
async def fifo(s: Side) -> None:
    for name in "abcdef":
        await s.add(name)
    await s.start()
    await s.ended(*"abcdef")


@scenario(short=True)
async def lifo(s: Side) -> None:
    for name in "abc":
        await s.add(name, lifo=True)
    await s.add("d")
    await s.start()
    await s.ended(*"abcd")


@scenario()
async def lifo_retried(s: Side) -> None:
    """A job that is added lifo goes first when it is retried, too."""
    await s.add("a", {"throw": "x"}, {}, lifo=True, attempts=2)
    await s.add("b", {"throw": "x"}, {}, attempts=2)
    await s.add("c")
    await s.start()
    await s.ended(*"abc")


@scenario(short=True)
async def by_number(s: Side) -> None:
    for name, priority in {"a": 10, "b": 1, "c": 2_097_151, "d": 1, "e": 0, "f": 3}.items():
        await s.add(name, priority=priority)
    await s.start()
    await s.ended(*"abcdef")


@scenario()
async def changed(s: Side) -> None:
    for name in "abc":
        await s.add(name, priority=5)
    await s.job("c", "changePriority", {"priority": 1})
    await s.job("a", "changePriority", {"priority": 0})
    await s.start()
    await s.ended(*"abc")


@scenario()
async def changed_lifo(s: Side) -> None:
    for name in "abc":
        await s.add(name)
    await s.job("a", "changePriority", {"lifo": True})
    await s.job("b", "changePriority", {"priority": 9})
    await s.start()
    await s.ended(*"abc")


@scenario()
async def in_bulk(s: Side) -> None:
    jobs = [
        {
            "name": s.scenario.queue,
            "data": {"script": [{"return": n}]},
            "opts": {"jobId": s.id(f"job{n}"), "priority": n % 3},
        }
        for n in range(12)
    ]
    await s.queue("addBulk", jobs)
    await s.start()
    await s.ended(*(f"job{n}" for n in range(12)))


@scenario(concurrency=4)
async def several_at_once(s: Side) -> None:
    """Four slots, twelve jobs: who is last comes last."""
    for n in range(12):
        await s.add(f"job{n}", {"sleep": 30, "return": n}, priority=n + 1)
    await s.start()
    await s.ended(*(f"job{n}" for n in range(12)))
    active = [event["jobId"] for event in await s.events() if event["event"] == "active"]
    s.fact("the first four", sorted(active[:4]))
    s.fact("all", len(active))
