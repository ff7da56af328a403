"""A short vector that stands for a matrix, and tells later how far the matrix has moved.

A copy of the weights at the start of a training would double the memory of the weights. What is kept here instead is a
CountSketch (Charikar, Chen and Farach-Colton 2002; as a map that keeps lengths, Thorup and Zhang 2012): every entry is
added to one of `SIZE` sums, drawn for it at random, with a random sign. It is linear in the matrix: the difference of
two sketches is the sketch of the difference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from htsr.arrays import Array, Product, Vector
from htsr.spectra.device import on_device, solving_device

if TYPE_CHECKING:
    import torch

SIZE = 1024
STANDARD_ERROR = (2 * SIZE) ** -0.5  # of a length, as a share of it: 2.2 %
_CHUNK = 1 << 20  # entries at a time, 24 MiB


@dataclass(frozen=True, eq=False)
class Sketch:
    """What is kept of a matrix W.

    Attributes:
        sums: the sketch, (SIZE,) float64.
        norm: length ‖W‖_F, which is exact.
        shape: shape of the matrix. Entries of another shape are added to other sums.
    """

    sums: Vector
    norm: float
    shape: tuple[int, ...]

    def same(self, other: Sketch) -> bool:
        """Whether both are sketches of one matrix, as all but surely only those are equal.

        Args:
            other: sketch with the same seed.
        """
        return (self.norm, self.shape) == (other.norm, other.shape) and bool((self.sums == other.sums).all())


def sketch(matrix: Array | Product, seed: int) -> Sketch:
    """The sketch of a matrix, made where it lies: 8 ns an entry on one thread of a CPU.

    Args:
        matrix: matrix (m, n), or stack (pieces, m, n), in any float dtype.
        seed: seed of the sums and signs. Sketches compare if they have the same seed and shape, and the same kind of
            device has made them.

    Examples:
        >>> import numpy as np
        >>> from htsr.spectra.sketch import relative_change, sketch
        >>> before = np.ones((300, 200))
        >>> after = before.copy()
        >>> after[0] += 1.0
        >>> exact = np.linalg.norm(after - before) / np.linalg.norm(before)
        >>> found = relative_change(sketch(after, seed=0), sketch(before, seed=0))
        >>> bool(abs(found / exact - 1) < 0.05)
        True
    """
    import torch

    values = matrix.dense() if isinstance(matrix, Product) else matrix
    rows = values.reshape(-1, values.shape[-1])
    device = solving_device("auto", rows)
    generator = torch.Generator(device).manual_seed(seed)
    sums = torch.zeros(2 * SIZE, dtype=torch.float64, device=device)
    square = torch.zeros((), dtype=torch.float64, device=device)
    step = max(1, _CHUNK // max(1, rows.shape[1]))
    for first in range(0, rows.shape[0], step):
        part: torch.Tensor = on_device(rows[first : first + step], device).reshape(-1).double()
        places = torch.randint(2 * SIZE, part.shape, generator=generator, device=device)
        sums.index_add_(0, places, part)  # the upper half of the sums is to be subtracted
        square += part.square().sum()
    return Sketch((sums[:SIZE] - sums[SIZE:]).cpu().numpy(), float(square.sqrt()), tuple(values.shape))


def relative_change(now: Sketch, before: Sketch) -> float | None:
    """The length of a change beside that of the matrix, ‖W - W_0‖_F / ‖W_0‖_F, as its sketches tell it.

    Its square is unbiased, and its standard error is at most √(2 / SIZE) of it, whatever the change is: that of the
    length itself is 2.2 % of the length. What a change of independent entries gives is no other: the length is all that
    this number knows of it.

    Args:
        now: sketch of W.
        before: sketch of W_0 with the same seed.

    Returns:
        The relative length; None where W_0 is zero, one of the two is not finite, or they have different shapes.

    Examples:
        >>> import numpy as np
        >>> from htsr.spectra.sketch import relative_change, sketch
        >>> W = sketch(np.eye(4), seed=0)
        >>> relative_change(W, W)
        0.0
    """
    if now.shape != before.shape:
        return None
    length = float(((now.sums - before.sums) ** 2).sum() ** 0.5)
    if not 0 < before.norm < float("inf") or not length < float("inf"):
        return None
    return length / before.norm
