"""Adam's arithmetic on lists of tensors, with the operations of torch.optim.Adam and AdamW: their numbers bit for bit.

A step t of W with gradient G and learning rate lr: ``count``, ``advance`` the moments m and v by G, and
W ← W + step_size·m/denominator.

Source: Adam (Kingma & Ba, arXiv 1412.6980), algorithm 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def count(steps: list[Tensor]) -> None:
    """Add 1 to step counters.

    Args:
        steps: counters, each a scalar, on one device, at least one; changed.
    """
    if steps[0].is_cpu:  # where a number would be made a tensor for each of them
        torch._foreach_add_(steps, torch.tensor(1.0, device="cpu"), alpha=1.0)
    else:
        torch._foreach_add_(steps, 1)


def advance(
    exp_avg: list[Tensor], exp_avg_sq: list[Tensor], gradients: list[Tensor], beta1: float, beta2: float
) -> None:
    """Take gradients into Adam's moments.

    Args:
        exp_avg: first moments, in the shape and dtype of its gradient each; changed.
        exp_avg_sq: second moments, in the same shape and dtype; changed.
        gradients: gradients, of any shape each.
        beta1: decay rate β₁ of the first moments.
        beta2: decay rate β₂ of the second moments.
    """
    torch._foreach_lerp_(exp_avg, gradients, 1 - beta1)
    torch._foreach_mul_(exp_avg_sq, beta2)
    torch._foreach_addcmul_(exp_avg_sq, gradients, gradients, 1 - beta2)


def denominators(exp_avg_sq: list[Tensor], steps: Iterable[float], beta2: float, eps: float) -> list[Tensor]:
    """√v̂ + eps, with the second moments corrected for their bias.

    Args:
        exp_avg_sq: second moments after the step, of any shape each.
        steps: number t of this step for each of them, counted from 1.
        beta2: decay rate β₂ of the second moments.
        eps: number that is added to the corrected root.

    Returns:
        The denominators, in the shapes and dtypes of the moments, in memory of their own.

    Examples:
        At the first step the direction is the sign of the gradient:

        >>> import torch
        >>> from htsr.training.adam import advance, denominators
        >>> G, m, v = torch.tensor([4.0, -0.5, 0.0]), torch.zeros(3), torch.zeros(3)
        >>> advance([m], [v], [G], beta1=0.9, beta2=0.999)
        >>> (denominator,) = denominators([v], [1], beta2=0.999, eps=1e-8)
        >>> (m / (1 - 0.9) / denominator).round(decimals=3)
        tensor([ 1., -1.,  0.])
    """
    found = list(torch._foreach_sqrt(exp_avg_sq))
    torch._foreach_div_(found, [(1 - beta2**step) ** 0.5 for step in steps])
    torch._foreach_add_(found, eps)
    return found


def step_sizes(rates: Iterable[float], steps: Sequence[float], beta1: float) -> list[float]:
    """-lr/(1 - β₁ᵗ): the factor of m/denominator, with the first moments corrected for their bias.

    Args:
        rates: learning rate of each parameter.
        steps: number t of this step for each of them, counted from 1.
        beta1: decay rate β₁ of the first moments.
    """
    return [lr / (1 - beta1**step) * -1 for lr, step in zip(rates, steps, strict=True)]
