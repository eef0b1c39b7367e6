"""Give a job back to its queue, which rests: what Node's worker does at a ``RateLimitError``."""

from redis.exceptions import ResponseError

from autoflow_worker.broker.claim import Claim, LockLostError, MalformedJobError, Reply


async def give_back(
    claim: Claim,
    *,
    fetch_next: bool,  # noqa: ARG001 - BullMQ's script fetches nothing
) -> Reply:
    """Move the job back to its queue, as the first of its priority; its attempt is not used up.

    Returns:
        A reply that says how long the queue's rate limit lasts, if there is one.

    Raises:
        LockLostError: this worker does not hold the job any more.
        MalformedJobError: BullMQ's script breaks on the job.
    """
    try:
        limited_ms = await claim.job.moveToWait(claim.token)
    except ResponseError as error:
        raise MalformedJobError(str(error)) from error
    except TypeError as error:  # Each of the script's refusals is about the job or its lock.
        raise LockLostError(str(error)) from error
    return Reply(fetched=limited_ms > 0, limited_ms=limited_ms)
