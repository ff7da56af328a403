"""Spectra whose tail exponent is known: independent samples, contaminated ones, and eigenvalues of matrix ensembles."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from htsr.arrays import Vector
from htsr.spectra.null import gaussian_eigenvalues


def pareto(random: np.random.Generator, alpha: float, size: int) -> Vector:
    """Independent draws of p(λ) ∝ λ^(-α), λ ≥ 1."""
    return (1 - random.random(size)) ** (-1 / (alpha - 1))


def contaminated(random: np.random.Generator, alpha: float, size: int, share: float) -> Vector:
    """A power-law tail from 1 on, `share` of all, over a Marchenko-Pastur bulk (Q = 2) that ends at 1."""
    tail = pareto(random, alpha, round(share * size))
    count = size - tail.size
    bulk = gaussian_eigenvalues(count, 2 * count, random)[0]
    return np.sort(np.concatenate([bulk / bulk[-1], tail]))


def power_law_population(random: np.random.Generator, alpha: float, M: int, N: int) -> npt.NDArray[np.float64]:
    """N × M Gaussian matrix whose columns' variances follow p(v) ∝ v^(-α): λ of WᵀW have the tail exponent α too."""
    return random.standard_normal((N, M)) * np.sqrt(pareto(random, alpha, M))


def heavy_entries(random: np.random.Generator, alpha: float, M: int, N: int) -> npt.NDArray[np.float64]:
    """N × M matrix of Student-t entries with ν = 2(α - 1): its largest λ are squares of entries, of exponent 1 + ν/2."""
    return random.standard_t(2 * (alpha - 1), (N, M))
