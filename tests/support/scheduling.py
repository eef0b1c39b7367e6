"""Tasks to schedule, and how long a scheduler waits for its servers."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, datetime
from typing import Any

import pytest
from pydantic import BaseModel, Field, computed_field
from redis.asyncio import Redis
from typing_extensions import TypedDict

from autoflow_worker import TaskContext, TaskOptions, define_task
from autoflow_worker.broker import channel
from autoflow_worker.recording import new_rows
from autoflow_worker.scheduling import scheduler as scheduler_module

QUEUE = "users-send-welcome-email"


class Email(BaseModel):
    address: str = Field(alias="emailAddress")
    born: date | None = None

    @computed_field  # type: ignore[prop-decorator]  # mypy's own limit
    @property
    def domain(self) -> str:
        return self.address.partition("@")[2]


@dataclass
class Invoice:
    number: int
    due: datetime | None = None


class Ticket(TypedDict):
    title: str


async def send(payload: Email, ctx: TaskContext) -> str:
    return payload.domain


async def pay(payload: Invoice, ctx: TaskContext) -> int:
    return payload.number


async def triage(payload: Ticket, ctx: TaskContext) -> None: ...


async def anything(payload: dict[str, Any], ctx: TaskContext) -> None: ...


email = define_task(
    QUEUE, send, TaskOptions(priority="high", max_attempts=5, backoff_ms=700, concurrency=5)
)
invoice = define_task("invoices-pay", pay)
ticket = define_task("tickets-triage", triage)
plain = define_task("anything", anything)


def wait_for_servers(patch: pytest.MonkeyPatch, seconds: float) -> None:
    for module in (scheduler_module, new_rows):
        patch.setattr(module, "PATIENCE", seconds)
    patch.setattr(channel, "CONNECT_PATIENCE", seconds)


@contextmanager
def impatience() -> Iterator[None]:
    """Where a server does not come back, that is known soon."""
    with pytest.MonkeyPatch.context() as patch:
        wait_for_servers(patch, 0.1)
        yield


async def job_ids(redis: Redis, prefix: str) -> set[str]:
    """The ids of all jobs, from their hashes."""
    found = set()
    async for key in redis.scan_iter(f"{prefix}:*", count=10_000):
        if await redis.type(key) == "hash" and await redis.hexists(key, "opts"):
            found.add(key.rpartition(":")[2])
    return found
