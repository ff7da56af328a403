import subprocess
import sys

import numpy as np
import powerlaw
import pytest

from htsr.errors import MatrixError
from htsr.spectra.alternatives import best_law, compare_laws, fit_truncated
from htsr.spectra.bulk import mp_quantile
from htsr.spectra.quality import free_cumulants, quality


def truncated_sample(random, size, alpha, cut):
    """By rejection from the power law."""
    kept = np.empty(0)
    while kept.size < size:
        x = (1 - random.random(4 * size)) ** (-1 / (alpha - 1))
        kept = np.concatenate([kept, x[random.random(x.size) < np.exp(-cut * (x - 1))]])
    return kept[:size]


def test_truncated_law_is_recovered(random):
    fits = np.array([fit_truncated(3.0 * truncated_sample(random, 2000, 1.8, 0.05)) for _ in range(10)])
    assert fits[:, 0].mean() == pytest.approx(1.8, abs=0.05)
    assert fits[:, 1].mean() * 3.0 == pytest.approx(0.05, rel=0.1)  # Λ is per unit of λ


def test_truncated_law_agrees_with_the_powerlaw_package(random):
    x = truncated_sample(random, 300, 2.0, 0.02)
    theirs = powerlaw.Fit(x, xmin=x.min(), verbose=False).truncated_power_law
    alpha, cut = fit_truncated(x)
    assert alpha == pytest.approx(theirs.parameter1, abs=0.02)
    assert cut == pytest.approx(theirs.parameter2, rel=0.05)


def test_the_truncated_law_is_never_worse_and_seldom_significant_on_a_power_law(random):
    found = [compare_laws((1 - random.random(300)) ** (-1 / 1.4))["truncated_power_law"] for _ in range(40)]
    assert all(c.R <= 1e-6 for c in found)  # it contains the power law
    assert sum(c.p < 0.05 for c in found) <= 6
    assert np.mean([c.parameters["alpha"] for c in found]) == pytest.approx(2.4, abs=0.15)


@pytest.mark.parametrize(
    ("law", "sample"),
    [
        ("power_law", lambda r: (1 - r.random(800)) ** (-1 / 1.3)),
        ("exponential", lambda r: 5 + r.exponential(2.0, 800)),
        ("truncated_power_law", lambda r: truncated_sample(r, 3000, 1.5, 0.03)),
    ],
)
def test_the_true_law_is_not_rejected(random, law, sample):
    x = sample(random)
    laws = compare_laws(x)
    if law == "power_law":
        assert best_law(laws) == law
    else:
        assert laws[law].R < 0
        assert laws[law].p < 0.05
        assert laws[law].delta_aic <= min(c.delta_aic for c in laws.values()) + 8


@pytest.mark.parametrize("alpha", [3.5, 5.0, 8.0])
def test_a_steep_power_law_is_one(random, alpha):
    """`powerlaw` 2.0 bounds α by 3, and whatever was compared with a steeper power law won."""
    found = [best_law(compare_laws((1 - random.random(300)) ** (-1 / (alpha - 1)))) for _ in range(20)]
    assert found.count("power_law") >= 17


def test_nothing_to_compare_is_said():
    with pytest.raises(MatrixError, match="2 or more distinct"):
        compare_laws([3.0, 3.0])
    with pytest.raises(MatrixError, match="all > 0"):
        compare_laws([0.0, 1.0, 3.0])


@pytest.mark.parametrize("q", [1.0, 0.5, 0.2])
def test_free_cumulants_of_the_mp_law(q):
    x = mp_quantile((np.arange(200_000) + 0.5) / 200_000, 1 / q)
    assert free_cumulants(x) == pytest.approx((1, q, q**2, q**3), rel=2e-3)


def test_quality_forms(random):
    values = np.sort(random.lognormal(size=100))
    ecs = values[-30:] * 100 / values.sum()
    found = quality(values, 30, 3.0)
    assert found.tail_norm == pytest.approx(ecs.sum())
    assert found.tail_norm_mean == pytest.approx(ecs.mean())
    assert found.log == pytest.approx(sum(np.log(x / ecs[0]) for x in ecs))
    assert found.schatten == pytest.approx(np.mean(ecs**2))
    k = free_cumulants(ecs)
    assert found.cumulant == pytest.approx(
        np.mean([sum(k[n] * (x / 30) ** (n + 1) / (n + 1) for n in range(4)) for x in ecs])
    )
    scaled = quality(values * 5, 30, 3.0)
    assert scaled.log == pytest.approx(found.log)
    assert scaled.cumulant == pytest.approx(found.cumulant)
    with pytest.raises(MatrixError, match="no crossing"):
        quality(values, 0, 3.0)


def test_laws_are_compared_without_another_package():
    """`powerlaw` holds the interpreter, sets filters for the whole process, and takes a second to import."""
    code = """
import sys
import numpy as np
from htsr.spectra.alternatives import compare_laws
compare_laws(1 + np.arange(40.0))
assert not {"powerlaw", "scipy.stats", "matplotlib", "pandas"} & set(sys.modules), sys.modules
"""
    assert subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True).stderr == ""


@pytest.mark.parametrize(
    "tail",
    [[1e-300, 1e300], [1, 2, np.inf], [1, np.nan, 2], [3.0, 3.0], [0.0, 1.0, 2.0], [5e-324, 1.0], [2.0], []],
    ids=str,
)
@pytest.mark.parametrize("fitted", [compare_laws, fit_truncated])
def test_tails_that_no_law_is_fitted_to_are_refused(tail, fitted):
    with pytest.raises(MatrixError, match="2 or more distinct eigenvalues, all > 0, within a factor of") as refused:
        fitted(tail)
    assert refused.value.status == "degenerate"


@pytest.mark.parametrize("tail", [[1, 1, 1e300], [1, 1, 1e299, 1e300], [1, 1e150, 1e300], [1, 2]], ids=str)
def test_a_law_that_contains_the_power_law_is_no_worse_however_wide_the_tail(tail):
    ratio = compare_laws(tail)["truncated_power_law"]
    assert ratio.R <= 0
    assert 0 < ratio.p <= 1
    assert np.isfinite(fit_truncated(tail)).all()
