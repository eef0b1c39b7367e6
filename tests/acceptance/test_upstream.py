"""Each report for upstream shows its fault in the bullmq that is installed."""

import re
from importlib.metadata import version
from pathlib import Path

import pytest
from redis.asyncio import Redis

from tests.support.upstream import FOLDER, REPORTS, run_reports


@pytest.mark.slow
async def test_each_report_shows_its_fault(redis: Redis, redis_url: str, tmp_path: Path) -> None:
    ended = run_reports(redis_url, tmp_path)
    assert len(ended) == len(REPORTS)
    # A later bullmq may mend some of them: then the report goes, and so may what it is the reason
    # for.
    assert version("bullmq").startswith("3.4.")
    shown = {name for name, (code, said) in ended.items() if (code, said[:7]) == (1, "fault: ")}
    assert {name: ended[name] for name in ended.keys() - shown} == {}
    assert [key async for key in redis.scan_iter("upstream-*")] == []


def test_the_table_has_a_row_for_each_report() -> None:
    rows = re.findall(
        r"^\| (\d\d) \|.+?\]\((.+?)\.py\)", (FOLDER / "README.md").read_text(), re.MULTILINE
    )
    assert [name for _, name in rows] == [report.stem for report in REPORTS]
    assert all(name.startswith(f"{number}_") for number, name in rows)
