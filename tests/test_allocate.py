"""Budgets: the formulas, exact totals, and what odd scores mean."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from htsr import allocate
from htsr.errors import UsageError

scores = st.lists(st.floats(0.5, 50), min_size=1, max_size=12)
anything = st.lists(st.one_of(st.floats(-5, 5), st.sampled_from([np.nan, np.inf, -np.inf])), max_size=10)
MAPS = ["linear", "sqrt", "log2", "sigmoid", "sigmoid_std", "rank", "model_balancing"]
ALPHAS = [2.0, 3.0, 2.5, 4.0]
FREE = (0.0, np.inf)


class TestMaps:
    """By hand."""

    def test_linear(self):
        assert allocate.multipliers(ALPHAS) == pytest.approx([1, 3, 2, 5])

    def test_the_sigmoid_of_llr(self):
        """2/(1+e^(-4z)), z by the (population's) standard deviation: for 1 and 3 it is ∓1."""
        found = allocate.multipliers([1.0, 3.0], map="sigmoid_std", bounds=(0, 2))
        assert found == pytest.approx([2 / (1 + np.exp(4)), 2 / (1 + np.exp(-4))])
        assert allocate.multipliers([2.0, 2.0], map="sigmoid_std", bounds=(0, 2)) == pytest.approx([1.0, 1.0])

    def test_sqrt(self):
        roots = np.sqrt(ALPHAS)
        assert allocate.multipliers(ALPHAS, map="sqrt", bounds=FREE) == pytest.approx(roots * 4 / roots.sum())

    def test_log2(self):
        logs = np.log2(ALPHAS)
        assert allocate.multipliers(ALPHAS, map="log2", bounds=FREE) == pytest.approx(logs * 4 / logs.sum())

    def test_sigmoid(self):
        z = (np.array(ALPHAS) - 2.875) / 2
        assert allocate.multipliers(ALPHAS, map="sigmoid", bounds=(0, 2)) == pytest.approx(2 / (1 + np.exp(-4 * z)))

    def test_rank_with_ties(self):
        assert allocate.multipliers([3, 1, 3, 9], map="rank") == pytest.approx([1 + 4 / 2, 1, 3, 5])

    def test_model_balancing(self):
        s = 0.7
        expected = 10 ** (s * (1 / (1 + np.exp(-10 * (np.array(ALPHAS) - 2.875))) - 0.5))
        found = allocate.multipliers(ALPHAS, map="model_balancing", bounds=(10 ** (-s / 2), 10 ** (s / 2)))
        assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("map", "equal"),
    [("linear", 1), ("rank", 1), ("sqrt", 1), ("log2", 1), ("sigmoid", 3), ("model_balancing", 5**0.5)],
)
@pytest.mark.parametrize("values", [[2.5], [2.5] * 4, [2.5, 2.5 * (1 + 1e-13)]])
def test_all_equal_and_single_scores(map, equal, values):
    assert allocate.multipliers(values, map=map, bounds=(1, 5)) == pytest.approx([equal] * len(values))


@pytest.mark.parametrize("map", MAPS)
@given(values=scores)
def test_multipliers_are_bounded_and_keep_the_order(map, values):
    values = [v + 1 for v in values]
    found = allocate.multipliers(values, map=map, bounds=(0.5, 2.0))
    assert ((found >= 0.5 - 1e-12) & (found <= 2.0 + 1e-12)).all()
    assert (np.diff(found[np.argsort(values, kind="stable")]) >= -1e-9).all()


@given(values=st.lists(st.floats(1, 5), min_size=1, max_size=12))  # none of them wild
def test_reversed_linear_is_the_mirror(values):
    if max(values) - min(values) > 1e-6:
        both = allocate.multipliers(values) + allocate.multipliers(values, reverse=True)
        assert both == pytest.approx(np.full(len(values), 6.0))


