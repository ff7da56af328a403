"""The weights of a block in one piece of memory, so that one copy brings all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_ALIGNMENT = 512  # bytes; that of CUDA's own allocations, so that kernels see a weight as they would anywhere


@dataclass(frozen=True)
class Place:
    """Where one weight lies in a piece of memory.

    Attributes:
        start: first byte.
        stop: byte after the last.
        dtype: dtype of the weight.
        shape: shape of the weight.
        stride: strides of the weight; it has no gaps.
    """

    start: int
    stop: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def of(self, memory: Tensor) -> Tensor:
        """The weight in `memory`, (bytes,) uint8, as a view."""
        return self.shaped(memory[self.start : self.stop])

    def shaped(self, piece: Tensor) -> Tensor:
        """The weight whose bytes `piece`, (bytes,) uint8, holds, as a view."""
        return piece.view(self.dtype).as_strided(self.shape, self.stride)


@dataclass(frozen=True)
class Layout:
    """Where the weights of one block lie in a piece of memory.

    Attributes:
        places: place of each weight.
        size: bytes of all, a multiple of every alignment.
    """

    places: tuple[Place, ...]
    size: int

    @classmethod
    def of(cls, weights: Sequence[Tensor]) -> Layout:
        """Places for `weights` of any shapes and dtypes, one after the other.

        Examples:
            >>> import torch
            >>> from htsr.training.streaming.layout import Layout
            >>> layout = Layout.of([torch.ones(2, 3), torch.ones(5, dtype=torch.bfloat16)])
            >>> [(place.start, place.stop) for place in layout.places], layout.size
            ([(0, 24), (512, 522)], 1024)
        """
        places, end = [], 0
        for weight in weights:
            like = torch.empty_like(weight, device="meta")  # its strides without gaps
            stop = end + weight.numel() * weight.element_size()
            places.append(Place(end, stop, weight.dtype, tuple(weight.shape), like.stride()))
            end = -(-stop // _ALIGNMENT) * _ALIGNMENT
        return cls(tuple(places), end)
