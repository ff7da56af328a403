"""What a comparison of two models has found: every metric of both, how far the weights are apart, and which way."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, overload

import numpy as np

from htsr.analysis.direction_rows import Heads, columns, heads_of, intruders, means, record
from htsr.analysis.distance import Distance
from htsr.analysis.result import Analysis
from htsr.analysis.tables import changes_table, pairs_table
from htsr.results import Record, Table, Tabular, by_key, column_types, counted
from htsr.spectra.direction_numbers import Directions
from htsr.spectra.metrics import NUMERIC, LayerMetrics
from htsr.spectra.subspaces import Subspace

_HEADS_OF = ("attn.q", "attn.k", "attn.v", "attn.o")


@dataclass(frozen=True, repr=False)
class Pair:
    """One matrix in both models.

    Attributes:
        name: name of the matrix in the first model.
        a: row of the matrix in the first model, without metrics that the two drew with another number or seed.
        b: row of the matrix in the second model, likewise.
        distance: distance between the weights; None for saved analyses, where one matrix is zero or not finite, and
            where the order of its rows is not known.
        esd_distance: Jensen-Shannon distance between the ESDs, in [0, √ln 2]; None where their sizes differ, or one is
            missing or zero.
        directions: leading singular vectors of the second matrix beside those of the first; None where they were not
            asked for, for saved analyses, and where there is no distance. Left vectors are those of the outputs,
            however the two are stored.
        heads: the same for each attention head of q, k, v and o; empty where the number of heads is not known.
        notes: what a reader of the distance and the directions should know.
    """

    name: str
    a: LayerMetrics
    b: LayerMetrics
    distance: Distance | None
    esd_distance: float | None
    directions: Directions | None = None
    heads: tuple[Directions, ...] = ()
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"<Pair {self.name!r}: alpha {self.a.alpha} and {self.b.alpha}, {self.distance}>"


@dataclass(frozen=True, repr=False)
class Comparison(Tabular):
    """Two models, matrix by matrix.

    Attributes:
        a: analysis of the first model.
        b: analysis of the second model.
        pairs: matrices that are in both models, in the order of the first.
        only_a: names of matrices that are in the first model only.
        only_b: names of matrices that are in the second model only.
        reshaped: names in the first model of matrices that have another shape in the second. They are no pair: α and
            most other numbers depend on the shape.
        directions: leading directions that were asked for; None where they were not.
    """

    a: Analysis
    b: Analysis
    pairs: tuple[Pair, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    reshaped: tuple[str, ...] = ()
    directions: Subspace | None = None

    def __repr__(self) -> str:
        alpha = self.summary().get("alpha")
        means = f", mean alpha {alpha[0]:.3f} and {alpha[1]:.3f}" if alpha else ""
        both = counted(len(self), "matrix", "matrices")
        return f"<Comparison of {self.a.label!r} and {self.b.label!r}: {both} in both{means}>"

    def _repr_html_(self) -> str:
        from htsr.reporting.figures import LABELS
        from htsr.reporting.html import table_html

        return table_html(repr(self)[1:-1], changes_table(self.summary(), LABELS))

    def __iter__(self) -> Iterator[Pair]:
        return iter(self.pairs)

    def __len__(self) -> int:
        return len(self.pairs)

    @overload
    def __getitem__(self, key: str | int) -> Pair: ...

    @overload
    def __getitem__(self, key: slice) -> tuple[Pair, ...]: ...

    def __getitem__(self, key: str | int | slice) -> Pair | tuple[Pair, ...]:
        """A pair by its name in the first model or its position, or the pairs of a slice.

        Raises:
            KeyError: no pair has this name; the message has the nearest one.
            TypeError: the key is neither a name nor a position nor a slice.
        """
        return by_key(self.pairs, key, f"the comparison of {self.label}")

    def summary(self) -> dict[str, tuple[float, float, float]]:
        """Metric by metric: mean in a, mean in b, mean difference b - a, over the matrices that have it in both."""
        table = {}
        for name in NUMERIC:
            both = [
                (x, y)
                for pair in self.pairs
                if (x := getattr(pair.a, name)) is not None and (y := getattr(pair.b, name)) is not None
            ]
            if both:
                x, y = np.array(both, dtype=np.float64).T
                table[name] = (float(x.mean()), float(y.mean()), float((y - x).mean()))
        return table

    @property
    def label(self) -> str:  # type: ignore[override]
        """Both models."""
        return f"{self.a.label} and {self.b.label}"

    def records(self) -> list[Record]:
        """One dictionary a pair: what it is, distances, directions, each metric as ``m_a``, ``m_b`` and ``m_delta``.

        Distances and metrics that no matrix has are left out, and directions that were not asked for.
        """
        rows = [row for pair in self.pairs for row in (pair.a, pair.b)]
        metrics = [name for name in NUMERIC if any(getattr(row, name) is not None for row in rows)]
        distances = [f.name for f in fields(Distance)] if any(pair.distance for pair in self.pairs) else []
        return [_record(pair, distances, metrics, directed=self.directions is not None) for pair in self.pairs]

    def types(self) -> dict[str, type]:
        """The types of all columns: of metrics as in an `Analysis`; distances and differences are floats."""
        kinds = column_types(LayerMetrics)
        of_metrics = {f"{name}_{side}": kinds[name] for name in NUMERIC for side in "ab"}
        differences = {f"{name}_delta": float for name in NUMERIC}
        return {"block": int, "esd_distance": float, **column_types(Distance), **columns(), **of_metrics, **differences}

    def tables(self) -> tuple[Table, ...]:
        """The pairs."""
        return (pairs_table(self.records()),)

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write the page of both models: one self-contained HTML file. Needs the ``report`` extra.

        Args:
            path: file to write.

        Raises:
            HtsrError: the file cannot be written.
            MissingDependencyError: plotly is not installed.
        """
        from htsr.analysis.comparison_report import comparison_page
        from htsr.reporting.comparison_page import write_comparison

        pairs = [(pair.name, pair.b.name, pair.directions) for pair in self.pairs]
        apart = {"in the first only": self.only_a, "in the second only": self.only_b, "of another shape": self.reshaped}
        counts = {reason: len(names) for reason, names in apart.items()}
        page = comparison_page(self, self.a, self.b, pairs, self.summary(), self.heads, counts)
        write_comparison(page, Path(path))

    def plot(self, name: str | None = None, *, metric: str = "relative", ax: Any = None) -> Any:
        """Plot both ESDs of the matrix `name`, or, without a name, a heat map of a column by block and role.

        Args:
            name: name of a matrix in the first model; None for the heat map.
            metric: column of numbers that the heat map shows, as ``alpha_delta`` or ``overlap_left``.
            ax: matplotlib axes to draw on; new ones by default.

        Returns:
            The matplotlib axes. Needs the ``report`` extra.

        Raises:
            KeyError: no such matrix is in both.
            UsageError: the matrix has no eigenvalues, or no pair has the number.
            MissingDependencyError: matplotlib is not installed.
        """
        from htsr.reporting.plots import plot_heat_map, plot_two_esds

        if name is None:
            return plot_heat_map(self.records(), metric, ax=ax)
        other = {pair.name: pair.b.name for pair in self.pairs}[name]
        spectra = self.a.eigenvalues.get(name), self.b.eigenvalues.get(other)
        return plot_two_esds(name, *spectra, (self.a.label, self.b.label), ax=ax)

    @property
    def heads(self) -> Heads:
        """The attention heads of all pairs: rows, tables and `to_pandas` like every result."""
        return heads_of(self.label, self.pairs)

    def facts(self) -> dict[str, Any]:
        """Both models, their options, means of both, and the names that are in one only or have another shape.

        Where directions were asked for: means of their columns, the intruder dimensions, and the rows of heads.
        """
        return {
            "a": self.a.label,
            "b": self.b.label,
            "options": _of_both(asdict(self.a.options), asdict(self.b.options)),
            "summary": {k: dict(zip(("a", "b", "delta"), v, strict=True)) for k, v in self.summary().items()},
            "only_a": self.only_a,
            "only_b": self.only_b,
            "reshaped": self.reshaped,
        } | (self._direction_facts() if self.directions is not None else {})

    def _direction_facts(self) -> dict[str, Any]:
        return {
            "directions": {"k": self.directions, "means": means(self._directions())},
            "intruders": [row for pair in self.pairs for row in intruders(pair.name, pair.directions)],
            "heads": self.heads.records(),
        }

    def _directions(self) -> list[Directions]:
        return [pair.directions for pair in self.pairs if pair.directions is not None]

    def remarks(self) -> tuple[str, ...]:
        """Means of α and of the directions, and for which heads there are no numbers."""
        said = []
        if alpha := self.summary().get("alpha"):
            both = sum(pair.a.alpha is not None and pair.b.alpha is not None for pair in self)
            over = counted(both, "matrix", "matrices")
            said.append(f"mean α ({self.a.options.fit}) {alpha[0]:.3f} → {alpha[1]:.3f} over {over}")
        if found := self._directions():
            said.append(_in_words(found))
        if any(p.directions and not p.heads and p.a.role.endswith(_HEADS_OF) for p in self):
            said.append(
                "the number of attention heads is not known for every q, k, v and o: those have no rows of heads"
            )
        return tuple(said)


