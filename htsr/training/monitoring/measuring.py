"""The matrices of a model in training, measured by all processes together."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from htsr.analysis.execution import measure_all
from htsr.analysis.sharing import described, entries_difference, results_of_all, shared_out
from htsr.arrays import Array, Product
from htsr.errors import HtsrError, MatrixError
from htsr.matrices.models import Filter, Model, WeightMatrix
from htsr.matrices.roles import whole_name
from htsr.matrices.sharded import LiveModel, open_live
from htsr.ranks import Ranks
from htsr.spectra.attempts import attempted
from htsr.spectra.device import on_device, solving_device
from htsr.spectra.metrics import LayerMetrics, Options
from htsr.spectra.sketch import Sketch, sketch

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

_COMPARED = 64  # entries of a matrix that ranks compare
_TURNS, _CHUNK = 8, 1 << 22  # of the power method, and entries that it takes at a time


@dataclass(frozen=True)
class Found:
    """A matrix as it is at one step.

    Attributes:
        row: numbers of its spectrum.
        sketch: what is kept of its entries; None where it cannot be read.
    """

    row: LayerMetrics
    sketch: Sketch | None


@dataclass(frozen=True)
class Start:
    """What is kept of a matrix as it is at the start of a run.

    Attributes:
        sketch: what is kept of its entries.
        stable_rank: about its stable rank, by up to a fifth too large; None for a matrix of zeros.
    """

    sketch: Sketch
    stable_rank: float | None


def open_wanted(module: torch.nn.Module, wanted: Filter) -> LiveModel:
    """The wanted matrices of a model, of which some may be sharded.

    Args:
        module: model, wrapped or not.
        wanted: filter of its matrices.

    Raises:
        UsageError: no matrix passes the filter, or the model lacks a pattern or block of it.
    """
    live = open_live(module)
    return replace(live, matrices=Model(type(module).__name__, live.matrices).filtered(wanted).matrices)


def insist_on_one(model: LiveModel, ranks: Ranks, options: Options, *, entries: bool = False) -> None:
    """Make sure that all ranks measure one model in one way.

    Args:
        model: matrices of this rank.
        ranks: processes that measure together; each of them calls this.
        options: options that say what is computed. No number depends on the device, which may differ.
        entries: whether to compare a few entries of each whole matrix, too.

    Raises:
        HtsrError: they do not, and all raise it.
    """
    if ranks.size == 1:
        return
    how = [f"{name} {value}" for name, value in vars(options).items() if name != "device"]
    differ = ranks.difference([*how, *described(model.matrices), *(f"{name} sharded" for name in sorted(model.shards))])
    if differ is None and entries:
        whole = [matrix for matrix in model.matrices if whole_name(matrix.name) not in model.shards]
        differ = entries_difference(ranks, whole, _COMPARED)
    if differ:
        raise HtsrError(
            f"the processes do not train one model: they monitor {differ}; with distributed=False each process "
            "monitors its own"
        )


def starts_of(model: LiveModel, ranks: Ranks) -> dict[str, Start]:
    """What is kept of all matrices of a model, on every rank; without those that cannot be read.

    Whole matrices are shared by cost, and sharded ones are put together one a rank at a time.

    Args:
        model: matrices to read.
        ranks: processes that share them.
    """

    def work(matrices: Sequence[WeightMatrix]) -> list[tuple[str, Start | None]]:
        return [(matrix.name, _start(matrix)) for matrix in matrices]

    whole, spread = shared_out(model.matrices, model.shards, ranks)
    found = results_of_all(whole, spread, model.shards, ranks, work)
    return {name: made for name, made in found if made is not None}


def measured(model: LiveModel, options: Options, before: Mapping[str, Found], ranks: Ranks) -> dict[str, Found]:
    """The numbers of all matrices of `model`, on every rank.

    A matrix whose entries are those of its last measurement has that one's numbers: frozen weights cost no
    decomposition.

    Args:
        model: matrices to measure.
        options: options that say what is computed.
        before: last measurement of each matrix that has one.
        ranks: processes that share the work.
    """

    def work(matrices: Sequence[WeightMatrix]) -> list[tuple[str, Found]]:
        found: dict[str, Found] = {}
        made = {matrix.name: _sketch(matrix) for matrix in matrices}
        for name, now in made.items():
            last = before.get(name)
            if now and last and last.sketch and now.same(last.sketch):
                found[name] = last
        todo = [matrix for matrix in matrices if matrix.name not in found]
        for result in measure_all(todo, options):
            found[result.row.name] = Found(result.row, made[result.row.name])
        return list(found.items())

    whole, spread = shared_out(model.matrices, model.shards, ranks)
    return dict(results_of_all(whole, spread, model.shards, ranks, work))


def _sketch(matrix: WeightMatrix) -> Sketch | None:
    found = attempted(lambda: _sketch_of(matrix.read(), matrix.name))
    return None if isinstance(found, MatrixError) else found


def _sketch_of(values: Array | Product, name: str) -> Sketch:
    return sketch(values, zlib.crc32(name.encode()))


def _start(matrix: WeightMatrix) -> Start | None:
    def read() -> Start:
        values = matrix.read()
        dense = values.dense() if isinstance(values, Product) else values
        made = _sketch_of(dense, matrix.name)
        largest = max(_largest(piece) for piece in dense.reshape(-1, *dense.shape[-2:]))
        rank = made.norm**2 / largest if 0 < largest < math.inf else math.nan
        return Start(made, rank if math.isfinite(rank) else None)

    found = attempted(read)
    return None if isinstance(found, MatrixError) else found


def _largest(matrix: Array) -> float:
    """The largest eigenvalue of WᵀW, or somewhat less, by the power method."""
    import torch

    device = solving_device("auto", matrix)
    generator = torch.Generator(device).manual_seed(0)
    vector = torch.randn(matrix.shape[1], generator=generator, device=device)
    step, largest = max(1, _CHUNK // matrix.shape[1]), torch.zeros((), device=device)
    for _ in range(_TURNS):
        vector, before = torch.zeros_like(vector), vector / vector.norm()
        largest = torch.zeros_like(largest)
        for first in range(0, matrix.shape[0], step):
            rows = on_device(matrix[first : first + step], device).float()
            image = rows @ before
            vector += image @ rows
            largest += image @ image
    return float(largest)
