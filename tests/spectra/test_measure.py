import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from htsr.arrays import Product
from htsr.errors import MatrixError, UsageError
from htsr.spectra.bulk import Bulk
from htsr.spectra.measure import measure, measure_batch
from htsr.spectra.metrics import LayerMetrics, Options
from htsr.spectra.notes import kind_of
from htsr.spectra.statistics import scalar_metrics
from htsr.spectra.tail import fit_power_law
from htsr.spectra.windows import Windows
from tests.reference import statistics as plain

seeds = st.integers(0, 2**32 - 1)
SHIFT_FREE = ("alpha", "D", "num_pl_tail", "trace_log", "erg_num", "erg_gap", "stable_rank", "entropy", "matrix_rank")


def row_of(matrix, **options):
    return measure(lambda: matrix, LayerMetrics(name="w"), Options(null=False, **options)).row


def heavy(seed, shape):
    """Correlated, heavy-tailed: what training makes."""
    random = np.random.default_rng(seed)
    m, n = shape
    rank = min(shape)
    singular = (1 - random.random(rank)) ** -0.4
    left, _ = np.linalg.qr(random.standard_normal((m, rank)))
    right, _ = np.linalg.qr(random.standard_normal((n, rank)))
    return (left * singular) @ right.T + 0.05 * random.standard_normal(shape)


shapes = st.tuples(st.integers(12, 60), st.integers(12, 60))


def same(a, b, fields=SHIFT_FREE):
    for field in fields:
        assert getattr(a, field) == pytest.approx(getattr(b, field), rel=1e-6, abs=1e-9), field


@settings(max_examples=30)
@given(seeds, shapes, st.floats(-5, 5))
def test_scale_changes_no_shape_number(seed, shape, exponent):
    W = heavy(seed, shape)
    row, scaled = row_of(W), row_of(W * 10**exponent)
    same(row, scaled)
    assert scaled.log_norm == pytest.approx(row.log_norm + 2 * exponent, abs=1e-9)
    assert scaled.lambda_min == pytest.approx(row.lambda_min * 100**exponent)


@settings(max_examples=30)
@given(seeds, shapes)
def test_transpose_and_permutations_change_nothing(seed, shape):
    W = heavy(seed, shape)
    random = np.random.default_rng(seed)
    row = row_of(W)
    same(row, row_of(W.T), (*SHIFT_FREE, "norm", "lambda_max"))
    same(row, row_of(W[random.permutation(shape[0])][:, random.permutation(shape[1])]), (*SHIFT_FREE, "norm"))


@settings(max_examples=30)
@given(seeds, shapes)
def test_rotations_change_nothing(seed, shape):
    W = heavy(seed, shape)
    random = np.random.default_rng(seed)
    rotate = [np.linalg.qr(random.standard_normal((k, k)))[0] for k in shape]
    same(row_of(W), row_of(rotate[0] @ W @ rotate[1]), (*SHIFT_FREE, "norm", "lambda_max"))


def test_scalar_metrics_are_their_definitions(random):
    values = np.sort(random.lognormal(size=60))
    found = scalar_metrics(values)
    assert found["norm"] == pytest.approx(sum(values))
    assert found["log_norm"] == pytest.approx(np.log10(sum(values)))
    assert found["log_spectral_norm"] == pytest.approx(np.log10(max(values)))
    assert found["stable_rank"] == pytest.approx(sum(values) / max(values))
    assert found["entropy"] == pytest.approx(plain.entropy(values))
    with_zeros = scalar_metrics(np.concatenate([np.zeros(4), values]))
    assert with_zeros["entropy"] == pytest.approx(found["entropy"])
    assert (with_zeros["matrix_rank"], with_zeros["rank_loss"]) == (60, 4)


def test_flat_spectrum_has_entropy_one(random):
    orthogonal, _ = np.linalg.qr(random.standard_normal((40, 40)))
    row = row_of(orthogonal)
    assert row.status == "degenerate"  # all eigenvalues are 1
    assert row.entropy == pytest.approx(1.0)
    assert row.stable_rank == pytest.approx(40.0)


