"""Jobs whose fields no sound producer makes: each costs itself, and neither others nor the worker.

They are written straight into Redis, as BullMQ would refuse to make some of them.
"""

import json
from typing import Any

from tests.support.poisoned import Fields, Poisoned
from tests.support.running import RunWorker


def nested(depth: int) -> str:
    return '{"a":' * depth + "1" + "}" * depth


def opts(**options: Any) -> Fields:
    return {"opts": json.dumps(options)}


# What the fields hold, and a part of the reason. The handler never runs.
UNREADABLE: dict[str, tuple[Fields, str]] = {
    "data-empty": ({"data": ""}, "JSONDecodeError"),
    "data-half": ({"data": "{"}, "JSONDecodeError"),
    "data-number": ({"data": "5"}, "a JSON object is needed, not a number"),
    "data-array": ({"data": "[]"}, "a JSON object is needed, not an array"),
    "data-null": ({"data": "null"}, "a JSON object is needed, not null"),
    "data-deep": ({"data": nested(100_000)}, "RecursionError"),
    "data-many-digits": ({"data": '{"n": ' + "9" * 5000 + "}"}, "4300 digits"),
    "opts-empty": ({"opts": ""}, "JSONDecodeError"),
    "opts-half": ({"opts": "{"}, "JSONDecodeError"),
    "opts-null": ({"opts": "null"}, "NoneType"),
    "opts-array": ({"opts": "[]"}, "list"),
    "opts-bytes": ({"opts": b"\xff"}, "JSONDecodeError"),
    "opts-deep": ({"opts": nested(100_000)}, "RecursionError"),
    "name-missing": ({"name": None}, "its fields are gone"),
    "timestamp-text": ({"timestamp": "x"}, "invalid literal"),
    "timestamp-vast": ({"timestamp": "9" * 5000}, "4300 digits"),
    "delay-text": ({"delay": "x"}, "invalid literal"),
    "priority-text": ({"priority": "x"}, "invalid literal"),
    "made-text": ({"atm": "x"}, "invalid literal"),
    "made-fraction": ({"atm": "1.5"}, "invalid literal"),
    "started-text": ({"ats": "x"}, "invalid literal"),
    "stalled-text": ({"stc": "x"}, "invalid literal"),
    "progress-half": ({"progress": "{"}, "JSONDecodeError"),
    "stacktrace-half": ({"stacktrace": "{"}, "JSONDecodeError"),
    "finished-text": ({"finishedOn": "x"}, "invalid literal"),
    "deferred-bytes": ({"defa": b"its parent\xff"}, "its parent\ufffd"),
    "parent-half": ({"parent": "{"}, "JSONDecodeError"),
    "parent-number": ({"parent": "5", "parentKey": "p"}, "its parent is no object"),
    "parent-array": ({"parent": "[]"}, "its parent is no object"),
    "parent-null": ({"parent": "null"}, "its parent is no object"),
    "attempts-text": (opts(attempts="3"), "option attempts"),
    "attempts-object": (opts(attempts={}), "option attempts"),
    "attempts-true": (opts(attempts=True), "option attempts"),
    "attempts-vast": (opts(attempts=10**400), "option attempts"),
    "keep-text": (opts(removeOnComplete="x"), "option removeOnComplete"),
    "keep-array": (opts(removeOnComplete=[]), "option removeOnComplete"),
    "keep-age-text": (opts(removeOnComplete={"age": "x"}), "option removeOnComplete"),
    "keep-failed-text": (opts(removeOnFail="x"), "option removeOnFail"),
    "keep-failed-age": (opts(removeOnFail={"age": []}), "option removeOnFail"),
    "traces-text": (opts(stackTraceLimit="x"), "option stackTraceLimit"),
    "parent-opt-text": (opts(parent="x"), "'str'"),
    "parent-opt-array": (opts(parent=[1]), "'list'"),
    "parent-opt-number": (opts(parent=5), "'int'"),
    "exclusive-opts": (opts(fpof=True, idof=True), "cannot be used together"),
}


# The handler fails once, and the backoff can't be followed.
NO_BACKOFF: dict[str, tuple[object, str]] = {
    "text": ("x", "the backoff option is a str"),
    "array": ([1], "the backoff option is a list"),
    "unknown": ({"type": "moon", "delay": 5}, "the backoff type 'moon' is unknown"),
    "number-type": ({"type": 5}, "the backoff type 5 is unknown"),
    "object-type": ({"type": {}}, "the backoff type {} is unknown"),
    "text-delay": ({"type": "fixed", "delay": "x"}, "the backoff's delay is no number"),
    "object-delay": ({"type": "exponential", "delay": {"a": 1}}, "delay is no number"),
    "text-jitter": ({"type": "fixed", "delay": 1, "jitter": "x"}, "jitter is no number"),
}


