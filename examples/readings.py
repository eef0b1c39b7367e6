"""A batch task: one call of the handler for many jobs, as one INSERT for many rows."""

import asyncio
from collections.abc import Sequence

from pydantic import BaseModel

from autoflow_worker import BatchContext, BatchItem, BatchOptions, UnrecoverableError, define_task


class Reading(BaseModel):
    sensor: str
    celsius: float


async def store_readings(items: Sequence[BatchItem[Reading]], ctx: BatchContext) -> None:
    readings = []
    for item in items:
        if item.payload.celsius < -273.15:
            item.fail(UnrecoverableError("colder than cold: the sensor is broken"))
        else:
            readings.append(item.payload)
    await asyncio.sleep(0.01)  # one INSERT of all readings
    ctx.logger.info("readings_stored", count=len(readings))
    # The items that are not settled are completed. If the INSERT raised, they would fail.


store_readings_task = define_task(
    "readings-store", store_readings, batch=BatchOptions(size=100, wait_ms=50)
)
