"""Where a weight matrix stands in the stored tensor that holds it: taking it out, and putting it back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from htsr.arrays import Array


@dataclass(frozen=True)
class Position:
    """The place of one matrix in a stored tensor.

    Attributes:
        tensor: name of the stored tensor.
        element: index along the first axis of the tensor, for an expert of a stack; None for the whole tensor.
        index: NumPy index of the part, for a part of a fused matrix; None for the whole matrix.
        kernel: whether the tensor is a convolution kernel (out, in, …), whose offsets are the pieces of the matrix.

    Examples:
        >>> import numpy as np
        >>> from htsr.matrices.positions import Position
        >>> fused = np.arange(12.0).reshape(6, 2)  # q, k and v of two rows each
        >>> k = Position("attn.c_attn.weight", index=slice(2, 4))
        >>> k.take(fused).tolist()
        [[4.0, 5.0], [6.0, 7.0]]
        >>> k.put(fused, np.zeros((2, 2)))
        >>> fused[1:5, 0].tolist()
        [2.0, 0.0, 0.0, 8.0]
        >>> Position("conv.weight", kernel=True).take(np.zeros((8, 4, 3, 3))).shape  # 9 offsets, 8 × 4 each
        (9, 8, 4)
    """

    tensor: str
    element: int | None = None
    index: Any = field(default=None, compare=False)
    kernel: bool = False

    def take(self, whole: Array) -> Array:
        """The matrix, (m, n) or (pieces, m, n), out of the stored tensor `whole`; a view where slices allow it."""
        if self.kernel:
            out, inner = whole.shape[:2]
            return whole.reshape(out, inner, -1).swapaxes(1, 2).swapaxes(0, 1)
        part = whole if self.element is None else whole[self.element]
        return part if self.index is None else part[self.index]

    def put(self, whole: Array, matrix: Array) -> None:
        """Write `matrix`, of the shape that `take` gives, into the stored tensor `whole`, in place."""
        if self.kernel:
            whole[...] = matrix.swapaxes(0, 1).swapaxes(1, 2).reshape(tuple(whole.shape))  # type: ignore[call-overload,assignment]
            return
        part = whole if self.element is None else whole[self.element]
        part[... if self.index is None else self.index] = matrix  # type: ignore[assignment]
