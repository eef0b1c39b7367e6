"""The few Lua scripts that BullMQ has no word for, each of them atomic beside BullMQ's own."""

from typing import Final

# Is the job still ours? A lock that has expired is taken again if nobody has claimed the job since:
# `ats` counts the claims. Otherwise a pause of Redis would run again whatever ran then.
HOLD: Final = """
local lock = redis.call('GET', KEYS[1])
if lock and lock ~= ARGV[1] then return 'lost' end
if not lock then
  if redis.call('EXISTS', KEYS[2]) == 0 then return 'gone' end
  if redis.call('HGET', KEYS[2], 'ats') ~= ARGV[3] then return 'lost' end
  if not redis.call('LPOS', KEYS[3], ARGV[2]) then return 'lost' end
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[4])
redis.call('SREM', KEYS[4], ARGV[2])
return 'ours'
"""

# Jobs in `active` whose lock begins with ARGV[1]: claimed by us, whatever became of the reply.
HELD: Final = """
local held = {}
for _, id in ipairs(redis.call('LRANGE', KEYS[1], 0, -1)) do
  local lock = redis.call('GET', ARGV[2] .. id .. ':lock')
  if lock and string.sub(lock, 1, #ARGV[1]) == ARGV[1] then
    local fields = redis.pcall('HGETALL', ARGV[2] .. id)
    held[#held + 1] = {id, lock, fields.err and {} or fields}
  end
end
return held
"""

# The last resort for a job on which BullMQ's own script breaks: take it out of `active`, into
# `failed`, with its reason, whatever its other fields hold, and be it no hash at all.
BURY: Final = """
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end
redis.call('SREM', KEYS[4], ARGV[2])
redis.call('LREM', KEYS[3], 0, ARGV[2])
redis.call('ZADD', KEYS[5], ARGV[4], ARGV[2])
redis.pcall('HSET', KEYS[2], 'failedReason', ARGV[3], 'finishedOn', ARGV[4], 'stacktrace', ARGV[5])
redis.pcall('HDEL', KEYS[2], 'defa')
if type(redis.pcall('HINCRBY', KEYS[2], 'atm', 1)) == 'table' then
  redis.pcall('HSET', KEYS[2], 'atm', 1)
end
redis.call('XADD', KEYS[6], '*', 'event', 'failed', 'jobId', ARGV[2], 'failedReason', ARGV[3],
  'prev', 'active')
return 1
"""

PUT_MARKER: Final = """
local left = redis.call('LLEN', KEYS[2]) + redis.call('ZCARD', KEYS[3])
if left + redis.call('ZCARD', KEYS[4]) > 0 then
  redis.call('ZADD', KEYS[1], 0, '0')
end
"""
