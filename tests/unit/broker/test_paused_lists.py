"""Every place where BullMQ's scripts put a job into `wait` is found; nothing else changes."""

import re
from pathlib import Path

import bullmq
import pytest

from autoflow_worker.broker.paused_lists import PUSHING, differs, safe_when_paused

SCRIPTS = {
    path.name.split("-")[0]: path.read_text()
    for path in (Path(bullmq.__file__).parent / "commands").glob("*.lua")
}
PUSH = re.compile(r'rcall\((?:pushCmd|"[LR]PUSH"), (\S+),')
# Lists of other things, and what no part of this package calls: Queue's bulk retry, and its pause.
OTHER_LISTS = {"activeKey", "dataPointsList", "KEYS[2]"}
NEVER_CALLED = {"moveJobsToWait", "pause"}


@pytest.mark.parametrize("name", sorted(SCRIPTS.keys() - NEVER_CALLED))
def test_each_script_chooses_the_list_before_it_puts_a_job_there(name: str) -> None:
    script = SCRIPTS[name]
    changed = safe_when_paused(script)
    pushed = {key for key in PUSH.findall(script) if key not in OTHER_LISTS}
    assert pushed <= {"targetKey"}
    assert ("waiting_list(" in changed) is bool(pushed)
    assert pushed or changed == script


def test_the_scripts_are_those_that_the_worker_knows() -> None:
    assert [name for name in sorted(PUSHING) if differs(name, SCRIPTS[name])] == []
    assert differs("moveToActive", SCRIPTS["moveToActive"].replace("ZREM", "ZREMRANGEBYSCORE"))
    assert differs(
        "retryJob", SCRIPTS["retryJob"].replace("pushCmd, targetKey", "pushCmd, KEYS[2]")
    )
