import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from htsr.spectra.certainty import fit_is_certain
from htsr.spectra.density import ESD
from htsr.spectra.esd import esd
from htsr.spectra.measure import measure
from htsr.spectra.metrics import LayerMetrics, Options
from htsr.spectra.tail import fit_power_law
from htsr.spectra.windows import Windows


def matrix(seed, M, more, tail):
    random = np.random.default_rng(seed)
    scales = (1 - random.random(M + more)) ** -tail
    return (random.standard_normal((M, M + more)) * scales).astype(np.float32)


def row(W, **options):
    return measure(lambda: W, LayerMetrics(name="w", stored="float32"), Options(**options)).row


EVERYTHING = {"bulk": True, "permuted": True, "quality": True}
RESAMPLED = {"alternatives": True, "bootstrap": 50, "gof": 50}
OF_THE_FIT = ("alpha", "sigma", "D", "mp_distance", "quality")  # to a thousandth; all else to rounding


def differences(single, double):
    """Columns of a row in float32 that are not those of float64."""
    for name, value in vars(double).items():
        found = getattr(single, name)
        if isinstance(value, float) and found is not None:
            near = any(part in name for part in OF_THE_FIT)
            close = {"rel": 1e-3, "abs": 1e-3 * (double.alpha or 1.0)} if near else {"rel": 1e-4, "abs": 1e-5}
            same = found == pytest.approx(value, **close)
        else:
            same = found == value
        if not same and name not in ("seconds", "route"):
            yield name, found, value


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(8, 60),
    st.sampled_from([0, 0, 0, 1, 10, 100]),
    st.floats(0.0, 1.2),
    st.sampled_from(["ks", "hill", "hill_paper", "fix_fingers", "clip_xmax"]),
    st.sampled_from([{}, EVERYTHING, EVERYTHING | RESAMPLED]),
)
def test_a_row_in_float32_is_that_of_float64(seed, M, more, tail, fit, options):
    """In every column and note, whatever shape and spectrum; what float32 cannot say comes from float64."""
    W = matrix(seed, M, more, tail)
    assert not [*differences(row(W, dtype="float32", fit=fit, **options), row(W, dtype="float64", fit=fit, **options))]


@pytest.mark.parametrize("options", [{}, {"windows": Windows(20, 2)}])
@pytest.mark.parametrize("pieces", [1, 3])
def test_unresolved_eigenvalues_are_computed_in_float64(options, pieces):
    """Square matrices of full rank, plain, in windows and pooled: nothing is taken for rank-deficient."""
    W = np.stack([matrix(seed, 60, 0, 1.0) for seed in range(pieces)]).squeeze()
    spectra = {d: esd(W, dtype=d, **options).eigenvalues for d in ("float32", "float64")}
    assert [bool(values[0]) for values in spectra.values()] == [False, True]
    single, double = (row(W, dtype=d, **EVERYTHING, **options) for d in spectra)
    assert single.rank_loss == 0
    assert not [*differences(single, double)]


def test_what_fails_in_float64_is_a_failed_row(monkeypatch):
    def fails(*_):
        raise MemoryError

    monkeypatch.setattr("htsr.spectra.eigenvalues.np.linalg.eigvalsh", fails)
    found = row(matrix(0, 60, 0, 1.0), dtype="float32")
    assert (found.status, found.alpha) == ("failed", None)


def test_a_row_says_in_which_precision_it_was_computed():
    wide, square = matrix(0, 60, 60, 0.3), matrix(0, 60, 0, 1.0)
    assert row(wide, dtype="float32").route == "gram/float32"
    assert row(square, dtype="float32").route == "gram/float64"
    for options in ({"fit": "clip_xmax"}, {"xmax": 1e9}, {"gof": 50}, {"bootstrap": 50}, {"alternatives": True}):
        assert row(wide, dtype="float32", **options).route == "gram/float64"


def spectrum(eigenvalues):
    values = np.sort(np.asarray(eigenvalues, dtype=np.float64))
    return ESD(values, values.size, 2 * values.size, 1, route="gram/float32")


def certain(eigenvalues, method="ks", xmin=None):
    found = spectrum(eigenvalues)
    fit = fit_power_law(found.positive, method, xmin=xmin)
    return fit_is_certain(found, fit.method, fit.alpha, fit.D, fit.lambda_min, "cpu")


def test_another_tail_that_is_as_good_makes_a_fit_uncertain():
    """A rival whose D is pushed, by moving the smallest eigenvalue of its tail, to that of the best."""
    values = np.sort((1 - np.random.default_rng(3).random(60)) ** -1.0)
    best = fit_power_law(values)
    assert certain(values)

    def with_last(top):
        moved = values.copy()
        moved[-1] = top
        return fit_power_law(moved)

    low, high = values[-2] * 1.01, values[-1] * 50
    starts = np.array([with_last(top).lambda_min for top in np.geomspace(low, high, 200)])
    change = int(np.flatnonzero(np.diff(starts) != 0)[0])  # where the best tail becomes another one
    a, b = np.geomspace(low, high, 200)[change : change + 2]
    first = with_last(a).lambda_min
    for _ in range(60):
        middle = (a * b) ** 0.5
        a, b = (middle, b) if with_last(middle).lambda_min == first else (a, middle)
    values[-1] = a
    assert not certain(values)
    assert best.num_tail > 2


def test_a_given_begin_is_certain_unless_an_eigenvalue_comes_too_near():
    values = np.linspace(1.0, 4.0, 50)
    assert certain(values, xmin=values[20] * 1.001)
    assert not certain(values, xmin=values[20] * (1 + 1e-7))
