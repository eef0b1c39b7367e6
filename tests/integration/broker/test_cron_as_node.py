"""Schedules have the next times that BullMQ's own strategy gives them in Node."""

import pytest

from tests.support.node import Node
from tests.support.schedules import LOCAL, cases, differences


async def test_no_next_time_differs_from_node(node6: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", LOCAL)
    drawn = list(cases(seed=11, count=2000))
    assert await differences(node6, drawn) == []
