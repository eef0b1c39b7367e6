"""The differential runner sees a difference, and names it only as its file does."""

import pytest

import parity.scenarios  # noqa: F401 - its modules enter their scenarios into ALL
from parity.compare import Named, differences, named_differences
from parity.scenario import ALL, Scenario
from parity.side import Side
from parity.snapshot import Comparable


async def nothing(side: Side) -> None: ...


def scenario(*varies: str) -> Scenario:
    return Scenario("flows/one", nothing, {"": {}}, varies=varies)


def test_each_value_that_differs_is_found() -> None:
    node = {"q/wait": ["a"], "q/q-a": {"atm": "1", "ats": "1"}, "q/id": "1"}
    ours = {"q/wait": ["a"], "q/q-a": {"atm": "2", "ats": "1"}, "q/go": "1"}
    found = differences(scenario(), node, ours)
    assert [difference.path for difference in found] == ["q/go", "q/id", "q/q-a/atm"]
    assert not differences(scenario("q/*"), node, ours)


def test_a_name_holds_for_its_scenario_its_version_and_its_paths() -> None:
    named = Named(["flows/one"], ["q/q-*/atm"], "why", versions=[6])
    assert named.covers("flows/one", 6, "q/q-a/atm")
    assert not named.covers("flows/one", 5, "q/q-a/atm")
    assert not named.covers("flows/two", 6, "q/q-a/atm")
    assert not named.covers("flows/one", 6, "q/q-a/ats")


def test_a_name_without_a_difference_is_stale() -> None:
    named = Named(["flows/one", "flows/two"], ["q/*"], "why")
    named.matched.add(("flows/one", 5))
    ran = [("flows/one", 5), ("flows/one", 6), ("flows/three", 5)]
    assert named.stale(ran) == [("flows/one", 6)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("p-5-node:flows-one-child:flows-one-a", "q-child:q-a"),
        ("repeat:s:1790000000000", "repeat:s:<ms>"),
        ('{"duration":12}', '{"duration":"some ms"}'),
        (1_790_000_000_000, "<ms>"),
        (179, 179),
        (
            {"repeat:1790000000000": 1, "repeat:1790000000001": 2},
            {"repeat:<ms>": 1, "repeat:<ms> #2": 2},
        ),
    ],
)
def test_times_and_names_are_left_out(value: object, shown: object) -> None:
    assert Comparable("p-5-node", scenario()).value(value) == shown


def test_the_file_has_a_reason_for_each_name() -> None:
    assert len(ALL) > 150
    assert all(named.why for named in named_differences())
