"""What runs on the Redis server: our own Lua scripts, and the arguments of BullMQ's completion."""

from collections.abc import Mapping
from functools import lru_cache, partial
from typing import Any, Final

import msgpack

from autoflow_worker.broker.claim import Claim
from autoflow_worker.broker.paused_lists import WAITING_LIST

# A function of a job's id and the index in KEYS of the first key of ELSEWHERE.
_IS_ELSEWHERE: Final = """
local function is_elsewhere(id, first)
  for number = first, first + 1 do
    if redis.call('LPOS', KEYS[number], id) then return true end
  end
  for number = first + 2, #KEYS do
    if redis.call('ZSCORE', KEYS[number], id) then return true end
  end
  return false
end
"""

ELSEWHERE: Final = (
    *("wait", "paused"),
    *("prioritized", "delayed", "waiting-children", "completed", "failed"),
)
"""The two lists and five sets of jobs that are not active: the last keys of three scripts."""

# Return who holds the job. An expired lock is taken again unless another worker has claimed the job
# since, which `ats` shows, as it counts the claims. Without this, each job that runs during a pause
# of Redis would run again. If the job is in no list, Redis refused a command in the middle of a
# script: put the job back into `active`, and `atm` back to ARGV[5], as that script may have counted
# the attempt.
HOLD: Final = f"""
{_IS_ELSEWHERE}
local lock, job, active, stalled = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local token, id = ARGV[1], ARGV[2]
local owner = redis.call('GET', lock)
if owner and owner ~= token then return 'lost' end
if not owner then
  if redis.call('EXISTS', job) == 0 then return 'gone' end
  if redis.call('HGET', job, 'ats') ~= ARGV[3] then return 'lost' end
  if not redis.call('LPOS', active, id) then
    if is_elsewhere(id, 5) then return 'lost' end
    redis.call('LPUSH', active, id)
    redis.call('HSET', job, 'atm', ARGV[5])
  end
end
redis.call('SET', lock, token, 'PX', ARGV[4])
redis.call('SREM', stalled, id)
return 'ours'
"""

# Return the jobs in `active` whose lock begins with ARGV[1]. This worker has claimed them, even if
# the reply to the claim was lost.
HELD: Final = """
local held = {}
for _, id in ipairs(redis.call('LRANGE', KEYS[1], 0, -1)) do
  local lock = redis.call('GET', ARGV[2] .. id .. ':lock')
  if lock and string.sub(lock, 1, #ARGV[1]) == ARGV[1] then
    held[#held + 1] = {id, lock}
  end
end
return held
"""

# Like HELD, without the ids from ARGV[4] on, and with the jobs' fields. Complete each claim first:
# Redis may have refused the claiming script before it set `processedOn` and counted the claim.
ADOPT: Final = """
local known, held = {}, {}
for number = 4, #ARGV do known[ARGV[number]] = true end
for _, id in ipairs(redis.call('LRANGE', KEYS[1], 0, -1)) do
  local job = ARGV[2] .. id
  local lock = redis.call('GET', job .. ':lock')
  if lock and string.sub(lock, 1, #ARGV[1]) == ARGV[1] and not known[id] then
    redis.pcall('HSET', job, 'processedOn', ARGV[3])
    redis.pcall('HINCRBY', job, 'ats', 1)
    local fields = redis.pcall('HGETALL', job)
    held[#held + 1] = {id, lock, fields.err and {} or fields}
  end
end
return held
"""

