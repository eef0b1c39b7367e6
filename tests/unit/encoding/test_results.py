"""Whatever a handler returns is stored the same in both stores, or refused."""

import json
import math
import subprocess
from collections import Counter, OrderedDict, UserDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum, IntEnum, StrEnum
from pathlib import PurePosixPath
from types import MappingProxyType
from typing import Any, NamedTuple, TypedDict
from uuid import UUID

import psycopg
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, RootModel

from autoflow_worker.encoding import results as rules
from autoflow_worker.encoding.results import Json, dump, encode, storable, stored
from autoflow_worker.errors import NotStorableError
from tests.support.node import NODE

GRIN = "\U0001f600"


class Colour(Enum):
    RED = "red"
    PAIR = ("a", 1)


class Size(IntEnum):
    LARGE = 3


class Word(StrEnum):
    YES = "yes"


class Point(NamedTuple):
    x: int
    y: int


class Settings(TypedDict):
    name: str


@dataclass
class Line:
    start: Point
    _note: str = "kept"
    when: date = field(default=date(2026, 1, 2))


@dataclass(slots=True)
class Slotted:
    value: Any


class Model(BaseModel):
    name: str
    when: datetime
    price: Decimal
    ratio: float = 0.5


class Text(str):
    __slots__ = ()

    def __str__(self) -> str:
        raise RuntimeError("no text")


class Number(int):
    def __repr__(self) -> str:
        raise RuntimeError("no number")


def nested(depth: int, innermost: object = 1) -> object:
    value = innermost
    for level in range(depth):
        value = [value] if level % 2 else {"in": value}
    return value


# -- every type by the table ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        (True, True),
        ("text", "text"),
        (1, 1),
        (1.5, 1.5),
        ({"a": [1, (2, 3)]}, {"a": [1, [2, 3]]}),
        (OrderedDict(b=1, a=2), {"b": 1, "a": 2}),
        (Counter("aab"), {"a": 2, "b": 1}),
        (UserDict({"a": 1}), {"a": 1}),
        (MappingProxyType({"a": 1}), {"a": 1}),
        (Settings(name="n"), {"name": "n"}),
        (Point(1, 2), [1, 2]),
        (deque([1, 2], maxlen=2), [1, 2]),
        ({3, 1, 2}, [1, 2, 3]),
        (frozenset("ba"), ["a", "b"]),
        (math.nan, None),
        (math.inf, None),
        (-1e22, -(10**22)),
        (2.656862051562661e16, 26568620515626608),
        ([-math.inf, {"a": math.nan}], [None, {"a": None}]),
        (Decimal("1.10"), 1.1),
        (Decimal("5.0"), 5),
        (Decimal("0.1234567890123456789"), "0.1234567890123456789"),
        (Decimal("1E+400"), "1E+400"),
        (Decimal("1E+22"), 10**22),
        (Decimal(26568620515626610), "26568620515626610"),
        (Decimal("NaN"), None),
        (Decimal("sNaN"), None),
        (Decimal("-Infinity"), None),
        (datetime(2026, 1, 2, 3, 4, 5, 678000, UTC), "2026-01-02T03:04:05.678000Z"),
        (datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC).replace(tzinfo=None), "2026-01-02T03:04:05"),
        (
            datetime(2026, 1, 2, tzinfo=timezone(timedelta(hours=2))),
            "2026-01-02T00:00:00+02:00",
        ),
        (date(2026, 1, 2), "2026-01-02"),
        (time(3, 4), "03:04:00"),
        (timedelta(minutes=1, milliseconds=500), 60.5),
        (UUID(int=7), "00000000-0000-0000-0000-000000000007"),
        (PurePosixPath("/a/b"), "/a/b"),
        (b"hello", "aGVsbG8="),
        (bytearray(b"\xff"), "/w=="),
        (memoryview(b""), ""),
        (Colour.RED, "red"),
        (Colour.PAIR, ["a", 1]),
        (Size.LARGE, 3),
        (Word.YES, "yes"),
        (Line(Point(1, 2)), {"start": [1, 2], "_note": "kept", "when": "2026-01-02"}),
        (Slotted({1}), {"value": [1]}),
        (
            Model(name="n", when=datetime(2026, 1, 2, tzinfo=UTC), price=Decimal("1.10")),
            {"name": "n", "when": "2026-01-02T00:00:00Z", "price": "1.10", "ratio": 0.5},
        ),
        (RootModel[list[int]]([1]), [1]),
        (Text("sub"), "sub"),
        (Number(4), 4),
    ],
    ids=lambda value: type(value).__name__,
)
def test_each_type_has_its_form(value: object, expected: object) -> None:
    result = stored(value)
    assert result.value == expected
    assert type(result.value) is type(expected)
    assert json.loads(result.text) == expected
    assert encode(value) == result.text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\0b", "a\ufffdb"),
        ("\ud800", "\ufffd"),
        ("\udc00\ud800", "\ufffd\ufffd"),
        ("\ud83d\ude00", GRIN),
        ("\ud83dx\0", "\ufffdx\ufffd"),
        (GRIN, GRIN),
        ("\\u0000", "\\u0000"),
        ("\\\\u0000\0", "\\\\u0000\ufffd"),
        ("\x01\x7f\u2028\uffff", "\x01\x7f\u2028\uffff"),
    ],
    ids=ascii,
)
def test_texts_lose_only_what_jsonb_refuses(text: str, expected: str) -> None:
    assert storable(text) == expected
    assert storable({text: [text]}) == {expected: [expected]}


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (None, "null"),
        (True, "true"),
        (7, "7"),
        (1.5, "1.5"),
        (1.0, "1.0"),
        (math.nan, "NaN"),
        (-math.inf, "-Infinity"),
        (10**400, "1" + "0" * 400),
        (Colour.RED, "red"),
        (Size.LARGE, "3"),
        (UUID(int=7), "00000000-0000-0000-0000-000000000007"),
        (date(2026, 1, 2), "2026-01-02"),
        (Decimal("1.5"), "1.5"),
        (Text("sub"), "sub"),
    ],
    ids=lambda key: type(key).__name__,
)
def test_keys_become_text(key: object, expected: str) -> None:
    assert storable({key: 1}) == {expected: 1}


