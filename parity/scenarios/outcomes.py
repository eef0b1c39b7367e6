"""What handlers return and raise, and what the job keeps of it."""

from typing import Any

from parity.scenario import scenario
from parity.side import Side


@scenario()
async def values(s: Side) -> None:
    """Every kind of return value."""
    returned: list[Any] = [
        None,
        True,
        0,
        -1.5,
        2**53 - 1,
        "",
        "ü\U0001f600\n",
        [],
        {},
        {"a": [1, {"b": None}]},
    ]
    for number, value in enumerate(returned):
        await s.add(f"v{number}", {"return": value})
    await s.start()
    await s.ended(*(f"v{number}" for number in range(len(returned))))


@scenario()
async def ids_numbered_by_bullmq(s: Side) -> None:
    ids = [await s.add(None, {"return": n}) for n in range(3)]
    s.fact("ids", ids)
    await s.start()
    await s.ended(*ids)


@scenario()
async def odd_ids(s: Side) -> None:
    names = ["with blank", "ümläut-\U0001f600", "a/b?c=d&e", "x" * 200, "null", "..", "a=3Ab~c"]
    for name in names:
        await s.add(name, {"return": name})
    await s.start()
    await s.ended(*names)


@scenario()
async def payloads(s: Side) -> None:
    """What a payload may hold beside its script."""
    deep: object = "end"
    for _ in range(60):
        deep = {"next": [deep]}
    odd = {
        "deep": {"next": deep},
        "unicode": {"ключ": "значение", "\u2028": "\u0001\u001f", "emoji": "👩‍👩‍👧"},
        "numbers": {"big": 2**53 - 1, "small": 5e-324, "negative": -0.1, "large": 1.7e308},
        "empty": {"a": {}, "b": [], "c": "", "d": None},
        "names": {"__proto__x": 1, "constructor": 2, "": 3, "id": "4", "name": "5"},
    }
    for name, value in odd.items():
        await s.add_data(name, {"script": [{"see": ["data"]}], "value": value})
    await s.start()
    await s.ended(*odd)


@scenario()
async def payloads_that_are_no_objects(s: Side) -> None:
    """This worker's handlers take an object; anything else fails at once."""
    for name, value in {"null": None, "array": [1], "text": "t", "number": 7}.items():
        await s.add_data(name, value, attempts=3)
    await s.start()
    await s.ended("null", "array", "text", "number")


@scenario()
async def an_error(s: Side) -> None:
    await s.add("a", {"throw": "no luck"})
    await s.start()
    await s.ended("a")


@scenario()
async def odd_errors(s: Side) -> None:
    """Messages with several lines, in any language."""
    messages = ["one\ntwo", "ошибка \U0001f600", '{"json": true}', "%s %d {0}", "x" * 1500]
    for number, message in enumerate(messages):
        await s.add(f"e{number}", {"throw": message})
    await s.start()
    await s.ended(*(f"e{number}" for number in range(len(messages))))


@scenario()
async def an_error_without_a_message(s: Side) -> None:
    await s.add("a", {"throw": ""})
    await s.start()
    await s.ended("a")


@scenario()
async def a_very_long_message(s: Side) -> None:
    await s.add("a", {"throw": "x" * 20_000})
    await s.start()
    await s.ended("a")


@scenario(short=True)
async def unrecoverable(s: Side) -> None:
    await s.add("a", {"throw": "first"}, {"unrecoverable": "never"}, {"return": 1}, attempts=5)
    await s.start()
    await s.ended("a")


@scenario(versions=(5,))
async def discarded(s: Side) -> None:
    """A discarded job has no further attempt; 6.x has no `discard` any more."""
    await s.add("a", {"discard": True, "throw": "no more"}, {"return": 1}, attempts=3)
    await s.start()
    await s.ended("a")


@scenario(short=True)
async def progress(s: Side) -> None:
    reported = [0, 50, "half", {"pct": 75, "left": None}, True, 99.5]
    await s.add("a", {"progress": reported, "return": "done"})
    await s.start()
    await s.ended("a")
    s.fact("progress", (await s.hash("a"))["progress"])


@scenario()
async def logs(s: Side) -> None:
    await s.add("a", {"log": ["one", "", "ü\nthree"], "throw": "x"}, {"log": ["two"]}, attempts=2)
    await s.start()
    await s.ended("a")
    s.fact("logs", await s.queue("getJobLogs", s.id("a")))


@scenario()
async def keep_logs(s: Side) -> None:
    await s.add("a", {"log": [str(n) for n in range(7)]}, keepLogs=3)
    await s.start()
    await s.ended("a")
    s.fact("logs", await s.queue("getJobLogs", s.id("a")))


@scenario()
async def stack_trace_limit(s: Side) -> None:
    throws = [{"throw": f"error {n}"} for n in range(4)]
    for limit in (0, 1, 2, 10):
        await s.add(f"l{limit}", *throws, attempts=4, stackTraceLimit=limit)
    await s.start()
    await s.ended("l0", "l1", "l2", "l10")


@scenario()
async def updated_data(s: Side) -> None:
    script = [{"update": {"step": 1}, "throw": "again"}, {"see": ["data"]}]
    await s.add_data("a", {"script": script, "step": 0}, attempts=2)
    await s.start()
    await s.ended("a")


@scenario()
async def what_a_handler_sees(s: Side) -> None:
    seen = ["id", "name", "attemptsMade", "attemptsStarted", "priority", "delay", "progress"]
    step = {"see": seen}
    await s.add("a", {"throw": "first"}, step, attempts=3, priority=4)
    await s.add("b", {"progress": 5, "throw": "first"}, step, attempts=2, delay=30)
    await s.start()
    await s.ended("a", "b")


@scenario(name="mailer-7")
async def a_named_worker(s: Side) -> None:
    """`processedBy` says whose job it was."""
    await s.add("a", {"return": 1})
    await s.add("b", {"throw": "x"}, {"see": ["processedBy"]}, attempts=2)
    await s.add("c", {"throw": "x"})
    await s.start()
    await s.ended("a", "b", "c")
    s.fact("workers", [w["name"] for w in await s.queue("getWorkers")])


@scenario()
async def telemetry_options(s: Side) -> None:
    """A producer with telemetry; the worker has none."""
    metadata = '{"traceparent":"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}'
    await s.add("a", {"return": 1}, telemetry={"metadata": metadata, "omitContext": True})
    await s.add("b", {"throw": "x"}, {}, attempts=2, telemetry={"metadata": metadata})
    await s.start()
    await s.ended("a", "b")


@scenario()
async def a_size_limit_and_a_name(s: Side) -> None:
    """Options and names that matter to the producer only."""
    await s.add("a", {"see": ["name"]}, name="another name", sizeLimit=10_000)
    await s.add("b", {"see": ["name"]}, name="", timestamp=1_700_000_000_000)
    await s.start()
    await s.ended("a", "b")


@scenario()
async def an_id_that_is_added_twice(s: Side) -> None:
    await s.add("a", {"return": 1})
    await s.add("a", {"return": 2})
    await s.start()
    await s.ended("a")
    s.fact("added again", await s.add("a", {"return": 3}))
    await s.add("b")
    await s.ended("b")
