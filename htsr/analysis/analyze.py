"""Analyze a model: every weight matrix a row of numbers.

    analysis = htsr.analyze("path/or/hub-id")
    analysis.summary()["alpha"]
    analysis.to_pandas()

Run as a module, also under `accelerate launch`, it is the `htsr analyze` command.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from difflib import get_close_matches
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from htsr._version import __version__
from htsr.analysis.execution import measure_all, pick_device, shared_out
from htsr.analysis.journal import Journal
from htsr.analysis.saving import read_parts, write_parts
from htsr.arrays import Vector
from htsr.errors import UsageError
from htsr.matrices.models import Filter, Model, as_filter
from htsr.matrices.sharded import Shard, in_rounds, open_live
from htsr.matrices.sources import Source, open_model
from htsr.ranks import Ranks
from htsr.spectra.measure import Measured
from htsr.spectra.metrics import NUMERIC, LayerMetrics, Options

if TYPE_CHECKING:
    import pandas

FULL = {"bulk": True, "permuted": True, "alternatives": True}


@dataclass(frozen=True)
class Progress:
    """How far an analysis is, after each matrix.

    Attributes:
        done: matrices finished (by this rank, plus those taken up from a journal).
        total: matrices this rank has to do, those included.
        fraction: share of the work done, by floating-point operations.
        row: the row just finished.
    """

    done: int
    total: int
    fraction: float
    row: LayerMetrics


@dataclass(frozen=True, repr=False)
class Analysis:
    """The rows of a model, in its order, with the spectra they were computed from.

    Attributes:
        label: path, hub id or class name of the model.
        rows: one `LayerMetrics` per matrix.
        options: what was computed, and how.
        eigenvalues: (K,) float64, ascending, by matrix name; matrices without a spectrum are missing.
        permuted: (K,) likewise, of the permuted matrices; empty where not asked for.
        meta: version, seconds, ranks.

    Iteration, `len` and ``analysis["name"]`` or ``analysis[0]`` go by rows.
    """

    label: str
    rows: tuple[LayerMetrics, ...]
    options: Options
    eigenvalues: Mapping[str, Vector]
    permuted: Mapping[str, Vector]
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        means = self.summary()
        alpha = f", mean alpha {means['alpha']:.3f}" if "alpha" in means else ""
        return (
            f"<Analysis of {self.label!r}: {len(self)} matrices, {means['fitted']} fitted by {self.options.fit}{alpha}>"
        )

    def _repr_html_(self) -> str:
        from htsr.reporting.html import summary_html

        return summary_html(self)

    def __iter__(self) -> Iterator[LayerMetrics]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, key: str | int) -> LayerMetrics: ...

    @overload
    def __getitem__(self, key: slice) -> tuple[LayerMetrics, ...]: ...

    def __getitem__(self, key: str | int | slice) -> LayerMetrics | tuple[LayerMetrics, ...]:
        """A row by name or position, or the rows of a slice.

        Raises:
            KeyError: no such name; the message has the nearest.
            TypeError: none of these.
        """
        if isinstance(key, (slice, int, np.integer)):
            return self.rows[key]
        if not isinstance(key, str):
            raise TypeError(f"rows go by name, position or slice, not by {type(key).__name__}")
        for row in self.rows:
            if row.name == key:
                return row
        near = get_close_matches(key, [row.name for row in self.rows], n=1, cutoff=0)
        raise KeyError(f"{self.label} has no matrix {key}" + "".join(f"; the nearest is {name}" for name in near))

    def summary(self) -> dict[str, float]:
        """Mean of every metric over the matrices that have it, and their number as ``matrices`` and ``fitted``."""
        return _means(self.rows)

    def summary_by(self, key: str) -> dict[Any, dict[str, float]]:
        """`summary` of the matrices of each group, in the model's order.

        Args:
            key: the field of `LayerMetrics` to group by: ``role``, ``block``, ``kind`` …

        Raises:
            UsageError: rows have no such field.
        """
        if key not in {f.name for f in fields(LayerMetrics)}:
            raise UsageError(f"rows have no {key!r} to group by; role and block are usual")
        groups: dict[Any, list[LayerMetrics]] = {}
        for row in self.rows:
            groups.setdefault(getattr(row, key), []).append(row)
        return {group: _means(rows) for group, rows in groups.items()}

    def to_pandas(self) -> pandas.DataFrame:
        """All rows as a table, one column per field; columns that are empty in every row are left out."""
        import pandas as pd

        frame = pd.DataFrame([asdict(row) for row in self.rows])
        keep = [c for c in frame.columns if c in ("block", "warning") or frame[c].notna().any()]
        return frame[keep]

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write the report: one self-contained HTML file. Needs the ``report`` extra.

        Args:
            path: of the file.

        Raises:
            HtsrError: it cannot be written.
            MissingDependencyError: plotly is not installed.
        """
        from htsr.reporting.html import write_report

        write_report(self, Path(path))

    def plot(self, name: str | None = None, *, metric: str = "alpha", ax: Any = None) -> Any:
        """Plot the ESD of the matrix `name` with its fit, or, without a name, a heat map of `metric` by block and role.

        Args:
            name: of a matrix.
            metric: a numeric field of `LayerMetrics`, for the heat map.
            ax: matplotlib axes to draw on; new ones by default.

        Returns:
            The matplotlib axes. Needs the ``report`` extra.
        """
        from htsr.reporting.plots import plot_esd, plot_heat_map

        return plot_heat_map(self, metric, ax) if name is None else plot_esd(self, name, ax)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write rows and spectra to one .npz file, by way of a temporary file.

        Args:
            path: of the file, taken as it is.

        Raises:
            HtsrError: it cannot be written.
        """
        spectra = {"eigenvalues": self.eigenvalues, "permuted": self.permuted}
        write_parts(Path(path), self.label, self.rows, self.options, spectra, self.meta)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Analysis:
        """Read what `save` wrote.

        Args:
            path: of the file.

        Raises:
            SourceError: not such a file, or a damaged one; the message says what does not fit.
        """
        return cls(**read_parts(Path(path)))


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
        against: analyze the difference to this model instead.
        base: for an adapter, analyze this base + ΔW; ``auto`` for the base that the adapter names.
        where: which matrices; all by default.
        full: also bulk, permuted weights and alternatives to the power law (several times slower).
        journal: keep finished rows in this file while running, and take up those that an interrupted run of the same
            analysis of the same weights has left there. Removed at the end.
        progress: called after each matrix.
        distributed: under `accelerate launch` or `torchrun` the ranks share the matrices, and each of them returns all
            rows: every rank has to call this, with the same model. False where one rank analyzes alone, or each of
            them its own model; a tensor that is sharded over the ranks then has a row that says so.
        **options: the fields of `htsr.Options`: fit, route, dtype, device (``auto`` is an accelerator where there is
            one), windows, bulk, permuted, alternatives, quality, bootstrap, seed …

    Returns:
        An `Analysis`. Matrices that cannot be analyzed have a row that says why.

    Raises:
        SourceError: the source cannot be read at all.
        UsageError: an option without meaning, a filter that nothing passes, a `base` without an adapter, a
            `revision` of a local path, or ranks that do not come or bring another model.

    Sources: HT-SR (Martin & Mahoney, JMLR 2021); SETOL (arXiv 2507.17912); of each number, see `LayerMetrics`.
    """
    settings = make_options(full=full, **options)
    model = open_model(source, revision=revision, against=against, base=base).filtered(as_filter(where))
    shards: Mapping[str, Shard] = {}
    if distributed and against is None and any(matrix.problem and matrix.problem[0] == "sharded" for matrix in model):
        live = open_live(source)  # type: ignore[arg-type]  # only a module has such
        model, shards = replace(model, matrices=live.matrices).filtered(as_filter(where)), live.shards
    kept = Journal(model, settings, Path(journal)) if journal else None
    return analyze_model(model, settings, kept, progress, shards, Ranks(distributed))


