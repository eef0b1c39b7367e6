"""A short run of `make parity`: some scenarios of each kind, with both versions of BullMQ."""

import secrets
from pathlib import Path

import pytest

from parity.batch import Servers
from parity.report import print_report
from parity.runner import run
from parity.scenario import ALL, VERSIONS
from tests.support.database import create_database

pytestmark = [pytest.mark.slow, pytest.mark.timeout(150)]


async def test_parity(
    redis_url: str, database_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"parity_{secrets.token_hex(4)}"
    urls = {
        version: await create_database(database_url, f"{name}_{version}") for version in VERSIONS
    }
    scenarios = [scenario for scenario in ALL.values() if scenario.short]
    report = await run(scenarios, VERSIONS, Servers(redis_url, urls, name), tmp_path)
    print_report(report)
    assert report.ok, capsys.readouterr().out
