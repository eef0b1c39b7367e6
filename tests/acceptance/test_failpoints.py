"""A worker dies at each point of a job's life, another one takes over, and the stores agree.

`make crashes` does the same a hundred times at each point.
"""

import random
import subprocess
import sys
from pathlib import Path

import pytest

from autoflow_worker import failpoints
from chaos.failpoints import Field, draw
from chaos.nursery import Nursery
from tests.support.node import Node

EACH = 2


@pytest.mark.timeout(150)
async def test_the_stores_agree_after_a_crash_at_any_point(
    redis_url: str, database_url: str, prefix: str, node5: Node, tmp_path: Path
) -> None:
    crashes = draw(random.Random(), failpoints.POINTS, EACH)
    async with Nursery(tmp_path) as nursery:
        await Field(redis_url, database_url, prefix, node5, nursery).run(crashes)
    faults = {f"{crash.point}:{crash.number}": crash.faults for crash in crashes if crash.faults}
    assert faults == {}


def test_a_failpoint_that_nobody_armed_does_nothing() -> None:
    assert failpoints.failpoint is failpoints._ignore
    for point in failpoints.POINTS:
        failpoints.failpoint(point)


def test_arming_a_point_that_there_is_not() -> None:
    imported = subprocess.run(
        [sys.executable, "-c", "import autoflow_worker.failpoints"],
        env={"AUTOFLOW_FAILPOINT": "nowhere"},
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert imported.returncode == 1
    assert "AUTOFLOW_FAILPOINT names none of after-claim, " in imported.stderr
