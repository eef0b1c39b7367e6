"""PostgreSQL and JavaScript read any stored value alike."""

import json
import subprocess
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import Any

import psycopg
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from autoflow_worker.encoding import cleaner as rules
from autoflow_worker.encoding.cleaner import Json
from autoflow_worker.encoding.results import dump
from tests.support.node import NODE
from tests.support.storable_values import Colour, Size, Slotted, Word, in_both_shapes, nested

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
    plain, text = in_both_shapes(value)
    assert_storable(text)
    assert json.loads(text) == plain
    returned = json.dumps(plain, separators=(",", ":"), allow_nan=False)  # as bullmq writes it
    assert_storable(returned)
    assert json.loads(returned) == plain
    assert dump(plain) == text


@given(values)
def test_what_is_stored_is_stored_again_unchanged(value: object) -> None:
    once = in_both_shapes(value)
    assert in_both_shapes(once[0]) == once


@settings(max_examples=150)
@given(data=st.data())
def test_postgresql_takes_any_value_and_gives_it_back(data: st.DataObject, jsonb: Any) -> None:
    plain, text = in_both_shapes(data.draw(values))
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
    plain, text = in_both_shapes(data.draw(values))
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
    plain, text = in_both_shapes(value)
    assert jsonb(text) == plain
    assert as_javascript_has_it(javascript(text)) == as_javascript_has_it(plain)
