import contextlib
import functools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ParamSpec

import pytest
from pydantic import BaseModel, TypeAdapter
from typing_extensions import TypedDict  # pydantic takes typing's from Python 3.12 on

from autoflow_worker import TaskContext, TaskOptions, define_task
from autoflow_worker.errors import TaskListError

if TYPE_CHECKING:
    from decimal import Decimal


P = ParamSpec("P")


class Email(BaseModel):
    address: str


@dataclass
class Point:
    x: int


class Size(TypedDict):
    width: int


async def takes_email(payload: Email, ctx: TaskContext) -> None: ...


def takes_email_sync(payload: Email, ctx: TaskContext) -> None: ...


async def takes_point(payload: Point, ctx: TaskContext) -> None: ...


async def takes_size(payload: Size, ctx: TaskContext) -> None: ...


async def takes_text(payload: "Email", ctx: "NeverDefined") -> None:  # type: ignore[name-defined]  # noqa: F821
    ...


async def takes_dict(payload: dict[str, Any], ctx: TaskContext) -> None: ...


async def takes_anything(payload, ctx):  # type: ignore[no-untyped-def]
    ...


async def takes_more(
    extra: int, payload: Email, ctx: TaskContext, *, flag: bool = True
) -> None: ...


def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        return await function(*args, **kwargs)

    return wrapper


class Mailer:
    async def __call__(self, payload: Email, ctx: TaskContext) -> None: ...

    def send(self, payload: Email, ctx: TaskContext) -> None: ...


@pytest.mark.parametrize(
    ("handler", "is_async"),
    [
        (takes_email, True),
        (takes_email_sync, False),
        (takes_text, True),
        (functools.partial(takes_more, 1), True),
        (functools.partial(functools.partial(takes_more, 1), flag=False), True),
        (wrapped(takes_email), True),
        (Mailer(), True),
        (Mailer().send, False),
        (functools.partial(Mailer()), True),
    ],
)
def test_the_payload_type_is_the_annotation(handler: Any, is_async: bool) -> None:
    task = define_task("mails", handler)
    assert task.is_async is is_async
    assert task.handler is handler
    assert task.parse_payload({"address": "a@b.c"}) == Email(address="a@b.c")


def test_dataclasses_and_typed_dicts() -> None:
    assert define_task("q", takes_point).parse_payload({"x": "1"}) == Point(1)
    assert define_task("q", takes_size).parse_payload({"width": 1}) == {"width": 1}


@pytest.mark.parametrize("handler", [takes_dict, takes_anything])
def test_without_a_type_the_plain_object_passes(handler: Any) -> None:
    data: dict[str, object] = {"any": ["thing", None]}
    assert define_task("q", handler).parse_payload(data) is data


@pytest.mark.parametrize("payload", [Email, TypeAdapter(Email)])
def test_payload_goes_before_the_annotation(payload: Any) -> None:
    task = define_task("q", takes_anything, payload=payload)
    assert task.parse_payload({"address": "x"}) == Email(address="x")


def test_the_defaults() -> None:
    task = define_task("q", takes_email)
    assert task.options == TaskOptions(
        priority="normal", max_attempts=3, backoff_ms=1000, timeout_ms=30_000, concurrency=None
    )
    assert task.worker_options == {}


def test_older_queues_may_have_a_colon() -> None:
    assert define_task("mail:welcome", takes_email).queue_name == "mail:welcome"


def test_a_definition_can_not_be_changed() -> None:
    with pytest.raises(AttributeError):
        define_task("q", takes_email).queue_name = "other"  # type: ignore[misc]


@pytest.mark.parametrize("name", ["", " ", "a\0b", "a\nb", None, 5])
def test_queue_names_that_can_not_work(name: Any) -> None:
    with pytest.raises(TaskListError, match="queue_name"):
        define_task(name, takes_email)


async def yields(payload: Email, ctx: TaskContext) -> Any:
    yield payload


@pytest.mark.parametrize(
    ("handler", "message"),
    [
        (None, "must be a function"),
        ("handler", "must be a function"),
        (Email, "must be a function"),
        (lambda payload: None, "two arguments"),
        (lambda payload, ctx, more: None, "two arguments"),
        (yields, "not yield"),
        (lambda payload, ctx: (yield), "not yield"),
    ],
)
def test_handlers_that_can_not_work(handler: Any, message: str) -> None:
    with pytest.raises(TaskListError, match=f"task 'mails': handler .*{message}"):
        define_task("mails", handler)


