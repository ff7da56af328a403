"""Probabilities by the gradients that members have had (MISA, arXiv 2511.00056).

    p_b ∝ exp(η·G_b)

which maximises Σ p_b·G_b less 1/η of the Kullback-Leibler divergence from uniform draws: what has large gradients is
drawn more often, and everything again and again. The paper's are this form, the uniform draws at first, and that G_b
changes only where b was drawn. Ours, since the paper leaves them open or could not be had: G_b is the root mean square
of the entries of b's matrices in the gradient, averaged over the steps of an interval, and half of it is that of the
last interval; it is divided by the largest; what was never drawn has the mean of the others; and η is ln 5, so that no
member is drawn first more than five times as often as another, the span that spectra have, too. Norms and biases count
where nothing else of a member trains: the entries of their gradients are of another size.

Gradients are seen when backward has ended: clipped to a norm before the step, those of all members would be alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
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
        >>> large, small = torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.zeros(3, 3))
        >>> large.grad, small.grad = torch.full((2, 2), 2.0), torch.full((3, 3), 1.0)
        >>> norms.see([[large], [small], []], (0, 1))
        >>> norms.note()
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
        self._seen: list[tuple[int, int, torch.Tensor]] = []  # member, number of entries and norm of each gradient

    def see(self, parameters: Sequence[Sequence[torch.nn.Parameter]], active: Sequence[int]) -> None:
        """Take the norms of the gradients as they are, in place of what was seen before; waits for no device.

        Args:
            parameters: parameters of each member.
            active: indices of the members that train.
        """
        import torch

        own = [(i, p.numel(), p.grad) for i in active for p in _counting(parameters[i]) if p.grad is not None]
        with torch.no_grad():
            norms = torch._foreach_norm([gradient for _, _, gradient in own]) if own else ()
        self._seen = [(index, size, norm) for (index, size, _), norm in zip(own, norms, strict=True)]

    def note(self, scale: float = 1.0) -> None:
        """Take up what was seen last, once per step; a device is waited for once. NaN and Inf do not count.

        Args:
            scale: factor that the gradients had when they were seen.
        """
        import torch

        if not self._seen:
            return
        device = self._seen[0][2].device
        squares = torch.stack([norm.float().div(scale).square().to(device) for _, _, norm in self._seen]).tolist()
        for index in dict.fromkeys(i for i, _, _ in self._seen):
            square = sum(value for (i, _, _), value in zip(self._seen, squares, strict=True) if i == index)
            size = sum(size for i, size, _ in self._seen if i == index)
            if math.isfinite(square):
                self._sums[index] += math.sqrt(square / size)
                self._steps[index] += 1
        self._seen = []

    @property
    def has_seen(self) -> bool:
        """Whether there is something to be taken up."""
        return bool(self._seen)

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


def _counting(parameters: Sequence[torch.nn.Parameter]) -> Sequence[torch.nn.Parameter]:
    return [parameter for parameter in parameters if parameter.ndim > 1] or parameters


def after_backward(parameters: Iterable[torch.Tensor], function: Callable[[], None]) -> list[Any]:
    """Have a function called at the end of each backward pass that gives one of the parameters a gradient.

    Gradients are whole then: added up over the passes so far, and averaged by DDP.

    Args:
        parameters: leaves of any shape that require gradients.
        function: function without arguments.

    Returns:
        Handles, whose `remove` ends it.
    """
    import torch

    queue = torch.autograd.Variable._execution_engine.queue_callback  # type: ignore[attr-defined]
    last = -1

    def arrived(_: torch.Tensor) -> None:
        nonlocal last
        task = torch._C._current_graph_task_id()
        if task != last:
            last = task
            queue(lambda: queue(function))  # after DDP's own callback, which it queues with its last bucket

    return [p.register_post_accumulate_grad_hook(arrived) for p in parameters]  # type: ignore[no-untyped-call]


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
