"""What is said of a server's troubles, and when they have lasted too long."""

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from autoflow_worker.outage import MAX_REASONS, Reasons, Refusals


class Clock:
    """A loop's time, as a test wants it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.now = 0.0
        loop.time = lambda: self.now  # type: ignore[method-assign]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["refused", "done", "outage"]),
            st.sampled_from(["a", "b"]),
            st.integers(0, 12),
        ),
        max_size=30,
    )
)
def test_only_refusals_and_nothing_else_last(events: list[tuple[str, str, int]]) -> None:
    """Against the rule in its simplest words, over every order of events."""

    async def story() -> None:
        loop = asyncio.get_running_loop()
        clock, real = Clock(loop), type(loop).time
        refusals = Refusals()
        refusals.patience = 30
        history: list[tuple[str, str, float]] = []
        try:
            for kind, what, after in events:
                clock.now += after
                history.append((kind, what, clock.now))
                if kind == "refused":
                    refusals.note(what)
                elif kind == "done":
                    refusals.over(what)
                else:
                    refusals.forget()
                if kind != "refused":
                    continue
                first = clock.now
                for earlier_kind, earlier_what, at in reversed(history):
                    if earlier_kind == "outage":
                        break
                    if earlier_what == what:
                        if earlier_kind == "done":
                            break
                        first = at
                if clock.now - first >= 30:
                    assert refusals.lasting.is_set()
                    refusals.forget()
                    history.append(("outage", "", clock.now))
                else:
                    assert not refusals.lasting.is_set()
        finally:
            loop.time = real.__get__(loop)  # type: ignore[method-assign]

    asyncio.run(story())


def test_each_reason_is_told_once_in_an_outage() -> None:
    reasons = Reasons()
    assert reasons.is_new("connection to port 5432 failed")
    assert not reasons.is_new("connection to port 5433 failed")
    assert reasons.is_new("password authentication failed")
    assert not reasons.is_new("connection to port 5432 failed")
    reasons.forget()
    assert reasons.is_new("connection to port 5432 failed")


def test_reasons_that_never_repeat_are_told_up_to_a_limit() -> None:
    reasons = Reasons()
    words = ["a" * (n + 1) for n in range(2 * MAX_REASONS)]
    assert sum(map(reasons.is_new, words)) == MAX_REASONS
