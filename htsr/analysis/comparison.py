"""Compare two models matrix by matrix: every metric of both, and how far the weights are apart.

comparison = htsr.compare("base", "fine-tuned")
comparison.to_pandas()
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from htsr.analysis.analyze import FULL, analyze_model, make_options
from htsr.analysis.devices import device_of
from htsr.analysis.distance import Distance, distance
from htsr.analysis.matching import match, of_one_shape
from htsr.analysis.result import Analysis
from htsr.analysis.saving import is_saved
from htsr.analysis.sharing import launched_ranks
from htsr.analysis.tables import changes_table, pairs_table
from htsr.arrays import Array, Vector
from htsr.errors import MatrixError, SourceError, UsageError
from htsr.matrices.models import Filter, Model, WeightMatrix, as_filter
from htsr.matrices.positions import Position
from htsr.matrices.sources import Source, open_model
from htsr.results import Record, Table, Tabular, column_types
from htsr.spectra.attempts import attempted
from htsr.spectra.bulk import jensen_shannon_distance
from htsr.spectra.metrics import NUMERIC, LayerMetrics, Options

logger = logging.getLogger(__name__)

_DECISIVE = ("fit", "xmin", "xmax", "windows")  # options under which α is another number

_DRAWN = {"gof": ("gof_p",), "bootstrap": ("alpha_low", "alpha_high")}  # metrics by the number of draws behind them


@dataclass(frozen=True, repr=False)
class Pair:
    """One matrix in both models.

    Attributes:
        name: name of the matrix in the first model.
        a: row of the matrix in the first model, without metrics that the two drew with another number or seed.
        b: row of the matrix in the second model, likewise.
        distance: distance between the weights; None for saved analyses, where one matrix is zero, and where one is
            stored transposed.
        esd_distance: Jensen-Shannon distance between the ESDs, in [0, √ln 2]; None where their sizes differ, or one is
            missing or zero.
    """

    name: str
    a: LayerMetrics
    b: LayerMetrics
    distance: Distance | None
    esd_distance: float | None

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
    """

    a: Analysis
    b: Analysis
    pairs: tuple[Pair, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    reshaped: tuple[str, ...] = ()

    def __repr__(self) -> str:
        alpha = self.summary().get("alpha")
        means = f", mean alpha {alpha[0]:.3f} and {alpha[1]:.3f}" if alpha else ""
        return f"<Comparison of {self.a.label!r} and {self.b.label!r}: {len(self)} matrices in both{means}>"

    def _repr_html_(self) -> str:
        from htsr.reporting.figures import LABELS
        from htsr.reporting.html import table_html

        return table_html(repr(self)[1:-1], changes_table(self.summary(), LABELS))

    def __iter__(self) -> Iterator[Pair]:
        return iter(self.pairs)

    def __len__(self) -> int:
        return len(self.pairs)

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
        """One dictionary a pair: name, role, block, distances, and each metric as ``m_a``, ``m_b`` and ``m_delta``.

        Distances and metrics that no matrix has are left out.
        """
        rows = [row for pair in self.pairs for row in (pair.a, pair.b)]
        metrics = [name for name in NUMERIC if any(getattr(row, name) is not None for row in rows)]
        distances = [f.name for f in fields(Distance)] if any(pair.distance for pair in self.pairs) else []
        return [_record(pair, distances, metrics) for pair in self.pairs]

    def types(self) -> dict[str, type]:
        """The types of all columns: of metrics as in an `Analysis`; distances and differences are floats."""
        kinds = column_types(LayerMetrics)
        of_metrics = {f"{name}_{side}": kinds[name] for name in NUMERIC for side in "ab"}
        differences = {f"{name}_delta": float for name in NUMERIC}
        return {"block": int, "esd_distance": float, **column_types(Distance), **of_metrics, **differences}

    def tables(self) -> tuple[Table, ...]:
        """The pairs."""
        return (pairs_table(self.records()),)

    def facts(self) -> dict[str, Any]:
        """Both models, their options, means of both, and the names that are in one only or have another shape."""
        return {
            "a": self.a.label,
            "b": self.b.label,
            "options": _of_both(asdict(self.a.options), asdict(self.b.options)),
            "summary": {k: dict(zip(("a", "b", "delta"), v, strict=True)) for k, v in self.summary().items()},
            "only_a": self.only_a,
            "only_b": self.only_b,
            "reshaped": self.reshaped,
        }

    def remarks(self) -> tuple[str, ...]:
        """Means of α."""
        if not (alpha := self.summary().get("alpha")):
            return ()
        both = sum(pair.a.alpha is not None and pair.b.alpha is not None for pair in self)
        return (f"mean α {alpha[0]:.3f} → {alpha[1]:.3f} over {both} matrices",)


def compare(
    a: Source | Analysis,
    b: Source | Analysis,
    *,
    where: Filter | None = None,
    full: bool = False,
    distributed: bool = True,
    **options: Any,
) -> Comparison:
    """Compare two models, or two saved analyses of them.

    Matrices are matched by name; where the two models have different names (a GGUF file and its original, experts one
    by one or in a stack), by role and block. Rows that llama.cpp's converter has permuted are put back; where the
    permutation is not known, the row's warning says so.

    Args:
        a: first model: a source as `htsr.analyze` takes it, an `Analysis`, or the path of a saved one (.npz).
        b: second model, likewise.
        where: filter of the matrices that are wanted, also in a finished analysis; all by default.
        full: whether to add bulk, permuted weights and alternatives to the power law.
        distributed: whether the ranks of `accelerate launch` or `torchrun` share the matrices.
        **options: options as in `htsr.analyze`; beside an `Analysis`, its own options are the default.

    Returns:
        A `Comparison`. It has distances between weights only where both are models, not analyses.

    Raises:
        SourceError: a model or saved analysis cannot be read, or the two have no matrix of one shape in common.
        UsageError: an option has no meaning, no matrix passes the filter, or the two were fitted in ways that give
            different numbers.

    Examples:
        >>> import htsr, torch
        >>> base = {"layers.0.mlp.up_proj.weight": torch.randn(40, 40, generator=torch.Generator().manual_seed(0))}
        >>> tuned = {name: 2 * W for name, W in base.items()}
        >>> (pair,) = htsr.compare(base, tuned, null=False)
        >>> round(pair.distance.relative, 6), round(pair.distance.cosine, 6)
        (1.0, 1.0)
        >>> abs(pair.a.alpha - pair.b.alpha) < 1e-9  # α does not feel the scale
        True
    """
    given = [saved_or_source(x) for x in (a, b)]
    settings = options_beside(given, full=full, **options)
    sides = filtered_together([x if isinstance(x, Analysis) else open_model(x) for x in given], as_filter(where))
    analyses = [
        side if isinstance(side, Analysis) else analyze_model(side, settings, ranks=launched_ranks(distributed))
        for side in sides
    ]
    models = [side if isinstance(side, Model) else None for side in sides]
    return compare_analyses(analyses[0], analyses[1], models[0], models[1])


def saved_or_source(given: Source | Analysis) -> Source | Analysis:
    """The analysis that is saved at the path `given` (.npz), else what is given.

    Raises:
        SourceError: the file is not one that `Analysis.save` wrote.
    """
    if isinstance(given, (str, os.PathLike)) and is_saved(Path(given)):
        return Analysis.load(given)
    return given


def options_beside(sides: Sequence[Source | Analysis], *, full: bool = False, **options: Any) -> Options:
    """Options for two models that are compared: those of a finished analysis among them, where they are not given.

    Args:
        sides: the two models, each a source or a finished analysis.
        full: whether to add bulk, permuted weights and alternatives to the power law.
        **options: options as in `htsr.analyze`.

    Raises:
        UsageError: an option has no meaning, or gives other numbers than those of a saved analysis.
    """
    saved = [side for side in sides if isinstance(side, Analysis)]
    live = [side for side in sides if device_of(side)]
    theirs: dict[str, Any] = {}
    if saved:
        theirs = {f.name: getattr(saved[0].options, f.name) for f in fields(Options) if f.name != "device"}
    settings = make_options(*live[:1], **theirs | (FULL if full else {}) | options)
    for analysis in saved:
        _insist_on_one_fit(analysis.label, analysis.options, "this comparison", settings)
    return settings


def _insist_on_one_fit(a: str, options_a: Options, b: str, options_b: Options) -> None:
    for name in _DECISIVE:
        x, y = getattr(options_a, name), getattr(options_b, name)
        if x != y:
            raise UsageError(f"{a} was analyzed with {name} {x}, {b} with {name} {y}: their numbers do not compare")


def filtered_together(sides: Sequence[Model | Analysis], where: Filter) -> list[Model | Analysis]:
    """The wanted matrices of each of `sides`; what `where` names need be in one of them only.

    Args:
        sides: the models or analyses to be compared.
        where: filter of the matrices that are wanted.

    Raises:
        UsageError: none of the sides has a pattern or block of the filter, or nothing is left of one side.
    """
    where.check([matrix for side in sides for matrix in _matrices(side)], " and ".join(side.label for side in sides))
    kept: list[Model | Analysis] = []
    for side in sides:
        if isinstance(side, Model):
            kept.append(side.filtered(where, checked=True))
            continue
        rows = tuple(row for row, matrix in zip(side.rows, _matrices(side), strict=True) if where(matrix))
        if side.rows and not rows:
            raise UsageError(f"no matrix of {side.label} passes the filter")
        kept.append(replace(side, rows=rows))
    return kept


def _matrices(side: Model | Analysis) -> Sequence[WeightMatrix]:
    """The matrices of a side, of an analysis those that its rows speak of, which nobody reads."""
    if isinstance(side, Model):
        return side.matrices

    def gone() -> Array:
        raise MatrixError("unreadable", "a saved analysis has no weights")

    return [
        WeightMatrix(
            name=row.name,
            shape=(row.rows or 0, row.columns or 0),
            pieces=row.pieces or 1,
            role=row.role,
            block=row.block,
            kind=row.kind,
            dtype=row.stored or "",
            load=gone,
            position=Position(row.name),
        )
        for row in side
    ]


def compare_analyses(
    a: Analysis, b: Analysis, model_a: Model | None = None, model_b: Model | None = None
) -> Comparison:
    """`compare` for analyses that exist.

    Args:
        a: analysis of the first model.
        b: analysis of the second model.
        model_a: the first model, which is read once more for the distances between weights; None for no distances.
        model_b: the second model, likewise.

    Raises:
        SourceError: the two have no matrix of one shape in common.
        UsageError: the analyses were made by different fits.
    """
    _insist_on_one_fit(a.label, a.options, b.label, b.options)
    if (versions := (a.meta.get("htsr"), b.meta.get("htsr")))[0] != versions[1]:
        logger.warning("the analyses are of htsr %s and %s, and numbers may have been mended in between", *versions)
    matches = match(a.rows, b.rows)
    if not matches:
        raise SourceError(f"{a.label} and {b.label} have no matrix in common")
    alike = [pair for pair in matches if of_one_shape(*pair)]
    if not alike:
        x, y = matches[0]
        raise SourceError(
            f"{a.label} and {b.label} have no matrix of one shape in common: {x.name} is {x.rows}×{x.columns} and "
            f"{y.rows}×{y.columns}"
        )
    weights = [{m.name: m for m in model} if model else {} for model in (model_a, model_b)]
    unlike: dict[str, Any] = dict.fromkeys(_drawn_otherwise(a, b))
    pairs = []
    for x, y in alike:
        esd_distance = _esd_distance(a.eigenvalues.get(x.name), b.eigenvalues.get(y.name))
        weight_distance = _distance_of(weights[0].get(x.name), weights[1].get(y.name), a.options.device)
        pairs.append(Pair(x.name, replace(x, **unlike), replace(y, **unlike), weight_distance, esd_distance))
    seen_a, seen_b = {x.name for x, _ in matches}, {y.name for _, y in matches}
    paired = {x.name for x, _ in alike}
    return Comparison(
        a,
        b,
        tuple(pairs),
        tuple(row.name for row in a if row.name not in seen_a),
        tuple(row.name for row in b if row.name not in seen_b),
        tuple(row.name for row in a if row.name in seen_a - paired),
    )


def _drawn_otherwise(a: Analysis, b: Analysis) -> list[str]:
    """Metrics that both have by other draws, whose differences would be those of the draws; a warning names them."""
    found: list[str] = []
    for option, metrics in _DRAWN.items():
        (x, seed_x), (y, seed_y) = ((getattr(side.options, option), side.options.seed) for side in (a, b))
        if x and y and (x, seed_x) != (y, seed_y):
            found += metrics
            logger.warning(
                "%s left out: %s was analyzed with %s %d and seed %d, %s with %s %d and seed %d",
                *(" and ".join(metrics), a.label, option, x, seed_x, b.label, option, y, seed_y),
            )
    return found


def _esd_distance(a: Vector | None, b: Vector | None) -> float | None:
    if a is None or b is None or a.size != b.size or min(a[-1], b[-1]) <= 0:
        return None
    return jensen_shannon_distance(a, b)


def _distance_of(a: WeightMatrix | None, b: WeightMatrix | None, device: str) -> Distance | None:
    """Distances, computed where the spectra of both have just been."""
    if a is None or b is None or (a.shape, a.pieces) != (b.shape, b.pieces):
        return None
    found = attempted(lambda: distance(a.read(), b.read(), device))
    if isinstance(found, MatrixError):
        logger.warning("%s has no distance: %s", a.name, found)
        return None
    return found


def _of_both(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """Options of two analyses, by side where they differ."""
    return {name: a[name] if a[name] == b[name] else {"a": a[name], "b": b[name]} for name in a}


def _record(pair: Pair, distances: Sequence[str], metrics: Sequence[str]) -> Record:
    a, b = pair.a, pair.b
    record: Record = {"name": pair.name, "name_b": b.name, "role": a.role, "block": a.block}
    record |= {"status_a": a.status, "status_b": b.status, "esd_distance": pair.esd_distance}
    record |= {name: getattr(pair.distance, name, None) for name in distances}
    for name in metrics:
        x, y = getattr(a, name), getattr(b, name)
        delta = None if x is None or y is None else float(y) - float(x)
        record |= {f"{name}_a": x, f"{name}_b": y, f"{name}_delta": delta}
    return record
