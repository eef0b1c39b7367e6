"""A job as BullMQ keeps it in Redis: its state and its fields, whatever they hold."""

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
"""2001, in ms since the epoch. An earlier value in a field for a time is not a time."""

_LATEST_MS: Final = 253_402_300_799_999
_MAX_SAFE_INTEGER: Final = 2**53 - 1

_SETS: Final = ("completed", "failed", "delayed", "prioritized", "waiting-children")
_LISTS: Final = ("active", "wait", "paused")
_FIELDS: Final = (
    *("atm", "failedReason", "finishedOn", "processedOn", "returnvalue", "stacktrace"),
)

# One script, so that it sees a moving job in either its old or its new state. It does not read the
# payload.
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
    """What BullMQ keeps of one job. Times and counts that BullMQ does not know are 0.

    Attributes:
        state: the name of the list or set that the job is in; "" for none.
        exists: whether the job has fields.
        score: the job's score, if the state is a set.
        fields: the fields that were read and that exist.
        fault: why the job can't be read; None if it can.
    """

    id: str
    state: str = ""
    exists: bool = False
    score: float | None = None
    fields: Mapping[str, str] | None = None
    fault: str | None = None

    @property
    def due_ms(self) -> int:
        """When a delayed job is due."""
        # BullMQ keeps a counter in the score's lower 12 bits.
        return time_ms((self.score or 0) / 0x1000)

    @property
    def started_ms(self) -> int:
        """When the last attempt began."""
        return time_ms(self.text("processedOn"))

    @property
    def ended_ms(self) -> int:
        """When the job finished. The score of its set is the same time."""
        return time_ms(self.text("finishedOn")) or time_ms(self.score)

    @property
    def attempts_made(self) -> int:
        """How many attempts have ended."""
        made = whole(self.text("atm"))
        return made if 0 <= made <= _MAX_SAFE_INTEGER else 0

    def text(self, field: str) -> str | None:
        return (self.fields or {}).get(field)


class JobReader:
    """Reads jobs without changing them."""

    def __init__(self, redis: PipelinedRedis, prefix: str) -> None:
        self._look = redis.register_script(_LOOK)
        self._prefix = prefix

    async def look(self, queue: str, job_id: str, *, fields: bool) -> KeptJob:
        """Look one job up, whatever its key and its queue's keys hold.

        Args:
            fields: whether to read the fields, which may be large.

        Raises:
            redis.exceptions.RedisError: the server can't be reached, or refuses the script.
        """
        base = f"{self._prefix}:{queue}:"
        keys = [base + job_id, *(base + name for name in (*_SETS, *_LISTS))]
        wanted = _FIELDS if fields else _FIELDS[:1]  # one shows whether the key is a hash
        try:
            state, score, exists, values = await self._look(keys=keys, args=[job_id, *wanted])
        except ResponseError as error:
            if "WRONGTYPE" not in str(error):
                raise
            return KeptJob(job_id, fault="its key, or one of its queue, holds another type of data")
        return KeptJob(
            job_id,
            state=("", *_SETS, *_LISTS)[state],
            exists=bool(exists),
            score=float(score) if score else None,
            fields={name: v for name, v in zip(wanted, values, strict=True) if v is not None},
        )


def time_ms(value: Any) -> int:
    """Return the time that a field or a score holds, in ms since the epoch; 0 if it holds none."""
    ms = whole(value)
    return ms if EARLIEST_MS <= ms <= _LATEST_MS else 0


def whole(value: Any) -> int:
    """Return a number without its fraction; 0 for anything else."""
    try:
        return int(float(value))
    except (TypeError, ValueError, OverflowError):
        return 0
