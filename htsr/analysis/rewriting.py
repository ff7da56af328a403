"""A copy of a checkpoint in which matrices are changed, one stored tensor in memory at a time.

What `htsr.analysis.surgery` and `htsr.analysis.repair` have in common: the copy has the files of the original (shards,
configuration, tokenizer) and becomes the output folder when all is done, or never.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias, TypeVar

from htsr.errors import HtsrError, MatrixError, UsageError
from htsr.matrices import hub
from htsr.matrices.checkpoint_files import file_tensors, folder_tensors
from htsr.matrices.file_bytes import TensorInFile
from htsr.matrices.folders import ModelFiles, model_files, named_files
from htsr.matrices.models import WeightMatrix
from htsr.matrices.sources import locate
from htsr.matrices.stored_tensors import FLOATS, StoredTensor
from htsr.matrices.tying import repeated, tied
from htsr.matrices.writing import copy_checkpoint

if TYPE_CHECKING:
    import torch

Row = TypeVar("Row")
Own = TypeVar("Own", covariant=True)
Advance: TypeAlias = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Checkpoint:
    """A model in files.

    Attributes:
        name: path or hub id, as it was given.
        place: folder or file where it lies.
    """

    name: str
    place: Path

    def files(self) -> ModelFiles:
        """The files that hold its weights."""
        return model_files(self.place) if self.place.is_dir() else named_files(self.place)

    def tensors(self) -> list[StoredTensor]:
        """Its tensors as they are stored."""
        return folder_tensors(self.place) if self.place.is_dir() else file_tensors(self.place)

    def copies(self) -> dict[str, str]:
        """Names of tensors that are stored a second time, each with the name of the first."""
        return repeated(tied(self.tensors()))


def find(source: str | os.PathLike[str], revision: str | None = None) -> Checkpoint:
    """The checkpoint that a path or hub id names, with all its files here.

    Args:
        source: folder, file or hub id.
        revision: branch, tag or commit of a hub id.

    Raises:
        SourceError: there is no such path or model.
        UsageError: a revision is given for a path.
    """
    name = os.fspath(source)
    place = locate(name, revision)
    if not Path(name).expanduser().exists():
        hub.fetch_rest(name, revision)
    return Checkpoint(name, place)


def check_goal(output: str | os.PathLike[str], *checkpoints: Checkpoint) -> Path:
    """The folder to write, which is free.

    Args:
        output: folder; it must be empty, or not exist yet.
        *checkpoints: models that are read.

    Raises:
        UsageError: the folder is in use, or lies within one of the models.
    """
    goal = Path(output)
    if goal.exists() and (not goal.is_dir() or any(goal.iterdir())):
        raise UsageError(f"{goal} exists already and is not an empty folder; take another output")
    for one in checkpoints:
        if one.place.is_dir() and goal.resolve().is_relative_to(one.place.resolve()):
            raise UsageError(
                f"{goal} lies inside the model {one.name}, and would become part of it; take an output beside it"
            )
    return goal


@contextmanager
def copied(place: Path, files: ModelFiles, goal: Path) -> Iterator[tuple[Path, dict[str, TensorInFile]]]:
    """A copy of a checkpoint, to be changed in the block, at the end of which it becomes `goal`.

    Args:
        place: folder or file of the checkpoint.
        files: files of it that hold weights.
        goal: folder that the copy becomes.

    Yields:
        The folder of the copy, and its tensors by name.

    Raises:
        SourceError: the checkpoint has a format that is not written (GGUF).
        HtsrError: the output cannot be written.
    """
    try:
        folder = Path(tempfile.mkdtemp(dir=goal.absolute().parent, prefix=f".{goal.name}."))
    except OSError as error:
        raise HtsrError(f"{goal} cannot be written: {error.strerror}") from error
    try:
        yield folder, copy_checkpoint(place, files, folder)
        umask = os.umask(0)
        os.umask(umask)
        folder.chmod(0o777 & ~umask)
        folder.replace(goal)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Operator(Protocol[Own]):
    """What is done to each matrix, and the row that says so."""

    def leave(self, matrix: WeightMatrix, status: str, why: str) -> Own:
        """The row of a matrix that is left as it is.

        Args:
            matrix: matrix that is left.
            status: why, in one word.
            why: the same as a sentence.
        """

    def operate(self, matrix: WeightMatrix, W: torch.Tensor) -> tuple[torch.Tensor | None, Own]:
        """The changed matrix and its row; a MatrixError that is raised leaves the matrix as it is.

        Args:
            matrix: matrix to change.
            W: its weights, (m, n) or (pieces, m, n), in their stored dtype.

        Returns:
            The changed weights in the shape of `W`, or None where they stay the same; and the row.
        """


def operate(
    wanted: Sequence[WeightMatrix],
    operator: Operator[Row],
    read: Callable[[str], torch.Tensor],
    write: Callable[[str, torch.Tensor], None],
    progress: Advance | None = None,
) -> list[Row]:
    """Change `wanted`, the matrices of one stored tensor together.

    Args:
        wanted: matrices to change.
        operator: what is done to each.
        read: function that reads a stored tensor by name.
        write: function that writes it.
        progress: function that is called with (done, total, name) after each matrix.

    Returns:
        The rows, in the order of `wanted`.
    """
    by_tensor: dict[str, list[int]] = {}
    for i, matrix in enumerate(wanted):
        by_tensor.setdefault(matrix.position.tensor, []).append(i)
    rows: dict[int, Row] = {}
    for tensor, indices in by_tensor.items():
        whole, changed = None, False
        for i in indices:
            matrix = wanted[i]
            if problem := obstacle(matrix):
                rows[i] = operator.leave(matrix, *problem)
            else:
                whole = read(tensor) if whole is None else whole
                try:
                    W, rows[i] = operator.operate(matrix, matrix.position.take(whole))  # type: ignore[arg-type]
                except MatrixError as error:
                    W, rows[i] = None, operator.leave(matrix, error.status, f"left as it is: {error}")
                if W is not None:
                    matrix.position.put(whole, W)
                    changed = True
            if progress is not None:
                progress(len(rows), len(wanted), matrix.name)
        if whole is not None and changed:
            write(tensor, whole)
    return [rows[i] for i in range(len(wanted))]


def obstacle(matrix: WeightMatrix) -> tuple[str, str] | None:
    """Why a matrix cannot be written: a status and a sentence; None where it can.

    Args:
        matrix: matrix to be written.
    """
    if matrix.problem is not None:
        return matrix.problem
    if matrix.dtype not in FLOATS or "de-quantised" in matrix.warning:
        return "quantized", f"left as it is: {matrix.name} is stored quantised"
    return None


def write_copies(copies: dict[str, str], changed: set[str], stored: dict[str, TensorInFile]) -> None:
    """Write tensors that are stored a second time as the first was written.

    Args:
        copies: names of such tensors, each with the name of the first.
        changed: names of the tensors that were changed.
        stored: tensors of the copy by name.
    """
    for other, original in copies.items():
        if original in changed and stored[other].shape == stored[original].shape:
            stored[other].write(stored[original].read().to(stored[other].read().dtype))
