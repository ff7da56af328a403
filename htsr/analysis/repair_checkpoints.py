"""Repair of a checkpoint: each matrix beside the base's matrix of the same stored name, as both are stored.

Nothing is brought to another layout: a base in another format (GGUF beside safetensors) has other names and is refused.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from htsr.analysis.repair_methods import Method
from htsr.analysis.repair_result import Repair, RepairedMatrix
from htsr.analysis.rewriting import Advance, Checkpoint, check_goal, copied, operate, write_copies
from htsr.errors import MatrixError, SourceError, UsageError
from htsr.matrices.adapters import adapter_folder
from htsr.matrices.file_bytes import TensorInFile
from htsr.matrices.folders import read_config
from htsr.matrices.models import Filter, WeightMatrix, as_filter
from htsr.matrices.quantized import dequantized
from htsr.matrices.sources import open_model
from htsr.matrices.stored_tensors import FLOATS, StoredTensor
from htsr.matrices.writing import folders_left_out
from htsr.spectra.denoising import intruders, left_vectors

if TYPE_CHECKING:
    import torch


_CHUNK = 1 << 20


class Base:
    """The tensors of a base model, read whole; the last one stays in memory, for the next part of it.

    Args:
        checkpoint: where the base lies.
        names: names of the fine-tuned model's tensors. A base's name may lack a prefix, or have one more, where it is
            the only one that ends so, and no other tensor of the fine-tuned model has a claim to it.

    Raises:
        UsageError: the base is an adapter.
    """

    def __init__(self, checkpoint: Checkpoint, names: Iterable[str]) -> None:
        folder = checkpoint.place if checkpoint.place.is_dir() else checkpoint.place.parent
        if adapter_folder(checkpoint.place) is not None:
            raise UsageError(f"{checkpoint.name} is an adapter, and no base model")
        self.name = checkpoint.name
        there = {t.name: t for t in dequantized(checkpoint.tensors(), read_config(folder))}
        self._tensors = {name: there[other] for name, other in paired_names(names, there).items()}
        self.read: Callable[[str, tuple[int, ...]], torch.Tensor] = lru_cache(maxsize=1)(self._read)

    def insist_on_any(self, model: str, shapes: Iterable[tuple[str, tuple[int, ...]]]) -> None:
        """Insist that a matrix of the fine-tuned model is here, and in its shape.

        Args:
            model: what messages call the fine-tuned model.
            shapes: name and shape of the tensors that its matrices lie in.

        Raises:
            SourceError: none is.
        """
        here = [(name, shape) for name, shape in shapes if name in self._tensors]
        if not here:
            raise SourceError(f"{model} and {self.name} have no matrix with the same name in common")
        known = [(name, shape) for name, shape in here if self._tensors[name].problem is None]
        if known and all(tuple(self._tensors[name].shape) != shape for name, shape in known):
            raise SourceError(f"no matrix of {model} has its shape in {self.name}: {self._unlike(*known[0])}")

    def _unlike(self, name: str, shape: tuple[int, ...]) -> str:
        return f"{name} is {shape} here and {tuple(self._tensors[name].shape)} in {self.name}"

    def _read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        import torch

        tensor = self._tensors.get(name)
        if tensor is None:
            raise MatrixError("unmatched", f"{name} is not in {self.name}")
        if tensor.problem is not None:
            raise MatrixError(*tensor.problem)
        if tuple(tensor.shape) != shape:
            raise MatrixError("unmatched", self._unlike(name, shape))
        return torch.as_tensor(tensor.read())


def paired_names(names: Iterable[str], others: Iterable[str]) -> dict[str, str]:
    """Each of `names` with that of `others` which is the same, or the same but for a prefix and in no doubt.

    Examples:
        >>> from htsr.analysis.repair_checkpoints import paired_names
        >>> paired_names(["model.up.weight", "head.weight"], ["up.weight", "head.weight"])
        {'head.weight': 'head.weight', 'model.up.weight': 'up.weight'}
        >>> paired_names(["text.up.weight", "vision.up.weight"], ["up.weight"])  # whose is it?
        {}
    """
    names, others = set(names), set(others)
    pairs = {name: name for name in sorted(names & others)}
    free = others - names
    by_end: dict[str, set[str]] = {}
    for other in free:
        for end in _ends(other):
            by_end.setdefault(end, set()).add(other)
    claims: dict[str, list[str]] = {}
    for name in sorted(names - others):
        alike = by_end.get(name, set()) | (free & set(_ends(name)))
        if len(alike) == 1:
            claims.setdefault(alike.pop(), []).append(name)
    return pairs | {claimants[0]: other for other, claimants in claims.items() if len(claimants) == 1}


def _ends(name: str) -> list[str]:
    """The name itself, and what is left of it without its first words."""
    words = name.split(".")
    return [".".join(words[i:]) for i in range(len(words))]


@dataclass(frozen=True)
class _Repairer:
    """The operator on matrices of a checkpoint, whose tensors have `shapes`; a dry one writes nothing."""

    method: Method
    base: Base
    shapes: dict[str, tuple[int, ...]]
    dry: bool

    def leave(self, matrix: WeightMatrix, status: str, why: str) -> RepairedMatrix:
        return replace(row_of(matrix), status=status, warning=why)

    def operate(self, matrix: WeightMatrix, W: torch.Tensor) -> tuple[torch.Tensor | None, RepairedMatrix]:
        import torch

        tensor = matrix.position.tensor
        old: Any = matrix.position.take(self.base.read(tensor, self.shapes[tensor]))
        wide = torch.float64 if torch.float64 in (W.dtype, old.dtype) else torch.float32
        old = old.to(wide)
        left, row = repaired(W.to(wide) - old, old, self.method, row_of(matrix), self.dry)
        return None if left is None or self.dry else left.add_(old), row


def row_of(matrix: WeightMatrix) -> RepairedMatrix:
    """The row of a matrix of which nothing is known yet.

    Args:
        matrix: matrix of the fine-tuned model.
    """
    rows, columns = matrix.shape
    return RepairedMatrix(name=matrix.name, role=matrix.role, block=matrix.block, rows=rows, columns=columns)


def repaired(
    change: torch.Tensor,
    base: torch.Tensor | None,
    method: Method,
    row: RepairedMatrix,
    count: bool,
    held: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> tuple[torch.Tensor | None, RepairedMatrix]:
    """What is left of a change.

    Args:
        change: ΔW, (m, n) or (pieces, m, n), float32 or float64.
        base: matrix before fine-tuning, in shape and dtype of `change`; None where neither method nor count needs it.
        method: what is done.
        row: row of the matrix, to be filled in.
        count: whether to count intruders under every method.
        held: function that gives of the new change what will be written; None where all of it is.

    Returns:
        The new change, None where nothing is taken away; and the row.

    Raises:
        MatrixError: entries are NaN or infinite, or the change has no spectrum to speak of.
    """
    size = _norm(change)
    if not size < float("inf"):
        raise MatrixError("nan", "its change has NaN, infinite or overflowing entries")
    row = replace(row, change_norm=size, relative=size / _norm(base) if base is not None and base.any() else None)
    if size == 0:
        return None, replace(row, status="unchanged")
    look = base is not None and (count or method.name == "intruders")
    known = left_vectors(base) if look and base is not None else None
    left = method.leave(change, base, known)
    row = replace(
        row,
        status="kept" if left.change is None else "ok",
        warning=left.note,
        norm_kept=1.0 if left.change is None else (_norm(left.change) / size) ** 2,
        kept=left.kept,
        total=left.total,
        threshold=left.threshold,
    )
    if base is not None and known is not None:
        asked: dict[str, Any] = {"k": method.k, "epsilon": method.epsilon} if method.name == "intruders" else {}
        before = intruders(known, base + change, **asked) if left.intruders is None else left.intruders
        if left.change is None:
            after = before
        else:
            after = intruders(known, base + (left.change if held is None else held(left.change)), **asked)
        row = replace(row, intruders_before=before, intruders_after=after)
    return left.change, row


def _norm(x: torch.Tensor) -> float:
    import torch

    rows = x.reshape(-1, x.shape[-1])  # up-cast some at a time
    parts = torch.split(rows, max(1, _CHUNK // max(1, x.shape[-1])))
    return sum(float(torch.linalg.vector_norm(part, dtype=torch.float64)) ** 2 for part in parts) ** 0.5


def repair_checkpoint(
    model: Checkpoint,
    against: Checkpoint,
    output: str | os.PathLike[str] | None,
    method: Method,
    where: Filter | None,
    progress: Advance | None,
) -> Repair:
    """`htsr.repair` of a model that is no adapter.

    Args:
        model: fine-tuned model.
        against: base model.
        output: folder to write; None for nothing.
        method: what is done.
        where: filter of the matrices to change; where that is all, interpolation takes in what is no matrix, too.
        progress: function that is called after each matrix.

    Raises:
        SourceError: a model cannot be read, or no matrix is in both with one name and shape.
        UsageError: the output is in use, the base is an adapter, or no matrix passes the filter.
        HtsrError: the output cannot be written.
    """
    goal = None if output is None else check_goal(output, model, against)
    everything = open_model(model.place)
    wanted = everything.filtered(as_filter(where)).matrices
    tensors = {tensor.name: tensor for tensor in model.tensors()}
    base = Base(against, tensors)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    base.insist_on_any(model.name, ((m.position.tensor, shapes[m.position.tensor]) for m in wanted))
    places = {m.position.tensor for m in everything}
    others = _Others(
        method, len(wanted) == len(everything.matrices), base, [t for t in tensors.values() if t.name not in places]
    )
    repairer = _Repairer(method, base, shapes, goal is None)

    def result(rows: list[RepairedMatrix], count: int) -> Repair:
        return Repair(
            model.name, against.name, method, goal, tuple(rows), len(everything.matrices), count, others.change,
            folders_left_out(model.place),
        )  # fmt: skip

    if goal is None:
        rows = operate(wanted, repairer, lambda name: torch_of(tensors[name]), lambda *_: None, progress)
        return result(rows, others.go(None))
    copies = model.copies()
    with copied(model.place, model.files(), goal) as (folder, stored):
        rows = operate(
            wanted, repairer, lambda name: stored[name].read(), lambda name, W: stored[name].write(W), progress
        )
        found = result(rows, others.go(stored))
        if all(row.status == "quantized" for row in rows):
            raise SourceError(f"the matrices of {model.name} are quantised: de-quantise it first, and take that")
        changed = {m.position.tensor for m, row in zip(wanted, rows, strict=True) if row.status == "ok"}
        write_copies(copies, changed, stored)
        found.record(folder)
    return found


def torch_of(tensor: StoredTensor) -> torch.Tensor:
    """The numbers of a stored tensor, in its shape and dtype.

    Args:
        tensor: tensor of a checkpoint, unread.
    """
    import torch

    return torch.as_tensor(tensor.read())


@dataclass(frozen=True)
class _Others:
    """The tensors that are no matrices: interpolated where all of the model is, else kept."""

    method: Method
    all: bool
    base: Base
    tensors: list[StoredTensor]

    @property
    def change(self) -> bool:
        return self.all and self.method.name == "interpolate"

    def go(self, stored: dict[str, TensorInFile] | None) -> int:
        """How many differ from the base; they are changed where they are `stored`."""
        count = 0
        for tensor in self.tensors:
            if tensor.dtype not in FLOATS or tensor.problem is not None:
                continue
            try:
                old = self.base.read(tensor.name, tuple(tensor.shape))
            except MatrixError:  # the base has no such tensor
                continue
            new = torch_of(tensor)
            change = new.double() - old.double()
            if not change.any():
                continue
            count += 1
            if stored is not None and self.change:
                assert self.method.factor is not None
                stored[tensor.name].write((old.double() + self.method.factor * change).to(new.dtype))
        return count
