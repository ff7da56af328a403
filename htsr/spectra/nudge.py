"""Moving a spectrum towards α = 2 under the trace-log condition.

Let the power-law tail be n eigenvalues λ ≥ λ_min with exponent α, T = mean of ln λ̃ over it (the trace-log, or ERG,
number, λ̃ = λ·K/Σλ) and S = Σλ over the whole ESD. A nudge of strength η in [0, 1] stretches or squeezes the
logarithms of the tail about their mean μ, leaves the rest, and scales everything so that Σλ is S again:

    ln λ' = μ + g·(ln λ - μ) on the tail,   g = (α - 1)^η

Singular vectors stay. On the tail that was fitted

- the exponent becomes α' = 1 + (α - 1)^(1-η): ln(α - 1), which is 0 at α = 2, shrinks by the factor 1 - η;
- the product of the eigenvalues stays but for the last scaling (the map is volume-preserving), so T moves by the
  norm alone: T' = T - ln(Σλ'/S), down where α > 2 and up where α < 2. That is towards 0 where SETOL's two conditions
  go together (α > 2 with T > 0, α < 2 with T < 0), and the condition is kept: η is halved until T' is between T and 0.
  A layer that meets it, or lies on the other side, cannot be moved so, and is left;
- ‖W‖_F stays.

A new fit may choose another tail, so its α follows only on the whole.
An experiment on top of SETOL (arXiv 2507.17912), which describes ideal layers and does not prescribe this.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from htsr.arrays import Array, Vector
from htsr.errors import MatrixError, UsageError
from htsr.spectra.directions import decompose, rescaled
from htsr.spectra.tail import FitMethod, fit_power_law

LEAST_TAIL = 8  # a shorter one has no exponent worth moving
HALVINGS = 6


@dataclass(frozen=True)
class Nudge:
    """A nudged spectrum.

    Attributes:
        eigenvalues: new eigenvalues, in the shape and order of the old ones.
        tail: mask of those that are the tail, bool, in the same shape.
        alpha: exponent of the tail before the nudge.
        alpha_after: exponent of the same eigenvalues after the nudge.
        strength: strength that was applied, at most the one that was asked for.
    """

    eigenvalues: Vector
    tail: npt.NDArray[np.bool_]
    alpha: float
    alpha_after: float
    strength: float


def nudge_spectrum(eigenvalues: Vector, strength: float, *, fit: FitMethod = "ks") -> Nudge:
    """The spectrum, moved towards α = 2.

    Args:
        eigenvalues: non-negative eigenvalues in any shape and order; the fit pools them.
        strength: η in [0, 1]. At 0 nothing changes, at 1 the tail's exponent becomes 2.
        fit: how the tail is chosen (`htsr.spectra.tail`).

    Raises:
        MatrixError: there is no power law (status ``degenerate``), its tail has fewer than 8 eigenvalues (``no_tail``),
            or it cannot go towards α = 2 without leaving the trace-log condition (``no_way``).
        UsageError: the strength lies outside [0, 1].

    Examples:
        >>> import numpy as np
        >>> from htsr.spectra.nudge import nudge_spectrum
        >>> bulk, tail = np.linspace(0.1, 1, 80), 2 * (np.arange(1, 41) / 41) ** -0.5  # a power law with α = 3
        >>> spectrum = np.concatenate([bulk, tail])
        >>> moved = nudge_spectrum(spectrum, 0.5)
        >>> round(moved.alpha, 2), round(moved.alpha_after, 2)  # α' = 1 + √(α - 1)
        (3.15, 2.47)
        >>> bool(np.isclose(moved.eigenvalues.sum(), spectrum.sum()))  # ‖W‖_F stays
        True
    """
    if not 0 <= strength <= 1:
        raise UsageError(f"the strength of a nudge is between 0 and 1, not {strength}")
    found = fit_power_law(eigenvalues[eigenvalues > 0], fit)
    tail = eigenvalues >= found.lambda_min
    if int(tail.sum()) < LEAST_TAIL:
        raise MatrixError("no_tail", f"a power-law tail of {int(tail.sum())} eigenvalues is too short to be nudged")
    log = np.log(eigenvalues[tail])
    centre, total = float(log.mean()), float(eigenvalues.sum())
    T = centre - np.log(total / eigenvalues.size)  # mean of ln λ̃ without forming λ̃
    for halving in range(HALVINGS + 1):
        applied = strength * 0.5**halving
        stretch = (found.alpha - 1) ** applied
        after = eigenvalues.copy()
        after[tail] = np.exp(centre + stretch * (log - centre))
        growth = float(after.sum()) / total
        if min(T, 0.0) <= T - np.log(growth) <= max(T, 0.0) or strength == 0:
            return Nudge(after / growth, tail, found.alpha, 1 + (found.alpha - 1) / stretch, applied)
    raise MatrixError(
        "no_way",
        f"α = {found.alpha:.2f} cannot go towards 2 without taking the trace-log number {T:.2f} off its way to 0",
    )


def nudge(matrix: Array, strength: float, *, fit: FitMethod = "ks") -> tuple[Array, Nudge]:
    """The matrix with its spectrum moved towards α = 2, and what was moved.

    Args:
        matrix: (m, n), or (pieces, m, n) with pooled eigenvalues; computed in float64 where it lies.
        strength: η in [0, 1]; at 0 the matrix itself is returned.
        fit: how the tail is chosen (`htsr.spectra.tail`).

    Returns:
        The new matrix in shape, dtype and kind (NumPy or torch) of `matrix`, and the `Nudge` of its spectrum.

    Raises:
        MatrixError: `nudge_spectrum` or `htsr.spectra.directions.decompose` refuses the matrix.
        UsageError: the strength lies outside [0, 1].

    Examples:
        >>> import numpy as np
        >>> from htsr.spectra.nudge import nudge
        >>> W = np.diag(np.sqrt(np.concatenate([np.linspace(0.1, 1, 80), 2 * (np.arange(1, 41) / 41) ** -0.5])))
        >>> changed, moved = nudge(W, 1.0)
        >>> round(moved.alpha_after, 6), bool(np.isclose(np.linalg.norm(changed), np.linalg.norm(W)))
        (2.0, True)
    """
    found = decompose(matrix)
    found.require_tail()
    moved = nudge_spectrum(found.values, strength, fit=fit)
    if strength == 0:
        return matrix, moved
    ratios = np.ones_like(found.values)
    positive = found.values > 0
    ratios[positive] = np.sqrt(moved.eigenvalues[positive] / found.values[positive])
    return rescaled(matrix, found.vectors, ratios), moved