def test_alpha_norms(random):
    row = measured = measure(lambda: heavy(1, (40, 50)), LayerMetrics(name="w"), Options(null=False))
    row, values = measured.row, measured.eigenvalues
    assert row.alpha_hat == pytest.approx(row.alpha * np.log10(values[-1]))
    assert row.log_alpha_norm == pytest.approx(np.log10((values**row.alpha).sum()))
    huge = row_of(1e40 * heavy(1, (40, 50)))
    assert np.isfinite(huge.log_alpha_norm)
    assert huge.log_alpha_norm == pytest.approx(row.log_alpha_norm + 80 * row.alpha)


def test_pure_noise_is_called_random_and_a_spike_is_not(random):
    noise = random.standard_normal((150, 200))
    assert "random-like" in row_of(noise).warning
    spiked = noise + 3 * np.outer(random.standard_normal(150), random.standard_normal(200)) / 10
    assert "random-like" not in row_of(spiked).warning


def test_alpha_is_shown_beside_its_null():
    row = measure(lambda: heavy(3, (64, 128)), LayerMetrics(name="w"), Options(fit="hill")).row
    assert row.alpha_null == pytest.approx(2.7, abs=0.15)
    assert row.alpha_minus_null == pytest.approx(row.alpha - row.alpha_null)
    by_hand = measure(lambda: heavy(3, (64, 128)), LayerMetrics(name="w"), Options(xmin=0.5)).row
    assert by_hand.alpha_null is None  # an eigenvalue by hand means nothing in another matrix


@pytest.mark.parametrize(
    ("matrix", "status", "warning"),
    [
        (np.zeros((20, 30)), "zero", "all entries are zero"),
        (np.eye(3, 30), "tiny", "3 eigenvalues, too few for a fit"),
        (np.outer(np.arange(1, 21), np.ones(30)), "tiny", "1 eigenvalue above the resolution, too few for a fit"),
        (np.full((20, 30), 0.3, np.float32), "tiny", "1 eigenvalue above the resolution, too few for a fit"),
        (np.eye(20)[::-1], "degenerate", "all eigenvalues are equal but for rounding"),
        (np.kron(np.diag([1.0, 2.0, 3.0]), np.eye(9, 12)), "degenerate", "3 distinct eigenvalues but for rounding"),
        (np.full((20, 30), 1e-200), "underflow", "so small that float64 cannot hold their squares"),
        (np.full((20, 30), np.nan), "nan", "NaN, infinite"),
        (np.zeros((0, 30)), "empty", "no entries"),
    ],
)
def test_matrices_without_a_fit_get_a_status(matrix, status, warning):
    row = row_of(matrix, bulk=True, permuted=True, alternatives=True, quality=True, bootstrap=10, gof=10)
    assert row.status == status
    assert warning in row.warning
    assert row.alpha is None
    assert row.gof_p is None


def test_reading_errors_and_lack_of_memory_become_rows():
    def fails():
        raise MatrixError("unreadable", "w could not be read")

    def exhausts():
        raise MemoryError

    assert measure(fails, LayerMetrics(name="w"), Options()).row.status == "unreadable"
    row = measure(exhausts, LayerMetrics(name="w"), Options()).row
    assert (row.status, "lanczos" in row.warning) == ("failed", True)


def test_everything_at_once():
    found = measure(
        lambda: heavy(5, (120, 90)),
        LayerMetrics(name="w"),
        Options(bulk=True, permuted=True, alternatives=True, quality=True, bootstrap=20, gof=20),
    )
    row = found.row
    empty = {name for name in LayerMetrics.__dataclass_fields__ if getattr(row, name) is None}
    assert empty == {"block", "stored", "rows", "columns", "num_fingers", "alpha_error", "esd_error"}
    assert row.alpha_low <= row.alpha_high
    assert 0 <= row.gof_p <= 1
    assert found.permuted.sum() == pytest.approx(found.eigenvalues.sum(), rel=1e-5)
    assert row.mean_shift_threshold == pytest.approx((120 * 90) ** -0.25)


def test_mean_shift_is_that_of_the_entries():
    W = 0.3 + heavy(7, (50, 60))
    for options in ({}, {"windows": Windows(20, 2)}):
        row = row_of(W, permuted=True, **options)
        assert row.mean_shift == pytest.approx(abs(W.mean()) / W.std(), rel=1e-6)


