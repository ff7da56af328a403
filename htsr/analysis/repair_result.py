"""What `htsr.repair` says: one row for each matrix, and how much of the change is left."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from htsr._version import __version__
from htsr.analysis.repair_methods import Method
from htsr.results import Column, Record, Table, Tabular, Value, column_types, counted, tabulate

RECORD = "htsr_repair.json"


@dataclass(frozen=True, kw_only=True)
class RepairedMatrix:
    """What was done to one matrix; fields of what was not asked for are None.

    Attributes:
        name: name of the matrix, as `htsr analyze` prints it.
        role: what the matrix does in the model (`htsr.matrices.roles`).
        block: index of its transformer block; None outside of all blocks.
        rows: number of rows, the first dimension.
        columns: number of columns, the second dimension.
        status: ``ok`` where the matrix was changed, ``kept`` where nothing of its change had to be taken away,
            ``unchanged`` where it is the base's, or in one word why it was left as it is.
        warning: the same reason as a sentence.
        change_norm: ‖ΔW‖_F, in the unit of the weights.
        relative: size of the change before the repair, ‖ΔW‖_F / ‖W_base‖_F.
        norm_kept: ‖ΔW'‖_F² / ‖ΔW‖_F², where ΔW' is the change after the repair. Of a change that is Gaussian noise,
            ``denoise`` keeps 0.
        kept: number of directions of ΔW that were kept.
        total: number of directions that ΔW has.
        threshold: singular value above which directions were kept, by ``denoise``.
        intruders_before: number of intruder dimensions among the k leading left singular vectors of W, at k and ε of
            the method ``intruders``, else at 10 and 0.5. A Gaussian change of the same norm makes none, unless its
            largest singular value is like those of W itself.
        intruders_after: the same number after the repair; of an adapter, with the change that its rank holds.
        norm_lost: share of ‖ΔW'‖_F² that the rank of an adapter does not hold, and that is lost; None elsewhere.
    """

    name: str
    role: str
    block: int | None
    rows: int
    columns: int
    status: str = "ok"
    warning: str = ""
    change_norm: float | None = None
    relative: float | None = None
    norm_kept: float | None = None
    kept: int | None = None
    total: int | None = None
    threshold: float | None = None
    intruders_before: int | None = None
    intruders_after: int | None = None
    norm_lost: float | None = None


def _arrow(row: RepairedMatrix) -> str | None:
    return None if row.intruders_before is None else f"{row.intruders_before}→{row.intruders_after}"


_COLUMNS: tuple[tuple[Column, Callable[[RepairedMatrix], Value]], ...] = (
    (Column("matrix", text=True), lambda r: r.name),
    (Column("role", text=True, optional=True), lambda r: r.role),
    (Column("shape", optional=True), lambda r: f"{r.rows}×{r.columns}"),
    (Column("‖ΔW‖/‖W‖", ".2g", optional=True), lambda r: r.relative),
    (Column("kept", optional=True), lambda r: None if r.kept is None else f"{r.kept}/{r.total}"),
    (Column("‖ΔW‖² kept", ".4f", optional=True), lambda r: r.norm_kept),
    (Column("intruders", optional=True), _arrow),
    (Column("lost", ".1e", optional=True), lambda r: r.norm_lost or None),
    (Column("note", text=True, optional=True), lambda r: r.warning or (r.status if r.status == "unchanged" else "")),
)


@dataclass(frozen=True, repr=False)
class Repair(Tabular):
    """What was done to a fine-tuned model, or would be.

    Attributes:
        label: path or hub id of the fine-tuned model.
        against: path or hub id of the base; None where it was not needed.
        method: what was done, with its numbers.
        output: folder that was written; None where nothing was.
        matrices: one `RepairedMatrix` for each wanted matrix, in the model's order.
        in_model: number of matrices of the model, wanted or not.
        others: number of tensors that are no matrices (norms, biases) and differ from the base.
        others_changed: whether these were changed, too, as only ``interpolate`` does.
        folders_left_out: folders inside of the model's that hold weights of their own, such as an adapter or other
            checkpoints, and were not copied.
    """

    label: str
    against: str | None
    method: Method
    output: Path | None
    matrices: tuple[RepairedMatrix, ...]
    in_model: int
    others: int = 0
    others_changed: bool = False
    folders_left_out: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"<Repair of {self.label!r} by {self.method.name}: {self.changed} of {len(self.matrices)} matrices>"

    @property
    def changed(self) -> int:
        """How many matrices were changed."""
        return sum(row.status == "ok" for row in self.matrices)

    @property
    def norm_kept(self) -> float | None:
        """Share of ‖ΔW‖_F² that is left of those `matrices` whose change is known; None where none has changed.

        Matrices that a filter leaves out are not among them. They keep all of their change.
        """
        rows = [row for row in self.matrices if row.change_norm and row.norm_kept is not None]
        before = [(row.change_norm or 0.0) ** 2 for row in rows]
        left = [(row.norm_kept or 0.0) * (1 - (row.norm_lost or 0.0)) for row in rows]
        return sum(b * share for b, share in zip(before, left, strict=True)) / sum(before) if rows else None

    @property
    def compared(self) -> int:
        """How many of `matrices` could be compared with the base, changed or not."""
        return sum(row.change_norm is not None for row in self.matrices)

    def records(self) -> list[Record]:
        """One dictionary a matrix, with all fields of `RepairedMatrix`."""
        return [asdict(row) for row in self.matrices]

    def types(self) -> dict[str, type]:
        """The types of all columns."""
        return column_types(RepairedMatrix)

    def tables(self) -> tuple[Table, ...]:
        """What was done to each matrix."""
        return (tabulate(self.matrices, _COLUMNS, spare=("role", "shape", "lost", "‖ΔW‖/‖W‖", "note")),)

    def facts(self) -> dict[str, Any]:
        """The models, the method, and how much is left."""
        return {
            "model": self.label,
            "against": self.against,
            "output": None if self.output is None else str(self.output),
            "method": asdict(self.method),
            "changed": self.changed,
            "norm_kept": self.norm_kept,
            "compared": self.compared,
            "chosen": len(self.matrices),
            "in_model": self.in_model,
            "others": self.others,
            "others_changed": self.others_changed,
            "folders_left_out": list(self.folders_left_out),
        }

    def remarks(self) -> tuple[str, ...]:
        """How much is left, what became of tensors that are no matrices, and what is where."""
        found = []
        if self.norm_kept is not None:
            found.append(f"{self.norm_kept:.1%} of ‖ΔW‖² is left, summed over {self._summed()}")
        elif self.compared < len(self.matrices):
            found.append("no matrix that could be compared has changed, there is nothing to repair")
        elif self.in_model > len(self.matrices):
            found.append("no matrix of those chosen has changed, there is nothing to repair in them")
        elif not self.others:
            found.append(f"{self.label} and {self.against} hold the same weights, there is nothing to repair")
        if self.others:
            what = "interpolated, too" if self.others_changed else "kept as fine-tuned"
            others = counted(self.others, "changed tensor", "changed tensors")
            found.append(f"{others} beside the matrices (norms, biases …): {what}")
        if self.folders_left_out:
            found.append(f"folders with weights of their own are not copied: {', '.join(self.folders_left_out)}")
        where = "nothing is written" if self.output is None else f"{self.output} holds {self.label}"
        of = counted(len(self.matrices), "matrix", "matrices")
        return (*found, f"{where}, {self.changed} of {of} changed")

    def _summed(self) -> str:
        unknown, rest = len(self.matrices) - self.compared, self.in_model - len(self.matrices)
        which = f"{self.compared} of the model's" if unknown or rest else "all"
        return (
            f"{which} {counted(self.in_model, 'matrix', 'matrices')}"
            + (f"; of {unknown} the change is not known" if unknown else "")
            + (f"; what of the {rest} not chosen has changed is kept whole" if rest else "")
        )

    def record(self, folder: Path) -> None:
        """Write ``htsr_repair.json``.

        Args:
            folder: folder of the repaired checkpoint, in which the file is put.
        """
        content = {"htsr": __version__, **self.facts(), "matrices": self.records()}
        (folder / RECORD).write_text(json.dumps(content, indent=1) + "\n")