def test_of_two_keys_with_one_text_the_later_one_stays() -> None:
    assert storable({1: "a", "x": 0, "1": "b"}) == {"1": "b", "x": 0}
    assert storable({"a\0": 1, "a\ufffd": 2}) == {"a\ufffd": 2}


# -- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [2**53 + 1, 2**63, -(2**64), 10**30, int(1.7e308)])
def test_integers_within_a_double_stay_numbers_with_all_digits(number: int) -> None:
    result = stored({"n": number})
    assert result.value == {"n": number}
    assert result.text == f'{{"n":{number}}}'


def test_integers_beyond_a_double_are_text() -> None:
    assert storable(10**309) == "1" + "0" * 309
    assert storable(-(10**5000)) == "-1" + "0" * 5000
    digits = storable([10**100_000 - 1])
    assert digits == ["9" * 100_000]


def test_integers_beyond_the_limit_are_refused() -> None:
    with pytest.raises(NotStorableError, match="131,072 digits"):
        storable(10 ** (rules.MAX_DIGITS + 2))
    # Each is allowed, but together they would take long.
    with pytest.raises(NotStorableError, match="larger than 16 MiB"):
        storable([10**131_000] * 1000)


# -- limits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("innermost", [1, "\0", {1}, []], ids=repr)
def test_nesting_ends_at_the_limit(innermost: object) -> None:
    storable(nested(rules.MAX_DEPTH - 1, innermost))
    storable(nested(rules.MAX_DEPTH, 1))
    for depth in (rules.MAX_DEPTH + 1, 10_000, 100_000):
        with pytest.raises(NotStorableError, match="nested deeper than 200 levels"):
            storable(nested(depth, innermost))


def test_the_deepest_value_still_fits_into_a_patch() -> None:
    deepest = storable(nested(rules.MAX_DEPTH, "\0"))
    assert json.loads(dump({"result": {"output": deepest}}))["result"]["output"] == deepest


def circular_list() -> object:
    value: list[object] = [1]
    value.append(value)
    return value


def circular_twice() -> object:
    value: dict[str, object] = {}
    value["a"] = value["b"] = [value, value]
    return value


def circular_dataclass() -> object:
    value = Slotted(None)
    value.value = [value]
    return value


def shared_many_times_over() -> object:
    value: object = ["x"]
    for _ in range(60):
        value = [value, value]
    return value


def shared_many_times_over_with_care() -> object:
    return [shared_many_times_over(), {1}]


@pytest.mark.parametrize(
    "make",
    [
        circular_list,
        circular_twice,
        circular_dataclass,
        shared_many_times_over,
        shared_many_times_over_with_care,
    ],
)
def test_what_never_ends_is_refused(make: Callable[[], object]) -> None:
    with pytest.raises(NotStorableError, match=r"holds itself|more than 1,000,000 values"):
        storable(make())