# Move a job on which BullMQ's own script breaks from `active` to `failed` or `completed`, whatever
# its fields hold, and even if its key holds no hash. Do nothing if another worker has its lock, or
# if it has no lock and is in another list. If it is in no list, BullMQ's script broke half-way.
BURY: Final = f"""
{_IS_ELSEWHERE}
local lock, job, active, stalled, target, events = unpack(KEYS)
local token, id, state, now, field, value = unpack(ARGV)
local owner = redis.call('GET', lock)
if owner and owner ~= token then return 0 end
if not owner and not redis.call('LPOS', active, id) and is_elsewhere(id, 7) then return 0 end
redis.call('DEL', lock)
redis.call('SREM', stalled, id)
redis.call('LREM', active, 0, id)
redis.call('ZADD', target, now, id)
redis.pcall('HSET', job, field, value, 'finishedOn', now)
if ARGV[7] then redis.pcall('HSET', job, 'stacktrace', ARGV[7]) end
redis.pcall('HDEL', job, 'defa')
local made = redis.pcall('HINCRBY', job, 'atm', 1)
if type(made) == 'table' then redis.pcall('HSET', job, 'atm', 1) end
redis.call('XADD', events, '*', 'event', state, 'jobId', id, field, value, 'prev', 'active')
return 1
"""

# Delete a job that has no data left. Its hash holds only the fields that its claim wrote.
DROP: Final = """
local lock, job, active, stalled = unpack(KEYS)
local owner = redis.call('GET', lock)
if owner and owner ~= ARGV[1] then return 0 end
if redis.call('HEXISTS', job, 'name') == 1 then return 0 end
redis.call('DEL', lock, job)
redis.call('SREM', stalled, ARGV[2])
return redis.call('LREM', active, 0, ARGV[2])
"""

# Put a job that is in no list back into its queue, as a job that has just become due. Do nothing if
# it is finished, held or in a list. A job with unfinished children waits for them.
PUT_BACK: Final = f"""
{_IS_ELSEWHERE}
{WAITING_LIST}
local lock, job, active, meta, counter, marker, events, wait, _, prioritized = unpack(KEYS)
local id, now, children = ARGV[1], ARGV[2], KEYS[12]
if redis.call('EXISTS', job) == 0 or redis.call('EXISTS', lock) == 1 then return 0 end
if redis.call('HEXISTS', job, 'finishedOn') == 1 then return 0 end
if redis.call('LPOS', active, id) or is_elsewhere(id, 8) then return 0 end
local priority = tonumber(redis.call('HGET', job, 'priority')) or 0
redis.call('HSET', job, 'delay', 0)
if redis.call('SCARD', job .. ':dependencies') > 0 then
  redis.call('ZADD', children, now, id)
  return 1
elseif priority > 0 then
  local count = redis.call('INCR', counter)
  redis.call('ZADD', prioritized, priority * 0x100000000 + count % 0x100000000, id)
else
  redis.call('LPUSH', waiting_list(wait), id)
end
redis.call('XADD', events, '*', 'event', 'waiting', 'jobId', id)
if redis.call('HEXISTS', meta, 'paused') == 0 then redis.call('ZADD', marker, 0, '0') end
return 1
"""
PUT_BACK_KEYS: Final = ("meta", "pc", "marker", "events", *ELSEWHERE)
"""The keys of PUT_BACK after the job's lock, the job and `active`."""

# Put the markers that BullMQ puts: one for jobs that wait, and one with the time of the next
# delayed job, whose score has a counter in its lower 12 bits.
PUT_MARKER: Final = """
if redis.call('LLEN', KEYS[2]) + redis.call('ZCARD', KEYS[3]) > 0 then
  redis.call('ZADD', KEYS[1], 0, '0')
end
local due = redis.call('ZRANGE', KEYS[4], 0, 0, 'WITHSCORES')[2]
if due then redis.call('ZADD', KEYS[1], due / 0x1000, '1') end
"""

# The keys of BullMQ's script `moveToFinished`, up to the job's own.
_COMPLETION_KEYS: Final = (
    *("wait", "active", "prioritized", "events", "stalled", "limiter", "delayed", "paused"),
    *("meta", "pc", "completed"),
)
# The options of a job that its parent is treated by, by their names in the script.
_PARENT_OPTIONS: Final = {
    "fpof": "failParentOnFailure",
    "cpof": "continueParentOnFailure",
    "idof": "ignoreDependencyOnFailure",
    "rdof": "removeDependencyOnFailure",
}
_PARENT_OPTION_NAMES: Final = frozenset(_PARENT_OPTIONS.values())

# The keys of BullMQ's script `moveToActive`.
_CLAIM_KEYS: Final = (*_COMPLETION_KEYS[:-1], "marker")