@pytest.mark.parametrize("map", MAPS)
@pytest.mark.parametrize("wild", [4e6, 60.0])
def test_one_wild_score_does_not_squeeze_the_others(map, wild):
    rest = [2.03, 2.06, 2.0, 2.7, 2.65, 2.1]
    found = allocate.multipliers([*rest, wild], map=map, bounds=(1.0, 5.0))
    assert found == pytest.approx(allocate.multipliers([*rest, 2.7], map=map, bounds=(1.0, 5.0)))
    low = allocate.multipliers([*rest, -wild], bounds=(1.0, 5.0))
    assert low == pytest.approx(allocate.multipliers([*rest, 2.0], bounds=(1.0, 5.0)))


def test_a_minority_that_differs_by_its_shape_is_not_wild():
    alphas = [*np.linspace(2.0, 2.06, 24), 2.7, 2.71]  # T5: 8 attention matrices to 2 of the MLP
    assert allocate.multipliers(alphas) == pytest.approx(1 + 4 * (np.array(alphas) - 2) / 0.71)
    wide = [2.05, 2.1, 2.0, 8.0]  # Q = 32 under hill
    assert allocate.multipliers(wide) == pytest.approx(1 + 4 * (np.array(wide) - 2) / 6)
    assert allocate.multipliers([0.0, 0.0, 0.0, 1.0]) == pytest.approx([1, 1, 1, 5])


@pytest.mark.parametrize("map", ["linear", "sigmoid", "rank", "model_balancing"])
@given(values=anything)
def test_odd_scores_give_finite_multipliers(map, values):
    found = allocate.multipliers(values, map=map, bounds=(0.5, 2.0), missing=1.25)
    assert np.isfinite(found).all()
    for value, m in zip(values, found, strict=True):
        if np.isnan(value):
            assert m == 1.25
        elif value == np.inf:
            assert m == max(m for v, m in zip(values, found, strict=True) if not np.isnan(v))


def test_nan_leaves_the_others_alone():
    assert allocate.multipliers([2.0, np.nan, 4.0]) == pytest.approx([1, 1, 5])
    assert allocate.multipliers([2.0, np.inf, 4.0, -np.inf]) == pytest.approx([1, 5, 5, 1])


def test_pins_take_no_part():
    assert allocate.multipliers([2.0, 99.0, 4.0], pin=[None, 7.0, None]) == pytest.approx([1, 7, 5])
    assert allocate.multipliers([2.0, 99.0, 4.0], pin=[0.0, 7.0, None]) == pytest.approx([0, 7, 1])


def test_units_share_the_mean():
    found = allocate.multipliers([1.0, 3.0, 4.0, np.nan, 6.0], units=["a", "a", "b", "b", "c"])
    assert found == pytest.approx([1, 1, 3, 1, 5])  # means 2, 4, 6; NaN has none


def test_errors():
    for wrong in ({"map": "cubic"}, {"bounds": (2, 1)}, {"map": "model_balancing", "bounds": (0, 1)}, {"units": [1]}):
        with pytest.raises(UsageError):
            allocate.multipliers([1.0, 2.0], **wrong)
    with pytest.raises(UsageError, match="≥ 1"):
        allocate.multipliers([0.5, 2.0], map="log2")
    with pytest.raises(UsageError, match="≥ 0"):
        allocate.multipliers([-0.5, 2.0], map="sqrt")
    with pytest.raises(UsageError, match="vector"):
        allocate.multipliers([[1.0]])


class TestProbabilities:
    def test_in_proportion(self):
        assert allocate.probabilities([1, 3, 4]) == pytest.approx([1 / 8, 3 / 8, 1 / 2])
        assert allocate.probabilities([1, 3, 4], reverse=True) == pytest.approx([4 / 7, 2 / 7, 1 / 7])
        assert allocate.probabilities([0, 0]) == pytest.approx([0.5, 0.5])
        assert allocate.probabilities([1, np.nan, 3]) == pytest.approx([1 / 6, 2 / 6, 3 / 6])

    @given(values=scores, share=st.floats(0, 1))
    def test_sum_and_minimum(self, values, share):
        minimum = share / len(values)
        found = allocate.probabilities(values, minimum=minimum)
        assert found.sum() == pytest.approx(1, abs=1e-12)
        assert (found >= minimum - 1e-15).all()

    def test_errors(self):
        with pytest.raises(UsageError, match="≥ 0"):
            allocate.probabilities([-1.0, 2.0])
        with pytest.raises(UsageError, match="at least"):
            allocate.probabilities([1.0, 2.0], minimum=0.6)


