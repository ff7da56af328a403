"""Repair of a LoRA adapter: what is left of each ΔW = scaling · B·A is written as two factors of the same rank.

The factors are those of the singular value decomposition, √σ in each, as PEFT's `reduce_intruder_dimension` has them.
Shrinking intruders makes ΔW' of a higher rank than ΔW; what the adapter's rank does not hold is lost, and its row says
how much. Tensors that an adapter saves whole (`modules_to_save`) are kept.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from htsr.analysis.repair_checkpoints import Base, repaired, row_of
from htsr.analysis.repair_methods import Method
from htsr.analysis.repair_result import Repair, RepairedMatrix
from htsr.analysis.rewriting import Advance, Checkpoint, check_goal, copied, find
from htsr.errors import MatrixError, UsageError
from htsr.matrices import adapters
from htsr.matrices.deltas import Delta
from htsr.matrices.file_bytes import TensorInFile
from htsr.matrices.folders import ModelFiles
from htsr.matrices.models import Filter, as_filter
from htsr.matrices.roles import role_of, whole_name
from htsr.matrices.sources import open_model
from htsr.matrices.stored_tensors import StoredTensor
from htsr.matrices.writing import folders_left_out
from htsr.spectra.directions import decompose

if TYPE_CHECKING:
    import torch


def repair_adapter(
    model: Checkpoint,
    folder: Path,
    against: str | os.PathLike[str] | None,
    output: str | os.PathLike[str] | None,
    method: Method,
    where: Filter | None,
    progress: Advance | None,
) -> Repair:
    """`htsr.repair` of an adapter.

    Args:
        model: the adapter.
        folder: its folder.
        against: base model; None for the one that the adapter names, where the method needs it.
        output: folder to write; None for nothing.
        method: what is done.
        where: filter of the matrices to change.
        progress: function that is called after each matrix.

    Raises:
        SourceError: the adapter or its base cannot be read, it is no LoRA adapter, or none of its changes fits a matrix
            of the base.
        UsageError: the output is in use, the base is not known, or no matrix passes the filter.
        HtsrError: the output cannot be written.
    """
    changes = {tensor.name: tensor for tensor in adapters.adapter_changes(folder)}
    base = _base_of(model, folder, against, method, changes)
    goal = None if output is None else check_goal(output, model)
    wanted = {m.position.tensor: m for m in reversed(open_model(folder).filtered(as_filter(where)).matrices)}
    names = [name for name in changes if name in wanted]
    if base is not None:
        base.insist_on_any(model.name, ((name, tuple(changes[name].shape)) for name in names))
    worker = _Worker(method, base, goal is None)

    def run(stored: dict[str, TensorInFile] | None) -> Repair:
        rows = []
        for name in names:
            tensor, matrix = changes[name], wanted[name]
            row = replace(
                row_of(matrix),
                name=whole_name(matrix.name),
                role=role_of(name, tensor.kind),
                rows=tensor.shape[0],
                columns=int(np.prod(tensor.shape[1:])),
            )
            try:
                rows.append(worker.mend(tensor, row, stored))
            except MatrixError as error:
                rows.append(replace(row, status=error.status, warning=f"left as it is: {error}"))
            if progress is not None:
                progress(len(rows), len(names), row.name)
        return Repair(
            model.name, None if base is None else base.name, method, goal, tuple(rows), len(changes),
            folders_left_out=folders_left_out(folder),
        )  # fmt: skip

    if goal is None:
        return run(None)
    with copied(folder, ModelFiles((adapters.adapter_file(folder),)), goal) as (copy, stored):
        found = run(stored)
        found.record(copy)
    return found


def _base_of(
    model: Checkpoint, folder: Path, against: str | os.PathLike[str] | None, method: Method, names: Iterable[str]
) -> Base | None:
    """The base, where it is given or needed."""
    named = adapters.base_of(folder) if method.needs_base else None
    if against is None and method.needs_base and named is None:
        raise UsageError(f"{model.name} names no base model; say which one it is (against=…, --against)")
    if against is not None:
        return Base(find(against), names)
    if named is None:
        return None
    with adapters.named_by(folder):
        return Base(find(named), names)


@dataclass(frozen=True)
class _Worker:
    """What is done to the two factors of each module; a dry one only says."""

    method: Method
    base: Base | None
    dry: bool

    def mend(self, tensor: StoredTensor, row: RepairedMatrix, stored: dict[str, TensorInFile] | None) -> RepairedMatrix:
        """The row of a module; its factors are written where they are `stored`."""
        import torch

        delta = tensor.read
        if tensor.problem is not None:
            raise MatrixError(*tensor.problem)
        if not isinstance(delta, Delta):
            raise MatrixError("whole", "the adapter saves it whole, and not as a change")
        if len(tensor.shape) > 2 and self.method.name != "interpolate":
            raise MatrixError("unsupported", "it is the change of a kernel, whose offsets share their factors")
        change = torch.as_tensor(delta())
        base = None if self.base is None else self.base.read(tensor.name, tuple(tensor.shape)).to(change)
        factors: Callable[[torch.Tensor], _Factors] = lru_cache(maxsize=1)(lambda left: _factors(left, delta))
        scaled = self.method.name == "interpolate"  # in the same rank
        held = None if scaled else lambda left: factors(left).product(delta)
        left, row = repaired(change, base, self.method, row, self.dry and base is not None, held)
        if left is None:
            return row
        if scaled and stored is not None:
            assert self.method.factor is not None
            B = stored[delta.B.name].read()
            stored[delta.B.name].write((B.float() * self.method.factor).to(B.dtype))
        if scaled:
            return row
        found = factors(left)
        if stored is not None:
            for place, factor in ((stored[delta.B.name], found.B), (stored[delta.A.name], found.A)):
                old = place.read()
                place.write(factor.reshape(old.shape).to(old.dtype))
        return replace(row, norm_lost=found.lost)


@dataclass(frozen=True)
class _Factors:
    """B (out, r) and A (r, in) with scaling · B·A nearest to a change, and the share of its norm² that is lost."""

    B: torch.Tensor
    A: torch.Tensor
    lost: float

    def product(self, delta: Delta) -> torch.Tensor:
        """What they hold of the change, as W is stored."""
        assert delta.scaling is not None
        product = delta.scaling * self.B @ self.A
        return product.mT if delta.transposed else product


def _factors(left: torch.Tensor, delta: Delta) -> _Factors:
    import torch

    assert delta.scaling is not None
    change = left.mT if delta.transposed else left
    rank = delta.A.shape[0]
    found = decompose(change)
    values = torch.from_numpy(found.values[0][::-1].copy())
    vectors = found.vectors[0].flip(1)
    W = change.to(vectors) / delta.scaling
    wide = W.shape[0] < W.shape[1]
    k = min(rank, int((values > 0).sum()))
    root = (values[:k] ** 0.5 / abs(delta.scaling)) ** 0.5
    B, A = W.new_zeros(W.shape[0], rank), W.new_zeros(rank, W.shape[1])
    kept = vectors[:, :k]
    if wide:
        B[:, :k], A[:k] = kept * root, (kept.mT @ W) / root[:, None]
    else:
        B[:, :k], A[:k] = (W @ kept) / root, root[:, None] * kept.mT
    return _Factors(B, A, float(values[k:].sum() / values.sum()))
