"""A check before BullMQ's scripts that Redis lets them run to their end.

Redis does not undo what a script did before one of its commands is refused. A script that may
take a job out of one list and may not put it into the next loses the job. So each script first
asks Redis (`redis.acl_check_cmd`, since Redis 7) whether the user may run what the script calls,
and refuses to begin otherwise. Redis 6 can't be asked: there the checks at the start are all.
"""

import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Final

_CALLED: Final = re.compile(r"""(?:rcall|redis\.p?call)\(\s*["'](\w+)""")
_PUSHED_BY_VARIABLE: Final = re.compile(r"""["']([LR]PUSH)["']""")

FETCHING: Final = ("LPUSH", "SET")
"""What a fetch calls once it has taken a job whose id nobody knows yet."""

PROMOTING: Final = ("HGET", "HSET", "INCR", "LPUSH", "XADD", "ZADD")
"""What it calls once it has taken the jobs that are due out of `delayed`, all of them at once."""

HOT: Final = frozenset({"moveToActive", "moveToFinished"})
"""The scripts of every job's way, both of which fetch; `delayed` is the seventh key of both.

They check only what a refusal would lose for good, as each check costs Redis a quarter of a
microsecond. What any other refusal interrupts, `HOLD` and `ADOPT` put right by the job's id.
"""

_REFUSE: Final = "return redis.error_reply('NOPERM this user has no permissions to run all of {0}')"
# The name alone would be shorter, but Valkey 8 dies of `SET` without its arguments.
_ALLOWED: Final = "allowed('{0}', KEYS[1], KEYS[1], KEYS[1], KEYS[1])"
_GUARD: Final = """
if redis.acl_check_cmd then
  local allowed = redis.acl_check_cmd
  {checks}
end
"""


def guard(commands: dict[str, Any], register: Callable[[str], Any]) -> None:
    """Put each script of a `bullmq.Worker` or `Queue` behind its check.

    Args:
        commands: bullmq's own dictionary of its scripts, by name; changed in place.
        register: makes a script of a text.
    """
    for name, command in commands.items():
        commands[name] = register(guarded_as(name, command.script))


def guarded_as(name: str, script: str) -> str:
    """Return BullMQ's script of that name behind the check that it gets here."""
    return _guarded_hot(script) if name in HOT else guarded(script)


@cache
def guarded(script: str) -> str:
    """Return a script behind a check of all that it calls."""
    return _GUARD.format(checks=_check(commands_of(script))) + script


@cache
def _guarded_hot(script: str) -> str:
    promoting = f"if redis.call('ZCARD', KEYS[7]) > 0 then {_check(PROMOTING)} end"
    return _GUARD.format(checks=f"{_check(FETCHING)} {promoting}") + script


def _check(names: Sequence[str]) -> str:
    allowed = " and ".join(_ALLOWED.format(name) for name in names)
    return f"if not ({allowed}) then {_REFUSE.format(' '.join(names))} end"


def commands_of(script: str) -> list[str]:
    """Return the Redis commands that a script calls, sorted, in capitals."""
    found = {*_CALLED.findall(script), *_PUSHED_BY_VARIABLE.findall(script)}
    return sorted(name.upper() for name in found)
