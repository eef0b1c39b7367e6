"""A worker dies at each point of a job's life, another one takes over, and the stores agree.

`make crashes` does the same a hundred times at each point.
"""

import random
from pathlib import Path

import pytest

from chaos.crash_points import CRASH_POINTS, arm
from chaos.failpoints import Field, draw
from chaos.nursery import Nursery
from tests.support.node import Node

EACH = 2


@pytest.mark.timeout(150)
async def test_the_stores_agree_after_a_crash_at_any_point(
    redis_url: str, database_url: str, prefix: str, node5: Node, tmp_path: Path
) -> None:
    crashes = draw(random.Random(), [*CRASH_POINTS], EACH)
    async with Nursery(tmp_path) as nursery:
        await Field(redis_url, database_url, prefix, node5, nursery).run(crashes)
    faults = {f"{crash.point}:{crash.number}": crash.faults for crash in crashes if crash.faults}
    assert faults == {}


def test_a_point_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match="'nowhere:2' names none of after-claim, "):
        arm("nowhere:2")
