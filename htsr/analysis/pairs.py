"""One matrix of two models: its weights laid over each other, read once, and how they differ.

Two checkpoints can store the same matrix transposed (a Linear and GPT-2's Conv1D), as a part of a fused tensor, or with
its rows in another order. Both are read as a Linear has them, (out, in), so that left singular vectors are directions
of the outputs; where the order of the rows is not known nothing is compared, and a note says so.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from htsr.analysis.distance import Distance, distance
from htsr.analysis.execution import on_host
from htsr.analysis.sharing import share
from htsr.arrays import Array
from htsr.errors import MatrixError
from htsr.matrices.models import WeightMatrix
from htsr.ranks import Ranks
from htsr.spectra.attempts import attempted
from htsr.spectra.device import solving_device
from htsr.spectra.direction_numbers import Directions
from htsr.spectra.subspaces import Subspace, by_head, directions

logger = logging.getLogger(__name__)

_OF_A_HEAD = 10  # leading directions of a head where the number of those of the matrix is told by its spectrum
_COPIES = 4  # of a matrix of the pair, while it is measured


@dataclass(frozen=True)
class WeightPair:
    """The weights of one matrix in both models, unread.

    Attributes:
        a: the matrix in the first model.
        b: the matrix in the second model, in the shape of `a` or transposed.
    """

    a: WeightMatrix
    b: WeightMatrix

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the first matrix."""
        return self.a.shape

    @property
    def pieces(self) -> int:
        """Number of slices of a stack, or 1."""
        return self.a.pieces

    @property
    def parameters(self) -> int:
        """Number of entries that are held at once."""
        return _COPIES * (self.a.parameters + self.b.parameters)

    @property
    def cost(self) -> float:
        """Work on both, as `WeightMatrix.cost` counts it."""
        return self.a.cost + self.b.cost

    @property
    def is_comparable(self) -> bool:
        """Whether one can be laid over the other: they have one shape, transposed or not, and one order of rows."""
        alike = sorted(self.a.shape) == sorted(self.b.shape) and self.a.pieces == self.b.pieces
        return alike and self.a.axes.order == self.b.axes.order

    @property
    def is_transposed(self) -> bool:
        """Whether one of the two is stored transposed: told by the shapes, of square matrices by what is known."""
        if self.a.shape != self.b.shape:
            return True
        known = {self.a.axes.inputs_first, self.b.axes.inputs_first}
        return self.a.shape[0] == self.a.shape[1] and known == {True, False}

    @property
    def heads(self) -> int:
        """Number of attention heads; 0 where it is not known, or the two models have different ones."""
        known = {self.a.axes.heads, self.b.axes.heads} - {0}
        return known.pop() if len(known) == 1 else 0

    @property
    def head_axis(self) -> Literal[0, 1]:
        """Axis of (out, in) that heads divide: the inputs of o, the outputs of q, k and v."""
        return 1 if self.a.role.endswith(".o") else 0

    def read(self) -> tuple[Array, Array]:
        """Both matrices, (out, in) or (pieces, out, in) where it is known which is which, else as the first stores it.

        Raises:
            MatrixError: one of the two cannot be read; the message names the tensor.
        """
        a, b = self.a.axes.inputs_first, self.b.axes.inputs_first
        turn_a = a if a is not None else b is not None and b != self.is_transposed
        turn_b = turn_a != self.is_transposed
        return _turned(self.a.read(), turn_a), _turned(self.b.read(), turn_b)


@dataclass(frozen=True)
class Change:
    """How the weights of one matrix differ between two models.

    Attributes:
        distance: distance between the weights; None where one is zero or not finite, or they cannot be compared.
        directions: the leading directions of the second beside those of the first; None where they were not asked for
            or there are none.
        heads: the same for each attention head of q, k, v and o; empty where the number of heads is not known.
        notes: sentences that a reader of these numbers should know.
    """

    distance: Distance | None = None
    directions: Directions | None = None
    heads: tuple[Directions, ...] = ()
    notes: tuple[str, ...] = ()


