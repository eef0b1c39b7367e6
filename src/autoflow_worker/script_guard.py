"""A check before BullMQ's scripts that Redis lets them run to their end.

Redis does not undo what a script did before one of its commands is refused. A script that may
take a job out of one list and may not put it into the next loses the job. So each script first
asks Redis (`redis.acl_check_cmd`, since Redis 7) whether the user may run what the script calls,
and refuses to begin otherwise. Redis 6 can't be asked: there the checks at the start are all.
"""

import re
from collections.abc import Callable, Collection
from functools import cache
from typing import Any, Final

_CALLED: Final = re.compile(r"""(?:rcall|redis\.p?call)\(\s*["'](\w+)""")
_PUSHED_BY_VARIABLE: Final = re.compile(r"""["']([LR]PUSH)["']""")

UNRECOVERABLE: Final = ("LPUSH", "ZADD", "INCR", "SET")
"""Commands whose refusal loses a job that nobody knows the id of: the one that is fetched.

The scripts of every job's way check these alone, as each check costs Redis a quarter of a
microsecond. What any other refusal interrupts, `HOLD` and `ADOPT` put right by the job's id.
"""

HOT: Final = frozenset({"moveToActive", "moveToFinished"})
"""The scripts of every job's way."""

# The name alone would be shorter, but Valkey 8 dies of `SET` without its arguments.
_CHECK: Final = "allowed('{0}', KEYS[1], KEYS[1], KEYS[1], KEYS[1])"
_GUARD: Final = """
if redis.acl_check_cmd then
  local allowed = redis.acl_check_cmd
  if not ({checks}) then
    return redis.error_reply('NOPERM this user has no permissions to run all of {names}')
  end
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
    return guarded(script, UNRECOVERABLE if name in HOT else None)


@cache
def guarded(script: str, commands: Collection[str] | None = None) -> str:
    """Return the script behind a check of the commands; of all that it calls if not given."""
    names = commands_of(script) if commands is None else sorted(commands)
    checks = " and ".join(_CHECK.format(name) for name in names)
    return _GUARD.format(checks=checks, names=" ".join(names)) + script


def commands_of(script: str) -> list[str]:
    """Return the Redis commands that a script calls, sorted, in capitals."""
    found = {*_CALLED.findall(script), *_PUSHED_BY_VARIABLE.findall(script)}
    return sorted(name.upper() for name in found)