async def hidden(payload: "Decimal", ctx: TaskContext) -> None: ...


class NoSchema:
    pass


class Unfinished(BaseModel):
    field: "Missing"  # type: ignore[name-defined]  # noqa: F821


async def takes_unfinished(payload: Unfinished, ctx: TaskContext) -> None: ...


@pytest.mark.parametrize(
    ("handler", "payload", "message"),
    [
        (hidden, None, "NameError: name 'Decimal'.*payload="),
        (takes_anything, NoSchema, "NoSchema.* can't be validated"),
        (takes_unfinished, None, "Unfinished.* can't be validated"),
        (takes_anything, 5, "can't be validated"),
    ],
)
def test_payload_types_that_can_not_work(handler: Any, payload: Any, message: str) -> None:
    with pytest.raises(TaskListError, match=f"task 'mails': .*{message}") as caught:
        define_task("mails", handler, payload=payload)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"priority": "urgent"}, "priority"),
        ({"priority": 1}, "priority"),
        ({"priority": []}, "priority"),
        ({"max_attempts": 0}, "max_attempts"),
        ({"max_attempts": True}, "max_attempts"),
        ({"max_attempts": "3"}, "max_attempts"),
        ({"backoff_ms": -1}, "backoff_ms"),
        ({"backoff_ms": 2**31}, "backoff_ms"),
        ({"timeout_ms": 0}, "timeout_ms must be None or"),
        ({"timeout_ms": 1.5}, "timeout_ms"),
        ({"concurrency": 0}, "concurrency"),
        ({"concurrency": 10_001}, "concurrency"),
        ({"run_in": "thread"}, "run_in must be 'process' or None"),
        ({"run_in": []}, "run_in"),
        ({"recycle_after_jobs": 5}, "recycle_after_jobs needs run_in='process'"),
        ({"run_in": "process", "recycle_above_mb": 0}, "recycle_above_mb"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], argument: str) -> None:
    with pytest.raises(TaskListError, match=f"task 'mails': {argument}"):
        define_task("mails", takes_email, TaskOptions(**options))


def test_options_of_another_type() -> None:
    with pytest.raises(TaskListError, match="TaskOptions"):
        define_task("mails", takes_email, options={"priority": "high"})  # type: ignore[call-overload]


def test_worker_options_are_checked_and_copied() -> None:
    given = {"lockDuration": 1000}
    task = define_task("q", takes_email, worker_options=given)  # type: ignore[call-overload]
    given["lockDuration"] = 1
    assert task.worker_options == {"lockDuration": 1000}
    with pytest.raises(TaskListError, match="task 'q': worker_options: concurrency"):
        define_task("q", takes_email, worker_options={"concurrency": 2})  # type: ignore[call-overload]


def test_a_context_can_be_made_for_a_handlers_own_tests() -> None:
    context = TaskContext(task_id="t1", correlation_id="c1", queue_name="q")
    job: Any = context.job
    assert (context.attempt, context.max_attempts, job) == (1, 1, None)
    context.logger.debug("a_line")


def _plain_generator() -> Any:
    yield


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"lifespan": 3}, "lifespan must be a function that returns a context manager"),
        ({"lifespan": _plain_generator}, "decorated with contextlib's @asynccontextmanager"),
        ({"around": _plain_generator}, "decorated with contextlib's @contextmanager"),
        ({"around_async": "x"}, "around_async must be a function"),
    ],
)
def test_context_managers_that_are_none(given: dict[str, Any], reason: str) -> None:
    with pytest.raises(TaskListError, match=reason):
        define_task("q", takes_email, **given)


def test_a_sync_handler_has_no_async_context_manager() -> None:
    def handler(payload: Any, ctx: Any) -> None: ...

    with pytest.raises(TaskListError, match="around_async is for async handlers"):
        define_task("q", handler, around_async=lambda ctx: contextlib.nullcontext())  # type: ignore[arg-type]


def test_a_decorator_that_passes_its_parameters_on_is_named() -> None:
    def hides(handler: Callable[P, Awaitable[None]]) -> Callable[P, Awaitable[None]]:
        async def wrapper(*args: P.args, **kwargs: P.kwargs) -> None:
            await handler(*args, **kwargs)

        return wrapper

    @hides
    async def handler(payload: dict[str, int], ctx: TaskContext) -> None: ...

    with pytest.raises(TaskListError, match=r"hides the type of its payload; .*functools\.wraps"):
        define_task("q", handler)
