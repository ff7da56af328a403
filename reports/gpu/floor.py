"""The least that the analysis of one matrix asks of a device, stage by stage: operations, and bytes of its memory.

Of an m × n matrix, M = min(m, n) and N = max(m, n). Exactly, its eigenvalues take

- the Gram product, M²N multiplications and additions for one triangle (a plain product takes twice as many);
- its reduction to three diagonals, 4/3·M³. Half of it are products of the rest of the matrix with one vector each, which
  read one triangle of what is left, M³/6 entries in all: that stage waits for memory, not for arithmetic;
- the eigenvalues of the three diagonals, some 30 M², next to nothing.

By Lanczos, k steps of p probes take 4·m·n·p·k operations and read W twice a step, and each vector is made orthogonal to
those before it twice, which reads them four times: 2·p·k²·M numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """One stage of the work on one matrix, or on several.

    Attributes:
        name: what is done.
        flops: multiplications and additions.
        bytes: bytes that are read from and written to the device's memory.
    """

    name: str
    flops: float
    bytes: float

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """The least time: whichever of arithmetic and memory takes longer."""
        return max(self.flops / flops_per_second, self.bytes / bytes_per_second)

    def times(self, count: int) -> Stage:
        """The same for `count` matrices."""
        return Stage(self.name, count * self.flops, count * self.bytes)


def exact(rows: int, columns: int, *, stored: int = 2, working: int = 8) -> tuple[Stage, ...]:
    """The stages of an exact decomposition.

    Args:
        rows: number of rows of the matrix.
        columns: number of its columns.
        stored: bytes of an entry as it is stored.
        working: bytes of an entry of the Gram matrix.
    """
    M, N = sorted((rows, columns))
    return (
        Stage("Gram product", M * M * N, stored * M * N + working * M * M),
        Stage("reduction to three diagonals", 4 / 3 * M**3, working * M**3 / 6),
        Stage("eigenvalues of three diagonals", 30 * M**2, 2 * working * M),
    )


def lanczos(rows: int, columns: int, *, steps: int = 128, probes: int = 8, working: int = 4) -> tuple[Stage, ...]:
    """The stages of stochastic Lanczos quadrature.

    Args:
        rows: number of rows of the matrix.
        columns: number of its columns.
        steps: number of steps.
        probes: number of vectors, which go through W together.
        working: bytes of an entry of W in the products; the basis has 8.
    """
    M, N = sorted((rows, columns))
    basis = probes * steps**2 * M  # numbers, each read four times half the steps long
    return (
        Stage("products with W", 4 * M * N * probes * steps, 2 * working * M * N * steps),
        Stage("reorthogonalisation", 4 * basis, 2 * 8 * basis),
    )


def model(shapes: Iterable[tuple[int, int, int]], stages: Iterable[tuple[Stage, ...]]) -> tuple[Stage, ...]:
    """The stages of all matrices of a model added up.

    Args:
        shapes: rows, columns and number of the matrices of each shape.
        stages: stages of one matrix of each shape, in the same order.
    """
    counted = [[stage.times(count) for stage in one] for (_, _, count), one in zip(shapes, stages, strict=True)]
    return tuple(
        Stage(same[0].name, sum(s.flops for s in same), sum(s.bytes for s in same))
        for same in zip(*counted, strict=True)
    )
