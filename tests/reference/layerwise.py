"""LLR as plainly as it can be written: float64, SVD, one loop over the steps."""

from __future__ import annotations

import numpy as np


def hill_alpha(W) -> float:
    """1 + n/Σ ln(λ_j/λ_i) over the upper half of the squared singular values, the zero term counted."""
    eigenvalues = np.sort(np.linalg.svd(np.asarray(W, dtype=np.float64), compute_uv=False) ** 2)
    i = len(eigenvalues) // 2
    n = len(eigenvalues) - i
    return 1 + n / sum(np.log(eigenvalues[j] / eigenvalues[i]) for j in range(i, len(eigenvalues)))


def linear(alphas: dict[str, float], s1: float, s2: float) -> dict[str, float]:
    low, high = min(alphas.values()), max(alphas.values())
    return {name: s1 + (s2 - s1) * (alpha - low) / (high - low) for name, alpha in alphas.items()}


class Multipliers:
    """m_i(t) for t = 1, 2, …; `weights` gives the matrices as they are before step t."""

    def __init__(self, s1: float, s2: float, interval: int, ramp: int, last_event: float) -> None:
        self.s1, self.s2, self.interval, self.ramp, self.last_event = s1, s2, interval, ramp, last_event
        self.old: dict[str, float] = {}
        self.new: dict[str, float] = {}
        self.since = 0

    def at(self, t: int, weights) -> dict[str, float]:
        if t == 1 or (t % self.interval == 0 and t <= self.last_event):
            before = self._now(t)
            self.new = linear({name: hill_alpha(W) for name, W in weights().items()}, self.s1, self.s2)
            self.old = dict(self.new) if t == 1 else before
            self.since = t
        return self._now(t)

    def _now(self, t: int) -> dict[str, float]:
        done = 1.0 if self.ramp == 0 else min(1.0, (t - self.since) / self.ramp)
        return {name: (1 - done) * self.old[name] + done * self.new[name] for name in self.new}
