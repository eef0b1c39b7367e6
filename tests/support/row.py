"""The API's strict schema of a row, which refuses unknown keys (contract, section 2)."""

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StrictFloat,
    StrictInt,
    StringConstraints,
)


def _real_date(text: str) -> str:
    datetime.strptime(text, "%Y-%m-%dT%H:%M:%S.%fZ")  # noqa: DTZ007 - the Z is UTC
    return text


IsoDate = Annotated[
    str,
    StringConstraints(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$"),
    AfterValidator(_real_date),
]
# A JavaScript number; true and "1" are none.
Number = StrictInt | StrictFloat


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Result(Strict):
    success: Literal[True]
    output: Any = None
    duration: Number


class Error(Strict):
    success: Literal[False]
    reason: str
    # Optional, but never null.
    stackTrace: str = ""
    lastAttemptAt: IsoDate


class TaskRow(Strict):
    """The `data` of a row. Every key is required, because the API and the worker write all."""

    schemaVersion: Literal[1]
    taskName: str
    queueName: str
    payload: dict[str, Any]
    status: Literal["pending", "active", "completed", "failed", "delayed", "cancelled"]
    priority: Literal["low", "normal", "high", "critical"]
    attempts: Annotated[int, Field(ge=0)]
    maxAttempts: Annotated[int, Field(ge=1)]
    enqueuedAt: IsoDate
    startedAt: IsoDate | None
    completedAt: IsoDate | None
    failedAt: IsoDate | None
    delayUntil: IsoDate | None
    result: Result | None
    error: Error | None
    userId: str | None
    externalId: str | None
