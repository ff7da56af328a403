import matplotlib
import numpy as np
import pytest

import htsr
from htsr.errors import UsageError
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
