import numpy as np
import pytest
import torch

import htsr.spectra.lanczos as lanczos
from htsr.errors import MatrixError
from htsr.spectra.esd import esd
from htsr.spectra.lanczos import lanczos_esd
from htsr.spectra.tail import fit_power_law


def power_law_matrix(random, M, N, alpha):
    """A matrix whose eigenvalues are a power-law sample."""
    eigenvalues = (1 - random.random(M)) ** (-1 / (alpha - 1))
    left, _ = np.linalg.qr(random.standard_normal((M, M)))
    right, _ = np.linalg.qr(random.standard_normal((N, M)))
    return (left * np.sqrt(eigenvalues)) @ right.T


MATRICES = {
    "gauss": lambda r: r.standard_normal((600, 700)),
    "tall": lambda r: r.standard_normal((2000, 300)),
    "student": lambda r: r.standard_t(3, (600, 600)),
    "power law": lambda r: power_law_matrix(r, 600, 900, 2.5),
}


@pytest.mark.parametrize("kind", MATRICES)
@pytest.mark.parametrize("device", ["cpu", "cpu:0"])
def test_the_distribution_is_within_its_stated_error(random, kind, device):
    W = MATRICES[kind](random)
    exact, found = esd(W).eigenvalues, lanczos_esd(W, device=device)
    K = exact.size
    distance = np.abs(np.searchsorted(exact, found.eigenvalues) - np.arange(K)).max() / K
    assert 0 < found.error < 0.03
    assert distance < 5 * found.error + 2 / K
    assert found.eigenvalues.sum() == pytest.approx(exact.sum(), rel=1e-5)
    assert found.eigenvalues[-3:] == pytest.approx(exact[-3:], rel=1e-4)
    assert found.route == "lanczos/128x8"


def test_alpha_is_within_its_jackknife_error(random):
    W = power_law_matrix(random, 800, 1000, 2.3)
    exact = fit_power_law(esd(W).positive, "hill").alpha
    found = lanczos_esd(W)
    alphas = np.array([fit_power_law(v, "hill").alpha for v in found.replicates])
    error = (7 / 8 * ((alphas - alphas.mean()) ** 2).sum()) ** 0.5
    assert fit_power_law(found.positive, "hill").alpha == pytest.approx(exact, abs=4 * error)
    assert error < 0.1


def test_few_dimensions_are_exact(random):
    W = random.standard_normal((40, 60))
    assert lanczos_esd(W).eigenvalues == pytest.approx(esd(W).eigenvalues, rel=1e-6)


def test_rank_is_approximated(random):
    W = random.standard_normal((600, 150)) @ random.standard_normal((150, 900))
    found = lanczos_esd(W)
    assert found.positive.size == pytest.approx(150, abs=3 * 600 * found.error + 5)


def test_zero_bfloat16_and_seeds(random):
    assert not lanczos_esd(np.zeros((30, 40))).eigenvalues.any()
    W = torch.from_numpy(random.standard_normal((300, 300))).bfloat16()
    assert np.array_equal(lanczos_esd(W, seed=1).eigenvalues, lanczos_esd(W, seed=1).eigenvalues)
    assert not np.array_equal(lanczos_esd(W, seed=1).eigenvalues, lanczos_esd(W, seed=2).eigenvalues)


def plain_recursion(W, starts, steps):
    """Diagonals and off-diagonals of each start, each vector made orthogonal to all before it."""
    found = []
    for v in starts:
        basis, diagonal, off = [], [], []
        for _ in range(steps):
            basis.append(v)
            w = W.T @ (W @ v)
            diagonal.append(v @ w)
            for u in [*basis, *basis]:
                w = w - (u @ w) * u
            off.append(np.linalg.norm(w))
            v = w / off[-1]
        found.append((diagonal, off))
    return np.array(found).swapaxes(0, 1)


def test_the_recursion_is_that_of_a_plain_loop(random):
    W = random.standard_normal((90, 70))
    starts = lanczos._probes(70, 3, seed=0)
    expected = plain_recursion(W, starts.numpy(), 40)
    assert lanczos._recursion(torch.from_numpy(W), starts, 40) == pytest.approx(expected, rel=1e-9)


def test_steps_behind_an_invariant_subspace_count_for_nothing(random):
    """A rank of 5 and the null space make 6 steps; what follows in the same block of steps is noise."""
    W = random.standard_normal((400, 5)) @ random.standard_normal((5, 500))
    found = lanczos_esd(W)
    assert found.eigenvalues[-5:] == pytest.approx(esd(W).eigenvalues[-5:], rel=1e-9)
    assert not found.eigenvalues[:-5].any()


@pytest.mark.parametrize("size", [1, 2])
def test_the_smallest_matrices(size):
    assert lanczos_esd(np.diag([2.0, 3.0][:size])).eigenvalues == pytest.approx([4.0, 9.0][:size])


@pytest.mark.parametrize(
    ("factor", "status"), [(np.nan, "nan"), (1e25, "nan"), (1e-25, "underflow")], ids=["nan", "overflow", "underflow"]
)
def test_entries_whose_squares_float32_cannot_hold_are_refused(random, factor, status):
    W = random.standard_normal((60, 50)).astype(np.float32) * np.float32(factor)
    with pytest.raises(MatrixError) as refused:
        lanczos_esd(W)
    assert refused.value.status == status


def test_products_are_exact_whatever_training_allows(random):
    """TF32 keeps 10 bits of an entry; a CPU without it keeps all, so that the setting itself is looked at."""
    seen = []

    class Watched(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            if func is torch.Tensor.matmul:
                seen.append((torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision))
            return super().__torch_function__(func, types, args, kwargs or {})

    W = torch.from_numpy(random.standard_normal((20, 20)).astype(np.float32)).as_subclass(Watched)
    torch.set_float32_matmul_precision("medium")
    try:
        lanczos_esd(W, steps=4)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert set(seen) == {("ieee", "ieee")}


def test_a_matrix_that_nobody_may_write_to_is_read_without_a_warning(random, recwarn):
    W = random.standard_normal((30, 20))
    W.flags.writeable = False
    assert lanczos_esd(W).eigenvalues == pytest.approx(lanczos_esd(W.copy()).eigenvalues)
    assert not recwarn.list
