"""Check that a Redis server can serve BullMQ's queues: its kind, version, settings and rights."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from autoflow_worker.broker.client import PipelinedRedis
from autoflow_worker.broker.replies import is_denial
from autoflow_worker.broker.rights import probe_rights
from autoflow_worker.errors import RedisUnfitError

MIN_VERSION: Final = (5, 0, 0)
"""BullMQ's own lower limit."""

RECOMMENDED_VERSION: Final = (6, 2, 0)
"""The version below which BullMQ warns."""


@dataclass(frozen=True, slots=True)
class RedisReport:
    """A server that can serve.

    Attributes:
        server: its name and version.
        warnings: what the operator should change.
    """

    server: str
    warnings: tuple[str, ...]


async def examine_redis(redis: PipelinedRedis, prefix: str, queues: Sequence[str]) -> RedisReport:
    """Try every command that a worker of these queues needs.

    Args:
        redis: open.
        prefix: BullMQ's key prefix.
        queues: under whose prefixes each command is tried.

    Raises:
        RedisUnfitError: the server can't serve; the message names everything that is lacking.
        redis.exceptions.ConnectionError: the server went away.
    """
    lacking_info = False
    try:
        info: Mapping[str, object] = await redis.info()
    except (RedisError, RuntimeError, ValueError) as error:
        if isinstance(error, RedisConnectionError) and not is_denial(error):
            raise
        if not is_denial(error):
            raise RedisUnfitError(f"Redis does not describe itself: {error}") from error
        info, lacking_info = {}, True
    report = assess_redis(info)
    rights = await probe_rights(redis, prefix, queues)
    if lacking_info:
        rights.commands["INFO"] = None
    if lacking := rights.lacking():
        raise RedisUnfitError(f"{report.server}: {lacking}")
    return report


def assess_redis(info: Mapping[str, object]) -> RedisReport:
    """Judge a server by the fields of its INFO.

    Raises:
        RedisUnfitError: it is too old, a read-only replica, a Sentinel, or a node of a cluster.
    """
    text = str(info.get("redis_version", ""))
    version = _version(text)
    server = _server(info, text)
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


def _server(info: Mapping[str, object], version: str) -> str:
    if "valkey_version" in info:
        return f"Valkey {info['valkey_version']} (Redis {version})"
    return f"Redis {version or 'of an unknown version'}"


def _version(text: str) -> tuple[int, ...] | None:
    numbers = re.match(r"(\d+)(?:\.(\d+))?(?:\.(\d+))?", text)
    return tuple(int(number or 0) for number in numbers.groups()) if numbers else None


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