# Odd, but there is no doubt what is meant: these run, as they do with Node.
ODD: dict[str, Fields] = {
    "data-missing": {"data": None},
    "data-bytes": {"data": b'{"a": "\xff\xfe", "\xff": 1}'},
    "data-not-a-number": {"data": '{"a": NaN, "b": [Infinity, 1e999]}'},
    "data-big": {"data": '{"n": ' + "9" * 4000 + "}"},
    "data-nul": {"data": '{"a": "\\u0000", "\\u0000": 1}'},
    "data-surrogate": {"data": '{"a": "\\ud800", "\\ud800": 1}'},
    "data-correlation-id": {"data": '{"correlationId": {"a": 1}}'},
    "opts-missing": {"opts": None},
    "name-bytes": {"name": b"\xff"},
    "name-empty": {"name": ""},
    "timestamp-fraction": {"timestamp": "1790000000000.25"},
    "timestamp-negative": {"timestamp": "-5"},
    "timestamp-huge": {"timestamp": "9" * 400},
    "timestamp-missing": {"timestamp": None},
    "delay-fraction": {"delay": "20.5"},
    "made-negative": {"atm": "-4"},
    "started-huge": {"ats": str(2**63 - 1)},
    "started-negative": {"ats": "-9"},
    "stacktrace-object": {"stacktrace": "{}"},
    "returnvalue-half": {"returnvalue": "{"},
    "scheduler-gone": {"rjk": "no-such-scheduler"},
    "scheduler-bytes": {"rjk": b"\xff"},
    "deduplication-bytes": {"deid": b"\xff"},
    "parent-gone": {"parent": '{"id": "x", "queueKey": "p:gone"}', "parentKey": "p:gone:x"},
    "attempts-negative": opts(attempts=-1),
    "attempts-fraction": opts(attempts=2.5),
    "attempts-null": opts(attempts=None),
    "traces-null": opts(stackTraceLimit=None),
    "traces-negative": opts(stackTraceLimit=-3),
    "keep-null": opts(removeOnComplete=None, removeOnFail=None),
    "delay-opt-text": opts(delay="x", priority="x", timestamp={}),
    "repeat-number": opts(repeat=5, repeatJobKey=5),
    "id-opt": opts(jobId={}, de=5, kl="x", tm=5, lifo="x"),
    "opts-deep": {"opts": '{"x": ' + nested(300) + "}"},
}


async def test_what_can_not_be_read_fails_once_for_a_reason(
    run_worker: RunWorker, poisoned: Poisoned
) -> None:
    for name, (fields, _) in UNREADABLE.items():
        await poisoned.add(name, fields)
    async with run_worker([poisoned.task()]):
        await poisoned.until_all_ended()
    for name, (_, reason) in UNREADABLE.items():
        await poisoned.check_failed(name, reason)
    assert poisoned.ran == {"the-next": 1}


async def test_what_is_no_job_at_all_fails_once(run_worker: RunWorker, poisoned: Poisoned) -> None:
    await poisoned.push(b"gone")
    await poisoned.raw.set(poisoned.base + b"text", "a text")
    await poisoned.push(b"text")
    await poisoned.raw.rpush(poisoned.base + b"list", "an item")
    await poisoned.push(b"list")
    async with run_worker([poisoned.task()]):
        await poisoned.until_all_ended()
    await poisoned.check_failed("gone", "its fields are gone from Redis")
    await poisoned.check_failed("text", "its fields are gone")
    await poisoned.check_failed("list", "its fields are gone")
    assert poisoned.ran == {"the-next": 1}


async def test_a_backoff_that_can_not_be_followed(
    run_worker: RunWorker, poisoned: Poisoned
) -> None:
    for name, (backoff, _) in NO_BACKOFF.items():
        await poisoned.add(f"fails-{name}", opts(attempts=3, backoff=backoff))
    async with run_worker([poisoned.task()]):
        await poisoned.until_all_ended()
    for name, (_, reason) in NO_BACKOFF.items():
        await poisoned.check_failed(f"fails-{name}", "no luck (no retry: ")
        await poisoned.check_failed(f"fails-{name}", reason)
        assert poisoned.ran[f"fails-{name}"] == 1


async def test_a_backoff_that_is_odd_is_followed(run_worker: RunWorker, poisoned: Poisoned) -> None:
    backoffs: list[object] = [
        None,
        0,
        -1,
        1.5,
        {},
        {"type": "fixed", "delay": None},
        {"type": "fixed", "delay": -7},
        {"type": "exponential"},
        {"type": "fixed", "delay": 1, "jitter": 7},
    ]
    for number, backoff in enumerate(backoffs):
        await poisoned.add(f"fails-{number}", opts(attempts=2, backoff=backoff))
    async with run_worker([poisoned.task()]):
        await poisoned.until_all_ended()
    for number, backoff in enumerate(backoffs):
        assert poisoned.ran[f"fails-{number}"] == 2, backoff
        assert await poisoned.db.status(f"fails-{number}") == "failed"


async def test_what_is_odd_but_plain_runs(run_worker: RunWorker, poisoned: Poisoned) -> None:
    for name, fields in ODD.items():
        await poisoned.add(name, fields)
    async with run_worker([poisoned.task()]):
        await poisoned.until_all_ended()
    for name in ODD:
        await poisoned.check_completed(name)
