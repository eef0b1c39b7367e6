"""A result that is too large, never ends or has no form in JSON is refused."""

import json
from collections import UserDict
from collections.abc import Callable, Iterator
from enum import Enum
from typing import Any

import pytest
from pydantic import BaseModel

from autoflow_worker.encoding import cleaner as rules
from autoflow_worker.encoding.results import dump, storable
from autoflow_worker.errors import NotStorableError
from tests.support.storable_values import Colour, Slotted, nested

# -- limits --------------------------------------------------------------------------------------


def test_integers_beyond_the_limit_are_refused() -> None:
    with pytest.raises(NotStorableError, match="131,072 digits"):
        storable(10 ** (rules.MAX_DIGITS + 2))
    # Each is allowed, but together they would take long.
    with pytest.raises(NotStorableError, match="larger than 16 MiB"):
        storable([10**131_000] * 1000)


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


# -- the hostile -----------------------------------------------------------------------------------


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