@pytest.mark.parametrize("extra", [[], [{1}]], ids=["quick", "careful"])
def test_a_result_is_kept_whole_up_to_its_limit(extra: list[object]) -> None:
    text = "é" * (5 * 1024 * 1024)  # 10 MiB in UTF-8
    assert storable([text, *extra])[0] == text  # type: ignore[index]
    with pytest.raises(NotStorableError, match="larger than 16 MiB"):
        storable([text, text, *extra])
    with pytest.raises(NotStorableError, match="larger than 16 MiB"):
        storable([text] * 100_000 + extra)
    # Three times as long once it is encoded.
    with pytest.raises(NotStorableError, match="larger than 16 MiB"):
        storable(["\x01" * (6 * 1024 * 1024), *extra])


@pytest.mark.parametrize("extra", [[], [{1}]], ids=["quick", "careful"])
def test_the_number_of_values_is_limited(extra: list[object]) -> None:
    storable([0] * 900_000 + extra)
    with pytest.raises(NotStorableError, match="more than 1,000,000 values"):
        storable([0] * rules.MAX_VALUES + extra + [0])


# -- the hostile ---------------------------------------------------------------------------------


class Raises(BaseException):
    pass


class HostileMapping(UserDict[str, object]):
    def items(self) -> Any:
        raise Raises


class EndlessMapping(UserDict[int, object]):
    def items(self) -> Any:
        number = 0
        while True:
            number += 1
            yield number, number


class EndlessList(list[int]):
    def __iter__(self) -> Iterator[int]:
        while True:
            yield 1


class HostileModel(BaseModel):
    def model_dump(self, **_: Any) -> Any:
        raise SystemExit(3)


class HostileClass:
    @property
    def __class__(self) -> Any:
        raise KeyboardInterrupt

    @__class__.setter
    def __class__(self, _: Any) -> None: ...


class HostileType(type):
    def __getattribute__(cls, name: str) -> Any:
        raise Raises


def of_hostile_type() -> object:
    return HostileType("Nameless", (), {})()


class Incomparable:
    def __lt__(self, _: object) -> bool:
        raise Raises


class Itself(Enum):
    ME = 1

    @property
    def value(self) -> Any:
        return self


@pytest.mark.parametrize(
    "value",
    [
        object(),
        (number for number in range(3)),
        range(3),
        len,
        int,
        Line,
        Colour,
        ValueError("x"),
        1j,
        {(1, 2): 3},
        {frozenset(): 1},
        {object(): 1},
        HostileMapping(),
        EndlessMapping(),
        EndlessList(),
        HostileModel(),
        {Incomparable()},
        Itself.ME,
        Slotted.__new__(Slotted),
    ],
    ids=lambda value: type.__repr__(type(value)),
)
def test_what_has_no_form_in_json_is_refused(value: object) -> None:
    for each in (value, {"a": [value]}):
        with pytest.raises(NotStorableError, match="a value can't be stored: "):
            storable(each)


# Made inside the test, as pytest looks at the parameters itself.
@pytest.mark.parametrize("make", [HostileClass, of_hostile_type])
def test_an_object_that_can_not_even_be_looked_at_is_refused(make: Callable[[], object]) -> None:
    with pytest.raises(NotStorableError, match=r"(HostileClass|Nameless) raised"):
        storable([make()])


def test_the_refusal_says_where() -> None:
    with pytest.raises(NotStorableError) as caught:
        storable({"rows": [1, {"file": object()}]})
    assert str(caught.value) == (
        "a value can't be stored: at ['rows'][1]['file']: object has no form in JSON"
    )
    with pytest.raises(NotStorableError, match="HostileModel raised SystemExit"):
        storable(HostileModel())


def test_a_value_that_changes_while_it_is_read_does_no_harm() -> None:
    host: dict[str, object] = {}
    rows: list[object] = []

    class Grows(BaseModel):
        def model_dump(self, **_: Any) -> Any:
            host[f"key {len(host)}"] = 1
            rows.append(1)
            return "grown"

    host["rows"] = rows
    rows.append(Grows())
    assert storable(host) == {"rows": ["grown"]}


def test_what_is_stored_shares_nothing_with_the_value() -> None:
    value = {"rows": [1]}
    result = storable(value)
    value["rows"].append(2)
    assert result == {"rows": [1]}


# -- any value -----------------------------------------------------------------------------------

