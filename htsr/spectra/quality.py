"""Model estimates of a layer's quality from its effective correlation space (ECS). Experimental and uncalibrated.

SETOL derives the quality of a layer from an integral over its ECS eigenvalues λ̃ (rescaled to mean 1 over the whole ESD,
M̃ of them) whose value depends on the assumed R-transform of their distribution (§5.4-5.6). The four forms rank layers
of one model; none is a probability or an accuracy, and none has been calibrated.

Source: SETOL (arXiv 2507.17912), §5.4-5.6.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from htsr.arrays import Vector
from htsr.errors import MatrixError


@dataclass(frozen=True)
class Quality:
    """Quality estimates of one layer.

    Attributes:
        tail_norm: tail norm Σ λ̃ over the ECS (discrete model).
        tail_norm_mean: tail norm divided by M̃.
        log: sum κ·Σ(ln λ̃ - ln λ̃_min) with κ = (α-1)/2 (inverse Marchenko-Pastur model).
        schatten: mean of λ̃^(α-1) over the ECS (Lévy-Wigner model, meant for α < 2).
        cumulant: mean over the ECS of G(λ̃) = Σ_{n≤4} κ_n x^n/n at x = λ̃/M̃, where κ_n are the free cumulants.
    """

    tail_norm: float
    tail_norm_mean: float
    log: float
    schatten: float
    cumulant: float


def free_cumulants(eigenvalues: npt.ArrayLike) -> tuple[float, float, float, float]:
    """κ_1 … κ_4 of a spectrum, from its normalised moments m_k = mean λ^k.

    For the Marchenko-Pastur law of unit variance and ratio q = M/N, κ_n = q^(n-1).

    Args:
        eigenvalues: (n,) eigenvalues in any order.

    Returns:
        The four cumulants, in powers 1 to 4 of the eigenvalues' unit.

    Source: SETOL, appendix; Nica & Speicher, Lectures on the Combinatorics of Free Probability (2006), lecture 11.

    Examples:
        >>> import numpy as np
        >>> from htsr.spectra.quality import free_cumulants
        >>> W = np.random.default_rng(0).standard_normal((2000, 500))
        >>> [round(κ, 2) for κ in free_cumulants(np.linalg.eigvalsh(W.T @ W / 2000))]  # q = 1/4: 1, q, q², q³
        [1.0, 0.25, 0.06, 0.02]
    """
    values = np.asarray(eigenvalues, dtype=np.float64)
    m1, m2, m3, m4 = (float(np.mean(values**k)) for k in (1, 2, 3, 4))
    return (
        m1,
        m2 - m1**2,
        m3 - 3 * m2 * m1 + 2 * m1**3,
        m4 - 4 * m3 * m1 - 2 * m2**2 + 10 * m2 * m1**2 - 5 * m1**4,
    )


def quality(eigenvalues: Vector, num_erg: int, alpha: float) -> Quality:
    """The quality estimates of an ESD whose ECS is its `num_erg` largest eigenvalues.

    Args:
        eigenvalues: (K,) float64, ascending, in any unit.
        num_erg: number of eigenvalues in the ECS, M̃ (see `htsr.spectra.erg`).
        alpha: exponent of the layer's power law.

    Returns:
        The `Quality` of the layer; all estimates are free of units.

    Raises:
        MatrixError: the ECS is empty (status ``no_ecs``).

    Source: SETOL (arXiv 2507.17912), §5.4-5.6 and its table of R-transforms.

    Examples:
        >>> import numpy as np
        >>> from htsr.spectra.quality import quality
        >>> found = quality(np.array([1.0, 2.0, 3.0, 4.0, 90.0]), num_erg=2, alpha=2.0)  # λ̃ = λ/20
        >>> round(found.tail_norm, 6), round(found.schatten, 6), round(found.log, 3)
        (4.7, 2.35, 1.557)
    """
    if num_erg < 1:
        raise MatrixError("no_ecs", "the trace-log condition has no crossing, so there is no ECS to judge")
    ecs = eigenvalues[-num_erg:] * (eigenvalues.size / eigenvalues.sum())
    x = ecs / num_erg
    k1, k2, k3, k4 = free_cumulants(ecs)
    return Quality(
        tail_norm=float(ecs.sum()),
        tail_norm_mean=float(ecs.mean()),
        log=float((alpha - 1) / 2 * np.log(ecs / ecs[0]).sum()),
        schatten=float((ecs ** (alpha - 1)).mean()),
        cumulant=float((k1 * x + k2 * x**2 / 2 + k3 * x**3 / 3 + k4 * x**4 / 4).mean()),
    )
