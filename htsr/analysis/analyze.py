"""Analyze a model: every weight matrix a row of numbers.

    analysis = htsr.analyze("path/or/hub-id")
    analysis.summary()["alpha"]
    analysis.to_pandas()

`python -m htsr.analysis`, also under `accelerate launch`, is the `htsr analyze` command.
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
from htsr.analysis.execution import measure_all, pick_device
from htsr.analysis.journal import Journal
from htsr.analysis.saving import read_parts, write_parts
from htsr.analysis.sharing import agree, launched_ranks, results_of_all, shared_out
from htsr.analysis.tables import means_table, metrics_table
from htsr.arrays import Vector
from htsr.errors import UsageError
from htsr.matrices.models import Filter, Model, as_filter
from htsr.matrices.sharded import Shard, open_live
from htsr.matrices.sources import Source, open_model
from htsr.ranks import Ranks
from htsr.results import Record, Table, Tabular
from htsr.spectra.measure import Measured
from htsr.spectra.metrics import NUMERIC, LayerMetrics, Options
from htsr.spectra.notes import CAUTION

if TYPE_CHECKING:
    import pandas

    from htsr.reporting.html import Page

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


@dataclass(frozen=True, repr=False)
class Analysis(Tabular):
    """The rows of a model, in its order, with the spectra that they were computed from.

    Attributes:
        label: path, hub id or class name of the model.
        rows: one `LayerMetrics` for each matrix.
        options: options that say what was computed, and how.
        eigenvalues: spectra by matrix name, (K,) float64, ascending; matrices without a spectrum are missing.
        permuted: spectra of the permuted matrices, likewise (K,); empty where they were not asked for.
        meta: version of htsr, seconds that it took, number of ranks.

    Iteration, `len` and ``analysis["name"]`` or ``analysis[0]`` go by rows.

    Examples:
        >>> import htsr, torch
        >>> state = {f"layers.{i}.mlp.up_proj.weight": torch.diag(torch.arange(1.0, 31.0)) for i in (0, 1)}
        >>> analysis = htsr.analyze(state, null=False)
        >>> [row.name for row in analysis]
        ['layers.0.mlp.up_proj', 'layers.1.mlp.up_proj']
        >>> analysis[0].role, analysis[0].spectral_norm, analysis.eigenvalues["layers.0.mlp.up_proj"][:3].tolist()
        ('mlp.up', 900.0, [1.0, 4.0, 9.0])
        >>> analysis.summary()["norm"], list(analysis.summary_by("block"))
        (9455.0, [0, 1])
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
        from htsr.reporting.html import table_html

        return table_html(repr(self)[1:-1], self.tables()[-1])

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
            KeyError: no row has this name; the message has the nearest one.
            TypeError: the key is neither a name nor a position nor a slice.
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
        """Mean of every metric over the matrices that have it; ``matrices`` and ``fitted`` are numbers of matrices."""
        return _means(self.rows)

    def summary_by(self, key: str) -> dict[Any, dict[str, float]]:
        """`summary` of the matrices of each group, in the model's order.

        Args:
            key: field of `LayerMetrics` to group by: ``role``, ``block``, ``kind`` …

        Raises:
            UsageError: rows have no such field.
        """
        if key not in {f.name for f in fields(LayerMetrics)}:
            raise UsageError(f"rows have no {key!r} to group by; role and block are usual")
        groups: dict[Any, list[LayerMetrics]] = {}
        for row in self.rows:
            groups.setdefault(getattr(row, key), []).append(row)
        return {group: _means(rows) for group, rows in groups.items()}

    def records(self) -> list[Record]:
        """One dictionary a row, with all fields of `LayerMetrics`."""
        return [asdict(row) for row in self.rows]

    def tables(self) -> tuple[Table, ...]:
        """The short table of the rows, and their means by role."""
        return metrics_table(self.rows), means_table(self.summary_by("role"), self.summary())

    def facts(self) -> dict[str, Any]:
        """Model, options, meta, and means of all matrices and by role."""
        return {
            "model": self.label,
            "options": asdict(self.options),
            "meta": dict(self.meta),
            "summary": self.summary(),
            "roles": self.summary_by("role"),
        }

    def remarks(self) -> tuple[str, ...]:
        """How many matrices in which time, and what notes on tails do not mean."""
        failed = sum(row.status != "ok" for row in self)
        problems = f", {failed} without a fit" if failed else ""
        counted = f"{self.label}: {len(self)} matrices{problems} in {self.meta.get('seconds', 0):.1f} s"
        noted = any(kind in row.warning for row in self for kind in ("heavy tail", "light tail"))
        return (counted, CAUTION) if noted else (counted,)

    def to_pandas(self) -> pandas.DataFrame:
        """All rows as a table, one column per field; columns that are empty in every row are left out."""
        frame = super().to_pandas()
        keep = [c for c in frame.columns if c in ("block", "warning") or frame[c].notna().any()]
        return frame[keep]

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write the report: one self-contained HTML file. Needs the ``report`` extra.

        Args:
            path: file to write.

        Raises:
            HtsrError: the file cannot be written.
            MissingDependencyError: plotly is not installed.
        """
        from htsr.reporting.html import write_page

        write_page(self._page(), Path(path))

    def _page(self) -> Page:
        from htsr.analysis.report import page_of

        return page_of(self.label, self.rows, self.options, self.meta, self.tables(), self.eigenvalues, self.permuted)

    def plot(self, name: str | None = None, *, metric: str = "alpha", ax: Any = None) -> Any:
        """Plot the ESD of the matrix `name` with its fit, or, without a name, a heat map of `metric` by block and role.

        Args:
            name: name of a matrix; None for the heat map.
            metric: numeric field of `LayerMetrics` that the heat map shows.
            ax: matplotlib axes to draw on; new ones by default.

        Returns:
            The matplotlib axes. Needs the ``report`` extra.

        Raises:
            KeyError: no such matrix.
            UsageError: the matrix has no eigenvalues, or no matrix has the metric.
            MissingDependencyError: matplotlib is not installed.
        """
        from htsr.reporting.plots import plot_esd, plot_heat_map

        if name is not None:
            row, spectra = self[name], (self.eigenvalues, self.permuted)
            eigenvalues, permuted = (spectrum.get(row.name) for spectrum in spectra)
            return plot_esd(asdict(row), eigenvalues, permuted, xmax=self.options.xmax, ax=ax)
        if metric not in NUMERIC:
            raise UsageError(f"rows have no number {metric!r}; among others alpha, trace_log, stable_rank, log_norm")
        return plot_heat_map(self.records(), metric, ax=ax)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write rows and spectra to one .npz file, by way of a temporary file.

        Args:
            path: file to write; no suffix is added.

        Raises:
            HtsrError: the file cannot be written.
        """
        spectra = {"eigenvalues": self.eigenvalues, "permuted": self.permuted}
        write_parts(Path(path), self.label, self.rows, self.options, spectra, self.meta)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Analysis:
        """Read what `save` wrote.

        Args:
            path: file to read.

        Raises:
            SourceError: the file is not one that `save` wrote, or is damaged; the message says what is wrong.
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
        **options: fields of `htsr.Options`: fit, route, dtype, device (``auto`` is an accelerator where there is one),
            windows, bulk, permuted, alternatives, quality, bootstrap, gof, seed …

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
    settings = make_options(full=full, **options)
    model = open_model(source, revision=revision, against=against, base=base).filtered(as_filter(where))
    shards: Mapping[str, Shard] = {}
    if distributed and against is None and any(matrix.problem and matrix.problem[0] == "sharded" for matrix in model):
        live = open_live(source)  # type: ignore[arg-type]  # only a module has such
        model, shards = replace(model, matrices=live.matrices).filtered(as_filter(where)), live.shards
    kept = Journal(model, settings, Path(journal)) if journal else None
    return analyze_model(model, settings, kept, progress, shards, launched_ranks(distributed))


def make_options(*, full: bool = False, **options: Any) -> Options:
    """`Options` from keywords, with a device that exists.

    Args:
        full: whether to add bulk, permuted weights and alternatives to the power law.
        **options: fields of `Options`; `device` is ``auto`` by default.

    Raises:
        UsageError: there is no such option, or no such device.
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


_NOT_AVERAGED = {"rows", "columns", "M", "N", "pieces", "num_eigenvalues", "erg_crossing"}


def _means(rows: tuple[LayerMetrics, ...] | list[LayerMetrics]) -> dict[str, float]:
    means: dict[str, float] = {"matrices": len(rows), "fitted": sum(row.alpha is not None for row in rows)}
    for name in NUMERIC:
        values = [value for row in rows if (value := getattr(row, name)) is not None]
        if values and name not in _NOT_AVERAGED:
            means[name] = float(np.mean(values))
    return means
