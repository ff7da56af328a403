"""Surgery on a checkpoint: keep of each matrix its tail, remove its correlation traps, write a model that loads.

    htsr.project("path/or/hub-id", "projected", "erg")

The statistics of it are `htsr.spectra.directions`; here every wanted matrix of a model is changed, one stored tensor in
memory at a time, in a copy of its files that becomes the output folder when all is done.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from htsr._version import __version__
from htsr.errors import HtsrError, MatrixError, SourceError, UsageError
from htsr.matrices import adapters, hub
from htsr.matrices.checkpoint_files import file_tensors, folder_tensors
from htsr.matrices.file_bytes import TensorInFile
from htsr.matrices.folders import model_files, named_files
from htsr.matrices.models import Filter, WeightMatrix, as_filter
from htsr.matrices.sources import locate, open_model
from htsr.matrices.stored_tensors import FLOATS
from htsr.matrices.tying import repeated, tied
from htsr.matrices.writing import copy_checkpoint
from htsr.spectra.directions import Keep, project_tail, remove_traps
from htsr.spectra.tail import FitMethod

if TYPE_CHECKING:
    import torch

RECORD = "htsr_project.json"


@dataclass(frozen=True, kw_only=True)
class Operation:
    """What was done to one matrix; None where that was not asked for.

    Attributes:
        name: the matrix, as `htsr analyze` names it.
        role: what it does (`htsr.matrices.roles`).
        block: index of its block; None outside of all.
        rows: first dimension.
        columns: second dimension.
        status: ``ok``, or why it was left as it is.
        warning: the same as a sentence.
        kept: directions kept.
        total: directions it had, K.
        norm_kept: share of ‖W‖_F² kept.
        lambda_min: smallest eigenvalue kept.
        traps_before: correlation traps found.
        traps_after: those that remain.
        mean_removed: subtracted from every entry.
        limit: entries were clipped at ± this; None where none were.
        clipped: how many.
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


