"""Probabilities by the gradients that members have had (MISA, arXiv 2511.00056).

    p_b ∝ exp(η·G_b)

which maximises Σ p_b·G_b less 1/η of the Kullback-Leibler divergence from uniform draws: what has large gradients is
drawn more often, and everything again and again. The paper's are this form, the uniform draws at first, and that G_b
changes only where b was drawn. Ours, since the paper leaves them open or could not be had: G_b is the root mean square
of the gradient's entries, averaged over the steps of an interval, and half of it is that of the last interval; it is
divided by the largest; what was never drawn has the mean of the others; and η is ln 5, so that no member is drawn first
more than five times as often as another, the span that spectra have, too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from htsr.arrays import Vector
from htsr.errors import UsageError
from htsr.ranks import Ranks

if TYPE_CHECKING:
    import torch

ETA = math.log(5)
_KEPT = 0.5  # share of what was known before in a new estimate


class GradientNorms:
    """What is known of the members' gradients.

    Args:
        members: number of members.

    Attributes:
        estimates: (members,) float64 estimates G_b, 0 where a member was never drawn.

    Examples:
        >>> import torch
        >>> from htsr.training.sampling.gradient_norms import GradientNorms
        >>> norms = GradientNorms(3)
        >>> large, small = torch.nn.Parameter(torch.zeros(4)), torch.nn.Parameter(torch.zeros(9))
        >>> large.grad, small.grad = torch.full((4,), 2.0), torch.full((9,), 1.0)
        >>> norms.note([[large], [small], []], (0, 1))
        >>> norms.close()
        >>> norms.estimates
        array([2., 1., 0.])
        >>> norms.probabilities().round(3)
        array([0.473, 0.211, 0.316])
    """

    def __init__(self, members: int) -> None:
        self.estimates: Vector = np.zeros(members)
        self._sums: Vector = np.zeros(members)
        self._steps: Vector = np.zeros(members)

    def note(self, parameters: Sequence[Sequence[torch.nn.Parameter]], active: Sequence[int]) -> None:
        """Take up the gradients of a step; a device is waited for once. Those with NaN or Inf do not count.

        Args:
            parameters: parameters of each member.
            active: indices of the members that train.
        """
        import torch

        own = [(i, p) for i in active for p in parameters[i] if p.grad is not None]
        if not own:
            return
        norms = torch._foreach_norm([parameter.grad for _, parameter in own if parameter.grad is not None])
        squares = torch.stack([norm.float().square().to(norms[0].device) for norm in norms]).tolist()
        for index in dict.fromkeys(i for i, _ in own):
            square = sum(value for (i, _), value in zip(own, squares, strict=True) if i == index)
            size = sum(parameter.numel() for i, parameter in own if i == index)
            if math.isfinite(square):
                self._sums[index] += math.sqrt(square / size)
                self._steps[index] += 1

    def close(self) -> None:
        """End an interval: what it has shown goes into the estimates, on all processes those of the first."""
        seen = self._steps > 0
        means = self._sums / np.maximum(self._steps, 1)
        kept = np.where(self.estimates > 0, _KEPT, 0.0)
        estimates = np.where(seen, kept * self.estimates + (1 - kept) * means, self.estimates)
        self.estimates = Ranks.running().of_first(lambda: estimates)  # which may differ in the last bits of a sum
        self._sums, self._steps = np.zeros_like(self._sums), np.zeros_like(self._steps)

    def probabilities(self) -> Vector:
        """(members,) float64 probabilities with the sum 1."""
        known = self.estimates[self.estimates > 0]
        if known.size == 0:
            return np.full(self.estimates.size, 1 / self.estimates.size)
        relative = np.where(self.estimates > 0, self.estimates, known.mean()) / known.max()
        weights = np.exp(ETA * relative)
        found: Vector = weights / weights.sum()
        return found

    def state_dict(self) -> dict[str, Any]:
        """Plain lists of numbers."""
        return {"estimates": self.estimates.tolist(), "sums": self._sums.tolist(), "steps": self._steps.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a `state` stood, which `state_dict` returned."""
        self.estimates, self._sums, self._steps = (
            np.array(state[key], dtype=np.float64) for key in ("estimates", "sums", "steps")
        )


def insist_on_whole_gradients(
    optimizers: Iterable[torch.optim.Optimizer], parameters: Iterable[list[torch.nn.Parameter]]
) -> None:
    """Refuse what leaves no gradient by whose norm members could be drawn.

    Args:
        optimizers: optimizers of the members.
        parameters: parameters of each member.

    Raises:
        UsageError: gradients are not kept, or sharded.
    """
    if any(getattr(optimizer, "gradients", "keep") != "keep" for optimizer in optimizers):
        raise UsageError("gradient_norm draws by gradients that are kept: take gradients='keep', or another strategy")
    if any(hasattr(parameter, "device_mesh") for members in parameters for parameter in members):
        raise UsageError(
            "gradient_norm draws by gradients, and a sharded checkpoint is loaded before its draws are known: take "
            "DDP, or another strategy"
        )
