"""Which matrices to train: those with the most signal above noise, the same share of each role.

selection = htsr.select("org/model", top=0.25)
print(selection.export("axolotl"))

That is the idea of Spectrum (arXiv 2406.06623), with three differences. The edge of noise is that of Marchenko and
Pastur, σ(√N + √M): Spectrum's lacks the √N, so all of a matrix of noise is signal there. The ratio is not divided by
the largest singular value, which would change it with the units of the weights. And every score is the distance from
what one of 100 matrices of noise of the same shape passes, so that a matrix without signal is not taken, however few
its role has.

`htsr.spectra.signal` has the scores. Those but ``snr`` are ours; which of them all is best for a task is not known.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Protocol, TypeAlias, get_args, runtime_checkable

import numpy as np

from htsr.analysis import training_lists
from htsr.analysis.analyze import analyze_model, make_options
from htsr.analysis.loaded_names import loaded_names
from htsr.analysis.result import Analysis
from htsr.errors import MatrixError, UsageError
from htsr.matrices.models import Filter, as_filter
from htsr.matrices.patterns import matches, require
from htsr.matrices.roles import role_of, whole_name
from htsr.matrices.sources import Source, open_model
from htsr.results import Column, Record, Table, Tabular, column_types, counted, tabulate
from htsr.spectra.metrics import LayerMetrics
from htsr.spectra.signal import SIGNALS

logger = logging.getLogger(__name__)

By: TypeAlias = Literal["snr", "alpha", "erg", "outliers", "stable_rank"]
Tool: TypeAlias = Literal["peft", "axolotl", "spectrum", "regex"]


@runtime_checkable
class OutlierShares(Protocol):
    """What is read of `htsr.Outliers`."""

    @property
    def label(self) -> str:
        """Name of the model."""

    @property
    def rows(self) -> Sequence[Any]:
        """One row for each matrix, with its name, role, block and parameters."""

    def of_matrices(self, threshold: float) -> dict[str, float]:
        """Share of outliers in each matrix, by name.

        Args:
            threshold: threshold τ.
        """


@dataclass(frozen=True)
class SelectionRow:
    """One stored tensor, and whether it trains. Parts of a fused tensor are one row, with the means of their numbers.

    Attributes:
        name: name of the tensor, without ``.weight``; of a checkpoint, as the model has it that transformers loads.
        role: role of the tensor, within which scores are compared.
        block: index of its block; None outside of all blocks.
        parameters: number of entries.
        side: smaller side of its matrices; None where only activations are known.
        value: number that the selection goes by; None where there is none.
        null: bound that this number of Gaussian noise of that shape passes in about one of 100 matrices.
        score: distance of the two, larger for more signal (`htsr.spectra.signal`).
        place: place among the scores of its role, 1 for the first to train; None without a score.
        of: number of scores in its role.
        selected: whether it trains.
        note: why it has no score, or does not train in spite of its place.
        stacked: whether it is a stack of one matrix for each expert.
    """

    name: str
    role: str
    block: int | None
    parameters: int
    side: int | None = None
    value: float | None = None
    null: float | None = None
    score: float | None = None
    place: int | None = None
    of: int | None = None
    selected: bool = False
    note: str = ""
    stacked: bool = False


@dataclass(frozen=True, repr=False)
class Selection(Tabular):
    """Which matrices of a model train.

    Attributes:
        label: name of the model.
        rows: one `SelectionRow` for each stored tensor, in the model's order.
        by: what the selection goes by.
        top: share of each role that trains.
        reverse: whether those with the least signal were taken.

    Examples:
        >>> import htsr, numpy as np
        >>> random = np.random.default_rng(0)
        >>> state = {f"layers.{i}.mlp.up_proj.weight": random.standard_normal((40, 80)) for i in range(4)}
        >>> state["layers.2.mlp.up_proj.weight"] += 1.0  # one direction above the noise
        >>> selection = htsr.select(state, top=0.5)
        >>> selection.names, [row.value > 0 for row in selection.rows]
        (['layers.2.mlp.up_proj'], [False, False, True, False])
    """

    label: str
    rows: tuple[SelectionRow, ...]
    by: By
    top: float
    reverse: bool = False

    def __repr__(self) -> str:
        return f"<Selection of {self.label!r}: {len(self.names)} of {len(self.rows)} matrices by {self.by}>"

    @property
    def names(self) -> list[str]:
        """Names of the tensors that train, without ``.weight``."""
        return [row.name for row in self.rows if row.selected]

    def peft(self, rank: int = 8) -> dict[str, Any]:
        """Arguments of PEFT's ``LoraConfig``: adapters on what is selected, and on nothing else.

        Args:
            rank: rank of a uniform adapter on all candidates. The selected of each role share its parameters, so the
                quarter of a role has four times this rank, and no more than the smaller side of its matrices.

        Returns:
            ``r``, ``lora_alpha``, ``target_modules``, ``rank_pattern``, ``alpha_pattern``, for stacked experts
            ``target_parameters``, and ``exclude_modules`` where the name of a selected module ends that of another.

        Raises:
            UsageError: `rank` is below 1, or nothing is selected.
        """
        if rank < 1:
            raise UsageError(f"a rank is at least 1, not {rank}")
        self._require_some()
        chosen = [row for row in self.rows if row.selected]
        taken = Counter(row.role for row in chosen)
        wanted = {row.name: round(rank * max(row.of or 1, taken[row.role]) / taken[row.role]) for row in chosen}
        ranks = {row.name: min(wanted[row.name], row.side or wanted[row.name]) for row in chosen}
        others = [row.name for row in self.rows if not row.selected]
        return training_lists.peft(ranks, [row.name for row in chosen if row.stacked], rank, others=others)

    def export(self, tool: Tool, rank: int = 8) -> str:
        """The selection as another tool takes it.

        Args:
            tool: ``peft``, arguments of ``LoraConfig`` in JSON; ``axolotl``, the key ``unfrozen_parameters`` in YAML;
                ``spectrum``, the file of scores that Spectrum's script reads; ``regex``, one regular expression a line,
                for the names of the parameters that train.
            rank: rank of the adapters of ``peft``, as `peft` takes it.

        Raises:
            UsageError: there is no such tool, or nothing is selected: an empty list is read as no list, and all of
                the model trains. The scores for ``spectrum`` are written all the same.
        """
        if tool == "peft":
            return json.dumps(self.peft(rank), indent=1) + "\n"
        if tool in ("axolotl", "regex"):
            self._require_some()
        if tool == "axolotl":
            return training_lists.axolotl(self.names)
        if tool == "spectrum":
            sign = -1.0 if self.reverse else 1.0
            return training_lists.spectrum({r.name: sign * r.score for r in self.rows if r.score is not None})
        if tool == "regex":
            return "".join(f"{regex}\n" for regex in training_lists.regexes(self.names))
        raise UsageError(f"there is no list for {tool!r}: {', '.join(get_args(Tool))}")

    def _require_some(self) -> None:
        if not self.names:
            reason = "; ".join(self.remarks()[1:]) or "no matrix is a candidate"
            raise UsageError(f"nothing of {self.label} is selected, so there is nothing to train: {reason}")

    def records(self) -> list[Record]:
        """One dictionary a tensor, with all fields of `SelectionRow`."""
        return [asdict(row) for row in self.rows]

    def types(self) -> dict[str, type]:
        """The types of all columns."""
        return column_types(SelectionRow)

    def tables(self) -> tuple[Table, ...]:
        """The selected tensors, and the numbers of tensors and parameters by role."""
        chosen = [row for row in self.rows if row.selected]
        roles = dict.fromkeys(row.role for row in self.rows if row.score is not None or row.selected)
        lines = [(role, [row for row in self.rows if row.role == role]) for role in roles]
        return tabulate(chosen, _CHOSEN, spare=("null", "role", "of")), tabulate(lines, _ROLES, elsewhere="")

    def facts(self) -> dict[str, Any]:
        """What was asked for, and how much trains."""
        asked = {"by": self.by, "top": self.top, "reverse": self.reverse}
        return {"model": self.label, "options": asked, "selected": self.names, "share": self.share}

    @property
    def share(self) -> float:
        """Share of the parameters of all rows that trains."""
        return _parameters(self.rows) / (sum(row.parameters for row in self.rows) or 1)

    def remarks(self) -> tuple[str, ...]:
        """How much trains, what has no signal, and, where nothing trains, why the others have no score."""
        noise = sum(row.note == _NOISE for row in self.rows)
        others = Counter(row.note for row in self.rows if row.note and row.note != _NOISE)
        lines = [
            f"{self.label}: {len(self.names)} of {counted(len(self.rows), 'matrix trains', 'matrices train')}, "
            f"{_parameters(self.rows):,} parameters ({self.share:.1%})"
        ]
        if noise:
            what = counted(noise, "matrix has", "matrices have")
            lines.append(f"{what} no more signal than noise, and no place in the selection")
        if unnamed := [row.name for row in self.rows if row.note == _UNNAMED]:
            lines.append(
                f"{counted(len(unnamed), 'selected matrix', 'selected matrices')}, as {unnamed[0]}, {_UNNAMED}"
            )
        if not self.names:
            lines += [
                f"{counted(count, 'matrix does', 'matrices do')} not train: {note}"
                for note, count in others.most_common(3)
            ]
        return tuple(lines)


_NOISE = "no more signal than noise"
_UNNAMED = "may be called otherwise in the loaded model: choose from the model itself, in Python"


def _parameters(rows: Sequence[SelectionRow]) -> int:
    return sum(row.parameters for row in rows if row.selected)


_CHOSEN: tuple[tuple[Column, Callable[[SelectionRow], Any]], ...] = (
    (Column("trains", text=True), lambda row: row.name),
    (Column("role", text=True), lambda row: row.role),
    (Column("value", ".4g"), lambda row: row.value),
    (Column("null", ".4g"), lambda row: row.null),
    (Column("score", ".4g"), lambda row: row.score),
    (Column("place", ".0f"), lambda row: row.place),
    (Column("of", ".0f"), lambda row: row.of),
)
_Line: TypeAlias = tuple[str, list[SelectionRow]]
_ROLES: tuple[tuple[Column, Callable[[_Line], Any]], ...] = (
    (Column("role", text=True), lambda line: line[0]),
    (Column("matrices", ".0f"), lambda line: len(line[1])),
    (Column("train", ".0f"), lambda line: sum(row.selected for row in line[1])),
    (Column("parameters that train", ",.0f"), lambda line: _parameters(line[1])),
    (Column("median score", ".4g", optional=True), lambda line: _median([row.score for row in line[1]])),
)


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.median(known)) if known else None


def select(
    source: Source | Analysis | OutlierShares,
    top: float = 0.25,
    by: By = "snr",
    *,
    reverse: bool = False,
    also: Sequence[str] = (),
    threshold: float = 13.0,
    where: Filter | None = None,
    revision: str | None = None,
) -> Selection:
    """Choose the matrices to train: in each role the share `top` with the most signal above noise.

    Candidates are the matrices inside the blocks. Of each role ⌊`top` · number⌋ are taken, and at least one, except
    those that have no more signal than noise.

    Args:
        source: model as `htsr.analyze` takes it, an `Analysis`, or for ``outliers`` an `Outliers`.
        top: share of each role, above 0 and at most 1.
        by: ``snr``, ``alpha``, ``erg``, ``stable_rank`` or ``outliers``, as in the text of the module.
        reverse: whether to take those with the least signal instead; noise is then taken, too.
        also: patterns of roles or names that train whatever their score, such as ``embed`` and ``head``, which
            Spectrum always trains.
        threshold: threshold τ of ``outliers``.
        where: filter of the matrices that are looked at, for a model.
        revision: branch, tag or commit of a hub id.

    Returns:
        The `Selection`, with a row for each stored tensor.

    Raises:
        SourceError: the source cannot be read.
        UsageError: `top` is no share, there is no such `by`, the source does not fit it, or a pattern matches nothing.

    Source: Spectrum (arXiv 2406.06623), with the differences that the text of the module names.

    Examples:
        >>> import htsr, numpy as np
        >>> random = np.random.default_rng(0)
        >>> state = {f"layers.{i}.mlp.up_proj.weight": random.standard_normal((40, 80)) + 0.2 * i for i in range(4)}
        >>> htsr.select(state, top=0.25, by="stable_rank").names
        ['layers.3.mlp.up_proj']
    """
    if isinstance(top, bool) or not 0 < top <= 1:
        raise UsageError(f"top is a share of each role, above 0 and at most 1, not {top!r}")
    if by not in get_args(By):
        raise UsageError(f"there is no selection by {by!r}: {', '.join(get_args(By))}")
    in_memory = False
    if by == "outliers":
        if isinstance(source, Analysis) or not isinstance(source, OutlierShares):
            raise UsageError("a selection by outliers takes htsr.Outliers, which htsr.measure_outliers returns")
        rows = _of_outliers(source, threshold)
    else:
        if isinstance(source, OutlierShares) and not isinstance(source, Analysis):
            raise UsageError(f"outliers have no {by}: by='outliers'")
        if not isinstance(source, Analysis):
            in_memory = not isinstance(source, (str, os.PathLike))
            model = open_model(source, revision=revision).filtered(as_filter(where))
            source = analyze_model(model, make_options(source, null=False))
        rows = _of_analysis(source, by)
    if also:
        require(also, {text for row in rows for text in (row.name, row.role)}, source.label, "role or matrix")
    chosen = _chosen(rows, top, reverse, also)
    return Selection(
        source.label, chosen if in_memory else _as_loaded(chosen, source.label, revision), by, top, reverse
    )


def _as_loaded(rows: Sequence[SelectionRow], label: str, revision: str | None) -> tuple[SelectionRow, ...]:
    """The rows of the checkpoint `label`, under the names that the loaded model has."""
    names = loaded_names(label, [row.name for row in rows], revision)
    if names is None:
        return tuple(rows)
    known = tuple(
        replace(row, name=names.get(row.name) or row.name, note=row.note if names.get(row.name) else _UNNAMED)
        if row.selected or names.get(row.name)
        else row
        for row in rows
    )
    if unknown := [row.name for row in known if row.note == _UNNAMED]:
        logger.warning("%s: %s selected matrices, as %s, %s", label, len(unknown), unknown[0], _UNNAMED)
    return known


def _chosen(rows: Sequence[SelectionRow], top: float, reverse: bool, also: Sequence[str]) -> tuple[SelectionRow, ...]:
    by_role: dict[str, list[SelectionRow]] = defaultdict(list)
    for row in rows:
        if row.score is not None and row.block is not None:
            by_role[row.role].append(row)
    found: dict[str, dict[str, Any]] = {}
    for peers in by_role.values():
        ordered = sorted(peers, key=lambda row: row.score if reverse else -(row.score or 0.0))  # type: ignore[arg-type, return-value]
        count = max(math.floor(top * len(peers) + 1e-9), 1)
        for i, row in enumerate(ordered):
            noise = not reverse and (row.score or 0.0) <= 0
            found[row.name] = {
                "place": i + 1,
                "of": len(peers),
                "selected": i < count and not noise,
                "note": _NOISE if noise else "",
            }
    wanted = {row.name for row in rows if also and (matches(row.name, also) or matches(row.role, also))}
    complete = []
    for row in rows:
        own: dict[str, Any] = found.get(row.name, {"note": row.note or "outside of the blocks"})
        if row.name in wanted:
            own = own | {"selected": True, "note": ""}
        complete.append(SelectionRow(**asdict(row) | own))
    return tuple(complete)


def _of_analysis(analysis: Analysis, by: By) -> list[SelectionRow]:
    tensors: dict[str, list[tuple[LayerMetrics, tuple[float, float, float] | str]]] = defaultdict(list)
    for row in analysis:
        tensors[whole_name(row.name)].append((row, _scored(analysis, row, by)))
    return [_together(name, parts) for name, parts in tensors.items()]


def _together(name: str, parts: Sequence[tuple[LayerMetrics, tuple[float, float, float] | str]]) -> SelectionRow:
    """The row of a tensor, from those of its parts."""
    rows = [row for row, _ in parts]
    known = [numbers for _, numbers in parts if not isinstance(numbers, str)]
    roles = {row.role for row in rows}
    value, null, score = map(float, np.mean(known, axis=0)) if known else (None, None, None)
    return SelectionRow(
        name=name,
        role=rows[0].role if len(roles) == 1 else role_of(name),
        block=rows[0].block,
        parameters=sum((row.rows or 0) * (row.columns or 0) * _slices(row) for row in rows),
        side=max((min(row.rows or 0, row.columns or 0) for row in rows), default=0) or None,
        value=value,
        null=null,
        score=score,
        note="" if known else next(why for _, why in parts if isinstance(why, str)),
        stacked=any(re.search(r"\[\d+\]", row.name) for row in rows),
    )


def _slices(row: LayerMetrics) -> int:
    return (row.pieces or 1) if row.kind in ("conv", "stack") else 1


def _of_outliers(outliers: OutlierShares, threshold: float) -> list[SelectionRow]:
    from scipy.stats import binom

    shares = outliers.of_matrices(threshold)
    found = []
    for row in outliers.rows:
        value = shares[row.name]
        null = float(binom.isf(0.01, row.parameters, math.erfc(threshold / math.pi**0.5))) / row.parameters
        own = SelectionRow(row.name, row.role, row.block, row.parameters, None, value, null, value - null)
        found.append(own)
    return found


def _scored(analysis: Analysis, row: LayerMetrics, by: By) -> tuple[float, float, float] | str:
    """Value, null and score of a row; in words why it has none."""
    values = analysis.eigenvalues.get(row.name)
    if values is None or row.status != "ok" or not (row.M and row.N and row.pieces):
        return f"{row.status}: {row.warning}"
    try:
        return SIGNALS[by](values, row.M, row.N, row.pieces)
    except MatrixError as error:
        return str(error)
