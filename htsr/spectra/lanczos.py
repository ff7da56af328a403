"""Stochastic Lanczos quadrature: the ESD of a matrix too large for an exact decomposition.

For a random unit vector v, k steps of the Lanczos recursion on A = WᵀW give a k-point Gauss quadrature of the spectral
measure Σ_i (v·u_i)² δ(λ - λ_i), whose mean over v is the ESD. Only products with W are needed, so the cost grows with
the entries of W times steps and probes, not with the cube of its side.

Two things are known better than the quadrature has them, and are used: the largest Ritz values converge to eigenvalues,
each of which has weight exactly 1/M; and Σλ = ‖W‖_F². The rest of the ESD is the quantile function of the averaged
quadrature. What it costs in accuracy is estimated from the scatter between probes.

Source: Ubaru, Chen & Saad (SIAM J. Matrix Anal. Appl. 38, 2017); Lin, Saad & Yang (SIAM Rev. 58, 2016).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from htsr.arrays import Array, Vector
from htsr.spectra.checks import require_finite, require_squares
from htsr.spectra.density import ESD
from htsr.spectra.device import on_device, solving_device
from htsr.spectra.exact_products import exact_products

if TYPE_CHECKING:
    import torch

STEPS = 128
PROBES = 8
_CONVERGED = 1e-3  # residual of a Ritz value that counts as an eigenvalue, relative to its distance from the next
_ZERO = 1e-6  # relative to λ_max: the float32 products resolve no less
_TINY = float(np.finfo(np.float64).tiny)
_CHUNK = 1 << 22  # entries whose squares are summed at a time
_TOGETHER = 32  # steps whose coefficients the host waits for


def lanczos_esd(matrix: Array, *, steps: int = STEPS, probes: int = PROBES, device: str = "cpu", seed: int = 0) -> ESD:
    """Approximate ESD of an m × n matrix.

    Everything that grows with the matrix stays on the device: W in the precision of the products, and `probes` bases of
    `steps` vectors of length M in float64 (32 MiB for M = 4096). The host sees the coefficients of the recursion, every
    32 steps, and solves the tridiagonal problems.

    Args:
        matrix: (m, n); products are taken in float32 (float64 where W is), the recursion in float64.
        steps: number of Lanczos steps per probe; more steps resolve more of the tail as single eigenvalues.
        probes: number of random vectors (at least 2); the error falls with its square root.
        device: device that it runs on; a CPU in place of one without float64.
        seed: seed of the probes.

    Returns:
        An `ESD` with `error`, the standard error of its distribution function (largest over λ), and `replicates`,
        the leave-one-probe-out ESDs from which the error of anything computed from it follows.

    Raises:
        MatrixError: entries are NaN, infinite or overflow (status ``nan``), or are so small that their squares vanish
            (``underflow``).

    Examples:
        >>> import numpy as np
        >>> from htsr.spectra.lanczos import lanczos_esd
        >>> W = np.diag(np.linspace(1.0, 10.0, 300))
        >>> spectrum = lanczos_esd(W, steps=60, probes=4)
        >>> exact = np.diagonal(W) ** 2
        >>> bool(np.isclose(spectrum.eigenvalues.sum(), exact.sum()))  # the trace is known exactly
        True
        >>> bool(np.abs(spectrum.eigenvalues - exact).max() < 0.05 * exact.max()), spectrum.error < 0.05
        (True, True)
    """
    m, n = matrix.shape
    M, N = min(m, n), max(m, n)
    W = _tall(matrix, device)
    trace = _trace(W)
    _require_range(W, trace)
    route = f"lanczos/{steps}x{probes}"
    if trace == 0.0:
        return ESD(np.zeros(M), M, N, 1, route, error=0.0)
    with exact_products(str(W.device)):
        quadratures = _quadratures(*_recursion(W, _probes(M, probes, seed), min(steps, M)))
    known = _converged(quadratures)
    grids = [_distribution(*q[:2], known.size) for q in quadratures]
    eigenvalues = _assemble(grids, known, M, trace)
    replicates = np.stack([_assemble(grids[:i] + grids[i + 1 :], known, M, trace) for i in range(probes)])
    cdfs = np.stack([np.interp(_log(eigenvalues), grid[0], grid[1]) for grid in grids])
    error = float((cdfs.std(axis=0, ddof=1) / probes**0.5).max()) * (1 - known.size / M)
    return ESD(eigenvalues, M, N, 1, route, error=error, replicates=replicates)


def _tall(matrix: Array, device: str) -> torch.Tensor:
    """The matrix, (N, M) tall, in float32, or in float64 where it is."""
    import torch

    W = on_device(matrix, solving_device(device))
    W = W if W.dtype == torch.float64 else W.to(torch.float32)
    return W if W.shape[0] >= W.shape[1] else W.mT


def _trace(W: torch.Tensor) -> float:
    """‖W‖_F², summed in float64 without an up-cast copy of W."""
    import torch

    rows = max(1, _CHUNK // W.shape[1])
    return float(sum(torch.linalg.vector_norm(part, dtype=torch.float64) ** 2 for part in torch.split(W, rows)))


def _require_range(W: torch.Tensor, trace: float) -> None:
    """That products with A = WᵀW, which are no larger than its trace, are numbers that the dtype of W can hold."""
    import torch

    require_finite(trace if trace <= torch.finfo(W.dtype).max else np.inf)
    require_squares(trace / W.shape[1], str(W.dtype).removeprefix("torch."), lambda: trace > 0)


def _probes(M: int, probes: int, seed: int) -> torch.Tensor:
    """(probes, M) random unit vectors, drawn on the host, so that they are the same for every device."""
    import torch

    vectors = np.random.default_rng(seed).standard_normal((M, probes))
    vectors /= np.linalg.norm(vectors, axis=0)
    return torch.from_numpy(np.ascontiguousarray(vectors.T))


def _recursion(W: torch.Tensor, start: torch.Tensor, steps: int) -> tuple[Vector, Vector]:
    """Diagonals and off-diagonals, each (probes, steps) or fewer steps, by Lanczos with full reorthogonalisation."""
    import torch

    probes, M = start.shape
    basis = torch.empty((probes, steps + 1, M), dtype=torch.float64, device=W.device)
    coefficients = torch.zeros((2, probes, steps), dtype=torch.float64, device=W.device)
    diagonal, off = coefficients
    basis[:, 0] = start.to(W.device)
    for k in range(steps):
        past, v = basis[:, : k + 1], basis[:, k].to(W.dtype)
        w = ((v @ W.mT) @ W).to(torch.float64)
        for again in (False, True):  # twice is enough (Parlett)
            along = _orthogonalize(w, past)
            if not again:
                diagonal[:, k] = along[:, k]
        torch.linalg.vector_norm(w, dim=1, out=off[:, k])
        torch.div(w, off[:, k, None].clamp(min=_TINY), out=basis[:, k + 1])
        if (k + 1) % _TOGETHER == 0 or k + 1 == steps:
            found = coefficients[:, :, : k + 1].cpu().numpy()
            if _ended(*found).any(axis=1).all():
                break
    return found[0], found[1]


def _orthogonalize(w: torch.Tensor, past: torch.Tensor) -> torch.Tensor:
    """Take from each of (probes, M), in place, what lies along its `past`, (probes, k, M); gives how much."""
    import torch

    if w.device.type == "cpu":  # torch's batched product with one vector each is several times slower than NumPy's
        rest, vectors = w.numpy(), past.numpy()
        along = np.matmul(vectors, rest[:, :, None])
        rest -= np.matmul(along.swapaxes(1, 2), vectors)[:, 0]
        return torch.from_numpy(along[:, :, 0])
    taken = torch.bmm(past, w[:, :, None])
    w[:, None].baddbmm_(taken.mT, past, alpha=-1)
    return taken[:, :, 0]


def _ended(diagonal: Vector, off: Vector) -> npt.NDArray[np.bool_]:
    """Whether the recursion has come to an invariant subspace, after each step."""
    return off < _ZERO * np.maximum.accumulate(np.abs(diagonal), axis=1)


def _quadratures(diagonal: Vector, off: Vector) -> list[tuple[Vector, Vector, Vector]]:
    """Ritz values, weights and residuals of each probe."""
    result = []
    for a, b, ended in zip(diagonal, off, _ended(diagonal, off), strict=True):
        k = int(ended.argmax()) + 1 if ended.any() else a.size
        ritz, s = np.linalg.eigh(np.diag(a[:k]) + np.diag(b[: k - 1], -1))  # of the lower triangle
        residual = np.abs(b[k - 1] * s[-1])
        result.append((np.maximum(ritz, 0.0), s[0] ** 2, residual))
    return result


def _converged(quadratures: list[tuple[Vector, Vector, Vector]]) -> Vector:
    """Eigenvalues (k,), ascending, on which the largest Ritz values of all probes have settled."""
    agreed = []
    for rank in range(1, min(q[0].size for q in quadratures)):
        values = np.array([ritz[-rank] for ritz, _, _ in quadratures])
        gaps = np.array([ritz[-rank] - ritz[-rank - 1] for ritz, _, _ in quadratures])
        residuals = np.array([residual[-rank] for _, _, residual in quadratures])
        if (residuals > _CONVERGED * gaps).any() or np.ptp(values) > gaps.min():
            break
        agreed.append(values.mean())
    return np.array(agreed[::-1], dtype=np.float64)


def _distribution(ritz: Vector, weights: Vector, known: int) -> tuple[Vector, Vector]:
    """ln λ and the distribution function at it, of one probe's quadrature without its `known` largest nodes."""
    nodes, mass = ritz[: ritz.size - known], weights[: ritz.size - known]
    if nodes.size == 0 or mass.sum() == 0:
        return np.zeros(1), np.ones(1)
    mass = mass / mass.sum()
    return _log(nodes), np.cumsum(mass) - mass / 2


def _assemble(grids: list[tuple[Vector, Vector]], known: Vector, M: int, trace: float) -> Vector:
    """M eigenvalues: quantiles of the averaged distribution, scaled to the trace, and the known ones."""
    rest = M - known.size
    if rest == 0:
        return known
    points = np.unique(np.concatenate([grid[0] for grid in grids]))
    mean = np.mean([np.interp(points, x, F, left=0.0, right=1.0) for x, F in grids], axis=0)
    mean = np.maximum.accumulate(mean)
    quantiles = np.exp(np.interp((np.arange(rest) + 0.5) / rest, mean, points))
    quantiles[quantiles <= _ZERO * max(points[-1] and np.exp(points[-1]), known[-1] if known.size else 0.0)] = 0.0
    total = quantiles.sum()
    if total > 0 and trace > known.sum():
        quantiles *= (trace - known.sum()) / total
    return np.sort(np.concatenate([quantiles, known]))


def _log(values: Vector) -> Vector:
    return np.log(np.maximum(values, _TINY))
