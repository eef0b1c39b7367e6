"""The job that a payload becomes, as the API makes it (contract, sections 1 and 5)."""

import secrets
from typing import Any
from uuid import uuid4

from pydantic_core import to_jsonable_python

from autoflow_worker.broker.backoff import MAX_DELAY_MS
from autoflow_worker.broker.producer import KEPT_COMPLETED, KEPT_FAILED
from autoflow_worker.encoding.results import storable
from autoflow_worker.errors import PayloadError, WorkerError
from autoflow_worker.tasks.definition import CORRELATION_ID, PRIORITIES, TaskDefinition


def job_data(
    task: TaskDefinition[Any], payload: object, correlation_id: str | None
) -> dict[str, Any]:
    """Return the data that a job of this payload has; its fields are not validated.

    Raises:
        PayloadError: the payload is no JSON object, or brings a `correlationId` as no field of it.
    """
    try:
        # By alias and without computed fields, as the worker validates it.
        data = storable(to_jsonable_python(payload, by_alias=True, round_trip=True))
    except Exception as error:
        reason = f"payload can't be written as JSON: {error}"
        raise PayloadError(reason) from error
    if not isinstance(data, dict):
        raise PayloadError(f"payload is no JSON object, but a {type(payload).__name__}")
    if CORRELATION_ID in data and not task.takes_correlation_id:
        raise PayloadError("correlationId is no field of the payload: pass correlation_id=")
    data[CORRELATION_ID] = correlation_id or data.get(CORRELATION_ID) or str(uuid4())
    return data


def job_options(task: TaskDefinition[Any], delay_ms: int | None) -> dict[str, Any]:
    """Return BullMQ's options of a new job, among them its id.

    Raises:
        WorkerError: the delay is out of range.
    """
    delay_ms = delay_ms or 0
    if not 0 <= delay_ms <= MAX_DELAY_MS:
        raise WorkerError(f"delay_ms must be from 0 to {MAX_DELAY_MS}, not {delay_ms}")
    return {
        "jobId": secrets.token_urlsafe(16)[:21],  # The alphabet and length of the API's nanoid.
        "priority": PRIORITIES[task.options.priority],
        "attempts": task.options.max_attempts,
        "backoff": {"type": "exponential", "delay": task.options.backoff_ms},
        "delay": delay_ms,
        "removeOnComplete": KEPT_COMPLETED,
        "removeOnFail": KEPT_FAILED,
    }
