"""Surgery on a checkpoint: keep of each matrix its tail, remove its correlation traps, write a model that loads.

    htsr.project("path/or/hub-id", "projected", "erg")

`htsr.spectra.directions` and `htsr.spectra.traps` have the mathematics of one matrix. Here every wanted matrix of a
model is changed in a copy of its files, one stored tensor in memory at a time; the copy becomes the output folder when
all is done.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from htsr._version import __version__
from htsr.analysis.rewriting import check_goal, copied, find, operate, write_copies
from htsr.errors import SourceError, UsageError
from htsr.matrices import adapters
from htsr.matrices.models import Filter, WeightMatrix, as_filter
from htsr.matrices.sources import open_model
from htsr.matrices.writing import folders_left_out
from htsr.results import Column, Record, Table, Tabular, Value, column_types, counted, tabulate
from htsr.spectra.directions import Keep, project_tail
from htsr.spectra.tail import FitMethod
from htsr.spectra.traps import remove_traps

if TYPE_CHECKING:
    import torch

RECORD = "htsr_project.json"


@dataclass(frozen=True, kw_only=True)
class Operation:
    """What was done to one matrix; fields of what was not asked for are None.

    Attributes:
        name: name of the matrix, as `htsr analyze` prints it.
        role: what the matrix does in the model (`htsr.matrices.roles`).
        block: index of its transformer block; None outside of all blocks.
        rows: number of rows, the first dimension.
        columns: number of columns, the second dimension.
        status: ``ok``, or in one word why the matrix was left as it is.
        warning: the same reason as a sentence.
        kept: number of directions that were kept.
        total: number of directions that the matrix had, K.
        norm_kept: share of ‖W‖_F² that was kept.
        lambda_min: smallest eigenvalue that was kept.
        traps_before: number of correlation traps that were found.
        traps_after: number of correlation traps that remain.
        mean_removed: mean that was subtracted from every entry.
        limit: size beyond which entries were clipped to ± this size; None where none were.
        clipped: number of entries that were clipped.
    """

    name: str
    role: str
    block: int | None
    rows: int
    columns: int
    status: str = "ok"
    warning: str = ""
    kept: int | None = None
    total: int | None = None
    norm_kept: float | None = None
    lambda_min: float | None = None
    traps_before: int | None = None
    traps_after: int | None = None
    mean_removed: float | None = None
    limit: float | None = None
    clipped: int | None = None


_COLUMNS: tuple[tuple[Column, Callable[[Operation], Value]], ...] = (
    (Column("matrix", text=True), lambda o: o.name),
    (Column("role", text=True, optional=True), lambda o: o.role),
    (Column("shape", optional=True), lambda o: f"{o.rows}×{o.columns}"),
    (Column("kept", optional=True), lambda o: None if o.kept is None else f"{o.kept}/{o.total}"),
    (Column("‖W‖² kept", ".4f", optional=True), lambda o: o.norm_kept),
    (Column("traps", optional=True), lambda o: None if o.traps_before is None else f"{o.traps_before}→{o.traps_after}"),
    (Column("mean", ".2g", optional=True), lambda o: o.mean_removed or None),
    (Column("clipped", optional=True), lambda o: o.clipped or None),
    (Column("note", text=True, optional=True), lambda o: "" if o.status == "ok" else o.warning),
)


@dataclass(frozen=True, repr=False)
class Surgery(Tabular):
    """What was done to a model.

    Attributes:
        label: path or hub id of the model.
        output: folder that was written.
        operations: one `Operation` for each wanted matrix, in the model's order.
        folders_left_out: folders inside of the model's that hold weights of their own, such as an adapter or other
            checkpoints, and were not copied.
    """

    label: str
    output: Path
    operations: tuple[Operation, ...]
    folders_left_out: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"<Surgery of {self.label!r} to {str(self.output)!r}: {self.changed} of {len(self.operations)} matrices>"

    @property
    def changed(self) -> int:
        """How many matrices were changed."""
        return sum(operation.status == "ok" for operation in self.operations)

    def records(self) -> list[Record]:
        """One dictionary a matrix, with all fields of `Operation`."""
        return [asdict(operation) for operation in self.operations]

    def types(self) -> dict[str, type]:
        """The types of all columns."""
        return column_types(Operation)

    def tables(self) -> tuple[Table, ...]:
        """What was done to each matrix."""
        return (tabulate(self.operations, _COLUMNS, spare=("role", "shape", "mean", "clipped")),)

    def facts(self) -> dict[str, Any]:
        """The model, the folder written, and folders that were not copied."""
        return {
            "model": self.label,
            "output": str(self.output),
            "folders_left_out": list(self.folders_left_out),
        }

    def remarks(self) -> tuple[str, ...]:
        """What is where."""
        left = ", ".join(self.folders_left_out)
        said = (f"folders with weights of their own are not copied: {left}",) if left else ()
        return (*said, f"{self.output} holds {self.label} with {counted(self.changed, 'matrix', 'matrices')} changed")


def project(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    keep: Keep | None = None,
    *,
    traps: bool = False,
    fit: FitMethod = "ks",
    where: Filter | None = None,
    revision: str | None = None,
    seed: int = 0,
    progress: Callable[[int, int, str], None] | None = None,
) -> Surgery:
    """Write a copy of a model whose matrices are projected on their tails.

    The copy has the files of the original: shards, configuration and tokenizer, and weights in their stored dtype;
    PyTorch files become safetensors. Tied weights change together. ``htsr_project.json`` in it says what was done.
    In bfloat16 and float16 the rounding of the result brings back small eigenvalues, about 1e-6 of λ_max.

    Args:
        source: folder, file (safetensors or PyTorch), or hub id of the model.
        output: folder to write; it must be empty, or not exist yet.
        keep: which directions are kept: ``"tail"``, ``"erg"`` or a number (`htsr.project_tail`); None for all.
        traps: whether to remove correlation traps first (`htsr.remove_traps`).
        fit: how the power-law tail is chosen.
        where: filter of the matrices to change; all others are copied as they are.
        revision: branch, tag or commit of a hub id.
        seed: seed of the permutations that show traps.
        progress: function that is called with (done, total, name) after each matrix.

    Returns:
        A `Surgery`. A matrix that cannot be changed is left as it is, and its `Operation` says why.

    Raises:
        SourceError: the model cannot be read, or its format is not written (GGUF, quantised).
        UsageError: nothing is to be done, the output is in use, the model is an adapter, or no matrix passes the
            filter.
        HtsrError: the output cannot be written, or safetensors does not store a dtype of the model.

    Source: SETOL (arXiv 2507.17912) for the projection on a tail as a test of what a layer has learned.

    Examples:
        >>> import htsr, torch
        >>> from safetensors.torch import load_file, save_file
        >>> save_file({"layers.0.mlp.up_proj.weight": torch.diag(torch.tensor([3.0, 2.0, 1.0]))}, "model.safetensors")
        >>> surgery = htsr.project("model.safetensors", "projected", keep=2)
        >>> surgery.operations[0].kept, surgery.operations[0].total
        (2, 3)
        >>> load_file("projected/model.safetensors")["layers.0.mlp.up_proj.weight"].diag().tolist()
        [3.0, 2.0, 0.0]
    """
    if keep is None and not traps:
        raise UsageError("say which directions to keep (erg, tail or a number), or remove traps")
    original = find(source, revision)
    goal = check_goal(output, original)
    adapter = f"{original.name} is an adapter: merge it into its base model first (merge_and_unload of PEFT)"
    if adapters.adapter_folder(original.place) is not None:
        raise UsageError(adapter)
    model = open_model(original.place)
    if any(matrix.kind == "adapter" for matrix in model):
        raise UsageError(adapter)
    wanted = model.filtered(as_filter(where)).matrices
    copies = original.copies()

    with copied(original.place, original.files(), goal) as (folder, stored):
        surgeon = _Surgeon(keep, traps, fit, seed)
        operations = operate(
            wanted, surgeon, lambda name: stored[name].read(), lambda name, W: stored[name].write(W), progress
        )
        if all(operation.status == "quantized" for operation in operations):
            raise SourceError(f"the matrices of {original.name} are quantised: de-quantise it first, and take that")
        changed = {m.position.tensor for m, o in zip(wanted, operations, strict=True) if o.status == "ok"}
        write_copies(copies, changed, stored)
        surgery = Surgery(original.name, goal, tuple(operations), folders_left_out(original.place))
        _record(folder / RECORD, surgery, surgeon)
    return surgery


@dataclass(frozen=True)
class _Surgeon:
    """What is done to each matrix."""

    keep: Keep | None
    traps: bool
    fit: FitMethod
    seed: int

    def leave(self, matrix: WeightMatrix, status: str, why: str) -> Operation:
        """The row of a matrix that is left as it is."""
        return replace(_row(matrix), status=status, warning=why)

    def operate(self, matrix: WeightMatrix, W: torch.Tensor) -> tuple[torch.Tensor | None, Operation]:
        """The changed matrix, and what was done to it."""
        import torch

        done = _row(matrix)
        if self.traps:
            cleaned = remove_traps(W, seed=self.seed)
            W = torch.as_tensor(cleaned.matrix)
            done = replace(
                done,
                traps_before=cleaned.traps_before,
                traps_after=cleaned.traps_after,
                mean_removed=cleaned.mean_removed,
                limit=cleaned.limit if math.isfinite(cleaned.limit) else None,
                clipped=cleaned.clipped,
            )
        if self.keep is not None:
            found = project_tail(W, self.keep, fit=self.fit)
            W = torch.as_tensor(found.matrix)
            done = replace(
                done, kept=found.kept, total=found.total, norm_kept=found.norm_kept, lambda_min=found.lambda_min
            )
        return W, done


def _row(matrix: WeightMatrix) -> Operation:
    rows, columns = matrix.shape
    return Operation(name=matrix.name, role=matrix.role, block=matrix.block, rows=rows, columns=columns)


def _record(file: Path, surgery: Surgery, surgeon: _Surgeon) -> None:
    content = {
        "htsr": __version__,
        "source": surgery.label,
        **asdict(surgeon),
        "folders_left_out": list(surgery.folders_left_out),
        "operations": [asdict(operation) for operation in surgery.operations],
    }
    file.write_text(json.dumps(content, indent=1) + "\n")
