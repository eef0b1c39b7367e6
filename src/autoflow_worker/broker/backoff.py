"""How long a failed job waits for its next attempt: the arithmetic of Node's `backoffs.ts`.

bullmq's Python `Backoffs` ignores jitter. At an unknown type it raises, and the job stays active.
"""

import inspect
import math
import random
from collections.abc import Callable, Mapping
from typing import Any, Final

MAX_DELAY_MS: Final = 10 * 365 * 24 * 3600 * 1000
"""The longest backoff, ten years: BullMQ packs due times into 53 bits."""

BackoffStrategy = Callable[[int, str, BaseException | None, Any], Any]
"""(attempts made, backoff type, error, job) -> ms, 0 for now, -1 for never; may be async."""


class NoBackoffError(ValueError):
    """A job's backoff options can't be followed."""


async def backoff_ms(
    backoff: object,
    attempts_made: int,
    *,
    error: BaseException | None = None,
    job: Any = None,
    strategy: BackoffStrategy | None = None,
) -> int | None:
    """Return the ms until the next attempt; None if the strategy wants no further attempt.

    Args:
        backoff: the job's `backoff` option: missing, a number of ms, or an object with `type`,
            `delay` (ms) and `jitter` (0 to 1).
        attempts_made: attempts including the one that failed now.
        error: why it failed; for the strategy, as is `job`.
        strategy: the worker's own, for types that BullMQ does not know.

    Raises:
        NoBackoffError: the options are of a wrong type, or name an unknown type.
    """
    if not backoff:
        return 0
    if isinstance(backoff, int | float):
        return _bounded(backoff)
    if not isinstance(backoff, Mapping):
        raise NoBackoffError(f"the backoff option is a {type(backoff).__name__}")
    kind = backoff.get("type")
    if kind in ("fixed", "exponential"):
        delay = _number(backoff.get("delay") or 0, "delay")
        jitter = _number(backoff.get("jitter") or 0, "jitter")
        if kind == "exponential":
            # Without a limit, a float would overflow after a thousand attempts.
            delay = math.floor(delay * 2.0 ** min(attempts_made - 1, 64) + 0.5)
        if jitter > 0:
            delay = math.floor(random.uniform(1 - jitter, 1) * delay)  # noqa: S311 - not a secret
        return _bounded(delay)
    if strategy is None:
        raise NoBackoffError(f"the backoff type {kind!r} is unknown")
    answer = strategy(attempts_made, str(kind), error, job)
    if inspect.isawaitable(answer):
        answer = await answer
    if answer == -1:
        return None
    return _bounded(_number(answer or 0, "what the backoff strategy returns"))


def _number(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise NoBackoffError(f"the backoff's {name} is no number")
    return value


def _bounded(delay: float) -> int:
    return int(min(max(delay, 0), MAX_DELAY_MS))