def test_the_permutation_depends_on_the_name_and_the_seed():
    W = heavy(9, (40, 50))

    def distance(name, seed=0):
        return measure(lambda: W, LayerMetrics(name=name), Options(permuted=True, seed=seed)).row.rand_distance

    assert distance("a") == distance("a")
    assert len({distance("a"), distance("b"), distance("a", 1)}) == 3


def test_lanczos_rows_state_their_error():
    row = row_of(heavy(11, (200, 220)), route="lanczos", permuted=True, gof=10)
    assert row.alpha_error > 0
    assert row.esd_error is not None
    assert row.gof_p is None
    assert {"approximate", "no p of the fit"} <= set(row.warning.split("; "))
    assert "no p of the fit" not in row_of(heavy(11, (200, 220)), route="lanczos").warning


def test_gof_follows_the_fit_and_the_seed():
    def p_of(**options):
        return row_of(heavy(3, (60, 80)), gof=50, **options).gof_p

    assert p_of() == p_of()
    assert len({p_of(), p_of(seed=1), p_of(fit="hill"), p_of(fit="fix_fingers"), p_of(xmin=1.0)}) > 2


def test_options_without_meaning_are_refused():
    with pytest.raises(UsageError, match="xmin is an eigenvalue"):
        Options(xmin=-1.0)
    with pytest.raises(UsageError, match="number of resamples"):
        Options(bootstrap=-1)
    with pytest.raises(UsageError, match="number of samples"):
        Options(gof=-1)


@pytest.mark.parametrize(
    "option",
    [
        {"gof": True}, {"gof": 50.0}, {"gof": 9}, {"gof": "50"}, {"bootstrap": True}, {"bootstrap": 1}, {"seed": True},
        {"xmin": True}, {"xmin": "1"}, {"xmax": "1"}, {"xmax": True}, {"bulk": 200}, {"null": "no"},
        {"windows": 2000}, {"windows": True},
    ],
)  # fmt: skip
def test_an_option_of_another_kind_is_refused_by_name(option):
    ((name, value),) = option.items()
    with pytest.raises(UsageError, match=rf"^{name} is .*(, not|or None, not) {value!r}$"):
        Options(**option)


@pytest.mark.parametrize("sizes", [(True, 3), (2000.0, 3), (10, 2.5), ("10", 3), (10, 3, True), (10, 3, np.inf)])
def test_windows_of_another_kind_are_refused(sizes):
    with pytest.raises(UsageError, match="windows need rows"):
        Windows(*sizes)


def test_notes_name_the_spectrum_and_judge_nothing():
    heavy_tail = np.sort((1 - np.random.default_rng(0).random(400)) ** -1.6)  # α = 1.6
    flat = np.linspace(1.0, 1.2, 400)
    for values, word in ((heavy_tail, "heavy tail α<2"), (flat, "light tail α>6")):
        W = np.diag(np.sqrt(values))
        assert word in row_of(W, fit="hill").warning.split("; ")
    row = row_of(np.diag(np.arange(1.0, 21.0)), fit="hill")
    assert f"tail of {row.num_pl_tail}" in row.warning.split("; ")
    assert {kind_of("tail of 7"), kind_of("tail of 12"), kind_of("no ERG")} == {"tail of", "no ERG"}


@pytest.mark.parametrize("shape", [(300, 400), (400, 300)])
def test_a_change_of_low_rank_is_held_against_noise_of_its_rank(shape):
    random, (m, n) = np.random.default_rng(2), shape
    left, right = random.standard_normal((m, 24)), random.standard_normal((24, n))
    rows = [
        measure(lambda W=W: W, LayerMetrics(name="w"), Options(fit="hill")).row
        for W in (
            Product(left, right),
            random.standard_normal((m, 24)) @ np.linalg.qr(random.standard_normal((n, 24)))[0].T,
        )
    ]
    for row in rows:
        assert row.matrix_rank == 24
        assert row.alpha_null == pytest.approx(row.alpha, rel=0.35)  # 24 eigenvalues, of noise; full-rank noise has 2.4
        assert row.alpha_null > 4
    draws = [
        fit_power_law(
            np.linalg.svd(random.standard_normal((m, 24)) @ random.standard_normal((24, n)), compute_uv=False)[:24]
            ** 2,
            "hill",
        )
        for _ in range(20)
    ]
    alphas = np.array([fit.alpha for fit in draws])
    assert rows[0].alpha_null == pytest.approx(np.median(alphas), abs=0.35)


