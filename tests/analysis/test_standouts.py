"""Look here first: what is planted is found, chance is kept to its rate, and the untrained pooler is named."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import htsr
from htsr.analysis.standouts import ERROR_RATE, noise_edge, standouts
from htsr.spectra.metrics import LayerMetrics
from tests.models import heavy_matrix, state_dict


def _drawn(random, roles=6, blocks=6, spread=0.4) -> list[LayerMetrics]:
    """Rows of a model whose layers scatter as Gaussian variables do, and equally in all roles."""

    def near(value):
        return value * math.exp(spread * random.standard_normal())

    return [
        LayerMetrics(
            name=f"layers.{block}.{role}", role=f"role{role}", rows=96, columns=96, M=96, N=96, pieces=1,
            num_eigenvalues=96, alpha=1 + near(2.5), num_pl_tail=60, stable_rank=near(20.0), norm=near(100.0),
            entropy=1 - near(0.1), matrix_rank=96, max_rand_eval=near(4.0), rand_threshold=4.0,
        )
        for block in range(blocks)
        for role in range(roles)
    ]  # fmt: skip


@pytest.mark.parametrize(("roles", "blocks"), [(6, 6), (1, 6), (3, 30)])
def test_chance_makes_a_standout_in_one_model_of_twenty_at_most(random, roles, blocks):
    models = 100
    alarms = sum(bool(standouts(_drawn(random, roles, blocks))) for _ in range(models))
    deviation = (ERROR_RATE * (1 - ERROR_RATE) / models) ** 0.5
    assert alarms / models <= ERROR_RATE + 3 * deviation


def test_no_matrix_of_a_freshly_drawn_model_stands_out(random):
    for _ in range(5):
        state = {
            f"layers.{i}.mlp.{part}.weight": 0.02 * random.standard_normal(shape)
            for i in range(8)
            for part, shape in (("up_proj", (64, 32)), ("down_proj", (32, 64)), ("gate_proj", (64, 32)))
        }
        assert standouts(htsr.analyze(state, null=False, permuted=True)) == ()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("alpha", 40.0),
        ("stable_rank", 1.5),
        ("norm", 4e4),
        ("entropy", 0.01),
        ("max_rand_eval", 400.0),
        ("matrix_rank", 9),
    ],
)
def test_what_is_planted_is_found_with_what_its_peers_have(random, field, value):
    rows = _drawn(random, spread=0.1)
    rows[8] = replace(rows[8], **{field: value})
    (found,) = standouts(rows)
    peers = [getattr(row, field) for row in rows if row.role == rows[8].role]
    assert (found.name, found.metric, found.value) == (rows[8].name, field, value)
    assert min(peers) < found.expected < max(peers) or found.expected == 96
    assert found.score > 4
    assert rows[8].role in found.reason
    # a number that is known no better than that is no standout
    if field == "alpha":
        assert standouts([replace(row, num_pl_tail=1) for row in rows]) == ()


def test_scale_and_order_change_nothing(random):
    state = {f"layers.{i}.mlp.up_proj.weight": heavy_matrix(random, 60, 40) for i in range(12)}
    signal = np.outer(random.standard_normal(60), random.standard_normal(40)).astype(np.float32)
    state["layers.5.mlp.up_proj.weight"] += torch.from_numpy(signal)
    found = standouts(htsr.analyze(state, null=False))
    assert found[0].name == "layers.5.mlp.up_proj"
    other = standouts(htsr.analyze({name: state[name] * 7 for name in reversed(list(state))}, null=False))
    assert [(each.name, each.metric) for each in other] == [(each.name, each.metric) for each in found]
    assert [each.score for each in other] == pytest.approx([each.score for each in found])


def test_the_untrained_pooler_comes_first(minilm):
    first, *_ = standouts(htsr.analyze(minilm, null=False))
    assert (first.name, first.metric) == ("pooler.dense", "lambda_max")
    assert first.value < first.expected
    assert "random-like" in first.reason


def test_the_scatter_of_noise_is_that_of_its_largest_eigenvalue(random):
    draws = random.standard_normal((400, 30, 60))
    largest = np.linalg.norm(draws, ord=2, axis=(1, 2)) ** 2
    edge, scatter = noise_edge(LayerMetrics(name="noise", M=30, N=60, pieces=1, norm=1800.0))
    assert scatter == pytest.approx(np.log(largest).std(), rel=0.15)
    assert np.mean(largest > edge) < 0.03


def test_what_is_broken_comes_before_all(random):
    rows = _drawn(random)
    rows[3] = replace(rows[3], stable_rank=0.1)
    rows.append(LayerMetrics(name="head", status="nan", warning="3 of its entries are NaN"))
    rows.append(LayerMetrics(name="small", status="tiny", warning="2 eigenvalues, too few for a fit"))
    first, second = standouts(rows)
    assert (first.name, first.score, first.value, first.expected) == ("head", math.inf, None, None)
    assert first.reason == "nan: 3 of its entries are NaN"
    assert second.name == rows[3].name


def test_nothing_is_nothing():
    assert standouts([]) == ()


def test_trackers_get_the_means_that_the_monitor_logs():
    analysis = htsr.analyze(state_dict(), null=False)
    values = analysis.log_values()
    assert values["spectrum/alpha/mlp.up"] == analysis.summary_by("role")["mlp.up"]["alpha"]
    assert values["spectrum/log_norm/all"] == analysis.summary()["log_norm"]
    assert all(isinstance(value, float) for value in values.values())
    each = analysis.log_values(["alpha"], by="name")
    assert each[f"spectrum/alpha/{analysis[0].name}"] == analysis[0].alpha
    assert len(each) == len(analysis) + 1
    assert "spectrum/alpha/0" in analysis.log_values(["alpha"], by="block")
    with pytest.raises(htsr.UsageError, match="no number 'alfa'"):
        analysis.log_values(["alfa"])
