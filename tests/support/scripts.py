"""BullMQ's scripts as this worker sends them. Their guards give them other hashes."""

import hashlib

from bullmq import Worker
from redis.asyncio import Redis

from autoflow_worker.broker.script_guard import guarded_as


def sha_of(name: str) -> bytes:
    """Return the hash by which this worker calls BullMQ's script of that name."""
    return hashlib.sha1(_scripts()[name].encode()).hexdigest().encode()


async def load_scripts(redis: Redis) -> None:
    """Load all scripts into the server's script cache."""
    for script in _scripts().values():
        await redis.script_load(script)


def _scripts() -> dict[str, str]:
    commands = Worker("any", None, {"connection": Redis()}).scripts.commands
    return {name: guarded_as(name, command.script) for name, command in commands.items()}
