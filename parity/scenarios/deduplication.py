"""Jobs that are told apart by a deduplication id."""

from parity.scenario import scenario
from parity.side import Side

TTL = 3000


@scenario(short=True)
async def simple(s: Side) -> None:
    """While one is unfinished, others are dropped; afterwards a new one runs."""
    for name in "abc":
        await s.add(name, {"return": name}, deduplication={"id": "d"})
    await s.start()
    await s.ended("a")
    await s.add("d", {"return": "d"}, deduplication={"id": "d"})
    await s.ended("d")


@scenario()
async def simple_with_a_failure(s: Side) -> None:
    await s.add("a", {"throw": "x"}, {"throw": "x"}, attempts=2, deduplication={"id": "d"})
    await s.start()
    await s.ended("a")
    await s.add("b", deduplication={"id": "d"})
    await s.ended("b")


@scenario()
async def while_it_runs(s: Side) -> None:
    await s.start()
    await s.add("a", {"hold": True, "return": 1}, deduplication={"id": "d"})
    await s.until("active", "a")
    await s.add("b", deduplication={"id": "d"})
    await s.let_go("a")
    await s.ended("a")


@scenario()
async def throttled(s: Side) -> None:
    """With a time to live the id stays for so long, whatever becomes of the job."""
    mode = {"id": "d", "ttl": 3_600_000}
    await s.add("a", deduplication=mode)
    await s.start()
    await s.ended("a")
    await s.add("b", deduplication=mode)
    await s.add("c")
    await s.ended("c")
    s.fact("kept", s.short(await s.queue("getDeduplicationJobId", "d")))


@scenario()
async def debounced(s: Side) -> None:
    """The last of a burst runs, with the last data."""
    mode = {"id": "d", "ttl": TTL, "extend": True, "replace": True}
    await s.start()
    for name in "abc":
        await s.add(name, {"return": name}, delay=TTL, deduplication=mode)
    await s.ended("c")


@scenario()
async def extended(s: Side) -> None:
    mode = {"id": "d", "ttl": 3_600_000, "extend": True}
    for name in "abc":
        await s.add(name, {"return": name}, deduplication=mode)
    await s.start()
    await s.ended("a")


@scenario()
async def replaced(s: Side) -> None:
    mode = {"id": "d", "replace": True}
    for name in "ab":
        await s.add(name, {"return": name}, delay=200, deduplication=mode)
    await s.start()
    await s.ended("b")


@scenario(versions=(6,))
async def keep_last_if_active(s: Side) -> None:
    """6.x keeps what comes last while one runs, and runs it afterwards."""
    await s.start()
    mode = {"id": "d", "keepLastIfActive": True}
    await s.add("a", {"hold": True, "return": 1}, deduplication=mode)
    await s.until("active", "a")
    for name in "bc":
        await s.add(name, {"return": name}, deduplication=mode)
    await s.let_go("a")
    await s.until_events("completed", 2)


@scenario()
async def with_priority(s: Side) -> None:
    for name, priority in {"a": 5, "b": 1}.items():
        await s.add(name, priority=priority, deduplication={"id": "d"})
    await s.start()
    await s.ended("a")


@scenario()
async def removed_by_the_api(s: Side) -> None:
    await s.start()
    await s.add("a", {"hold": True}, deduplication={"id": "d"})
    await s.until("active", "a")
    await s.queue("removeDeduplicationKey", "d")
    await s.add("b", deduplication={"id": "d"})
    await s.let_go("a")
    await s.ended("a", "b")
