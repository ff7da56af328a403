"""Readers of ΔW = scaling · B·A, alone or added to its base, with DoRA's factor.

Source: LoRA (arXiv 2106.09685), DoRA (arXiv 2402.09353).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from htsr.arrays import Array, Difference, Numbers, Product, as_numpy
from htsr.matrices.stored_tensors import FLOATS, StoredTensor


@dataclass(frozen=True)
class Delta:
    """Reads ΔW = scaling · B·A.

    Attributes:
        A: stored tensor of the first factor, (r, in, …).
        B: stored tensor of the second factor, (out, r, …).
        scaling: number that the product is multiplied with; None where `alpha` tells it.
        transposed: whether W is stored (in, out), as embeddings and GPT-2's Conv1D are.
        magnitude: stored tensor of DoRA's magnitudes; None without DoRA.
        base: stored tensor of W where the adapter has it, as for resized embeddings; else None.
        alpha: stored tensor of alpha = scaling · r, as kohya's files have it; else None.

    Examples:
        >>> import numpy as np
        >>> from htsr.matrices.deltas import Delta
        >>> from htsr.matrices.stored_tensors import StoredTensor
        >>> A = StoredTensor("lora_A", (1, 3), "float32", lambda: np.array([[1.0, 2.0, 0.0]]))
        >>> B = StoredTensor("lora_B", (2, 1), "float32", lambda: np.array([[3.0], [4.0]]))
        >>> Delta(A, B, scaling=2.0, transposed=False)().tolist()
        [[6.0, 12.0, 0.0], [8.0, 16.0, 0.0]]
    """

    A: StoredTensor
    B: StoredTensor
    scaling: float | None
    transposed: bool
    magnitude: StoredTensor | None = None
    base: StoredTensor | None = None
    alpha: StoredTensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of ΔW, which is that of W."""
        shape = (self.B.shape[0], *self.A.shape[1:])
        return shape[::-1] if self.transposed else shape

    def __call__(self, index: int | None = None) -> Array:
        """ΔW, float32, in its `shape`, or one slice of its first axis.

        Args:
            index: number of the slice; None for the whole tensor.
        """
        a, b = self._read()
        product = b @ a.reshape(a.shape[0], -1)
        product = product.T if self.transposed else product.reshape(self.shape)
        return product if index is None else product[index]

    def factors(self) -> Product:
        """ΔW as its factors; a kernel's as (positions, out, r) and (positions, r, in)."""
        a, b = self._read()
        if a.ndim > 2:
            a = np.moveaxis(a.reshape(*a.shape[:2], -1), 2, 0)
            b = np.broadcast_to(b, (len(a), *b.shape))
        return Product(a.T, b.T) if self.transposed else Product(b, a)

    def _read(self) -> tuple[Numbers, Numbers]:
        """A (r, in, …) and scaling · B (out, r), float32."""
        a, b = (as_numpy(x.read()).astype("float32") for x in (self.A, self.B))
        scaling = self.scaling
        if scaling is None and self.alpha is not None:
            scaling = float(as_numpy(self.alpha.read()).reshape(-1)[0]) / len(a)
        return a, scaling * b.reshape(b.shape[0], -1)  # type: ignore[operator]


@dataclass(frozen=True)
class Sum:
    """Reads W + ΔW, in float64 where W is stored so, else in float32.

    Attributes:
        base: stored tensor of W.
        delta: reader of ΔW.
    """

    base: StoredTensor
    delta: Delta

    def __call__(self, index: int | None = None) -> Array:
        """The sum in the shape of `base`, or one slice of its first axis.

        Args:
            index: number of the slice; None for the whole tensor.
        """
        own = as_numpy(self.base.read())
        own = own if own.dtype == np.float64 else own.astype("float32")
        total = own + as_numpy(self.delta())
        if self.delta.magnitude is not None:
            factor = dora_factor(total, as_numpy(self.delta.magnitude.read()), self.delta.transposed)
            total, own = total * factor, own * factor
        which = slice(None) if index is None else index
        return Difference.computed(total[which], [(own[which], self.base.dtype)])


def dora_factor(adapted: Any, magnitude: Any, transposed: bool) -> Any:
    """The factor that DoRA multiplies W + ΔW with: magnitude / ‖W + ΔW‖, one number per output.

    Args:
        adapted: W + ΔW, (out, in, …), or (in, out) where `transposed`; NumPy or torch.
        magnitude: DoRA's trained magnitudes, in any shape with one entry per output.
        transposed: whether W is stored (in, out), as embeddings and GPT-2's Conv1D are.

    Returns:
        (out, 1, …), or (1, out) where `transposed`, so that it broadcasts against `adapted`.

    Examples:
        >>> import numpy as np
        >>> from htsr.matrices.deltas import dora_factor
        >>> dora_factor(np.array([[3.0, 4.0], [0.0, 2.0]]), np.array([10.0, 1.0]), transposed=False).tolist()
        [[2.0], [0.5]]

    Source: DoRA (arXiv 2402.09353), eq. 5.
    """
    if transposed:
        return magnitude.reshape(1, -1) / (adapted**2).sum(0) ** 0.5
    norm = (adapted.reshape(adapted.shape[0], -1) ** 2).sum(1) ** 0.5
    return (magnitude.reshape(-1) / norm).reshape(-1, *[1] * (adapted.ndim - 1))


def misfit(A: StoredTensor, B: StoredTensor) -> str:
    """Why `A` and `B` are no factors of a ΔW; empty where they are."""
    if len(A.shape) < 2 or len(B.shape) < 2:
        return f"its factors have shapes {A.shape} and {B.shape}"
    if 0 in A.shape or 0 in B.shape:
        return f"its factors {A.shape} and {B.shape} are empty"
    if B.shape[1] != A.shape[0] or any(size != 1 for size in B.shape[2:]):
        return f"its factors of shapes {A.shape} and {B.shape} have no product"
    if not {A.dtype, B.dtype} <= FLOATS:
        return f"its factors are stored as {A.dtype} and {B.dtype}"
    return ""