texts = st.text(st.characters(exclude_categories=()), max_size=8)
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(10**330), 10**330)
    | st.floats()
    | texts
    | st.binary(max_size=8)
    | st.decimals()
    | st.datetimes(timezones=st.none() | st.timezones())
    | st.dates()
    | st.times()
    | st.timedeltas()
    | st.uuids()
    | st.sampled_from([*Colour, *Size, *Word, PurePosixPath("\udcff")])
)
keys = (
    texts
    | st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.decimals(allow_nan=False)
    | st.uuids()
    | st.dates()
    | st.sampled_from([*Size, *Word])
)
values: st.SearchStrategy[object] = st.recursive(
    scalars | st.frozensets(st.integers() | st.text(max_size=3), max_size=4),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.tuples(inner, inner)
        | st.dictionaries(keys, inner, max_size=5)
        | st.builds(Slotted, inner)
        | st.builds(deque, st.lists(inner, max_size=3))
    ),
    max_leaves=20,
)


def assert_storable(text: str) -> None:
    text.encode()  # no lone surrogates
    assert "\0" not in text
    assert "\\u0000" not in text.replace("\\\\", "")


@given(values)
@example([2**64, {"\0": "\ud800"}])
def test_any_value_is_stored_alike_in_both_shapes(value: object) -> None:
    plain, text = stored(value)
    assert_storable(text)
    assert json.loads(text) == plain
    returned = json.dumps(plain, separators=(",", ":"), allow_nan=False)  # as bullmq writes it
    assert_storable(returned)
    assert json.loads(returned) == plain
    assert dump(plain) == text


@given(values)
def test_what_is_stored_is_stored_again_unchanged(value: object) -> None:
    once = stored(value)
    assert stored(once.value) == once


@settings(max_examples=150)
@given(data=st.data())
def test_postgresql_takes_any_value_and_gives_it_back(data: st.DataObject, jsonb: Any) -> None:
    plain, text = stored(data.draw(values))
    assert jsonb(text) == plain


@pytest.fixture(scope="module")
def jsonb(server_urls: tuple[str, str]) -> Iterator[Callable[[str], Json]]:
    """What PostgreSQL makes of a JSON text."""
    with psycopg.connect(server_urls[1], autocommit=True) as connection:

        def through_postgresql(text: str) -> Json:
            row = connection.execute("SELECT %s::jsonb", (text,)).fetchone()
            assert row is not None
            value: Json = row[0]
            return value

        yield through_postgresql


READS_LINES = """
const finite = (key, value) => {
  if (typeof value === "number" && !Number.isFinite(value)) throw new Error("not finite");
  return value;
};
require("readline").createInterface({ input: process.stdin })
  .on("line", (line) => console.log(JSON.stringify(JSON.parse(line), finite)));
"""


@pytest.fixture(scope="module")
def javascript() -> Iterator[Callable[[str], Json]]:
    """What Node makes of a JSON text."""
    pipe = subprocess.PIPE
    with subprocess.Popen([NODE, "-e", READS_LINES], stdin=pipe, stdout=pipe) as node:
        assert node.stdin is not None
        assert node.stdout is not None
        reads, writes = node.stdout, node.stdin

        def through_javascript(text: str) -> Json:
            writes.write(text.encode() + b"\n")
            writes.flush()
            value: Json = json.loads(reads.readline())
            return value

        yield through_javascript
        writes.close()


def as_javascript_has_it(value: Json) -> Json:
    """The same with every number a double."""
    if isinstance(value, dict):
        return {key: as_javascript_has_it(item) for key, item in value.items()}
    if isinstance(value, list):
        return [as_javascript_has_it(item) for item in value]
    return float(value) if type(value) is int else value


@settings(max_examples=150)
@given(data=st.data())
def test_javascript_takes_any_value_and_gives_it_back(data: st.DataObject, javascript: Any) -> None:
    plain, text = stored(data.draw(values))
    assert as_javascript_has_it(javascript(text)) == as_javascript_has_it(plain)


@pytest.mark.parametrize(
    "value",
    [
        nested(rules.MAX_DEPTH, "\0"),
        10**308,
        10**100_000,
        5e-324,
        1.7976931348623157e308,
        -0.0,
        "x" * 10_000_000,
        {"k" * 100_000: [None] * 100_000},
    ],
    ids=["deep", "1e308", "digits", "least", "greatest", "-0", "10 MB", "wide"],
)
def test_both_take_what_is_at_the_limits(
    value: object, jsonb: Callable[[str], Json], javascript: Callable[[str], Json]
) -> None:
    plain, text = stored(value)
    assert jsonb(text) == plain
    assert as_javascript_has_it(javascript(text)) == as_javascript_has_it(plain)
