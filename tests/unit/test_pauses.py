"""The pauses between tries."""

from hypothesis import given
from hypothesis import strategies as st

from autoflow_worker.pauses import JITTER, Pauses


@given(first=st.floats(0.01, 10), factor=st.floats(1, 1000), tries=st.integers(1, 100))
def test_each_pause_is_twice_the_one_before_up_to_the_longest(
    first: float, factor: float, tries: int
) -> None:
    longest = first * factor
    pauses = Pauses(first, longest)
    for number in range(tries):
        whole = min(first * 2**number, longest)
        assert whole * (1 - JITTER) * 0.999 <= pauses.take() <= whole * 1.001
    pauses.restart()
    assert pauses.take() <= first


def test_two_workers_do_not_pause_in_step() -> None:
    one, other = Pauses(1, 60), Pauses(1, 60)
    assert [one.take() for _ in range(5)] != [other.take() for _ in range(5)]
