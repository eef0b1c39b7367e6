"""Which exit code counts when several processes end."""

import pytest

from autoflow_worker.supervisor import worst


@pytest.mark.parametrize(
    ("codes", "code"),
    [
        ([], 0),
        ([0, 0], 0),
        ([0, 4], 4),
        ([4, 3, 0], 3),
        ([2, 4, 3], 2),
        ([3, 1, 4], 1),
        ([0, 7], 1),
    ],
)
def test_the_worst_counts(codes: list[int], code: int) -> None:
    assert worst(codes) == code
