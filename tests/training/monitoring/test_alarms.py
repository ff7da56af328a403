"""What is warned of, and what is not."""

import numpy as np
import pytest

import htsr
from htsr.analysis.trajectory_file import Point
from htsr.spectra.metrics import LayerMetrics
from htsr.training.monitoring.alarms import PATIENCE, Sign, Watch, is_like_noise


def points(step, **by_name):
    return [Point(f"step-{step}", LayerMetrics(name=name, **row), step) for name, row in by_name.items()]


def kinds(signs):
    return [(sign.kind, sign.matrices) for sign in signs]


def test_a_low_alpha_is_told_where_the_evaluation_loss_rises():
    watch = Watch()
    low, within, high = ({"alpha": alpha, "sigma": 0.1} for alpha in (1.7, 1.9, 2.5))
    assert watch.signs(points(1, a=low, b=within, c=high)) == []
    assert [watch.evaluated(loss) for loss in (3.0, 2.0, 2.5)] == [[], [], []]  # up once, after down
    assert kinds(watch.evaluated(2.6)) == [("heavy", ("a",))]
    assert watch.evaluated(2.7) == []  # said before
    assert kinds(watch.signs(points(2, b=low))) == [("heavy", ("b",))]
    assert watch.evaluated(2.0) == []
    assert watch.signs(points(3, c=low)) == []


def test_a_stable_rank_that_was_always_small_is_no_collapse():
    watch = Watch()
    assert watch.signs(points(1, a={"stable_rank": 1.5}, b={"stable_rank": 3.0}, c={"stable_rank": 30.0})) == []
    after = points(2, a={"stable_rank": 1.2}, b={"stable_rank": 1.6}, c={"stable_rank": 14.0})
    assert watch.signs(after) == []
    assert kinds(watch.signs(points(3, b={"stable_rank": 1.4}))) == [("collapse", ("b",))]


def test_a_layer_that_stays_random_is_told_once_most_have_left():
    noise = {"alpha_minus_null": 0.1, "alpha_null_sd": 0.2, "num_spikes": 0}
    trained = noise | {"num_spikes": 4}
    watch = Watch()
    for step in range(PATIENCE + 2):
        assert watch.signs(points(step, a=noise, b=noise, c=noise)) == []  # all are: the training is young
    (sign,) = watch.signs(points(9, b=trained, c=trained))
    assert (sign.kind, sign.matrices) == ("random", ("a",))
    assert "can: a. A layer" in str(sign)
    assert watch.signs(points(10, a=noise)) == []
    assert watch.signs(points(11, b=noise)) == []
    watch = Watch()
    for step in range(PATIENCE):  # not three times in a row
        assert watch.signs(points(step, a=trained if step == 1 else noise, b=trained, c=trained)) == []


def test_a_layer_that_stays_random_though_it_moves_is_told_with_its_change():
    noise = {"alpha_minus_null": 0.1, "alpha_null_sd": 0.2, "num_spikes": 0}
    watch = Watch()
    watch.signs(points(0, b=noise | {"num_spikes": 4}))
    row = LayerMetrics(name="a", **noise)
    signs = [watch.signs([Point(f"step-{step}", row, step, relative=0.412)]) for step in range(PATIENCE)]
    assert signs[:-1] == [[]] * (PATIENCE - 1)
    assert "can: a (moved by 0.41). A layer" in str(signs[-1][0])


def test_noise_is_like_noise_and_a_spike_is_not():
    random = np.random.default_rng(0)
    noise = [random.standard_normal((80, 120)) for _ in range(40)]
    rows = htsr.analyze({f"{i}.weight": W for i, W in enumerate(noise)}, bulk=True)
    assert sum(map(is_like_noise, rows)) >= 34
    spike = 0.5 * np.outer(random.standard_normal(80), random.standard_normal(120))
    assert not is_like_noise(htsr.analyze({"w.weight": noise[0] + spike}, bulk=True)[0])
    assert is_like_noise(htsr.analyze({"w.weight": noise[0]})[0]) is None


@pytest.mark.parametrize("kind", ["heavy", "collapse", "random", "broken"])
def test_a_sentence_names_five(kind):
    assert "m0, m1, m2, m3, m4 and 3 more" in str(Sign(kind, tuple(f"m{i}" for i in range(8))))
