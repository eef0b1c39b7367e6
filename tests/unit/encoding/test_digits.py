"""The digits of integers of any size."""

import sys
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoflow_worker.encoding.digits import digits_of


@pytest.fixture(scope="module", autouse=True)
def str_takes_everything() -> Iterator[None]:
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    yield
    sys.set_int_max_str_digits(limit)


@given(st.integers())
def test_small_ones(number: int) -> None:
    assert digits_of(number) == str(number)


@given(st.integers(0, 40_000), st.integers(-(10**9), 10**9))
def test_large_ones(bits: int, offset: int) -> None:
    number = (1 << bits) + offset
    assert digits_of(number) == str(number)
    assert digits_of(-number) == str(-number)


@pytest.mark.parametrize("digits", [309, 4300, 4301, 100_000, 131_072])
def test_at_the_limits(digits: int) -> None:
    assert digits_of(10 ** (digits - 1)) == "1" + "0" * (digits - 1)
    assert digits_of(1 - 10**digits) == "-" + "9" * digits
