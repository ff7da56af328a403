"""Short trainings of one small model, on the CPU and on the device, in float64: where Adam divides by the size of a
gradient, rounding errors of float32 would become steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.nn import functional

from tests.training.models import VOCABULARY, TinyLM

Optimizers = Callable[[torch.nn.Module], torch.optim.Optimizer]


def model_on(device: torch.device | str, dtype: torch.dtype = torch.float64, **options: Any) -> TinyLM:
    """The small language model, the same weights wherever it is."""
    return TinyLM(**options).to(dtype).to(device)


def loss_of(model: torch.nn.Module, number: int) -> torch.Tensor:
    """Loss on the batch of this number."""
    tokens = torch.randint(0, VOCABULARY, (8, 9), generator=torch.Generator().manual_seed(number))
    tokens = tokens.to(next(model.parameters()).device, non_blocking=True)
    return functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def train(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    numbers: Iterable[int],
    counting: Callable[[], Any] | None = None,
    before: Callable[[int], None] | None = None,
) -> list[list[str]]:
    """One optimizer step a batch; what waited for the device from the gradients on, in each step."""
    waited = []
    for number in numbers:
        if before is not None:
            before(number)
        loss_of(model, number).backward()
        if counting is None:
            optimizer.step()
            optimizer.zero_grad()
            continue
        with counting() as counted:
            optimizer.step()
            optimizer.zero_grad()
        waited.append(list(counted.names))
    return waited


def within(device: torch.device, relative: float) -> float:
    """The tolerance of steps that float32 takes part in: a card adds up in another order than the CPU."""
    return relative if device.type == "pretended" else max(relative, 1e-2)


def state_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The state of each parameter, in the order of the groups."""
    return [dict(optimizer.state.get(p, {})) for group in optimizer.param_groups for p in group["params"]]
