"""Keep a paused queue's jobs where neither BullMQ 5 nor BullMQ 6 loses them at the resume.

BullMQ 5 keeps the waiting jobs of a paused queue in the list `paused`. Its resume renames that list
to `wait`, and what was in `wait` is then in no list: it never runs. BullMQ 6, whose scripts bullmq
for Python has, uses `wait` for paused queues as well; its resume joins both lists. So under an API
with BullMQ 5, a worker with BullMQ 6 loses each job that it puts into `wait` during a pause.
`docs/contract.md`, section 9, has the cases. Jobs in `prioritized` are never moved by a pause.
"""

import re
from functools import cache
from typing import Any, Final, NamedTuple

from autoflow_worker.broker.client import PipelinedRedis

MAX_JOINED: Final = 10_000
"""How many jobs `JOIN` moves at once, at most: it blocks Redis for a few milliseconds."""

# The list for a job that is to wait in a queue that may be paused. BullMQ 6's own layout is kept as
# long as nothing shows BullMQ 5: every `Queue` in Node writes its version into the queue's meta.
WAITING_LIST: Final = """
local function waiting_list(wait)
  local base = string.sub(wait, 1, -5)
  local meta = redis.call('HMGET', base .. 'meta', 'paused', 'version')
  if not meta[1] then return wait end
  if redis.call('EXISTS', base .. 'paused') == 1 then return base .. 'paused' end
  local major = tonumber(string.match(meta[2] or '', '^bullmq:(%d+)')) or 0
  if major >= 6 or redis.call('EXISTS', wait) == 1 then return wait end
  return base .. 'paused'
end
"""

# Where BullMQ's scripts put jobs into `wait`. In the second, jobs leave `delayed` first: a refusal
# of a command of `waiting_list` comes before that, and loses nothing.
_PUSH: Final = re.compile(r"^ +rcall\(pushCmd, targetKey, jobId\)$", re.MULTILINE)
_PROMOTE: Final = re.compile(
    r'^ +rcall\("ZREM", delayedKey, unpack\(jobs\)\)(?=\n +for _, jobId in ipairs)', re.MULTILINE
)

PROMOTING: Final = frozenset({"moveToActive", "moveToFinished", "moveToDelayed", "retryJob"})
"""The scripts that promote delayed jobs."""

PUSHING: Final = PROMOTING | {"moveStalledJobsToWait"}
"""The scripts that a worker moves jobs by, all of which may put one into `wait`."""

# Join the two lists of a paused queue in `paused`, and return the number of jobs that were moved.
JOIN: Final = f"""
local meta, wait, paused = unpack(KEYS)
if redis.call('EXISTS', wait, paused) < 2 then return 0 end
if redis.call('HEXISTS', meta, 'paused') == 0 then return 0 end
local joined = 0
while joined < {MAX_JOINED} and redis.call('RPOPLPUSH', wait, paused) do joined = joined + 1 end
return joined
"""


class Split(NamedTuple):
    """How many jobs a paused queue has in each of its two lists, neither of which is empty."""

    paused: int
    wait: int


# The function is made only where it is needed, as these scripts run for each job.
_CHOOSE: Final = f"""if {{paused}} then
{WAITING_LIST}
targetKey = waiting_list(targetKey)
end
"""


@cache
def safe_when_paused(script: str) -> str:
    """Return a script that puts no job where a resume by BullMQ 5 would lose it."""
    pushing = _CHOOSE.format(paused="isPausedOrMaxed")
    promoting = _CHOOSE.format(paused="isPaused")
    changed = _PUSH.sub(lambda found: pushing + found[0], script)
    return _PROMOTE.sub(lambda found: promoting + found[0], changed)


def differs(name: str, script: str) -> bool:
    """Whether BullMQ's script of this name puts jobs into `wait` in a way that is not known."""
    pushes, promotions = len(_PUSH.findall(script)), len(_PROMOTE.findall(script))
    return (pushes, promotions) != (int(name in PUSHING), int(name in PROMOTING))


async def find_split(redis: PipelinedRedis, prefix: str, queue: str) -> Split | None:
    """Return how the jobs of a paused queue are split; None if they are not, or it is not paused.

    Raises:
        redis.exceptions.RedisError: the server can't be reached, or refuses a command.
    """
    base = f"{prefix}:{queue}:"
    paused: Any = await redis.execute_command("LLEN", base + "paused")
    wait: Any = await redis.execute_command("LLEN", base + "wait")
    if not (paused and wait and await redis.execute_command("HEXISTS", base + "meta", "paused")):
        return None
    return Split(int(paused), int(wait))
