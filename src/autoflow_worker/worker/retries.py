"""Whether a failed attempt is followed by another one, and when."""

import asyncio
from typing import Any, Final

from autoflow_worker.broker.backoff import BackoffStrategy, NoBackoffError, backoff_ms
from autoflow_worker.broker.claim import ChildFailedError
from autoflow_worker.errors import NotStorableError, PayloadError
from autoflow_worker.tasks.exceptions import UnrecoverableError

_NEVER: Final = (UnrecoverableError, PayloadError, NotStorableError, ChildFailedError)


def is_final(error: BaseException, attempt: int, max_attempts: int) -> bool:
    """Whether no attempt can follow: none is left, or it would come to the same."""
    return isinstance(error, _NEVER) or attempt >= max_attempts


async def next_delay(
    error: BaseException,
    backoff: object,
    attempt: int,
    *,
    job: Any = None,
    strategy: BackoffStrategy | None = None,
) -> tuple[int | None, str | None]:
    """Return the ms until the next attempt, or None, and why there is none if not obvious.

    Args:
        error: why the attempt failed, which `is_final` does not know as the last one.
        backoff: the job's option.
        attempt: the number of the attempt, from 1.
        job: for the strategy.
        strategy: the task's own.
    """
    try:
        delay_ms = await backoff_ms(backoff, attempt, error=error, job=job, strategy=strategy)
    except NoBackoffError as reason:
        return None, str(reason)
    except BaseException as reason:
        slot = asyncio.current_task()
        if isinstance(reason, asyncio.CancelledError) and slot and slot.cancelling():
            raise
        # A strategy is a task author's code: it may raise `SystemExit`, and costs its job only.
        return None, f"the backoff strategy raised {type(reason).__name__}"
    return delay_ms, None
