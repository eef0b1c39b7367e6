"""Handlers that add children to their own job, and wait for them."""

from parity.scenario import Json, scenario
from parity.side import Side

HOUR = 3_600_000
SEES: Json = {"call": [["getChildrenValues"]]}


@scenario(queues=["child"], short=True)
async def added_and_waited_for(s: Side) -> None:
    children = [s.child(f"c{n}", {"return": n}, queue="child", delay=HOUR) for n in range(2)]
    await s.add("p", {"children": children, "park": True}, SEES)
    await s.start()
    await s.until("waiting-children", "p")
    await s.promote("c0", "c1", queue="child")
    await s.ended("p")


@scenario(queues=["child"])
async def waited_for_twice(s: Side) -> None:
    first = s.child("a", {"return": 1}, queue="child", delay=HOUR)
    second = s.child("b", {"return": 2}, queue="child", delay=HOUR)
    steps = [{"children": [first], "park": True}, {"children": [second], "park": True}, SEES]
    await s.add("p", *steps, attempts=2)
    await s.start()
    await s.until("waiting-children", "p")
    await s.promote("a", queue="child")
    await s.until_count("delayed", 1, queue="child")
    await s.until("waiting-children", "p")
    await s.promote("b", queue="child")
    await s.ended("p")


@scenario()
async def none_to_wait_for(s: Side) -> None:
    """`moveToWaitingChildren` says no, and the job goes on."""
    await s.add("p", {"park": True, "return": "went on"})
    await s.start()
    await s.ended("p")


@scenario(queues=["child"])
async def completed_with_pending_children(s: Side) -> None:
    """BullMQ refuses the completion, and the attempt fails with BullMQ's reason."""
    child = s.child("c", {"return": 1}, queue="child", delay=HOUR)
    await s.add("p", {"children": [child], "return": "too early"})
    await s.start()
    await s.ended("p")
    await s.promote("c", queue="child")
    await s.ended("c", queue="child")


@scenario(queues=["child"])
async def completed_after_a_refusal(s: Side) -> None:
    child = s.child("c", {"return": 1}, queue="child", delay=HOUR)
    await s.add("p", {"children": [child], "return": 1}, SEES, attempts=2, backoff=HOUR)
    await s.start()
    await s.until("delayed", "p")
    await s.promote("c", queue="child")
    await s.ended("c", queue="child")
    await s.promote("p")
    await s.ended("p")


@scenario(queues=["child"])
async def counted(s: Side) -> None:
    child = s.child("c", {"return": 1}, queue="child")
    late = s.child("d", queue="child", delay=HOUR)
    counts = {"call": [["getDependenciesCount"], ["getDependencies"]]}
    await s.flow("p", counts, children=[child, late])
    await s.start()
    await s.ended("c", queue="child")
    await s.job("d", "remove", queue="child")
    await s.ended("p")


@scenario(queues=["child"])
async def that_fail_their_waiting_parent(s: Side) -> None:
    options: Json = {"delay": HOUR, "failParentOnFailure": True}
    child = s.child("c", {"unrecoverable": "broke"}, queue="child", **options)
    await s.add("p", {"children": [child], "park": True}, SEES)
    await s.start()
    await s.until("waiting-children", "p")
    await s.promote("c", queue="child")
    await s.ended("p")


@scenario(queues=["child"])
async def added_with_priority(s: Side) -> None:
    children = [s.child(f"c{n}", {"sleep": 50}, queue="child", priority=3 - n) for n in range(3)]
    await s.add("p", {"children": children, "park": True}, SEES, priority=2)
    await s.start()
    await s.ended("p")
