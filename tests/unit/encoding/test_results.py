"""What a handler returns, of any type, has one form in both stores."""

import json
import math
import sys
from collections import Counter, OrderedDict, UserDict, deque
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from pathlib import PurePosixPath
from types import MappingProxyType
from typing import Any, NamedTuple, TypedDict
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, RootModel

from autoflow_worker.encoding import cleaner as rules
from autoflow_worker.encoding.results import storable
from tests.support.storable_values import Colour, Size, Slotted, Word, in_both_shapes

GRIN = "\U0001f600"


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
    plain, text = in_both_shapes(value)
    assert plain == expected
    assert type(plain) is type(expected)
    assert json.loads(text) == expected


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


# -- numbers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [2**53 + 1, 2**63, -(2**64), 10**30, int(1.7e308)])
def test_integers_within_a_double_stay_numbers_with_all_digits(number: int) -> None:
    assert in_both_shapes({"n": number}) == ({"n": number}, f'{{"n":{number}}}')


def test_integers_beyond_a_double_are_text() -> None:
    assert storable(10**309) == "1" + "0" * 309
    assert storable(-(10**5000)) == "-1" + "0" * 5000
    digits = storable([10**100_000 - 1])
    assert digits == ["9" * 100_000]


@given(st.integers(1024, 40_000), st.integers(-(10**9), 10**9))
def test_an_integer_of_any_size_keeps_its_digits(bits: int, offset: int) -> None:
    number = (1 << bits) + offset
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        expected = str(number)
    finally:
        sys.set_int_max_str_digits(limit)
    assert storable([number, -number]) == [expected, f"-{expected}"]


@pytest.mark.parametrize("digits", [310, 4300, 4301, 100_000, rules.MAX_DIGITS])
def test_digits_at_the_limits(digits: int) -> None:
    assert storable(10 ** (digits - 1)) == "1" + "0" * (digits - 1)
    assert storable(1 - 10**digits) == "-" + "9" * digits


# -- the stored copy -------------------------------------------------------------------------------


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
