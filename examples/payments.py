"""Two failures: one that a retry may solve, and one that no retry can."""

import asyncio
from decimal import Decimal

from pydantic import BaseModel

from autoflow_worker import TaskContext, TaskOptions, UnrecoverableError, define_task


class Charge(BaseModel):
    card: str
    amount: Decimal


async def charge_card(payload: Charge, ctx: TaskContext) -> dict[str, object]:
    await asyncio.sleep(0.02)
    if payload.card.endswith("0000"):
        raise UnrecoverableError("the card was declined")  # a retry would not help
    return {"charged": payload.amount}


charge_card_task = define_task(
    "payments-charge", charge_card, TaskOptions(priority="critical", concurrency=5)
)


class Refund(BaseModel):
    charge: str


async def refund(payload: Refund, ctx: TaskContext) -> dict[str, object]:
    # As if the bank were down at first. The retries follow after 0.3 s, 0.6 s, 1.2 s, ...
    if ctx.attempt < 3:
        raise ConnectionError("the bank does not answer")
    return {"refunded": payload.charge, "attempts": ctx.attempt}


refund_task = define_task(
    "payments-refund", refund, TaskOptions(max_attempts=5, backoff_ms=300, concurrency=5)
)
