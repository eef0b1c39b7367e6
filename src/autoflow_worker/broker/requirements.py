"""Check that a Redis server can serve BullMQ's queues: its kind, version, settings and rights.

An ACL, a renamed command or a managed service may take any command away. BullMQ's scripts would
then break half-way through a job. So each command that a worker needs is run at the start.
`docs/permissions.md` lists the same commands for operators.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha1
from typing import Final

from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, RedisError

from autoflow_worker.broker.client import PipelinedRedis
from autoflow_worker.broker.replies import NO_COMMAND, NO_KEY, is_denial
from autoflow_worker.errors import RedisUnfitError

MIN_VERSION: Final = (5, 0, 0)  # BullMQ's own lower limit
RECOMMENDED_VERSION: Final = (6, 2, 0)  # BullMQ warns below it

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
try('SET', text, 1); try('GET', text); try('INCR', text); try('EXISTS', text)
try('PEXPIRE', text, 1000); try('PTTL', text); try('PERSIST', text)
try('HSET', hash, 'a', 1); try('HMSET', hash, 'b', 1); try('HGET', hash, 'a')
try('HMGET', hash, 'a', 'b'); try('HGETALL', hash); try('HEXISTS', hash, 'a')
try('HINCRBY', hash, 'a', 1); try('HDEL', hash, 'a')
try('RPUSH', list, 'a', 'b', 'c'); try('LPUSH', list, 'd'); try('LLEN', list)
try('LINDEX', list, 0); try('LRANGE', list, 0, -1); try('LPOS', list, 'a')
try('LREM', list, 0, 'a'); try('RPOPLPUSH', list, list); try('LPOP', list); try('RPOP', list)
try('LTRIM', list, 0, -1)
try('SADD', set, 'a'); try('SCARD', set); try('SISMEMBER', set, 'a'); try('SMEMBERS', set)
try('SREM', set, 'a')
try('ZADD', zset, 1, 'a', 2, 'b'); try('ZCARD', zset); try('ZCOUNT', zset, 0, 9)
try('ZSCORE', zset, 'a'); try('ZRANGE', zset, 0, -1); try('ZREVRANGE', zset, 0, -1)
try('ZRANGEBYSCORE', zset, 0, 9); try('ZREVRANGEBYSCORE', zset, 9, 0); try('ZPOPMIN', zset)
try('ZREM', zset, 'b'); try('ZREMRANGEBYRANK', zset, 0, -1); try('ZREMRANGEBYSCORE', zset, 0, 9)
try('XADD', stream, '*', 'a', 1); try('XTRIM', stream, 'MAXLEN', '~', 1)
try('DEL', text, hash, list, set, zset, stream)
return refused
"""

SCRIPTED: Final = frozenset(re.findall(r"try\('(\w+)'", PROBE))
"""The commands that BullMQ's scripts and this worker's scripts call."""

DIRECT: Final = ("PING", "INFO", "CLIENT ID", "CLIENT SETNAME", "CLIENT UNBLOCK", "BZPOPMIN")
"""The commands that a worker sends outside of scripts, beside SCRIPT LOAD and EVALSHA."""

# Refusals that are no lack of a right, and that may pass.
_IN_NEED: Final = re.compile(r"\b(?:OOM|READONLY|MISCONF|NOREPLICAS|BUSY|LOADING|MASTERDOWN)\b")


@dataclass(frozen=True, slots=True)
class RedisReport:
    """A server that can serve."""

    server: str  # its name and version
    warnings: tuple[str, ...]  # what the operator should change