class TestCounts:
    def test_largest_remainder(self):
        assert allocate.counts([5, 3, 1], total=10).tolist() == [6, 3, 1]  # 5.56 3.33 1.11
        assert allocate.ranks([5, 3, 0], total=10).tolist() == [6, 3, 1]  # 1 is the least
        assert allocate.ranks([5, 3, 1], total=10, reverse=True).tolist() == [1, 3, 6]
        assert allocate.counts([0, 0, 0], total=6).tolist() == [2, 2, 2]

    @given(values=scores, minimum=st.integers(0, 3), extra=st.integers(0, 40), room=st.integers(0, 9))
    def test_exact_total_within_bounds(self, values, minimum, extra, room):
        n = len(values)
        maximum = minimum + -(-extra // n) + room
        found = allocate.counts(values, total=minimum * n + extra, minimum=minimum, maximum=maximum)
        assert found.sum() == minimum * n + extra
        assert ((found >= minimum) & (found <= maximum)).all()
        order = np.argsort(values, kind="stable")
        assert (np.diff(found[order]) >= -1).all()  # in proportion, but for the rounding

    @given(data=st.data(), values=scores, extra=st.integers(0, 4000))
    def test_costs_are_spent_to_the_last_affordable_unit(self, data, values, extra):
        costs = data.draw(st.lists(st.integers(1, 300), min_size=len(values), max_size=len(values)))
        total = sum(costs) + extra
        found = allocate.ranks(values, total=total, costs=costs)
        left = total - int(found @ costs)
        assert (found >= 1).all()
        assert 0 <= left < min(costs)

    def test_errors(self):
        with pytest.raises(UsageError, match="less than the minimum"):
            allocate.ranks([1, 1, 1], total=2)
        with pytest.raises(UsageError, match="more than the maximum"):
            allocate.counts([1, 1], total=5, maximum=2)
        with pytest.raises(UsageError, match="positive"):
            allocate.counts([1, 1], total=5, costs=[1, 0])


class TestSparsities:
    def test_linear_around_the_mean(self):
        found = allocate.sparsities([2, 3, 4], mean=0.5, spread=0.2, sizes=[1000, 1000, 1000])
        assert found == pytest.approx([0.4, 0.5, 0.6])
        found = allocate.sparsities([2, 3, 4], mean=0.5, spread=0.2, sizes=[1000, 1000, 1000], reverse=True)
        assert found == pytest.approx([0.6, 0.5, 0.4])

    @given(data=st.data(), values=anything, mean=st.floats(0, 1), spread=st.floats(0, 1.5))
    def test_exact_number_of_entries(self, data, values, mean, spread):
        sizes = data.draw(st.lists(st.integers(1, 5000), min_size=len(values), max_size=len(values)))
        found = allocate.sparsities(values, mean=mean, spread=spread, sizes=sizes)
        pruned = found * np.array(sizes, dtype=float)
        assert pruned == pytest.approx(np.round(pruned), abs=1e-6)
        assert round(float(pruned.sum())) == round(mean * sum(sizes))
        assert ((found >= 0) & (found <= 1)).all()

    def test_errors(self):
        for wrong in ({"mean": 1.2, "spread": 0}, {"mean": 0.5, "spread": -1}):
            with pytest.raises(UsageError):
                allocate.sparsities([1.0], sizes=[5], **wrong)


def test_sparsities_need_a_size_for_each_score():
    for sizes in ([10], [10, 0], [10, 20, 30]):
        with pytest.raises(UsageError, match="one positive number of entries for each score"):
            allocate.sparsities([1.0, 2.0], mean=0.5, spread=0.1, sizes=sizes)
    assert allocate.sparsities([], mean=0.5, spread=0.1, sizes=[]).size == 0
