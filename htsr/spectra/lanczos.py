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

from collections.abc import Callable

import numpy as np

from htsr.arrays import Array, Vector, as_numpy
from htsr.errors import MatrixError
from htsr.spectra.density import ESD

STEPS = 128
PROBES = 8
_CONVERGED = 1e-3  # residual of a Ritz value that counts as an eigenvalue, relative to its distance from the next
_ZERO = 1e-6  # relative to λ_max: the float32 products resolve no less


def lanczos_esd(matrix: Array, *, steps: int = STEPS, probes: int = PROBES, device: str = "cpu", seed: int = 0) -> ESD:
    """Approximate ESD of an m × n matrix.

    Args:
        matrix: (m, n); products are taken in float32 (float64 where W is and on a CPU), the recursion in float64.
        steps: number of Lanczos steps per probe; more steps resolve more of the tail as single eigenvalues.
        probes: number of random vectors (at least 2); the error falls with its square root.
        device: device that the products with W run on.
        seed: seed of the probes.

    Returns:
        An `ESD` with `error`, the standard error of its distribution function (largest over λ), and `replicates`,
        the leave-one-probe-out ESDs from which the error of anything computed from it follows.

    Raises:
        MatrixError: entries are NaN, infinite or overflow (status ``nan``).

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
    apply, trace = _operator(matrix, device)
    if not np.isfinite(trace):
        raise MatrixError("nan", "the matrix has NaN, infinite or overflowing entries")
    route = f"lanczos/{steps}x{probes}"
    if trace == 0.0:
        return ESD(np.zeros(M), M, N, 1, route, error=0.0)
    quadratures = _recursion(apply, M, min(steps, M), probes, np.random.default_rng(seed))
    known = _converged(quadratures)
    grids = [_distribution(*q[:2], known.size) for q in quadratures]
    eigenvalues = _assemble(grids, known, M, trace)
    replicates = np.stack([_assemble(grids[:i] + grids[i + 1 :], known, M, trace) for i in range(probes)])
    cdfs = np.stack([np.interp(_log(eigenvalues), grid[0], grid[1]) for grid in grids])
    error = float((cdfs.std(axis=0, ddof=1) / probes**0.5).max()) * (1 - known.size / M)
    return ESD(eigenvalues, M, N, 1, route, error=error, replicates=replicates)


def _operator(matrix: Array, device: str) -> tuple[Callable[[Vector], Vector], float]:
    """v ↦ A v for a block of columns (M, b), and the trace of A."""
    if device == "cpu":
        W = as_numpy(matrix)
        W = W.astype(np.float32) if W.dtype == np.float16 else W
        tall = W if W.shape[0] >= W.shape[1] else W.T
        trace = float(np.einsum("ij,ij->", W, W, dtype=np.float64))
        return (lambda v: (tall.T @ (tall @ v.astype(tall.dtype))).astype(np.float64)), trace
    import torch

    tensor = torch.as_tensor(matrix).to(device, torch.float32)
    columns = tensor if tensor.shape[0] >= tensor.shape[1] else tensor.mT

    def product(v: Vector) -> Vector:
        block = torch.as_tensor(v, dtype=torch.float32, device=columns.device)
        return (columns.mT @ (columns @ block)).double().cpu().numpy()

    return product, float(sum((rows.double() ** 2).sum() for rows in torch.split(tensor, 4096)))


def _recursion(
    apply: Callable[[Vector], Vector], M: int, steps: int, probes: int, random: np.random.Generator
) -> list[tuple[Vector, Vector, Vector]]:
    """Ritz values, weights and residuals of each probe, by Lanczos with full reorthogonalisation."""
    vectors = random.standard_normal((M, probes))
    vectors /= np.linalg.norm(vectors, axis=0)
    basis = np.zeros((probes, steps, M))
    diagonal, off = np.zeros((probes, steps)), np.zeros((probes, steps))
    length = np.full(probes, steps)
    for k in range(steps):
        basis[:, k] = vectors.T
        w = apply(vectors)
        diagonal[:, k] = np.einsum("mp,mp->p", vectors, w)
        w = w.T
        for _ in range(2):  # twice is enough (Parlett)
            w = w - np.matmul(np.matmul(basis[:, : k + 1], w[:, :, None])[:, None, :, 0], basis[:, : k + 1])[:, 0]
        norm = np.linalg.norm(w, axis=1)
        off[:, k] = norm
        ended = norm < _ZERO * np.abs(diagonal[:, : k + 1]).max(axis=1)
        length = np.where(ended & (length == steps), k + 1, length)
        if (length <= k + 1).all():
            break
        vectors = (w / np.maximum(norm, np.finfo(float).tiny)[:, None]).T
    result = []
    for p in range(probes):
        k = int(length[p])
        T = np.diag(diagonal[p, :k]) + np.diag(off[p, : k - 1], 1) + np.diag(off[p, : k - 1], -1)
        ritz, s = np.linalg.eigh(T)
        residual = np.abs(off[p, k - 1] * s[-1])
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
    return np.log(np.maximum(values, np.finfo(np.float64).tiny))
