import matplotlib
import numpy as np
import pytest

import htsr
from htsr.errors import UsageError
from htsr.reporting import plots
from htsr.reporting.trajectories import pivot
from tests.models import state_dict

matplotlib.use("Agg")

NAME = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def analysis():
    return htsr.analyze(state_dict(), device="cpu", bulk=True, permuted=True)


def test_the_esd_is_drawn_with_its_fit_and_its_marks(analysis):
    row = analysis[NAME]
    axes = analysis.plot(NAME)
    assert axes.get_xscale() == axes.get_yscale() == "log"
    vertical = {float(line.get_xdata()[0]) for line in axes.lines if line.get_xdata()[0] == line.get_xdata()[-1]}
    assert vertical == {row.lambda_min, row.lambda_erg, row.bulk_threshold}
    (fit,) = [line for line in axes.lines if line.get_xdata()[0] != line.get_xdata()[-1]]
    (x0, x1), (y0, y1) = fit.get_xdata(), fit.get_ydata()
    assert np.log(y1 / y0) / np.log(x1 / x0) == pytest.approx(-row.alpha)


def test_the_heat_map_holds_the_metric(analysis):
    axes = analysis.plot(metric="stable_rank")
    (image,) = axes.images
    shown = image.get_array()
    assert sorted(shown.compressed()) == pytest.approx(sorted(row.stable_rank for row in analysis))


def test_given_axes_are_drawn_on(analysis):
    from matplotlib import pyplot

    _, ax = pyplot.subplots()
    assert analysis.plot(NAME, ax=ax) is ax


def test_what_cannot_be_plotted_is_said(analysis):
    with pytest.raises(KeyError, match="no matrix nowhere"):
        analysis.plot("nowhere")
    with pytest.raises(UsageError, match="no number 'colour'"):
        analysis.plot(metric="colour")
    with pytest.raises(UsageError, match="has tpl_alpha"):
        analysis.plot(metric="tpl_alpha")


def test_two_esds_are_drawn_over_each_other_and_each_keeps_its_integral(analysis):
    a = analysis.eigenvalues[NAME]
    axes = plots.plot_two_esds(NAME, a, 9 * a, ("base $x", "_tuned"))
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [r"base \$x", "\u200b_tuned"]
    outlines = [patch.get_data() for patch in axes.patches]
    for data in outlines:
        assert np.nansum(data.values * np.diff(data.edges)) == pytest.approx(1.0)
    assert outlines[2].edges[-1] == pytest.approx(9 * outlines[0].edges[-1])
    plots.plot_two_esds(NAME, a, None)
    with pytest.raises(UsageError, match="no positive eigenvalues"):
        plots.plot_two_esds(NAME, None, np.zeros(4))


def point(step, name, alpha, block=0):
    role = name.split(".")[-1]
    return {"source": f"checkpoint-{step}", "step": step, "name": name, "role": role, "block": block, "alpha": alpha}


POINTS = [
    *(point(0, "0.up", 4.0), point(0, "1.up", 6.0, 1), point(0, "0.q", 3.0)),
    *(point(5, "0.up", 2.0), point(5, "0.q", None)),  # of a monitor that did not come to the others
    *(point(9, "1.up", 5.0, 1), point(9, "0.q", 2.5)),
]


def test_a_line_has_the_latest_numbers_of_its_matrices():
    axes = plots.plot_trajectory(POINTS, "alpha")
    lines = {line.get_label(): np.array(line.get_xydata()) for line in axes.lines}
    assert lines["up"].tolist() == [[0, 5.0], [5, 4.0], [9, 3.5]]
    np.testing.assert_array_equal(lines["q"], [[0, 3.0], [5, np.nan], [9, 2.5]])  # measured, and without a fit


def test_ticks_are_at_blocks_and_steps():
    one_step = [point for point in POINTS if point["step"] == 0]
    for axes in (plots.plot_trajectory(one_step, "alpha"), plots.plot_distributions({"τ = 3": np.ones(3)}, "of three")):
        axes.figure.canvas.draw()
        assert all(tick == round(tick) for tick in axes.get_xticks())


def test_by_block_and_by_matrix_the_same_points_are_other_lines():
    found = pivot(POINTS)
    assert list(found.lines("alpha", "block")) == ["block 0", "block 1"]
    assert found.lines("alpha", "block")["block 0"].tolist() == [3.5, 2.0, 2.25]
    assert list(found.lines("alpha", "matrix")) == ["0.up", "1.up", "0.q"]
    assert pivot([{**p, "step": None} for p in POINTS]).steps is None


def test_a_trajectory_without_such_numbers_is_a_sentence():
    with pytest.raises(UsageError, match="no matrix has entropy"):
        plots.plot_trajectory(POINTS, "entropy")
    with pytest.raises(UsageError, match="role, block, matrix, not by 'layer'"):
        plots.plot_trajectory(POINTS, "alpha", "layer")
