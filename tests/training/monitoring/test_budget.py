"""A share of the time of training, by a clock that the test turns."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from htsr.training.monitoring.budget import Budget


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@settings(deadline=None, max_examples=50)
@given(
    share=st.floats(0.001, 0.5),
    step=st.floats(0.01, 10),
    speed=st.floats(1e-13, 1e-9),
    costs=st.lists(st.floats(1e6, 1e12), min_size=1, max_size=12),
)
def test_the_share_is_kept_and_used(share, step, speed, costs):
    """After the first matrix, whose seconds nobody knows, no more is spent than was saved, and nothing is wasted."""
    clock = Clock()
    budget = Budget(share, clock)
    first, measured, turn = None, 0, 0
    for _ in range(600):
        clock.now += step
        coming = [costs[(turn + i) % len(costs)] for i in range(len(costs))]
        count = budget.affordable(coming)
        if count == 0:
            continue
        with budget.measuring(coming[:count]):
            took = speed * sum(cost + 2e7 for cost in coming[:count])
            clock.now += took
        first = took if first is None else first
        turn, measured = turn + count, measured + count
        assert budget.left() >= -first - 1e-6
    dearest = max(speed, 3e-11) * (max(costs) + 2e7)
    assert budget.spent <= share * (clock.now - budget.spent) + (first or 0) + 1e-6
    if share * (clock.now - budget.spent) > 2 * dearest:
        assert measured
    if first is not None and budget.left() > 2 * dearest:
        assert count == len(costs)  # more than a whole round is never measured at a time


def test_what_took_longer_than_thought_is_paid_back():
    clock = Clock()
    budget = Budget(0.01, clock)
    clock.now = 100.0
    assert budget.affordable([1e9]) == 1
    with budget.measuring([1e9]):
        clock.now += 5.0
    assert budget.left() == pytest.approx(-4.0)
    assert budget.affordable([1e9]) == 0
    assert budget.taken() == pytest.approx(0.05)
    clock.now += 800.0
    assert budget.affordable([1e9]) == 0
    clock.now += 101.0
    assert budget.affordable([1e9]) == 1


def test_time_that_is_no_measurement_is_paid_for_and_teaches_nothing():
    clock = Clock()
    budget = Budget(0.5, clock)
    with budget.measuring():
        clock.now += 10.0
    assert (budget.spent, budget.left()) == (10.0, pytest.approx(-10.0))
    clock.now += 30.0
    assert budget.affordable([1e9]) == 1