MAX_PACKED: Final = 1_000  # packed options that are kept for further jobs


def _claim_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a script has to know of the worker that it claims a job for."""
    known = {name: options.get(name) for name in ("limiter", "lockDuration")}
    # Node's `processedBy`. bullmq's own methods leave it out.
    return known if options.get("name") is None else {**known, "name": options["name"]}


class ClaimArguments:
    """Makes keys and arguments of `moveToActive` for one queue; see `CompletionArguments`."""

    def __init__(self, keys: Mapping[str, str], options: Mapping[str, Any]) -> None:
        self._base = keys[""]
        self._keys = [keys[name] for name in _CLAIM_KEYS]
        self._options = _claim_options(options)

    def __call__(self, token: str, *, now_ms: int) -> tuple[list[str], list[Any]]:
        """Return the script's keys and arguments."""
        return self._keys, [self._base, now_ms, self.packed(token)]

    def packed(self, token: str) -> bytes:
        """Return the packed options, which are an argument of `moveToDelayed` as well."""
        return bytes(msgpack.packb({"token": token, **self._options}, use_bin_type=True))


class CompletionArguments:
    """Makes keys and arguments of `moveToFinished` for completed jobs of one queue.

    bullmq's `moveToCompletedArgs` needs a `Job` and packs everything anew, which takes a third of
    the CPU time that a job costs. This packs only what differs from job to job. `official_worker`
    compares the two once in each process.

    Args:
        keys: the queue's, by BullMQ's names for them; "" is the base of all.
        options: the worker's, with BullMQ's defaults.
    """

    def __init__(self, keys: Mapping[str, str], options: Mapping[str, Any]) -> None:
        self._base = keys[""]
        self._first_keys = [keys[name] for name in _COMPLETION_KEYS]
        self._last_keys = [keys[""] + "metrics:completed", keys["marker"]]
        metrics = options.get("metrics")
        self._options = {
            **_claim_options(options),
            "maxMetricsSize": metrics.get("maxDataPoints", "") if metrics is not None else "",
        }
        self._packed_alike = lru_cache(MAX_PACKED)(partial(self._packed, {}))

    def __call__(
        self, claim: Claim, value: str, keep: Any, *, fetch_next: bool, now_ms: int
    ) -> tuple[list[str], list[Any]]:
        """Return the script's keys and arguments.

        Args:
            value: the return value's JSON.
            keep: the value of `removeOnComplete` that applies.
            fetch_next: whether the script is to claim another job.
        """
        about = claim.token, keep, claim.max_attempts, claim.attempts_made
        # Consecutive jobs of a slot have the same token, and mostly the same options.
        if type(keep) is int and claim.options.keys().isdisjoint(_PARENT_OPTION_NAMES):
            packed = self._packed_alike(*about)
        else:
            packed = self._packed(claim.options, *about)
        keys = [*self._first_keys, self._base + claim.id, *self._last_keys]
        fetch = "1" if fetch_next else ""
        args = [claim.id, now_ms, "returnvalue", value, "completed", fetch, self._base, packed]
        return keys, args

    def packed(self, claim: Claim, keep: Any) -> bytes:
        """Return the packed options, which are the same for a failed job."""
        about = claim.token, keep, claim.max_attempts, claim.attempts_made
        return self._packed(claim.options, *about)

    def _packed(
        self, job_options: Mapping[str, Any], token: str, keep: Any, attempts: int, made: int
    ) -> bytes:
        options = {
            **self._options,
            "token": token,
            "keepJobs": _jobs_to_keep(keep),
            "attempts": attempts,
            "attemptsMade": made,
        }
        for short, name in _PARENT_OPTIONS.items():
            options[short] = job_options.get(name, False)
        return bytes(msgpack.packb(options, use_bin_type=True))


def _jobs_to_keep(keep: Any) -> Mapping[str, Any]:
    if type(keep) is int:  # not a bool, which is an int, too
        return {"count": keep}
    if isinstance(keep, dict):
        return keep
    return {"count": 0 if keep else -1}
