"""Only checked, never run: what type checkers know about a task."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, assert_type

from pydantic import BaseModel, TypeAdapter

from autoflow_worker import TaskContext, TaskDefinition, TaskOptions, define_task


class Email(BaseModel):
    address: str


class Invoice(BaseModel):
    number: int


async def send(payload: Email, ctx: TaskContext) -> dict[str, bool]:
    ctx.logger.info("sending", to=payload.address)
    return {"sent": True}


def send_sync(payload: Email, ctx: TaskContext) -> None: ...


async def send_plain(payload: dict[str, Any], ctx: TaskContext) -> None: ...


async def send_either(payload: Email | Invoice, ctx: TaskContext) -> None: ...


class Sender:
    async def __call__(self, payload: Email, ctx: TaskContext) -> None: ...


def count_sync(payload: Email, ctx: TaskContext) -> int:
    return len(payload.address)


assert_type(define_task("q", send), TaskDefinition[Email, dict[str, bool]])
assert_type(define_task("q", send_sync), TaskDefinition[Email, None])
assert_type(define_task("q", count_sync), TaskDefinition[Email, int])
assert_type(define_task("q", Sender()), TaskDefinition[Email, None])
# Any in a handler's signature leaves mypy without a choice between the overloads.
assert_type(define_task("q", send_plain), TaskDefinition[Any, Any])
assert_type(define_task("q", send_either), TaskDefinition[Email | Invoice, None])
assert_type(define_task("q", send).parse_payload({}), Email)
assert_type(define_task("q", send, payload=Email), TaskDefinition[Email, dict[str, bool]])
assert_type(
    define_task("q", send, payload=TypeAdapter(Email)), TaskDefinition[Email, dict[str, bool]]
)

define_task(
    queue_name="q",
    handler=send,
    options=TaskOptions(priority="high", timeout_ms=None),
    worker_options={
        "lockDuration": 1000,
        "limiter": {"max": 1, "duration": 1000},
        "removeOnFail": {"count": 5},
    },
)

# Each of these is a mistake that has to be found.
define_task("q", send, payload=Invoice)  # type: ignore[arg-type]
define_task("q", send_plain, payload=Email)  # type: ignore[arg-type]
define_task("q", lambda payload: None)  # type: ignore[misc, arg-type]
define_task("q", send, options={"priority": "high"})  # type: ignore[call-overload]
define_task("q", send, TaskOptions(priority="urgent"))  # type: ignore[arg-type]
define_task("q", send, worker_options={"concurrency": 5})  # type: ignore[call-overload]
define_task("q", send, worker_options={"lockDuration": "1000"})  # type: ignore[call-overload]


class Http:
    def get(self, url: str) -> bytes:
        return url.encode()


@asynccontextmanager
async def http() -> AsyncIterator[Http]:
    yield Http()


@asynccontextmanager
async def number() -> AsyncIterator[int]:
    yield 1


async def fetch(payload: Email, ctx: TaskContext[Http]) -> bytes:
    return ctx.resources.get(payload.address)


def fetch_sync(payload: Email, ctx: TaskContext[Http]) -> bytes:
    return ctx.resources.get(payload.address)


async def misuse(payload: Email, ctx: TaskContext) -> None:
    ctx.resources.get("x")  # type: ignore[attr-defined]
    ctx.progres(1)  # type: ignore[attr-defined]


assert_type(define_task("q", fetch, lifespan=http), TaskDefinition[Email, bytes])
assert_type(define_task("q", fetch_sync, lifespan=http), TaskDefinition[Email, bytes])
# A handler that uses no resources may have some.
assert_type(define_task("q", send, lifespan=http), TaskDefinition[Email, dict[str, bool]])

define_task("q", fetch)  # type: ignore[arg-type]
define_task("q", fetch, lifespan=number)  # type: ignore[misc]
define_task("q", fetch_sync)  # type: ignore[arg-type]
define_task("q", fetch, lifespan=Http)  # type: ignore[arg-type]