def make_options(*, full: bool = False, **options: Any) -> Options:
    """`Options` from keywords, the device picked.

    Args:
        full: also bulk, permuted weights and alternatives to the power law.
        **options: fields of `Options`; `device` is ``auto`` by default.

    Raises:
        UsageError: an unknown option.
    """
    options = {"device": "auto"} | (FULL if full else {}) | options
    options["device"] = pick_device(options["device"])
    try:
        return Options(**options)
    except TypeError as error:
        raise UsageError(f"no such option; there are {', '.join(f.name for f in fields(Options))}") from error


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
        model: whose matrices are measured.
        options: what is computed, and how.
        journal: where finished rows are kept while running; discarded at the end.
        progress: called after each matrix.
        shards: tensors of the model that are spread over the processes.
        ranks: who shares the work; all processes by default.

    Raises:
        UsageError: ranks do not come, or bring another model.
    """
    started = time.perf_counter()
    ranks = ranks or Ranks()
    ranks.agree(model, options, shards)
    kept = journal.load().values() if journal and ranks.rank == 0 else ()
    done = {result.row.name: result for result in ranks.gather(list(kept))}  # before any rank writes
    todo = [matrix for matrix in model if matrix.name not in done]
    whole, tensors = shared_out(todo, shards, ranks.rank, ranks.size)
    own = [*whole, *chain.from_iterable(tensors[ranks.rank :: ranks.size])]
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
        mine = measure_all(whole, options, measured)
        for parts in in_rounds(tensors, shards, ranks.rank, ranks.size):
            mine += measure_all(parts, options, measured)
    finally:
        if journal:
            journal.close()
    by_name = done | {result.row.name: result for result in ranks.gather(mine)}
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
        source: as for `analyze`, like the rest.
        revision: branch, tag or commit of a hub id.
        against: the difference to this model.
        base: for an adapter, this base + ΔW; ``auto`` for the base that the adapter names.
        where: which matrices; all by default.

    Raises:
        SourceError: the source cannot be read at all.
        UsageError: a filter that nothing passes, a `base` without an adapter, or a `revision` of a local path.
    """
    return open_model(source, revision=revision, against=against, base=base).filtered(as_filter(where))


_NOT_AVERAGED = {"rows", "columns", "M", "N", "pieces", "num_eigenvalues", "erg_crossing"}


def _means(rows: tuple[LayerMetrics, ...] | list[LayerMetrics]) -> dict[str, float]:
    means: dict[str, float] = {"matrices": len(rows), "fitted": sum(row.alpha is not None for row in rows)}
    for name in NUMERIC:
        values = [value for row in rows if (value := getattr(row, name)) is not None]
        if values and name not in _NOT_AVERAGED:
            means[name] = float(np.mean(values))
    return means
