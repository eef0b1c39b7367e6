"""Make each script check first that the user may run all of its commands.

If Redis refuses a command of a script, it does not undo the commands before. A script that may take
a job out of one list, but may not put it into the next, loses the job. So each script first asks
Redis (`redis.acl_check_cmd`, since Redis 7) whether the user may run its commands, and does nothing
otherwise. Redis 6 has no such check; there, only `requirements` checks the rights at the start.

BullMQ's scripts are also made safe for queues that BullMQ 5 has paused (`paused_lists`).
"""

import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Final

from autoflow_worker.broker.paused_lists import safe_when_paused

_CALLED: Final = re.compile(r"""(?:rcall|redis\.p?call)\(\s*["'](\w+)""")
_PUSHED_BY_VARIABLE: Final = re.compile(r"""["']([LR]PUSH)["']""")

FETCHING: Final = ("LPUSH", "SET")
"""What a fetch calls after it has taken a job whose id this worker does not know yet."""

PROMOTING: Final = ("HGET", "HSET", "INCR", "LPUSH", "XADD", "ZADD")
"""What a fetch calls after it has taken all jobs that are due out of `delayed`."""

HOT: Final = frozenset({"moveToActive", "moveToFinished"})
"""The two scripts that run for each job and fetch the next; `delayed` is the seventh key of both.

They check only the commands whose refusal would lose a job, as each check costs Redis a quarter of
a microsecond. After any other refusal, `scripts.HOLD` and `scripts.ADOPT` repair the job by its id.
"""

_REFUSE: Final = "return redis.error_reply('NOPERM this user has no permissions to run all of {0}')"
# The dummy arguments are needed: Valkey 8 crashes at a check of `SET` without arguments.
_ALLOWED: Final = "allowed('{0}', KEYS[1], KEYS[1], KEYS[1], KEYS[1])"
_GUARD: Final = """
if redis.acl_check_cmd then
  local allowed = redis.acl_check_cmd
  {checks}
end
"""


def guard(commands: dict[str, Any], register: Callable[[str], Any]) -> None:
    """Add its check to each script in this dictionary of a `bullmq.Worker` or `Queue`."""
    for name, command in commands.items():
        commands[name] = register(guarded_as(name, command.script))


@cache
def guarded_as(name: str, script: str) -> str:
    """Return BullMQ's script of that name with its check."""
    if name not in HOT:
        return guarded(script)
    promoting = f"if redis.call('ZCARD', KEYS[7]) > 0 then {_check(PROMOTING)} end"
    return _GUARD.format(checks=f"{_check(FETCHING)} {promoting}") + safe_when_paused(script)


@cache
def guarded(script: str) -> str:
    """Return a script with a check of all commands that it calls."""
    script = safe_when_paused(script)
    found = {*_CALLED.findall(script), *_PUSHED_BY_VARIABLE.findall(script)}
    return _GUARD.format(checks=_check(sorted(name.upper() for name in found))) + script


def _check(names: Sequence[str]) -> str:
    allowed = " and ".join(_ALLOWED.format(name) for name in names)
    return f"if not ({allowed}) then {_REFUSE.format(' '.join(names))} end"
