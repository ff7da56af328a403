"""Where the weights of a block live while it does not compute."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from htsr.training.streaming.layout import Layout


def has_streams(device: torch.device) -> bool:
    """Whether copies to the `device` run beside what it computes, on a stream of their own."""
    found = torch.accelerator.current_accelerator() if device.type not in ("cpu", "mps") else None
    return found is not None and found.type == device.type


Where: TypeAlias = Literal["host", "disk"]


class Home:
    """Where the weights of one block live: host memory, pinned where the device copies from it by itself, or files.

    transformers maps the files of a checkpoint into memory if it is asked for the dtype that they have. Such weights
    stay there: they are read from the file when they are needed, and what is written to them takes memory and leaves
    the file as it is (a private mapping).

    Args:
        weights: weights of the block, of any shape each.
        device: device that the block visits.
        where: ``host``: the weights are copied into memory of one piece; ``disk``: they stay where they are.

    Attributes:
        layout: places of the weights in a buffer of the device.
        views: the weights at home.
        reads: whether sending them waits for a disk, so that another thread should.
    """

    def __init__(self, weights: Sequence[Tensor], device: torch.device, where: Where = "host") -> None:
        self.layout, self.reads = Layout.of(weights), where == "disk"
        self._memory: Tensor | None = None
        if self.reads:
            self.views = [weight.detach() for weight in weights]
            return
        self._memory = torch.empty(self.layout.size, dtype=torch.uint8, device="cpu", pin_memory=has_streams(device))
        whole, places = self._memory.numpy(), self.layout.places
        # a storage for each weight: torch.save refuses one that is read in two dtypes
        self.views = [place.shaped(torch.from_numpy(whole[place.start : place.stop])) for place in places]
        for view, weight in zip(self.views, weights, strict=True):
            view.copy_(weight.detach())

    def send(self, memory: Tensor) -> None:
        """Copy the weights to the device, at least ordered by its current stream.

        Args:
            memory: (bytes,) uint8 buffer on the device, of at least the layout's size.
        """
        if self._memory is not None:
            memory[: self.layout.size].copy_(self._memory, non_blocking=True)
            return
        for place, view in zip(self.layout.places, self.views, strict=True):
            place.of(memory).copy_(view, non_blocking=True)


def are_mapped(weights: Iterable[Tensor]) -> bool:
    """Whether all `weights`, of any shape each, lie in files that are mapped; True where the system does not tell."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return True
    lines = [line.split() for line in maps.read_text().splitlines()]
    files = [tuple(int(end, 16) for end in line[0].split("-")) for line in lines if len(line) > 5 and line[5][0] == "/"]
    return all(any(start <= weight.data_ptr() < stop for start, stop in files) for weight in weights)
