"""Short runs of the programs in `chaos/`; `make chaos` is the long one."""

import random
from pathlib import Path

import pytest

from chaos import signals
from chaos.driver import Plan, run
from chaos.report import print_report

pytestmark = [pytest.mark.slow, pytest.mark.timeout(150)]


async def test_chaos(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = Plan(
        seed=random.randrange(10**6),
        jobs=250,
        workers=2,
        kills=3,
        terminations=2,
        stops=2,
        restarts=1,
        suspensions=1,
        cuts=1,
        seconds=12,
        limit=120,
    )
    report = await run(plan, tmp_path)
    print_report(report)
    assert report.ok, capsys.readouterr().out


async def test_no_signal_strands_a_job(tmp_path: Path) -> None:
    tally = await signals.run(tmp_path, seed=random.randrange(10**6), busy=4, idle=6)
    assert not tally.faults
    assert tally.signals["idle"] == 6