@dataclass(slots=True)
class _Lacking:
    """The rights that a Redis user lacks; the dictionaries are ordered sets."""

    commands: dict[str, None] = field(default_factory=dict)
    keys: dict[str, None] = field(default_factory=dict)  # patterns of keys
    other: dict[str, None] = field(default_factory=dict)  # in the server's own words

    def note(self, command: str, keys: str, reason: str) -> None:
        if NO_KEY.search(reason):
            self.keys[keys] = None
        elif NO_COMMAND.search(reason):
            self.commands[command] = None
        elif not _IN_NEED.search(reason):
            self.other[f"{command}: {reason}"] = None

    def told(self) -> str | None:
        """Name everything that is lacking in one sentence."""
        lacks = []
        if self.commands:
            lacks.append(f"may not run {', '.join(self.commands)}")
        if self.keys:
            lacks.append(f"may not use the keys {', '.join(self.keys)}")
        lacks += [f"is refused {refusal}" for refusal in self.other]
        if not lacks:
            return None
        return f"the user of REDIS_URL {'; '.join(lacks)} (docs/permissions.md has what it needs)"


async def examine_redis(redis: PipelinedRedis, prefix: str, queues: Sequence[str]) -> RedisReport:
    """Try every command that a worker of these queues needs, under the prefix of each queue.

    Raises:
        RedisUnfitError: the server can't serve; the message names everything that is lacking.
        redis.exceptions.ConnectionError: the server went away.
    """
    lacking = _Lacking()
    info: Mapping[str, object] = {}
    try:
        info = await redis.info()
    except (RedisError, RuntimeError, ValueError) as error:
        if not is_denial(error):
            if isinstance(error, RedisConnectionError):
                raise
            raise RedisUnfitError(f"Redis does not describe itself: {error}") from error
        lacking.commands["INFO"] = None
    report = assess_redis(info)
    for queue in queues:
        await _probe(redis, f"{prefix}:{queue}", lacking)
    if told := lacking.told():
        raise RedisUnfitError(f"{report.server}: {told}")
    return report


def assess_redis(info: Mapping[str, object]) -> RedisReport:
    """Judge a server by the fields of its INFO.

    Raises:
        RedisUnfitError: it is too old, a read-only replica, a Sentinel, or a node of a cluster.
    """
    text = str(info.get("redis_version", ""))
    numbers = re.match(r"(\d+)(?:\.(\d+))?(?:\.(\d+))?", text)
    version = tuple(int(number or 0) for number in numbers.groups()) if numbers else None
    server = f"Redis {text or 'of an unknown version'}"
    if "valkey_version" in info:
        server = f"Valkey {info['valkey_version']} (Redis {text})"
    mode = info.get("redis_mode") or info.get("server_mode")  # as Valkey calls it
    if mode == "sentinel":
        raise RedisUnfitError(
            f"{server} is a Sentinel; REDIS_URL must name the Redis server that it watches"
        )
    if mode == "cluster" or str(info.get("cluster_enabled")) == "1":
        raise RedisUnfitError(
            f"{server} is a node of a cluster, which this worker can't drive; "
            "REDIS_URL must name a server without one"
        )
    if version is not None and version < MIN_VERSION:
        raise RedisUnfitError(f"{server} is too old: BullMQ needs Redis {_dotted(MIN_VERSION)}")
    if info.get("role") == "slave":
        raise RedisUnfitError(f"{server} is a read-only replica; REDIS_URL must name the primary")
    warnings = []
    if version is None:
        warnings.append("the server does not tell its version")
    elif version < RECOMMENDED_VERSION:
        warnings.append(f"Redis {_dotted(RECOMMENDED_VERSION)} or later is recommended")
    policy = info.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        warnings.append(f"maxmemory-policy is {policy}: set noeviction, or jobs can vanish")
    return RedisReport(server, tuple(warnings))


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


async def _probe(redis: PipelinedRedis, base: str, lacking: _Lacking) -> None:
    """Run every command that a worker needs on keys of one queue."""
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
            lacking.note(str(command[0]), keys, str(error))
            return ()

    await run("CLIENT SETNAME", "")
    await run("CLIENT UNBLOCK", 0)
    # This blocks on a key that does not exist.
    await run("BZPOPMIN", f"{key}:none", "0.01")
    await run("SCRIPT LOAD", PROBE)
    refused = await run("EVALSHA", digest, 1, key)
    for command, reason in refused if isinstance(refused, list) else ():
        lacking.note(command, keys, reason)
