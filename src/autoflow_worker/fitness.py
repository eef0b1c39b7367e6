"""Whether a Redis server can carry BullMQ's queues, from what its INFO says."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from autoflow_worker.errors import RedisUnfitError

#: BullMQ's own lower limit, and the version below which it warns.
MIN_VERSION = (5, 0, 0)
RECOMMENDED_VERSION = (6, 2, 0)


@dataclass(frozen=True, slots=True)
class RedisReport:
    """What is worth knowing about a server that will do.

    Attributes:
        server: its name and version.
        warnings: what should be changed.
    """

    server: str
    warnings: tuple[str, ...]


def assess_redis(info: Mapping[str, object]) -> RedisReport:
    """Judge a server by the fields of its INFO.

    Raises:
        RedisUnfitError: it is too old, a read-only replica, or a node of a cluster.
    """
    text = str(info.get("redis_version", ""))
    version = _version(text)
    server = _server(info, text)
    if version is not None and version < MIN_VERSION:
        raise RedisUnfitError(f"{server} is too old: BullMQ needs Redis {_dotted(MIN_VERSION)}")
    if info.get("role") == "slave":
        raise RedisUnfitError(f"{server} is a read-only replica; REDIS_URL must name the primary")
    if info.get("redis_mode") == "cluster" or str(info.get("cluster_enabled")) == "1":
        raise RedisUnfitError(f"{server} is a node of a cluster, which this worker can't drive")
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
