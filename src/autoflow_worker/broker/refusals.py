"""What a script of BullMQ's refuses about a job that a worker ends or moves, as an exception."""

from typing import Any, Final

from bullmq.error_code import ErrorCode

from autoflow_worker.broker.claim import ChildFailedError, ChildrenLeftError, LockLostError

_LOST: Final = {
    ErrorCode[name].value: name
    for name in ("JobNotExist", "JobLockNotExist", "JobNotInState", "JobLockMismatch")
}


def refusal(scripts: Any, code: int, job_id: str, command: str) -> Exception:
    """Return what a negative reply means; the words about children are BullMQ's own.

    Args:
        scripts: bullmq's `Scripts`.
        code: the reply.
        command: the script's name.
    """
    if code in _LOST:
        return LockLostError(_LOST[code])
    words = str(scripts.finishedErrors({"code": code, "jobId": job_id, "command": command}))
    if code == ErrorCode.JobHasFailedChildren.value:
        return ChildFailedError(words)
    return ChildrenLeftError(words)