def _in_words(found: Sequence[Directions]) -> str:
    """Means of directions, each beside its null, in a sentence."""
    mean = means(found)
    left, right = (_beside_null(mean, f"overlap_{side}", ".4f") for side in ("left", "right"))
    count, where = sum(one.intruders for one in found), sum(one.intruders > 0 for one in found)
    return (
        f"mean overlap of the leading directions {left} left and {right} right (in brackets: a Gaussian change of the "
        f"same norm); {counted(count, 'intruder dimension', 'intruder dimensions')} in "
        f"{where} of {counted(len(found), 'matrix', 'matrices')}"
    )


def _beside_null(mean: dict[str, float], name: str, form: str) -> str:
    null = mean.get(f"{name}_null")
    return f"{mean[name]:{form}}" + ("" if null is None else f" ({null:{form}})")


def _of_both(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """Options of two analyses, by side where they differ."""
    return {name: a[name] if a[name] == b[name] else {"a": a[name], "b": b[name]} for name in a}


def _record(pair: Pair, distances: Sequence[str], metrics: Sequence[str], directed: bool) -> Record:
    a, b = pair.a, pair.b
    row: Record = {"name": pair.name, "name_b": b.name, "role": a.role, "block": a.block}
    row |= {"status_a": a.status, "status_b": b.status, "note": "; ".join(pair.notes)}
    row |= {"esd_distance": pair.esd_distance} | {name: getattr(pair.distance, name, None) for name in distances}
    row |= record(pair.directions) if directed else {}
    for name in metrics:
        x, y = getattr(a, name), getattr(b, name)
        delta = None if x is None or y is None else float(y) - float(x)
        row |= {f"{name}_a": x, f"{name}_b": y, f"{name}_delta": delta}
    return row
