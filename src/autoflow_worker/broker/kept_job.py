"""A job as BullMQ keeps it in Redis: where it is, and what its fields say, whatever they hold."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from redis.exceptions import ResponseError

from autoflow_worker.broker.client import PipelinedRedis

STATUS_OF_STATE: Final[Mapping[str, str]] = {
    "wait": "pending",
    "paused": "pending",
    "prioritized": "pending",
    "waiting-children": "pending",
    "delayed": "delayed",
    "active": "active",
    "completed": "completed",
    "failed": "failed",
}

EARLIEST_MS: Final = 1_000_000_000_000
"""Epoch ms in 2001. What BullMQ calls a time and lies before it, is none."""

_LATEST_MS: Final = 253_402_300_799_999
_MAX_SAFE_INTEGER: Final = 2**53 - 1

_SETS: Final = ("completed", "failed", "delayed", "prioritized", "waiting-children")
_LISTS: Final = ("active", "wait", "paused")
_FIELDS: Final = (
    "atm",
    "failedReason",
    "finishedOn",
    "processedOn",
    "returnvalue",
    "stacktrace",
)

# One script, so that a job which moves meanwhile is seen either before or after. The payload is not
# read.
_LOOK: Final = """
local state, score
for i = 1, 5 do
  score = redis.call('ZSCORE', KEYS[i + 1], ARGV[1])
  if score then state = i; break end
end
for i = 6, 8 do
  if not state and redis.call('LPOS', KEYS[i + 1], ARGV[1]) then state = i end
end
local fields = redis.call('HMGET', KEYS[1], unpack(ARGV, 2))
return {state or 0, score or '', redis.call('EXISTS', KEYS[1]), fields}
"""


@dataclass(frozen=True, slots=True)
class KeptJob:
    """What BullMQ keeps of one job.

    Attributes:
        id: the job's.
        state: the list or set it is in, by the name of its key; "" for none.
        exists: whether its fields are there.
        score: its score, where the state is a set.
        fields: those that were read and that it has.
        fault: why nothing else is known of it; None as a rule.
    """

    id: str
    state: str = ""
    exists: bool = False
    score: float | None = None
    fields: Mapping[str, str] | None = None
    fault: str | None = None

    @property
    def due_ms(self) -> int | None:
        """When a delayed job is due."""
        # BullMQ keeps a counter in the lower 12 bits.
        return None if self.score is None else time_ms(self.score / 0x1000)

    @property
    def started_ms(self) -> int | None:
        """When its last attempt began."""
        return time_ms(self.text("processedOn"))

    @property
    def ended_ms(self) -> int | None:
        """When it finished; the score of its set is the same time."""
        return time_ms(self.text("finishedOn")) or time_ms(self.score)

    @property
    def attempts_made(self) -> int | None:
        """How many attempts have ended; None if the counter is none."""
        made = whole(self.text("atm") or "0")
        return made if made is not None and 0 <= made <= _MAX_SAFE_INTEGER else None

    def text(self, field: str) -> str | None:
        """One field, as it is."""
        return (self.fields or {}).get(field)


class JobReader:
    """Looks at jobs in Redis.

    Args:
        redis: an open client; the caller closes it.
        prefix: BullMQ's key prefix.
    """

    def __init__(self, redis: PipelinedRedis, prefix: str) -> None:
        self._look = redis.register_script(_LOOK)
        self._prefix = prefix

    async def look(self, queue: str, job_id: str, *, fields: bool) -> KeptJob:
        """Look at one job; what its key or its queue's keys hold may be anything.

        Args:
            fields: whether to read them; they may be large.

        Raises:
            redis.exceptions.RedisError: the server can't be reached, or refuses to be asked.
        """
        base = f"{self._prefix}:{queue}:"
        keys = [base + job_id, *(base + name for name in (*_SETS, *_LISTS))]
        wanted = _FIELDS if fields else _FIELDS[:1]  # which tells whether they can be read
        try:
            state, score, exists, values = await self._look(keys=keys, args=[job_id, *wanted])
        except ResponseError as error:
            if "WRONGTYPE" not in str(error):
                raise
            return KeptJob(job_id, fault="a key of it, or of its queue, holds another type of data")
        return KeptJob(
            job_id,
            state=("", *_SETS, *_LISTS)[state],
            exists=bool(exists),
            score=float(score) if score else None,
            fields={name: v for name, v in zip(wanted, values, strict=True) if v is not None},
        )


def time_ms(value: Any) -> int | None:
    """Return a time that a field or a score holds, in epoch ms; None for what is no time."""
    ms = whole(value)
    return ms if ms is not None and EARLIEST_MS <= ms <= _LATEST_MS else None


def whole(value: Any) -> int | None:
    """Return a number without its fraction; None for what is none."""
    try:
        return int(float(value))
    except (TypeError, ValueError, OverflowError):
        return None
