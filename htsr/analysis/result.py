"""What an analysis has found: a row of numbers for each matrix, and the spectra they are of."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from htsr.analysis.saving import read_parts, write_parts
from htsr.analysis.standouts import Standout, standouts
from htsr.analysis.tables import means_table, metrics_table, standouts_table
from htsr.arrays import Vector
from htsr.errors import UsageError
from htsr.results import Record, Table, Tabular, by_key, column_types, counted
from htsr.spectra.metrics import NUMERIC, LayerMetrics, Options
from htsr.spectra.notes import CAUTION

if TYPE_CHECKING:
    import pandas

    from htsr.reporting.analysis_page import AnalysisPage

LOGGED = ("alpha", "sigma", "trace_log", "stable_rank", "entropy", "log_norm")
"""What trackers see of an analysis by default."""


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
        matrices = counted(len(self), "matrix", "matrices")
        return f"<Analysis of {self.label!r}: {matrices}, {means['fitted']} fitted by {self.options.fit}{alpha}>"

    def _repr_html_(self) -> str:
        from htsr.reporting.html import table_html

        return table_html(repr(self)[1:-1], self.tables()[1])

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
        return by_key(self.rows, key, self.label)

    def summary(self) -> dict[str, float]:
        """Mean of every metric over the matrices that have it; ``matrices`` and ``fitted`` are numbers of matrices."""
        return means_of(self.rows)

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
        return {group: means_of(rows) for group, rows in groups.items()}

    def log_values(self, metrics: Sequence[str] = LOGGED, by: str = "role") -> dict[str, float]:
        """What a tracker should see, as numbers by name: means of each group, and of the whole model.

        Every tracker takes such a dictionary: ``wandb.log``, ``trackio.log``, ``mlflow.log_metrics``,
        ``accelerator.log`` … The names are those of `SpectralMonitor`.

        Args:
            metrics: numeric fields of `LayerMetrics`; those that no matrix has are left out.
            by: field of `LayerMetrics` to group by: ``role``, ``block``, or ``name`` for every matrix.

        Returns:
            Dictionary of ``spectrum/METRIC/GROUP`` and ``spectrum/METRIC/all``.

        Raises:
            UsageError: there is no such field, or no such number.

        Examples:
            >>> import htsr, torch
            >>> analysis = htsr.analyze({"mlp.up_proj.weight": torch.diag(torch.arange(1.0, 31.0))}, null=False)
            >>> analysis.log_values(["norm"])
            {'spectrum/norm/mlp.up': 9455.0, 'spectrum/norm/all': 9455.0}
        """
        for metric in metrics:
            if metric not in NUMERIC:
                raise UsageError(
                    f"rows have no number {metric!r}; alpha, trace_log, stable_rank and log_norm are usual"
                )
        groups = {**self.summary_by(by), "all": self.summary()}
        return {
            f"spectrum/{metric}/{group}": means[metric]
            for group, means in groups.items()
            for metric in metrics
            if metric in means and group is not None
        }

    def standouts(self) -> tuple[Standout, ...]:
        """Where to look first: the matrices that stand out against their peers and against noise, the clearest first.

        Returns:
            One `Standout` for each; empty where none does.
        """
        return standouts(self.rows)

    def records(self) -> list[Record]:
        """One dictionary a row, with all fields of `LayerMetrics`."""
        return [asdict(row) for row in self.rows]

    def types(self) -> dict[str, type]:
        """The types of all columns."""
        return column_types(LayerMetrics)

    def tables(self) -> tuple[Table, ...]:
        """The short table of the rows, their means by role, and where to look first, if anything stands out."""
        tables = metrics_table(self.rows), means_table(self.summary_by("role"), self.summary())
        found = self.standouts()
        return (*tables, standouts_table(found)) if found else tables

    def facts(self) -> dict[str, Any]:
        """Model, options, meta, means of all matrices and by role, and what stands out."""
        return {
            "model": self.label,
            "options": asdict(self.options),
            "meta": dict(self.meta),
            "summary": self.summary(),
            "roles": self.summary_by("role"),
            "standouts": [asdict(standout) for standout in self.standouts()],
        }

    def remarks(self) -> tuple[str, ...]:
        """How many matrices in which time, and what notes on tails do not mean."""
        failed = sum(row.status != "ok" for row in self)
        problems = f", {failed} without a fit" if failed else ""
        matrices = counted(len(self), "matrix", "matrices")
        measured = f"{self.label}: {matrices}{problems} in {self.meta.get('seconds', 0):.1f} s"
        noted = any(kind in row.warning for row in self for kind in ("heavy tail", "light tail"))
        return (measured, CAUTION) if noted else (measured,)

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
        from htsr.reporting.analysis_page import analysis_document
        from htsr.reporting.html import write_document

        write_document(analysis_document(self._page()), Path(path))

    def _page(self) -> AnalysisPage:
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
            path: file to write, with the suffix .npz, which is not added.

        Raises:
            UsageError: the file has another suffix, or is one of a model.
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


_NOT_AVERAGED = {"rows", "columns", "M", "N", "pieces", "num_eigenvalues", "erg_crossing"}


def means_of(rows: Sequence[LayerMetrics]) -> dict[str, float]:
    """Mean of every metric over the `rows` that have it; ``matrices`` and ``fitted`` are numbers of rows."""
    means: dict[str, float] = {"matrices": len(rows), "fitted": sum(row.alpha is not None for row in rows)}
    for name in NUMERIC:
        values = [value for row in rows if (value := getattr(row, name)) is not None]
        if values and name not in _NOT_AVERAGED:
            means[name] = float(np.mean(values))
    return means
