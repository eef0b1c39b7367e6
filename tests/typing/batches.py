"""Only checked, never run: what type checkers know about a batch task."""

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, assert_type

from pydantic import BaseModel

from autoflow_worker import (
    BatchContext,
    BatchItem,
    BatchOptions,
    TaskContext,
    TaskDefinition,
    define_task,
)


class Email(BaseModel):
    address: str


class Invoice(BaseModel):
    number: int


class Http:
    def post(self, addresses: list[str]) -> None: ...


@asynccontextmanager
async def http() -> AsyncIterator[Http]:
    yield Http()


@asynccontextmanager
async def number() -> AsyncIterator[int]:
    yield 1


@contextmanager
def around(ctx: BatchContext[Any]) -> Iterator[None]:
    ctx.logger.info("a batch", items=ctx.size)
    yield


@contextmanager
def around_one(ctx: TaskContext[Any]) -> Iterator[None]:
    yield


async def send(items: Sequence[BatchItem[Email]], ctx: BatchContext) -> None:
    for item in items:
        assert_type(item, BatchItem[Email])
        assert_type(item.ctx.cancelled, bool)
        item.complete(item.payload.address)
        item.fail(ValueError("no"))
        item.retry_later(30)


def send_sync(items: Sequence[BatchItem[Email]], ctx: BatchContext) -> None: ...


async def post(items: Sequence[BatchItem[Email]], ctx: BatchContext[Http]) -> None:
    ctx.resources.post([item.payload.address for item in items])


async def send_plain(items: Sequence[BatchItem[dict[str, Any]]], ctx: BatchContext) -> None: ...


async def send_list(items: list[BatchItem[Email]], ctx: BatchContext) -> None: ...


async def send_one(payload: Email, ctx: TaskContext) -> None: ...


async def send_returning(items: Sequence[BatchItem[Email]], ctx: BatchContext) -> list[str]:
    return [item.payload.address for item in items]


batch = BatchOptions(size=100, wait_ms=50)

assert_type(define_task("q", send, batch=batch), TaskDefinition[Email, Any])
assert_type(define_task("q", send_sync, batch=batch), TaskDefinition[Email, Any])
assert_type(define_task("q", send, payload=Email, batch=batch), TaskDefinition[Email, Any])
assert_type(define_task("q", send, batch=batch, around=around), TaskDefinition[Email, Any])
assert_type(define_task("q", post, lifespan=http, batch=batch), TaskDefinition[Email, Any])
# A handler that uses no resources may have some.
assert_type(define_task("q", send, lifespan=http, batch=batch), TaskDefinition[Email, Any])
assert_type(define_task("q", send_plain, batch=batch).parse_payload({}), dict[str, Any])

# Each of these is a mistake that has to be found.
define_task("q", send_one, batch=batch)  # type: ignore[arg-type]
define_task("q", send_list, batch=batch)  # type: ignore[arg-type]
define_task("q", send_returning, batch=batch)  # type: ignore[arg-type]
define_task("q", send, batch=100)  # type: ignore[call-overload]
define_task("q", send, payload=Invoice, batch=batch)  # type: ignore[arg-type]
define_task("q", send, batch=batch, around=around_one)  # type: ignore[arg-type]
define_task("q", post, batch=batch)  # type: ignore[arg-type]
define_task("q", post, lifespan=number, batch=batch)  # type: ignore[misc]
define_task("q", send)  # type: ignore[arg-type]


async def misuse(items: Sequence[BatchItem[Email]], ctx: BatchContext) -> None:
    ctx.logger.info(items[0].payload.adress)  # type: ignore[attr-defined]
    items[0].fail("no")  # type: ignore[arg-type]
    items[0].retry_later("soon")  # type: ignore[arg-type]
    items[0].finish()  # type: ignore[attr-defined]
    ctx.progress(1)  # type: ignore[attr-defined]
    ctx.resources.post([])  # type: ignore[attr-defined]
