"""The arrays that weights come in: NumPy's or torch's, a product of two factors, a difference with its rounding.

They stand below `htsr.matrices`, which reads them, and `htsr.spectra`, which takes their eigenvalues: what a reader
knows of its numbers, and a spectrum needs, travels with the array.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

Numbers: TypeAlias = npt.NDArray[Any]
Vector: TypeAlias = npt.NDArray[np.float64]
Array: TypeAlias = "Numbers | torch.Tensor"

EPSILON = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
MANTISSAS = (0.541 / 12) ** 0.5  # rounding errors over epsilon times rms: see `htsr.spectra.resolution`


def as_numpy(array: Array | Product) -> npt.NDArray[Any]:
    """`array`, of any shape, as NumPy on the CPU; dtypes that NumPy lacks (bfloat16, float8) become float32.

    Examples:
        >>> import torch
        >>> from htsr.arrays import as_numpy
        >>> as_numpy(torch.ones(2, dtype=torch.bfloat16))
        array([1., 1.], dtype=float32)
    """
    if isinstance(array, Product):
        return array.dense()
    if isinstance(array, np.ndarray):
        return np.asarray(array)
    tensor = array.detach().cpu()
    if str(tensor.dtype) not in ("torch.float64", "torch.float32", "torch.float16"):
        tensor = tensor.float()
    return np.asarray(tensor.numpy())


@dataclass(frozen=True)
class Product:
    """A matrix of low rank as its two factors, left · right, or a stack of such matrices.

    Attributes:
        left: left factor, (m, r) or (pieces, m, r), any float dtype.
        right: right factor, (r, n) or (pieces, r, n).

    Raises:
        ValueError: the shapes cannot be multiplied.

    Examples:
        >>> import numpy as np
        >>> from htsr.arrays import Product
        >>> B, A = np.array([[3.0], [4.0]]), np.array([[1.0, 2.0, 0.0]])
        >>> delta = Product(B, A)
        >>> delta.shape, delta.rank, delta.dense().tolist()
        ((2, 3), 1, [[3.0, 6.0, 0.0], [4.0, 8.0, 0.0]])
        >>> delta[1:, :2].dense().tolist()  # rows and columns of it are a product, too
        [[4.0, 8.0]]
    """

    left: Numbers
    right: Numbers

    def __post_init__(self) -> None:
        left, right = self.left.shape, self.right.shape
        if len(left) != len(right) or left[:-2] != right[:-2] or left[-1] != right[-2]:
            raise ValueError(f"factors of shapes {left} and {right} have no product")

    @property
    def rank(self) -> int:
        """The largest rank that a piece can have."""
        return min(self.left.shape[-1], *self.shape[-2:])

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix, (m, n), or of the stack, (pieces, m, n)."""
        return (*self.left.shape[:-1], self.right.shape[-1])

    @property
    def ndim(self) -> int:
        """Number of axes: 2, or 3 for a stack."""
        return self.left.ndim

    def __getitem__(self, index: Any) -> Product:
        """A piece of a stack, or rows of one product, or (rows, columns) of it."""
        if self.ndim == 3:
            return Product(self.left[index], self.right[index])
        rows, columns = index if isinstance(index, tuple) else (index, slice(None))
        return Product(self.left[rows], self.right[:, columns])

    def dense(self) -> Numbers:
        """The matrix itself, multiplied in float64."""
        return self.left.astype(np.float64) @ self.right.astype(np.float64)  # type: ignore[no-any-return]


def epsilon(stored: str) -> float:
    """Machine epsilon of the dtype that numbers were stored in; float32's for all that is no plain float.

    De-quantised numbers were computed in float32, whatever they were stored in.

    Args:
        stored: dtype as torch names it.

    Examples:
        >>> from htsr.arrays import epsilon
        >>> epsilon("bfloat16"), epsilon("nf4") == epsilon("float32")
        (0.0078125, True)
    """
    return EPSILON.get(stored, EPSILON["float32"])


class Difference(np.ndarray[Any, Any]):
    """An array with `rounding`, the mean square of its entries' rounding errors; slices of it keep that number.

    The entries of a - b do not tell their own errors: those are as large as the errors of a and b, however small the
    difference is.

    Examples:
        >>> import numpy as np
        >>> from htsr.arrays import Difference
        >>> a = np.random.default_rng(0).standard_normal((100, 100)).astype("float32")
        >>> difference = Difference.of(a, a * np.float32(0.999), ("bfloat16", "bfloat16"))
        >>> size, error = np.sqrt(np.mean(difference**2)), difference.rounding**0.5
        >>> bool(error > size)  # all rounding: bfloat16 does not hold changes of 0.1 %
        True
    """

    rounding: float | None = None

    def __array_finalize__(self, source: Any) -> None:
        self.rounding = getattr(source, "rounding", None)

    @classmethod
    def of(cls, a: npt.NDArray[Any], b: npt.NDArray[Any], stored: tuple[str, str]) -> Difference:
        """The difference of two arrays of one shape, in float64 where one of them is, else in float32.

        Args:
            a: (m, n) or of any other shape, as it was read.
            b: array of the shape of `a`, as it was read.
            stored: dtypes that the two were stored in, as torch names them.
        """
        wide = np.float64 if np.float64 in (a.dtype, b.dtype) else np.float32
        return cls.computed(a.astype(wide) - b.astype(wide), tuple(zip((a, b), stored, strict=True)))

    @classmethod
    def computed(cls, result: npt.NDArray[Any], parts: Iterable[tuple[npt.NDArray[Any], str]]) -> Difference:
        """The `result` of a computation in float32 or better, with the errors of what went into it.

        Args:
            result: (m, n) or of any other shape.
            parts: summands of the result, of its shape, each with the dtype that it was stored in, as torch names it.
                Of one that is a `Difference` the errors are known.
        """
        found = result.view(cls)
        found.rounding = sum(_mean_square_error(part, dtype) for part, dtype in parts)
        return found


def _mean_square_error(values: npt.NDArray[Any], stored: str) -> float:
    known: float | None = getattr(values, "rounding", None)
    if known is not None or values.size == 0:
        return known or 0.0
    return (MANTISSAS * epsilon(stored)) ** 2 * float(np.square(values, dtype=np.float64).mean())