@dataclass(frozen=True)
class Surgery:
    """What was done to a model.

    Attributes:
        label: the model.
        output: the folder written.
        operations: one per wanted matrix, in the model's order.
    """

    label: str
    output: Path
    operations: tuple[Operation, ...]


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

    The copy has the files of the original: shards, configuration and tokenizer, weights in their dtype; PyTorch files
    become safetensors. Tied weights change together. ``htsr_project.json`` in it says what was done.
    In bfloat16 and float16 the rounding of the result brings back small eigenvalues, about 1e-6 of λ_max.

    Args:
        source: a folder, a file (safetensors or PyTorch), or a hub id.
        output: the folder to write; must not exist, or be empty.
        keep: the directions that are kept (`htsr.spectra.directions.project_tail`); None for all.
        traps: first remove correlation traps (`htsr.spectra.directions.remove_traps`).
        fit: how the power-law tail is chosen.
        where: the matrices to change; all others are copied as they are.
        revision: branch, tag or commit of a hub id.
        seed: of the permutations that show traps.
        progress: called with (done, total, name) after each matrix.

    Returns:
        A `Surgery`. A matrix that cannot be changed is left as it is, and its `Operation` says why.

    Raises:
        SourceError: a model that cannot be read, or whose format is not written (GGUF, quantised).
        UsageError: nothing to do, an output that is in use, an adapter, or a filter that nothing passes.
        HtsrError: the output cannot be written, or safetensors does not store a dtype of the model.

    Source: SETOL (arXiv 2507.17912) for the projection on a tail as a test of what a layer has learned.
    """
    if keep is None and not traps:
        raise UsageError("say which directions to keep (erg, tail or a number), or remove traps")
    goal = Path(output)
    if goal.exists() and (not goal.is_dir() or any(goal.iterdir())):
        raise UsageError(f"{goal} exists already and is not an empty folder; take another output")
    name = os.fspath(source)
    place = locate(name, revision)
    if not Path(name).expanduser().exists():
        hub.fetch_rest(name, revision)
    if place.is_dir() and goal.resolve().is_relative_to(place.resolve()):
        raise UsageError(f"{goal} lies inside the model {name}, and would become part of it; take an output beside it")
    adapter = f"{name} is an adapter: merge it into its base model first (merge_and_unload of PEFT)"
    if adapters.adapter_folder(place) is not None:
        raise UsageError(adapter)
    model = open_model(place)
    if any(matrix.kind == "adapter" for matrix in model):
        raise UsageError(adapter)
    wanted = model.filtered(as_filter(where)).matrices
    copies = repeated(tied(folder_tensors(place) if place.is_dir() else file_tensors(place)))

    try:
        folder = Path(tempfile.mkdtemp(dir=goal.absolute().parent, prefix=f".{goal.name}."))
    except OSError as error:
        raise HtsrError(f"{goal} cannot be written: {error.strerror}") from error
    try:
        stored = copy_checkpoint(place, model_files(place) if place.is_dir() else named_files(place), folder)
        surgeon = _Surgeon(keep, traps, fit, seed)
        operations = _operate(wanted, stored, surgeon, progress)
        if all(operation.status == "quantized" for operation in operations):
            raise SourceError(f"the matrices of {name} are quantised: de-quantise it first, and take that")
        changed = {m.position.tensor for m, o in zip(wanted, operations, strict=True) if o.status == "ok"}
        for other, original in copies.items():
            if original in changed and stored[other].shape == stored[original].shape:
                stored[other].write(stored[original].read().to(stored[other].read().dtype))
        surgery = Surgery(name, goal, tuple(operations))
        _record(folder / RECORD, surgery, surgeon)
        umask = os.umask(0)
        os.umask(umask)
        folder.chmod(0o777 & ~umask)
        folder.replace(goal)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return surgery


@dataclass(frozen=True)
class _Surgeon:
    """What is done to each matrix."""

    keep: Keep | None
    traps: bool
    fit: FitMethod
    seed: int

    def operate(self, W: torch.Tensor, before: Operation) -> tuple[torch.Tensor, Operation]:
        """The changed matrix, and what was done to it."""
        import torch

        done = before
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


def _operate(
    wanted: tuple[WeightMatrix, ...],
    stored: dict[str, TensorInFile],
    surgeon: _Surgeon,
    progress: Callable[[int, int, str], None] | None,
) -> list[Operation]:
    """Change `wanted` where they are `stored`; the matrices of one stored tensor together."""
    by_tensor: dict[str, list[int]] = {}
    for i, matrix in enumerate(wanted):
        by_tensor.setdefault(matrix.position.tensor, []).append(i)
    operations: dict[int, Operation] = {}
    for tensor, indices in by_tensor.items():
        writable = [i for i in indices if _obstacle(wanted[i]) is None]
        whole = stored[tensor].read() if writable else None
        for i in indices:
            operations[i] = _one(wanted[i], whole, surgeon)
            if progress is not None:
                progress(len(operations), len(wanted), wanted[i].name)
        if whole is not None:
            stored[tensor].write(whole)
    return [operations[i] for i in range(len(wanted))]


def _one(matrix: WeightMatrix, whole: torch.Tensor | None, surgeon: _Surgeon) -> Operation:
    rows, columns = matrix.shape
    before = Operation(name=matrix.name, role=matrix.role, block=matrix.block, rows=rows, columns=columns)
    problem = _obstacle(matrix)
    if problem is not None or whole is None:
        status, why = problem or ("failed", "not read")
        return replace(before, status=status, warning=why)
    try:
        W, done = surgeon.operate(matrix.position.take(whole), before)  # type: ignore[arg-type]
    except MatrixError as error:
        return replace(before, status=error.status, warning=f"left as it is: {error}")
    matrix.position.put(whole, W)
    return done


def _obstacle(matrix: WeightMatrix) -> tuple[str, str] | None:
    """Why a matrix cannot be written."""
    if matrix.problem is not None:
        return matrix.problem
    if matrix.dtype not in FLOATS or "de-quantised" in matrix.warning:
        return "quantized", f"left as it is: {matrix.name} is stored quantised"
    return None


def _record(file: Path, surgery: Surgery, surgeon: _Surgeon) -> None:
    content = {
        "htsr": __version__,
        "source": surgery.label,
        **asdict(surgeon),
        "operations": [asdict(operation) for operation in surgery.operations],
    }
    file.write_text(json.dumps(content, indent=1) + "\n")
