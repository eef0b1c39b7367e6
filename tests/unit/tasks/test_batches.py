"""A batch task's definition, and its items as a handler's own test makes them."""

import threading
from collections.abc import Sequence
from typing import Any

import pytest
from pydantic import BaseModel
from structlog.testing import capture_logs

from autoflow_worker import (
    BatchContext,
    BatchEndedError,
    BatchItem,
    BatchOptions,
    PayloadError,
    RetryLater,
    TaskContext,
    TaskOptions,
    define_task,
)
from autoflow_worker.errors import TaskListError


class Email(BaseModel):
    address: str


async def send(items: Sequence[BatchItem[Email]], ctx: BatchContext) -> None: ...


def send_sync(items: "list[BatchItem[Email]]", ctx: BatchContext) -> None: ...


async def send_bare(items: Sequence[BatchItem], ctx: BatchContext) -> None: ...


async def send_anything(items, ctx):  # type: ignore[no-untyped-def]
    ...


async def send_one(payload: Email, ctx: TaskContext) -> None: ...


def item(task_id: str = "t") -> BatchItem[Email]:
    ctx = TaskContext(task_id=task_id, correlation_id="c", queue_name="mails")
    return BatchItem(Email(address="a@x"), ctx)


@pytest.mark.parametrize("handler", [send, send_sync])
def test_the_payload_type_is_that_of_one_item(handler: Any) -> None:
    task = define_task("mails", handler, batch=BatchOptions())
    assert task.parse_payload({"address": "a@x", "correlationId": "c"}) == Email(address="a@x")
    with pytest.raises(PayloadError, match="address"):
        task.parse_payload({})


@pytest.mark.parametrize("handler", [send_bare, send_anything])
def test_items_without_a_type_have_the_plain_json_object(handler: Any) -> None:
    task = define_task("mails", handler, batch=BatchOptions())
    assert task.parse_payload({"n": 1}) == {"n": 1}
    typed = define_task("mails", handler, payload=Email, batch=BatchOptions())
    assert typed.parse_payload({"address": "a@x"}) == Email(address="a@x")


@pytest.mark.parametrize(
    ("handler", "given", "reason"),
    [
        (send, {}, r"define_task needs a batch="),
        (send_one, {"batch": BatchOptions()}, r"is a Sequence\[BatchItem\[...\]\], not .*Email"),
        (send, {"batch": 100}, "batch must be BatchOptions, not 100"),
        (send, {"batch": BatchOptions(size=0)}, "batch's size must be a whole number from 1"),
        (send, {"batch": BatchOptions(size=1001)}, "from 1 to 1000, not 1001"),
        (send, {"batch": BatchOptions(wait_ms=-1)}, "batch's wait_ms must be a whole number"),
        (send, {"batch": BatchOptions(wait_ms=0.5)}, "from 0 to 60000, not 0.5"),  # type: ignore[arg-type]
        (
            send,
            {"batch": BatchOptions(), "options": TaskOptions(run_in="process")},
            "not in processes; take batch= or run_in='process' away",
        ),
        (
            send,
            {"batch": BatchOptions(size=1000), "options": TaskOptions(concurrency=11)},
            "11 batches of 1000 are more than 10000 jobs at once; set a smaller",
        ),
    ],
)
def test_definitions_that_make_no_sense(handler: Any, given: dict[str, Any], reason: str) -> None:
    with pytest.raises(TaskListError, match=f"task 'mails': .*{reason}"):
        define_task("mails", handler, **given)


def test_the_first_settlement_counts() -> None:
    one = item()
    assert one.settlement is None
    one.complete({"sent": True})
    with capture_logs() as logs:
        one.fail(ValueError("no"))
        one.retry_later(3)
    assert one.settlement == ({"sent": True}, None)
    assert [(line["event"], line["task_id"]) for line in logs] == [("item_settled_twice", "t")] * 2


def test_an_item_can_fail_or_come_back() -> None:
    failed, later = item(), item()
    error = ValueError("no")
    failed.fail(error)
    later.retry_later(1.5)
    assert failed.settlement == (None, error)
    assert later.settlement is not None
    assert isinstance(later.settlement.error, RetryLater)
    assert later.settlement.error.delay_ms == 1500


def test_what_settles_nothing() -> None:
    one = item()
    with pytest.raises(TypeError, match=r"item\.fail\(\) takes an exception, not 'no'"):
        one.fail("no")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="seconds"):
        one.retry_later(-1)
    assert one.settlement is None


def test_an_item_is_not_settled_after_its_batch() -> None:
    open_item, settled = item(), item()
    settled.complete(1)
    assert (open_item.end(), settled.end()) == (None, (1, None))
    settle: list[tuple[str, Any]] = [("complete", 1), ("fail", ValueError()), ("retry_later", 1)]
    for each in (open_item, settled):
        for method, argument in settle:
            with pytest.raises(BatchEndedError, match="the job t has ended"):
                getattr(each, method)(argument)
    assert open_item.settlement is None


def test_threads_that_settle_one_item_settle_it_once() -> None:
    one, told = item(), []
    one.begin(lambda: told.append(one.settlement))
    start = threading.Barrier(8)

    def settle(number: int) -> None:
        start.wait()
        one.complete(number)

    with capture_logs() as logs:
        threads = [threading.Thread(target=settle, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert told == [one.settlement]
    assert len(logs) == 7


def test_a_context_can_be_made_for_a_handlers_own_tests() -> None:
    context = BatchContext([item("first"), item("second")])
    assert (context.queue_name, context.task_id, context.size) == ("mails", "first", 2)
    assert (context.resources, context.stopping, context.time_left()) == (None, False, None)
    assert context.log_fields() == {"queue": "mails", "task_id": "first", "items": 2}
    context.logger.debug("a_line")
