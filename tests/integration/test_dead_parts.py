"""A dead part kills the whole, in good order: nothing may look alive and not work."""

import pytest

from autoflow_worker import TaskContext, define_task, record
from autoflow_worker.errors import PartDiedError
from tests.support.node import Node
from tests.support.running import RunWorker


async def handler(payload: dict[str, object], ctx: TaskContext) -> None:
    return None


async def test_a_recorder_that_dies_over_a_write(
    run_worker: RunWorker, node5: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(record, "unknown_job_row", broken)
    async with run_worker([define_task("q", handler)]) as worker:
        await node5.schedule("q")
        death = await worker.death()
    assert isinstance(death, PartDiedError)
    assert str(death) == "status recorder 0 ended unasked: RuntimeError: a bug"
