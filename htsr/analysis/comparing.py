"""Compare two models matrix by matrix: every metric of both, how far the weights are apart, and which way.

comparison = htsr.compare("base", "fine-tuned", directions=10)
comparison.to_pandas()
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from htsr.analysis.analyze import FULL, Progress, analyze_model, make_options
from htsr.analysis.comparison import Comparison, Pair
from htsr.analysis.devices import device_of
from htsr.analysis.matching import match, of_one_shape, split_alike
from htsr.analysis.pairs import Change, WeightPair, changes
from htsr.analysis.result import Analysis
from htsr.analysis.saving import is_saved
from htsr.analysis.sharing import launched_ranks
from htsr.arrays import Array, Vector
from htsr.errors import MatrixError, SourceError, UsageError
from htsr.matrices.models import Filter, Model, WeightMatrix, as_filter
from htsr.matrices.positions import Position
from htsr.matrices.sources import Source, is_adapter, open_model
from htsr.ranks import Ranks
from htsr.spectra.bulk import jensen_shannon_distance
from htsr.spectra.metrics import LayerMetrics, Options
from htsr.spectra.subspaces import Subspace
from htsr.spectra.tail import FitMethod

logger = logging.getLogger(__name__)

FIT: FitMethod = "hill"  # separates the exponents of one matrix in two models better than ks: reports/estimators
_DECISIVE = ("fit", "xmin", "xmax", "windows")  # options under which α is another number

_DRAWN = {"gof": ("gof_p",), "bootstrap": ("alpha_low", "alpha_high")}  # metrics by the number of draws behind them


def compare(
    a: Source | Analysis,
    b: Source | Analysis,
    *,
    base: Source | None = None,
    where: Filter | None = None,
    directions: Subspace | None = None,
    full: bool = False,
    distributed: bool = True,
    **options: Any,
) -> Comparison:
    """Compare two models, or two saved analyses of them.

    Matrices are matched by name; where the two models have different names (a GGUF file and its original, experts one
    by one or in a stack), by role and block. However the two store a matrix, it is compared as one: rows that
    llama.cpp's converter has permuted are put back, a fused tensor is split where one of the two tells how, and one
    that is stored transposed (GPT-2's Conv1D) is turned. Where the order of rows is not known there is no distance, and
    a note says so.

    Args:
        a: first model: a source as `htsr.analyze` takes it, an `Analysis`, or the path of a saved one (.npz).
        b: second model, likewise.
        base: source of the base model of an adapter among the two, which is then compared as base + ΔW. Beside a model
            the default is ``auto``, the base that the adapter names; two adapters are compared as their ΔW.
        where: filter of the matrices that are wanted, also in a finished analysis; all by default.
        directions: number of leading singular vectors that are compared, ``"erg"`` for those of the first model's
            effective correlation space, ``"tail"`` for those of its power-law tail by ``ks``; None for none.
        full: whether to add bulk, permuted weights and alternatives to the power law.
        distributed: whether the ranks of `accelerate launch` or `torchrun` share the matrices.
        **options: options as in `htsr.analyze`, but ``hill`` is the default of `fit`: its α, an index of one shape,
            tells two models apart where that of ``ks`` does not. Beside an `Analysis`, its own options are the default.

    Returns:
        A `Comparison`. It has distances and directions only where both are models, not analyses.

    Raises:
        SourceError: a model or saved analysis cannot be read, or the two have no matrix of one shape in common.
        UsageError: an option has no meaning, no matrix passes the filter, a base is given and none of the two is an
            adapter, or the two were fitted in ways that give different numbers.

    Examples:
        >>> import htsr, torch
        >>> base = {"layers.0.mlp.up_proj.weight": torch.randn(40, 40, generator=torch.Generator().manual_seed(0))}
        >>> tuned = {name: 2 * W for name, W in base.items()}
        >>> (pair,) = htsr.compare(base, tuned, directions=5, null=False)
        >>> round(pair.distance.relative, 6), round(pair.distance.cosine, 6)
        (1.0, 1.0)
        >>> round(pair.directions.overlap_left, 6), pair.directions.intruders  # nor do the directions
        (1.0, 0)
        >>> abs(pair.a.alpha - pair.b.alpha) < 1e-9  # α does not feel the scale
        True
    """
    check_directions(directions)
    given = [saved_or_source(x) for x in (a, b)]
    settings = options_beside(given, full=full, **options)
    sides = opened_together(given, as_filter(where), base)
    ranks = launched_ranks(distributed)
    analyses = [side if isinstance(side, Analysis) else analyze_model(side, settings, ranks=ranks) for side in sides]
    models = [side if isinstance(side, Model) else None for side in sides]
    return compare_analyses(analyses[0], analyses[1], models[0], models[1], directions=directions, ranks=ranks)


def check_directions(directions: object) -> None:
    """Refuse what names no leading directions.

    Args:
        directions: what `compare` was given.

    Raises:
        UsageError: it is neither None nor ``erg`` nor ``tail`` nor a positive number.
    """
    number = isinstance(directions, int) and not isinstance(directions, bool) and directions > 0
    if not (directions is None or directions in ("erg", "tail") or number):
        raise UsageError(f"directions is erg, tail or a number of leading directions, not {directions!r}")


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
    theirs: dict[str, Any] = {"fit": FIT}
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


def opened_together(
    given: Sequence[Source | Analysis], where: Filter, base: Source | None = None
) -> list[Model | Analysis]:
    """Two sides of a comparison, with the wanted matrices of each; what `where` names need be in one of them only.

    Args:
        given: the two models, each a source or a finished analysis.
        where: filter of the matrices that are wanted.
        base: source of the base model of an adapter among the two; None as in `compare`.

    Raises:
        SourceError: a source cannot be read.
        UsageError: none of the sides has a pattern or block of the filter, nothing is left of one side, or there is a
            `base` and no adapter.
    """
    adapters = [not isinstance(side, Analysis) and is_adapter(side) for side in given]
    if base is not None and not any(adapters):
        raise UsageError("a base belongs to an adapter, and neither of the two is one")
    if base is None and any(adapters) and not all(adapters):
        beside = given[adapters.index(False)]
        of_changes = isinstance(beside, Analysis) and any(row.kind == "adapter" for row in beside)
        base = None if of_changes else "auto"
    sides: list[Model | Analysis] = [
        side if isinstance(side, Analysis) else open_model(side, base=base if adapted else None)
        for side, adapted in zip(given, adapters, strict=True)
    ]
    if isinstance(sides[0], Model) and isinstance(sides[1], Model):
        sides = [*split_alike(sides[0], sides[1])]
    return filtered_together(sides, where)


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
    a: Analysis,
    b: Analysis,
    model_a: Model | None = None,
    model_b: Model | None = None,
    *,
    directions: Subspace | None = None,
    ranks: Ranks | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Comparison:
    """`compare` for analyses that exist.

    Args:
        a: analysis of the first model.
        b: analysis of the second model.
        model_a: the first model, which is read once more to compare weights; None for no distances and directions.
        model_b: the second model, likewise.
        directions: leading directions that are compared, as in `compare`.
        ranks: processes that share the pairs of matrices; each of them calls this, with the same analyses.
        progress: function that is called after each pair whose weights are compared.

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
    if directions is not None and (model_a is None or model_b is None):
        logger.warning("a saved analysis has no weights: there are no directions")
    unlike: dict[str, Any] = dict.fromkeys(_drawn_otherwise(a, b))
    changed = _changes(alike, model_a, model_b, a.options, directions, ranks or Ranks(), progress)
    pairs = [
        Pair(
            name=x.name,
            a=replace(x, **unlike),
            b=replace(y, **unlike),
            distance=change.distance,
            esd_distance=_esd_distance(a.eigenvalues.get(x.name), b.eigenvalues.get(y.name)),
            directions=change.directions,
            heads=change.heads,
            notes=change.notes,
        )
        for (x, y), change in zip(alike, changed, strict=True)
    ]
    seen_a, seen_b = {x.name for x, _ in matches}, {y.name for _, y in matches}
    paired = {x.name for x, _ in alike}
    return Comparison(
        a,
        b,
        tuple(pairs),
        tuple(row.name for row in a if row.name not in seen_a),
        tuple(row.name for row in b if row.name not in seen_b),
        tuple(row.name for row in a if row.name in seen_a - paired),
        directions,
    )


def _changes(
    alike: Sequence[tuple[LayerMetrics, LayerMetrics]],
    model_a: Model | None,
    model_b: Model | None,
    options: Options,
    directions: Subspace | None,
    ranks: Ranks,
    progress: Callable[[Progress], None] | None,
) -> list[Change]:
    """How the weights differ of all pairs of rows, computed where the spectra of both have just been."""
    if model_a is None or model_b is None:
        return [Change()] * len(alike)
    if differ := ranks.difference([f"directions {directions}"]):
        raise UsageError(f"the processes do not compare alike: {differ}")
    weights_a, weights_b = ({matrix.name: matrix for matrix in model} for model in (model_a, model_b))
    pairs = [WeightPair(weights_a[x.name], weights_b[y.name]) for x, y in alike]
    rows = {x.name: x for x, _ in alike}

    def measured(done: int, total: int, fraction: float, name: str) -> None:
        if progress:
            progress(Progress(done, total, fraction, rows[name]))

    return changes(pairs, directions, options.device, options.seed, ranks, measured)


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