def changes(
    pairs: Sequence[WeightPair],
    k: Subspace | None,
    device: str,
    seed: int,
    ranks: Ranks,
    on_measured: Callable[[int, int, float, str], None] | None = None,
) -> list[Change]:
    """How the weights of `pairs` differ, in their order, on every rank; the ranks share the pairs.

    Args:
        pairs: pairs of all matrices, the same ones on every rank.
        k: leading directions that are compared, as `htsr.spectra.subspaces.directions` takes them; None for none.
        device: device that computes.
        seed: seed of the draws behind nulls.
        ranks: processes that share the work.
        on_measured: function that is called after each pair of this rank with the number of finished pairs and of all
            of them, the finished share of the work, and the name of the matrix.

    Raises:
        HtsrError: another rank has failed.
    """
    mine = share([pair.cost for pair in pairs], ranks.size)[ranks.rank]
    total = sum(pairs[i].cost for i in mine) or 1.0

    def measured() -> list[tuple[int, Change]]:
        found: list[tuple[int, Change]] = []
        spent = 0.0
        for at, change in _each([pairs[i] for i in mine], k, device, seed):
            found.append((mine[at], change))
            spent += pairs[mine[at]].cost
            if on_measured:
                on_measured(len(found), len(mine), spent / total, pairs[mine[at]].a.name)
        return found

    by_position = dict(ranks.gather_from(measured))
    return [by_position[i] for i in range(len(pairs))]


def change_of(pair: WeightPair, k: Subspace | None, device: str = "cpu", seed: int = 0) -> Change:
    """How the weights of one matrix differ; each of the two is read once.

    Args:
        pair: the matrix in both models.
        k: leading directions that are compared; None for none. A head has `k`, or 10 where `k` is told by the spectrum.
        device: device that computes.
        seed: seed of the draws behind nulls.

    Examples:
        >>> import htsr, torch
        >>> from htsr.analysis.pairs import WeightPair, change_of
        >>> W = torch.randn(8, 12, generator=torch.Generator().manual_seed(0))
        >>> (a,), (b,) = (htsr.describe({"up_proj.weight": stored}) for stored in (W, W.T.contiguous()))
        >>> change = change_of(WeightPair(a, b), k=2)
        >>> change.distance.frobenius, change.directions.overlap_left, change.notes
        (0.0, 1.0, ('unchanged', 'stored transposed in one of the two'))
    """
    orders = pair.a.axes.order, pair.b.axes.order
    if orders[0] != orders[1]:
        why = orders[0] or orders[1]
        return Change(notes=(f"weights are not compared, for their rows or columns may be in two orders: {why}",))
    matrices = attempted(pair.read)
    if isinstance(matrices, MatrixError):
        logger.warning("%s has no distance: %s", pair.a.name, matrices)
        return Change(notes=(str(matrices),))
    A, B = matrices
    notes = ["stored transposed in one of the two"] * pair.is_transposed
    apart = attempted(lambda: distance(A, B, device))
    if isinstance(apart, MatrixError):
        logger.warning("%s has no distance: %s", pair.a.name, apart)
        notes.append(str(apart))
        apart = None
    if apart is not None and apart.frobenius == 0:
        notes.insert(0, "unchanged")
    found, heads = _directions(pair, A, B, k, device, seed, notes) if k is not None else (None, ())
    return Change(apart, found, heads, tuple(notes))


def _directions(
    pair: WeightPair, A: Array, B: Array, k: Subspace, device: str, seed: int, notes: list[str]
) -> tuple[Directions | None, tuple[Directions, ...]]:
    """The directions of a matrix and of its heads; what there is none of adds to the `notes`."""
    stored = (pair.a.dtype, pair.b.dtype)
    whole = attempted(lambda: directions(A, B, k, stored=stored, seed=seed, device=device))
    if isinstance(whole, MatrixError):
        notes.append(f"no directions: {whole}")
        return None, ()
    notes += whole.notes
    if not pair.heads:
        return whole, ()
    of_head = k if isinstance(k, int) else _OF_A_HEAD
    heads = attempted(
        lambda: by_head(A, B, pair.heads, pair.head_axis, of_head, stored=stored, seed=seed, device=device)
    )
    if isinstance(heads, MatrixError):
        notes.append(f"no directions of heads: {heads}")
        return whole, ()
    return whole, heads


def _each(pairs: Sequence[WeightPair], k: Subspace | None, device: str, seed: int) -> Iterator[tuple[int, Change]]:
    """(position, change) of each pair in the order of completion: on a CPU in threads, else one after the other."""
    if solving_device(device) == "cpu":
        yield from on_host(pairs, lambda batch: [change_of(pair, k, device, seed) for pair in batch])
        return
    for position, pair in enumerate(pairs):
        yield position, change_of(pair, k, device, seed)


def _turned(matrix: Array, turn: bool) -> Array:
    return matrix.swapaxes(-1, -2) if turn else matrix
