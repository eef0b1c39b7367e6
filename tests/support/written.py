"""What a moment of a job wrote into its row."""

from datetime import UTC, datetime, timedelta
from typing import Any

from redis.asyncio import Redis

Json = dict[str, Any]


def patch(before: Json | None, after: Json | None) -> Json:
    """Return the keys that were written, with their new values."""
    assert before is not None
    assert after is not None
    return {key: value for key, value in after.items() if before.get(key) != value}


def is_now(date: object) -> bool:
    """Tell whether a row's date is in the last minute."""
    moment = datetime.fromisoformat(str(date))
    return timedelta(0) <= datetime.now(UTC) - moment < timedelta(minutes=1)


def is_failure(error: Json, reason: str) -> bool:
    """Tell whether this is the complete record of an exception with that message."""
    assert error.keys() == {"success", "reason", "stackTrace", "lastAttemptAt"}
    assert reason in error["stackTrace"]
    return error["reason"] == reason and is_now(error["lastAttemptAt"])


async def due(redis: Redis, prefix: str, queue: str, task_id: str) -> str:
    """Return when BullMQ will run a delayed job, in a row's format."""
    score = await redis.zscore(f"{prefix}:{queue}:delayed", task_id)
    assert score is not None
    moment = datetime.fromtimestamp((int(score) >> 12) / 1000, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
