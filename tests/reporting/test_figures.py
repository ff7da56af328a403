import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import htsr
from htsr.reporting import figures
from htsr.spectra.metrics import LayerMetrics
from tests.models import state_dict


@pytest.fixture(scope="module")
def analysis():
    return htsr.analyze(state_dict(), device="cpu")


spectra = arrays(np.float64, st.integers(1, 300), elements=st.one_of(st.just(0.0), st.floats(1e-12, 1e6))).map(np.sort)


@given(spectra)
def test_the_histogram_holds_the_share_of_positive_eigenvalues(eigenvalues):
    found = figures.log_histogram(eigenvalues)
    positive = (eigenvalues > 0).mean()
    if found is None:
        assert positive == 0
        return
    assert (np.diff(found.edges) > 0).all()
    assert (found.density * np.diff(found.edges)).sum() == pytest.approx(positive)


@given(spectra)
def test_survival_counts_the_eigenvalues_at_least_as_large(eigenvalues):
    values, ranks = figures.survival(eigenvalues)
    positive = eigenvalues[eigenvalues > 0]
    assert ranks.size <= figures.POINTS
    for value, rank in zip(values, ranks, strict=True):
        assert np.sort(positive)[::-1][rank - 1] == value
    if positive.size:
        assert ranks[0] == 1
        assert ranks[-1] == positive.size


def test_the_fitted_line_is_the_power_law_of_the_tail(analysis):
    for row in analysis:
        eigenvalues = analysis.eigenvalues[row.name]
        line = figures.fitted_line(vars(row), eigenvalues)
        assert line.survival(line.low) == pytest.approx(np.mean(eigenvalues >= row.lambda_min))
        x = np.geomspace(line.low, line.high, 20_001)
        area = np.trapezoid([line.density(value) for value in x], x)
        assert area == pytest.approx(line.survival(line.low) - line.survival(line.high), rel=1e-5)
        slope = np.log(line.density(line.high) / line.density(line.low)) / np.log(line.high / line.low)
        assert slope == pytest.approx(-row.alpha)


def test_a_tail_cut_by_hand_ends_where_it_was_cut():
    state = state_dict()
    name = "model.layers.0.mlp.up_proj"
    xmax = float(np.median(htsr.esd(state[f"{name}.weight"]).eigenvalues))
    analysis = htsr.analyze(state, device="cpu", xmax=xmax)
    line = figures.fitted_line(vars(analysis[name]), analysis.eigenvalues[name], xmax)
    assert line.high <= xmax
    assert line.high > 0.5 * xmax


def test_without_a_fit_there_is_no_line(analysis):
    row = LayerMetrics(name="zero", status="zero")
    assert figures.fitted_line(vars(row), np.zeros(4)) is None
    assert figures.marks(vars(row)) == {}


def test_the_grid_holds_each_matrix_once(analysis):
    cells = figures.grid(analysis.records())
    seen = sorted(i for line in cells.members for cell in line for i in cell)
    assert seen == list(range(len(analysis)))
    assert cells.blocks == (None, 0, 1, 2)
    means = cells.means(analysis.records(), "alpha")
    q = cells.roles.index("attn.q")
    assert means[q, 2] == analysis["model.layers.1.self_attn.q_proj"].alpha
    assert np.isnan(means[q, 0])


@pytest.mark.parametrize(
    ("metric", "values", "centre"),
    [("alpha", [2.0, 3.0, 7.0], 4.0), ("trace_log", [-1.0, 0.2], 0.0), ("stable_rank", [1.0, 9.0], None)],
)
def test_colours_are_symmetric_about_their_centre(metric, values, centre):
    scale = figures.colour_scale(np.array(values), metric)
    assert scale.centre == centre
    assert scale.low < scale.high
    if centre is not None:
        assert centre - scale.low == pytest.approx(scale.high - centre)


def test_a_metric_of_two_models_has_the_colours_of_the_metric_and_its_difference_lies_about_zero():
    values = np.linspace(2.5, 5.0, 9)
    assert figures.colour_scale(values, "alpha_b") == figures.colour_scale(values, "alpha")
    scale = figures.colour_scale(values - 3, "stable_rank_delta")
    assert (scale.low, scale.centre) == (-scale.high, 0.0)