def test_a_few_pieces_of_low_rank_do_not_change_the_null_of_all(random):
    def null_of(*ranks):
        pieces = [random.standard_normal((64, rank)) @ random.standard_normal((rank, 32)) for rank in ranks]
        kernel = np.stack(pieces) if max(ranks) else np.zeros((len(ranks), 64, 32))
        row = measure(lambda: kernel, LayerMetrics(name="w", stored="float64"), Options(fit="hill")).row
        assert row.matrix_rank == sum(ranks)
        return row.alpha_null

    full = [32] * 8
    assert null_of(*full, 31) == null_of(*full, 0) == null_of(*full, 32)
    assert null_of(*full[:4], *[20] * 5) == null_of(*[20] * 9) != null_of(*full, 32)


class TestFailures:
    """Whatever happens on one matrix is its row; the others are measured."""

    @pytest.mark.parametrize(
        ("error", "words"),
        [
            (np.linalg.LinAlgError("Eigenvalues did not converge"), "LinAlgError: Eigenvalues did not converge"),
            (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "not enough memory"),
            (MemoryError(), "not enough memory"),
            (ZeroDivisionError("division by zero"), "ZeroDivisionError"),
        ],
    )
    @pytest.mark.parametrize("count", [1, 3])
    def test_of_the_solver(self, monkeypatch, error, words, count):
        solve = np.linalg.eigvalsh

        def failing(matrices):
            if (np.trace(matrices, axis1=-2, axis2=-1) > 1e5).any():
                raise error
            return solve(matrices)

        monkeypatch.setattr(np.linalg, "eigvalsh", failing)
        good = [heavy(k, (20, 30)) for k in range(count)]
        jobs = [(lambda W=W: W, LayerMetrics(name="w")) for W in (*good, 1e3 * heavy(0, (20, 30)))]
        rows = [measured.row for measured in measure_batch(jobs, Options(null=False))]
        assert [row.status for row in rows] == [*["ok"] * count, "failed"]
        assert words in rows[-1].warning

    def test_of_the_numbers(self, monkeypatch):
        monkeypatch.setattr("htsr.spectra.statistics.fit_bulk", lambda *_: Bulk(1.0, np.nan, 0.0, 1.0, 0, np.inf, 0.0))
        row = row_of(heavy(0, (20, 30)), bulk=True)
        assert (row.status, row.lambda_plus, row.mp_softrank) == ("failed", None, None)
        assert "lambda_plus, mp_softrank: no finite number" in row.warning
        assert row.alpha is not None

    @pytest.mark.parametrize("tiny", [1e-45, 1e-40, 1e-200])
    def test_denormal_entries(self, tiny):
        dtype = np.float32 if tiny > 1e-50 else np.float64
        W = (tiny * np.abs(heavy(3, (30, 40)))).astype(dtype)
        row = row_of(W, bulk=True, permuted=True, alternatives=True, quality=True)
        assert row.status in ("ok", "underflow", "tiny", "degenerate", "zero")
        assert (row.status == "underflow") == (tiny == 1e-200)
        assert all(np.isfinite(v) for v in vars(row).values() if isinstance(v, float))

    def test_of_the_permuted_matrix(self, monkeypatch):
        """The rest of the row stands, and it says what it lacks."""
        W = heavy(0, (20, 30)).astype(np.float64)
        solve = np.linalg.eigvalsh

        def failing(grams):
            if not np.allclose(grams, W @ W.T):
                raise np.linalg.LinAlgError("Eigenvalues did not converge")
            return solve(grams)

        monkeypatch.setattr(np.linalg, "eigvalsh", failing)
        monkeypatch.setattr("htsr.spectra.eigenvalues.float32_eigenvalues", failing)
        row = measure(lambda: W, LayerMetrics(name="w"), Options(permuted=True, null=False)).row
        assert (row.status, row.num_traps) == ("ok", None)
        assert row.alpha > 1
        assert row.warning.endswith("no permuted weights: LinAlgError: Eigenvalues did not converge")
