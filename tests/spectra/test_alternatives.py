import sys
import warnings

import numpy as np
import powerlaw
import pytest
from mpmath import gammainc

from htsr.errors import MatrixError
from htsr.spectra.alternatives import _normaliser, best_law, compare_laws, fit_truncated
from htsr.spectra.bulk import mp_quantile
from htsr.spectra.quality import free_cumulants, quality


def truncated_sample(random, size, alpha, cut):
    """By rejection from the power law."""
    kept = np.empty(0)
    while kept.size < size:
        x = (1 - random.random(4 * size)) ** (-1 / (alpha - 1))
        kept = np.concatenate([kept, x[random.random(x.size) < np.exp(-cut * (x - 1))]])
    return kept[:size]


@pytest.mark.parametrize(
    ("alpha", "cut"), [(2.3, 0.005), (1.5, 0.1), (4.0, 1e-6), (-1.0, 0.5), (0.5, 1e-4), (6.0, 2.0), (1.0001, 1e-9)]
)
def test_normaliser_is_the_incomplete_gamma_function(alpha, cut):
    expected = float(gammainc(1 - alpha, cut)) * cut ** (alpha - 1)
    assert _normaliser(alpha, cut) == pytest.approx(expected, rel=1e-8)


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


def test_ratios_are_those_of_the_powerlaw_package(random):
    x = 2.0 * (1 - random.random(200)) ** (-1 / 1.5)
    ours = compare_laws(x)
    fit = powerlaw.Fit(x, xmin=x.min(), verbose=False)
    for law in ("exponential", "lognormal"):
        R, p = fit.distribution_compare("power_law", law, normalized_ratio=True)
        assert pytest.approx(R, abs=0.02) == ours[law].R
        assert ours[law].p == pytest.approx(p, abs=0.02)


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


def test_other_threads_keep_their_streams_and_warnings(random, monkeypatch, capfd):
    """What the process prints or warns of meanwhile is not the fits' to silence."""
    streams, fit = (sys.stdout, sys.stderr), powerlaw.Fit

    def spying(*args, **options):
        assert (sys.stdout, sys.stderr) == streams
        warnings.warn("from elsewhere", UserWarning, stacklevel=1)
        sys.stdout.write("progress\n")
        return fit(*args, **options)

    monkeypatch.setattr(powerlaw, "Fit", spying)
    with pytest.warns(UserWarning, match="from elsewhere") as seen:
        compare_laws(1 + random.exponential(size=40))
    assert len(seen) == 1  # none of powerlaw's own
    assert capfd.readouterr() == ("progress\n", "")
