"""Analyze a model: every weight matrix a row of numbers.

    analysis = htsr.analyze("path/or/hub-id")
    analysis.summary()["alpha"]
    analysis.to_pandas()

`python -m htsr.analysis`, also under `accelerate launch`, is the `htsr analyze` command.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any

from htsr._version import __version__
from htsr.analysis.devices import pick_device
from htsr.analysis.execution import measure_all
from htsr.analysis.journal import Journal
from htsr.analysis.result import Analysis
from htsr.analysis.sharing import agree, launched_ranks, results_of_all, shared_out
from htsr.errors import UsageError
from htsr.matrices.models import Filter, Model, as_filter
from htsr.matrices.sharded import Shard, open_live
from htsr.matrices.sources import Source, open_model
from htsr.ranks import Ranks
from htsr.spectra.device import solving_device
from htsr.spectra.measure import Measured
from htsr.spectra.metrics import LayerMetrics, Options

_ARGUMENTS = ("revision", "against", "base", "where", "full", "journal", "progress", "distributed")
FULL = {"bulk": True, "permuted": True, "alternatives": True}


@dataclass(frozen=True)
class Progress:
    """How far an analysis is, after each matrix.

    Attributes:
        done: number of finished matrices: those of this rank, and those taken over from a journal.
        total: number of matrices that this rank has to finish, counted in the same way.
        fraction: finished share of the work, in floating-point operations, between 0 and 1.
        row: row that was just finished.
    """

    done: int
    total: int
    fraction: float
    row: LayerMetrics


def analyze(
    source: Source,
    *,
    revision: str | None = None,
    against: Source | None = None,
    base: Source | None = None,
    where: Filter | None = None,
    full: bool = False,
    journal: str | os.PathLike[str] | None = None,
    progress: Callable[[Progress], None] | None = None,
    distributed: bool = True,
    **options: Any,
) -> Analysis:
    """Analyze the weight matrices of a model.

    Args:
        source: an ``nn.Module`` (on any device, wrapped or not), a state dict, a folder, a checkpoint file, a PEFT
            adapter folder (its ΔW), or a hub id.
        revision: branch, tag or commit of a hub id.
        against: second model; the matrices are then the differences of the two.
        base: source of an adapter's base model, to analyze base + ΔW; ``auto`` for the base that the adapter names.
        where: filter of the matrices that are wanted; all by default.
        full: whether to add bulk, permuted weights and alternatives to the power law (several times slower).
        journal: file that keeps finished rows while this runs, and from which rows of an interrupted run are taken
            over, if that was the same analysis of the same weights. It is removed at the end.
        progress: function that is called after each matrix.
        distributed: whether the ranks of `accelerate launch` or `torchrun` share the matrices. Each of them then has to
            call this with the same model, and returns all rows. False where one rank analyzes alone, or each of them
            its own model; a tensor that is sharded over the ranks then has a row that says so.
        **options: fields of `htsr.Options`: fit, route, dtype, device (``auto`` is where a live model lies, else this
            process's accelerator, else the CPU), windows, bulk, permuted, alternatives, quality, bootstrap, gof, seed …

    Returns:
        An `Analysis`. Matrices that cannot be analyzed have a row that says why.

    Raises:
        SourceError: the source cannot be read at all.
        UsageError: an option has no meaning, no matrix passes the filter, `base` is given without an adapter or
            `revision` for a local path; or other ranks do not call this, or call it with another model.

    Sources: HT-SR (Martin & Mahoney, JMLR 2021); SETOL (arXiv 2507.17912); for each number, see `LayerMetrics`.

    Examples:
        >>> import htsr, torch
        >>> noise = torch.randn(60, 90, generator=torch.Generator().manual_seed(0))
        >>> (row,) = htsr.analyze({"layers.0.mlp.up_proj.weight": noise})
        >>> row.name, row.role, row.M, row.N
        ('layers.0.mlp.up_proj', 'mlp.up', 60, 90)
        >>> abs(row.alpha - row.alpha_null) < 2 * row.alpha_null_sd  # noise has the α of its shape
        True
    """
    settings = make_options(source, full=full, **options)
    model = open_model(source, revision=revision, against=against, base=base).filtered(as_filter(where))
    shards: Mapping[str, Shard] = {}
    if distributed and against is None and any(matrix.problem and matrix.problem[0] == "sharded" for matrix in model):
        live = open_live(source)  # type: ignore[arg-type]  # only a module has such
        model, shards = replace(model, matrices=live.matrices).filtered(as_filter(where)), live.shards
    kept = Journal(model, settings, Path(journal)) if journal else None
    return analyze_model(model, settings, kept, progress, shards, launched_ranks(distributed))


def make_options(source: object = None, *, full: bool = False, **options: Any) -> Options:
    """`Options` from keywords, with a device that exists.

    Args:
        source: model that is analyzed, whose device is taken where none is given.
        full: whether to add bulk, permuted weights and alternatives to the power law.
        **options: fields of `Options`; `device` is ``auto`` by default.

    Raises:
        UsageError: there is no such option, or no such device.
    """
    known = [field.name for field in fields(Options)]
    for name in options:
        if name not in known:
            near = get_close_matches(name, {*_ARGUMENTS, *known} - {name}, n=1)
            hint = f"the nearest is {near[0]}" if near else f"there are {', '.join(known)}"
            raise UsageError(f"there is no option {name}; {hint}")
    options = {"device": "auto"} | (FULL if full else {}) | options
    options["device"] = solving_device(pick_device(options["device"], source))
    return Options(**options)


def analyze_model(
    model: Model,
    options: Options,
    journal: Journal | None = None,
    progress: Callable[[Progress], None] | None = None,
    shards: Mapping[str, Shard] = MappingProxyType({}),
    ranks: Ranks | None = None,
) -> Analysis:
    """`analyze` for a model that is already open.

    Args:
        model: model whose matrices are measured.
        options: options that say what is computed, and how.
        journal: file of finished rows while this runs; discarded at the end.
        progress: function that is called after each matrix.
        shards: tensors of the model that are spread over the processes, by name.
        ranks: processes that share the work; all by default.

    Raises:
        UsageError: other ranks do not call this, or call it with another model.
    """
    started = time.perf_counter()
    ranks = ranks or launched_ranks()
    agree(ranks, model, options, shards)
    kept = ranks.of_first(lambda: list(journal.load().values()) if journal else [])  # before any rank writes
    done = {result.row.name: result for result in kept}
    todo = [matrix for matrix in model if matrix.name not in done]
    whole, spread = shared_out(todo, shards, ranks)
    own = [*whole, *chain.from_iterable(spread[ranks.rank :: ranks.size])]
    total, spent = sum(matrix.cost for matrix in own) or 1.0, 0.0
    costs, finished = {matrix.name: matrix.cost for matrix in own}, len(done)
    if journal:
        journal.open(ranks.rank)

    def measured(_index: int, result: Measured) -> None:
        nonlocal spent, finished
        if journal:
            journal.add(result)
        spent += costs[result.row.name]
        finished += 1
        if progress:
            progress(Progress(finished, len(done) + len(own), spent / total, result.row))

    try:
        found = results_of_all(whole, spread, shards, ranks, lambda part: measure_all(part, options, measured))
    finally:
        if journal:
            journal.close()
    by_name = done | {result.row.name: result for result in found}
    if journal:
        journal.discard()
    results = [by_name[matrix.name] for matrix in model]
    return Analysis(
        label=model.label,
        rows=tuple(result.row for result in results),
        options=options,
        eigenvalues={r.row.name: r.eigenvalues for r in results if r.eigenvalues is not None},
        permuted={r.row.name: r.permuted for r in results if r.permuted is not None},
        meta={"htsr": __version__, "seconds": time.perf_counter() - started, "ranks": ranks.size},
    )


def describe(
    source: Source,
    *,
    revision: str | None = None,
    against: Source | None = None,
    base: Source | None = None,
    where: Filter | None = None,
) -> Model:
    """The weight matrices of a model, without reading any: names, shapes, roles, blocks.

    Args:
        source: model, file, folder or hub id as `analyze` takes it.
        revision: branch, tag or commit of a hub id.
        against: second model; the matrices are then the differences of the two.
        base: source of an adapter's base model, for the matrices of base + ΔW; ``auto`` for the base that it names.
        where: filter of the matrices that are wanted; all by default.

    Raises:
        SourceError: the source cannot be read at all.
        UsageError: no matrix passes the filter, or `base` is given without an adapter or `revision` for a local path.

    Examples:
        >>> import htsr, torch
        >>> model = htsr.describe(torch.nn.TransformerEncoderLayer(d_model=8, nhead=2, dim_feedforward=16))
        >>> for matrix in model:
        ...     print(matrix.name, matrix.role, matrix.shape)
        self_attn.in_proj_weight[q] attn.q (8, 8)
        self_attn.in_proj_weight[k] attn.k (8, 8)
        self_attn.in_proj_weight[v] attn.v (8, 8)
        self_attn.out_proj attn.o (8, 8)
        linear1 mlp.up (16, 8)
        linear2 mlp.down (8, 16)
    """
    return open_model(source, revision=revision, against=against, base=base).filtered(as_filter(where))
