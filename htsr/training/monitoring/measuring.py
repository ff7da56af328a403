"""The matrices of a model in training, measured by all processes together."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from htsr.analysis.execution import measure_all
from htsr.analysis.sharing import described, entries_difference, results_of_all, shared_out
from htsr.errors import HtsrError, MatrixError
from htsr.matrices.models import Filter, Model, WeightMatrix
from htsr.matrices.roles import whole_name
from htsr.matrices.sharded import LiveModel, open_live
from htsr.ranks import Ranks
from htsr.spectra.attempts import attempted
from htsr.spectra.metrics import LayerMetrics, Options
from htsr.spectra.sketch import Sketch, sketch

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

_COMPARED = 64  # entries of a matrix that ranks compare


@dataclass(frozen=True)
class Found:
    """A matrix as it is at one step.

    Attributes:
        row: numbers of its spectrum.
        sketch: what is kept of its entries; None where it cannot be read.
    """

    row: LayerMetrics
    sketch: Sketch | None


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


def sketches_of(model: LiveModel, ranks: Ranks) -> dict[str, Sketch]:
    """The sketches of all matrices of a model, on every rank; without those that cannot be read.

    Whole matrices are shared by cost, and sharded ones are put together one a rank at a time.

    Args:
        model: matrices to read.
        ranks: processes that share them.
    """

    def work(matrices: Sequence[WeightMatrix]) -> list[tuple[str, Sketch | None]]:
        return [(matrix.name, _sketch(matrix)) for matrix in matrices]

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
    def read() -> Sketch:
        return sketch(matrix.read(), zlib.crc32(matrix.name.encode()))

    found = attempted(read)
    return None if isinstance(found, MatrixError) else found
