"""Where the weights of a block live while it does not compute."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from htsr.training.streaming.layout import Layout


def has_streams(device: torch.device) -> bool:
    """Whether copies to the `device` run beside what it computes, on a stream of their own."""
    found = torch.accelerator.current_accelerator() if device.type not in ("cpu", "mps") else None
    return found is not None and found.type == device.type


class Home:
    """Host memory of one block, pinned where the device copies from it by itself.

    Args:
        weights: weights of the block, which are copied into it.
        device: device that the block visits.

    Attributes:
        layout: places of the weights.
        views: the weights, as views of the host memory.
    """

    def __init__(self, weights: Sequence[Tensor], device: torch.device) -> None:
        self.layout = Layout.of(weights)
        self._memory = torch.empty(self.layout.size, dtype=torch.uint8, device="cpu", pin_memory=has_streams(device))
        self.views = [place.of(self._memory) for place in self.layout.places]
        for view, weight in zip(self.views, weights, strict=True):
            view.copy_(weight.detach())

    def send(self, memory: Tensor) -> None:
        """Copy the weights to the device, at least ordered by its current stream.

        Args:
            memory: (bytes,) uint8 buffer on the device, of at least the layout's size.
        """
        memory[: self.layout.size].copy_(self._memory, non_blocking=True)
