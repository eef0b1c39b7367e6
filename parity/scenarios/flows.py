"""Flows: parents that wait for children."""

from parity.scenario import Json, scenario
from parity.side import Side

HOUR = 3_600_000
FAILS: Json = {"unrecoverable": "child broke"}
SEES: Json = {"call": [["getChildrenValues"]]}


@scenario(queues=["child"])
async def two_levels(s: Side) -> None:
    children = [s.child(f"c{n}", {"return": n}, queue="child") for n in range(3)]
    await s.flow("p", SEES, children=children)
    await s.start()
    await s.ended("p")


@scenario(queues=["child", "grandchild"])
async def deep(s: Side) -> None:
    """Five levels over three queues."""
    below = s.child("e", {"return": "e"}, queue="grandchild")
    for name, queue in (("d", "child"), ("c", ""), ("b", "child")):
        below = s.child(name, SEES, queue=queue, children=[below])
    await s.flow("a", SEES, children=[below])
    await s.start()
    await s.ended("a")


@scenario(queues={"child": {"concurrency": 5}})
async def wide(s: Side) -> None:
    children = [s.child(f"c{n}", {"return": n}, queue="child") for n in range(40)]
    await s.flow("p", SEES, children=children)
    await s.start()
    await s.ended("p")


@scenario()
async def in_one_queue(s: Side) -> None:
    await s.flow("p", SEES, children=[s.child("a", {"return": 1}), s.child("b", {"return": 2})])
    await s.start()
    await s.ended("p")


@scenario(queues=["child"])
async def with_priorities_and_delays(s: Side) -> None:
    children = [
        s.child("a", queue="child", priority=2),
        s.child("b", queue="child", priority=1),
        s.child("c", queue="child", delay=80),
    ]
    await s.flow("p", children=children, priority=3)
    await s.flow("delayed", children=[s.child("d", queue="child")], delay=1000)
    await s.start()
    await s.ended("p", "delayed")


@scenario(queues=["child"])
async def a_failed_child_stops_its_parent(s: Side) -> None:
    """Without an option, the parent waits for ever."""
    children = [s.child("a", FAILS, queue="child"), s.child("b", {"return": 1}, queue="child")]
    await s.flow("p", SEES, children=children)
    await s.start()
    await s.ended("a", "b", queue="child")


@scenario(queues=["child"], short=True)
async def fail_parent_on_failure(s: Side) -> None:
    children = [
        s.child("a", FAILS, queue="child", failParentOnFailure=True),
        s.child("b", {"return": 1}, queue="child", delay=HOUR),
    ]
    await s.flow("p", SEES, children=children)
    await s.start()
    await s.ended("p")
    await s.promote("b", queue="child")
    await s.ended("b", queue="child")


@scenario(queues=["child", "grandchild"])
async def fail_parent_on_failure_all_the_way_up(s: Side) -> None:
    up: Json = {"failParentOnFailure": True}
    below = s.child("c", FAILS, queue="grandchild", **up)
    middle = s.child("b", SEES, queue="child", children=[below], **up)
    await s.flow("a", SEES, children=[middle])
    await s.start()
    await s.ended("a")


@scenario(queues=["child"])
async def ignore_dependency_on_failure(s: Side) -> None:
    sees = {"call": [["getChildrenValues"], ["getIgnoredChildrenFailures"]]}
    children = [
        s.child("a", FAILS, queue="child", ignoreDependencyOnFailure=True),
        s.child("b", {"return": 1}, queue="child"),
    ]
    await s.flow("p", sees, children=children)
    await s.start()
    await s.ended("p")


@scenario(queues=["child"])
async def remove_dependency_on_failure(s: Side) -> None:
    children = [
        s.child("a", FAILS, queue="child", removeDependencyOnFailure=True),
        s.child("b", {"return": 1}, queue="child"),
    ]
    await s.flow("p", SEES, children=children)
    await s.start()
    await s.ended("p")


@scenario(queues=["child"])
async def continue_parent_on_failure(s: Side) -> None:
    """The parent runs at once, while other children still wait."""
    children = [
        s.child("a", FAILS, queue="child", continueParentOnFailure=True),
        s.child("b", {"return": 1}, queue="child", delay=HOUR),
    ]
    await s.flow("p", SEES, children=children)
    await s.start()
    await s.ended("p")
    await s.promote("b", queue="child")
    await s.ended("b", queue="child")


@scenario(queues=["child"])
async def continue_parent_that_waits_again(s: Side) -> None:
    children = [
        s.child("a", FAILS, queue="child", continueParentOnFailure=True),
        s.child("b", {"return": 1}, queue="child", delay=HOUR),
    ]
    sees = {"call": [["getFailedChildrenValues"], ["getChildrenValues"]]}
    await s.flow("p", {"park": True}, sees, children=children)
    await s.start()
    await s.until_events("waiting-children", 2)
    await s.promote("b", queue="child")
    await s.ended("p")


@scenario(queues=["child"])
async def a_child_that_needs_two_attempts(s: Side) -> None:
    child = s.child("a", {"throw": "x"}, {"return": 2}, queue="child", attempts=2, backoff=30)
    await s.flow("p", SEES, children=[child])
    await s.start()
    await s.ended("p")


@scenario(queues=["child"])
async def a_child_that_is_removed_when_done(s: Side) -> None:
    child = s.child("a", {"return": 1}, queue="child", removeOnComplete=True)
    await s.flow("p", SEES, children=[child], removeOnComplete=True)
    await s.start()
    await s.ended("p")


@scenario(queues=["child"])
async def a_parent_that_fails(s: Side) -> None:
    await s.flow(
        "p", {"throw": "x"}, SEES, children=[s.child("a", {"return": 1}, queue="child")], attempts=2
    )
    await s.start()
    await s.ended("p")


@scenario(queues=["child"])
async def a_child_that_is_removed_by_the_api(s: Side) -> None:
    children = [
        s.child("a", queue="child", delay=HOUR),
        s.child("b", {"return": 1}, queue="child"),
    ]
    await s.flow("p", SEES, children=children)
    await s.start()
    await s.job("a", "remove", queue="child")
    await s.ended("p")


@scenario(queues=["child"])
async def a_failed_child_that_the_api_retries(s: Side) -> None:
    await s.flow("p", SEES, children=[s.child("a", FAILS, {"return": 2}, queue="child")])
    await s.start()
    await s.ended("a", queue="child")
    await s.job("a", "retry", "failed", queue="child")
    await s.ended("p")
