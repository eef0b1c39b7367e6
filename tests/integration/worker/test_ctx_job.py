"""What a handler does with `ctx.job`, against what Node's `Job` says of the same job."""

import re
from collections.abc import Sequence
from typing import Any

import pytest

from autoflow_worker import JobHandle, TaskContext, TaskDefinition, TaskOptions, define_task
from tests.support.api import Api, Json
from tests.support.handlers import Gate
from tests.support.node import KEEP_ALL, Node, NodeError
from tests.support.running import RunWorker
from tests.support.until import until

QUEUE = "parents"

# Methods that only ask, with their arguments.
QUESTIONS: list[tuple[str, Sequence[Any]]] = [
    ("getChildrenValues", []),
    ("getIgnoredChildrenFailures", []),
    ("getFailedChildrenValues", []),
    ("getDependencies", []),
    ("getDependencies", [{"processed": {}}]),
    ("getDependencies", [{"failed": {"count": 2}, "unprocessed": {"cursor": 0, "count": 5}}]),
    ("getDependencies", [{"ignored": {"cursor": 0}, "processed": {"count": 1}}]),
    ("getDependenciesCount", []),
    ("getDependenciesCount", [{"processed": True, "failed": False, "unprocessed": True}]),
    ("getState", []),
    ("isActive", []),
    ("isWaiting", []),
    ("isDelayed", []),
    ("isWaitingChildren", []),
    ("isCompleted", []),
    ("isFailed", []),
]


# Those that are to fail their parent only keep it from completing, once it runs.
CHILDREN: list[tuple[str, Json, Json]] = [
    ("a", {"returns": {"number": 1.5, "none": None}}, {}),
    ("b", {"returns": "ü\U0001f600"}, {}),
    ("c", {"throws": "no luck"}, {"ignoreDependencyOnFailure": True}),
    *((child_id, {"throws": "oh"}, {"failParentOnFailure": True}) for child_id in "def"),
]


async def child(payload: Json, ctx: TaskContext) -> object:
    if "throws" in payload:
        raise ValueError(payload["throws"])
    return payload["returns"]


def children(handler: Any = child) -> TaskDefinition[Any]:
    return define_task("children", handler, TaskOptions(concurrency=1))


def a_child(job_id: str, data: Json, queue: str = "children", **options: Any) -> Json:
    return {"name": "child", "queueName": queue, "data": data, "opts": {"jobId": job_id, **options}}


def in_order(answer: Any) -> Any:
    """The same without the order of Redis' sets and hashes."""
    if isinstance(answer, dict):
        return {key: in_order(value) for key, value in answer.items()}
    return sorted(answer) if isinstance(answer, list) else answer


async def running_job(gate: Gate) -> JobHandle:
    """The job of a handler that waits at its gate."""
    await until(lambda: gate.contexts)
    return gate.contexts[-1].job


def flow(*its_children: Json, **options: Any) -> Json:
    about = {"jobId": "the-parent", **KEEP_ALL, **options}
    return {"name": QUEUE, "queueName": QUEUE, "opts": about, "children": [*its_children]}


async def test_a_parent_asks_and_gets_what_node_gets(
    run_worker: RunWorker, node: Node, prefix: str
) -> None:
    gate = Gate()
    async with run_worker([define_task(QUEUE, gate), children()]):
        await node.add(QUEUE, {})
        job = await running_job(gate)
        family: Any = {"parent": {"id": job.id, "queue": job.queueQualifiedName}}
        for child_id, data, options in CHILDREN:
            await node.add("children", data, jobId=child_id, **options, **family)
        await node.add("others", {}, **family)

        async def has_all() -> bool:
            counts = await job.getDependenciesCount()
            return counts == {"processed": 2, "unprocessed": 1, "ignored": 1, "failed": 3}

        await until(has_all)
        for method, args in QUESTIONS:
            ours = await getattr(job, method)(*args)
            theirs = await node.job(QUEUE, job.id, method, *args)
            assert in_order(ours) == in_order(theirs), (method, args)
        assert await job.getIgnoredChildrenFailures() == {f"{prefix}:children:c": "no luck"}
        # Node's second page of these is always empty.
        first = await job.getDependencies({"failed": {"count": 2}})
        cursor = first["nextFailedCursor"]
        second = await job.getDependencies({"failed": {"cursor": cursor, "count": 2}})
        found = [*first["failed"], *second["failed"]]
        assert sorted(found) == [f"{prefix}:children:{n}" for n in "def"]
        assert (job.queueName, job.prefix) == (QUEUE, prefix)
        assert job.queueQualifiedName == f"{prefix}:{QUEUE}"
        gate.opened.set()
        await until(lambda: node.get_state(QUEUE, job.id))


