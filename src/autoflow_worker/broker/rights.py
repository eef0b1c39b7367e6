"""Check that the Redis user may run every command that a worker needs, by running each of them.

An ACL, a renamed command or a managed service may take any command away. BullMQ's scripts would
then break half-way through a job. `docs/permissions.md` lists the same commands for operators.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha1
from typing import Final

from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, RedisError

from autoflow_worker.broker.client import PipelinedRedis
from autoflow_worker.broker.replies import NO_COMMAND, NO_KEY, is_denial

PROBE: Final = """
-- Try each command that the scripts call. BullMQ never reads these keys, and the end deletes them.
local text, hash, list = KEYS[1] .. ':text', KEYS[1] .. ':hash', KEYS[1] .. ':list'
local set, zset, stream = KEYS[1] .. ':set', KEYS[1] .. ':zset', KEYS[1] .. ':stream'
local refused = {}
local function try(command, ...)
  local reply = redis.pcall(command, ...)
  if type(reply) == 'table' and reply.err then
    refused[#refused + 1] = {command, reply.err}
  end
end
try('DEL', text, hash, list, set, zset, stream)
try('SET', text, 1)
try('GET', text)
try('INCR', text)
try('EXISTS', text)
try('PEXPIRE', text, 1000)
try('PTTL', text)
try('PERSIST', text)
try('HSET', hash, 'a', 1)
try('HMSET', hash, 'b', 1)
try('HGET', hash, 'a')
try('HMGET', hash, 'a', 'b')
try('HGETALL', hash)
try('HEXISTS', hash, 'a')
try('HINCRBY', hash, 'a', 1)
try('HDEL', hash, 'a')
try('RPUSH', list, 'a', 'b', 'c')
try('LPUSH', list, 'd')
try('LLEN', list)
try('LINDEX', list, 0)
try('LRANGE', list, 0, -1)
try('LPOS', list, 'a')
try('LREM', list, 0, 'a')
try('RPOPLPUSH', list, list)
try('LPOP', list)
try('RPOP', list)
try('LTRIM', list, 0, -1)
try('SADD', set, 'a')
try('SCARD', set)
try('SISMEMBER', set, 'a')
try('SMEMBERS', set)
try('SREM', set, 'a')
try('ZADD', zset, 1, 'a', 2, 'b')
try('ZCARD', zset)
try('ZCOUNT', zset, 0, 9)
try('ZSCORE', zset, 'a')
try('ZRANGE', zset, 0, -1)
try('ZREVRANGE', zset, 0, -1)
try('ZRANGEBYSCORE', zset, 0, 9)
try('ZREVRANGEBYSCORE', zset, 9, 0)
try('ZPOPMIN', zset)
try('ZREM', zset, 'b')
try('ZREMRANGEBYRANK', zset, 0, -1)
try('ZREMRANGEBYSCORE', zset, 0, 9)
try('XADD', stream, '*', 'a', 1)
try('XTRIM', stream, 'MAXLEN', '~', 1)
try('DEL', text, hash, list, set, zset, stream)
return refused
"""

SCRIPTED: Final = frozenset(re.findall(r"try\('(\w+)'", PROBE))
"""The commands that BullMQ's scripts and this worker's scripts call."""

DIRECT: Final = ("PING", "INFO", "CLIENT ID", "CLIENT SETNAME", "CLIENT UNBLOCK", "BZPOPMIN")
"""The commands that a worker sends outside of scripts, beside SCRIPT LOAD and EVALSHA."""

# Refusals that are no lack of a right, and that may pass.
_IN_NEED: Final = re.compile(r"\b(?:OOM|READONLY|MISCONF|NOREPLICAS|BUSY|LOADING|MASTERDOWN)\b")


@dataclass(slots=True)
class Rights:
    """The rights that a Redis user lacks.

    Attributes:
        commands: in the order in which they were tried.
        keys: patterns of keys.
        other: other refusals, in the server's own words.
    """

    commands: dict[str, None] = field(default_factory=dict)
    keys: dict[str, None] = field(default_factory=dict)
    other: dict[str, None] = field(default_factory=dict)

    def note(self, command: str, keys: str, reason: str) -> None:
        """Note that a command on such keys was refused."""
        if NO_KEY.search(reason):
            self.keys[keys] = None
        elif NO_COMMAND.search(reason):
            self.commands[command] = None
        elif not _IN_NEED.search(reason):
            self.other[f"{command}: {reason}"] = None

    def lacking(self) -> str | None:
        """Name everything that is lacking in one sentence; None if nothing is."""
        lacks = []
        if self.commands:
            lacks.append(f"may not run {', '.join(self.commands)}")
        if self.keys:
            lacks.append(f"may not use the keys {', '.join(self.keys)}")
        lacks += [f"is refused {refusal}" for refusal in self.other]
        if not lacks:
            return None
        return f"the user of REDIS_URL {'; '.join(lacks)} (docs/permissions.md has what it needs)"


async def probe_rights(redis: PipelinedRedis, prefix: str, queues: Sequence[str]) -> Rights:
    """Run every command that a worker of these queues needs, under the queues' own prefixes.

    Raises:
        redis.exceptions.ConnectionError: the server went away.
    """
    rights = Rights()
    for queue in queues:
        await _probe(redis, f"{prefix}:{queue}", rights)
    return rights


async def _probe(redis: PipelinedRedis, base: str, rights: Rights) -> None:
    key, keys = f"{base}:autoflow-probe", f"{base}:*"
    digest = sha1(PROBE.encode(), usedforsecurity=False).hexdigest()

    async def run(*command: object) -> object:
        try:
            return await redis.shared.execute(command)
        except NoScriptError:
            return ()  # SCRIPT LOAD was refused, which is noted already.
        except RedisError as error:
            if isinstance(error, RedisConnectionError) and not is_denial(error):
                raise
            rights.note(str(command[0]), keys, str(error))
            return ()

    await run("CLIENT SETNAME", "")
    await run("CLIENT UNBLOCK", 0)
    # This blocks on a key that does not exist.
    await run("BZPOPMIN", f"{key}:none", "0.01")
    await run("SCRIPT LOAD", PROBE)
    refused = await run("EVALSHA", digest, 1, key)
    for command, reason in refused if isinstance(refused, list) else ():
        rights.note(command, keys, reason)
