"""The few Lua scripts that BullMQ has no word for, each of them atomic beside BullMQ's own."""

from typing import Final

# A function of an id and the index of the first key in ELSEWHERE.
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
"""Where a job can be that is not active: two lists, and sets; the last keys of two scripts."""

# Is the job still ours? A lock that has expired is taken again if nobody has claimed the job since:
# `ats` counts the claims. Otherwise a pause of Redis would run again whatever ran then. A job that
# is in no list at all is one that a script was refused half-way with: it goes back to `active`, and
# `atm` to what it was, as the script may have counted the attempt.
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

# Jobs in `active` whose lock begins with ARGV[1]: claimed by us, whatever became of the reply.
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

# The same, but for the ids from ARGV[4] on, with the jobs' fields. The claim is made whole: the
# script that began it may have been refused before it counted the claim.
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

# The last resort for a job on which BullMQ's own script breaks: take it out of `active`, into
# `failed` or `completed`, whatever its other fields hold, and be it no hash at all. Not if somebody
# else has its lock, or nobody has and it is in another list; in none it is where BullMQ's script
# broke off.
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

# Forget a job that has no data left. What Redis still has of it is the claim that was made of it.
DROP: Final = """
local lock, job, active, stalled = unpack(KEYS)
local owner = redis.call('GET', lock)
if owner and owner ~= ARGV[1] then return 0 end
if redis.call('HEXISTS', job, 'name') == 1 then return 0 end
redis.call('DEL', lock, job)
redis.call('SREM', stalled, ARGV[2])
return redis.call('LREM', active, 0, ARGV[2])
"""

PUT_MARKER: Final = """
local left = redis.call('LLEN', KEYS[2]) + redis.call('ZCARD', KEYS[3])
if left + redis.call('ZCARD', KEYS[4]) > 0 then
  redis.call('ZADD', KEYS[1], 0, '0')
end
"""