async def test_node_sees_what_a_handler_tells(run_worker: RunWorker, node: Node) -> None:
    options: Any = {"keepLogs": 2, "priority": 5}
    job_id = await node.add(QUEUE, {"n": 1}, **options)
    gate = Gate()
    async with run_worker([define_task(QUEUE, gate)]):
        job = await running_job(gate)
        assert [await job.log(line) for line in ("one", "two", "three")] == [1, 2, 2]
        assert await node.queue(QUEUE, "getJobLogs", job_id) == {
            "logs": ["two", "three"],
            "count": 2,
        }
        await job.clearLogs(1)
        assert (await node.queue(QUEUE, "getJobLogs", job_id))["logs"] == ["three"]
        await job.clearLogs()
        assert (await node.queue(QUEUE, "getJobLogs", job_id))["logs"] == []
        await job.updateProgress({"at": 50})
        await job.updateData({"n": 2})
        await job.changePriority({"priority": 7})
        seen = await node.get_job(QUEUE, job_id)
        assert seen is not None
        assert (seen["progress"], seen["data"], seen["priority"]) == ({"at": 50}, {"n": 2}, 7)
        assert (job.progress, job.data, job.priority) == ({"at": 50}, {"n": 2}, 7)
        gate.opened.set()


REFUSED: list[tuple[str, Sequence[Any]]] = [
    ("promote", []),
    ("retry", ["failed"]),
    ("remove", []),
    ("moveToWait", ["another-token"]),
    ("moveToDelayed", [0, "another-token"]),
    ("moveToWaitingChildren", ["another-token"]),
]


async def test_what_bullmq_refuses_it_refuses_in_nodes_words(
    run_worker: RunWorker, node: Node
) -> None:
    gate = Gate()
    async with run_worker([define_task(QUEUE, gate)]):
        await node.add(QUEUE, {})
        job = await running_job(gate)
        family: Any = {"parent": {"id": job.id, "queue": job.queueQualifiedName}}
        await node.add("others", {}, **family)
        for method, args in REFUSED:
            with pytest.raises(NodeError) as theirs:
                await node.job(QUEUE, job.id, method, *args)
            words = str(theirs.value).splitlines()[0].removeprefix("Error: ")
            with pytest.raises(Exception, match=re.escape(words)):
                await getattr(job, method)(*args)
        await job.removeUnprocessedChildren()
        gate.opened.set()


async def test_a_child_leaves_its_parent(run_worker: RunWorker, node: Node) -> None:
    await node.flow(flow(a_child("a", {"returns": 1}), a_child("b", {"returns": 2}, "others")))
    gate, parent = Gate(), Gate()
    async with run_worker([define_task(QUEUE, parent), children(gate)]):
        job = await running_job(gate)
        assert await job.removeChildDependency()
        assert job.parentKey is None
        assert await node.job(QUEUE, "the-parent", "getDependenciesCount") == {
            "processed": 0,
            "unprocessed": 1,
            "ignored": 0,
            "failed": 0,
        }
        gate.opened.set()


async def test_a_parent_without_its_children(run_worker: RunWorker, node: Node) -> None:
    await node.flow(
        flow(
            a_child("a", {"throws": "oh"}, continueParentOnFailure=True),
            a_child("b", {}, "others"),
        )
    )
    gate = Gate("alone")
    async with run_worker([define_task(QUEUE, gate), children()]):
        job = await running_job(gate)
        await job.removeUnprocessedChildren()
        assert await node.get_state("others", "b") == "unknown"
        assert (await job.getDependenciesCount({"unprocessed": True})) == {"unprocessed": 0}
        gate.opened.set()

        async def completed() -> bool:
            return await node.get_state(QUEUE, job.id) == "completed"

        await until(completed)


async def test_a_deduplication_key_is_removed(run_worker: RunWorker, node: Node) -> None:
    options: Any = {"deduplication": {"id": "once"}}
    first = await node.add(QUEUE, {}, **options)
    gate = Gate()
    async with run_worker([define_task(QUEUE, gate, TaskOptions(concurrency=1))]):
        job = await running_job(gate)
        assert job.deduplicationId == "once"
        assert await node.add(QUEUE, {}, **options) == first
        assert await job.removeDeduplicationKey()
        assert not await job.removeDeduplicationKey()
        assert await node.add(QUEUE, {}, **options) != first
        gate.opened.set()


async def test_a_job_that_is_discarded_has_no_further_attempt(
    run_worker: RunWorker, api: Api
) -> None:
    gate = Gate(ValueError("no luck"))
    task_id = await api.schedule(QUEUE, attempts=3)
    async with run_worker([define_task(QUEUE, gate)]):
        (await running_job(gate)).discard()
        gate.opened.set()
        row = await api.until_both_say(QUEUE, task_id, "failed")
    assert row["attempts"] == 1
