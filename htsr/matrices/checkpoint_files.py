"""Checkpoint files, one tensor at a time: safetensors, PyTorch pickles (weights only), GGUF, and folders of them.

No code of the model is executed, and a pickle that holds more than tensors is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from htsr.arrays import Array
from htsr.errors import SourceError
from htsr.matrices.file_bytes import safetensors_header
from htsr.matrices.folders import ModelFiles, model_files, named_files
from htsr.matrices.gguf_files import gguf_tensors
from htsr.matrices.pickles import PICKLES, pickle_tensors, state_dict_in
from htsr.matrices.stored_tensors import StoredTensor, clean_names, stored_tensor

_LFS = b"version https://git-lfs"


def file_tensors(path: Path) -> list[StoredTensor]:
    """The tensors of one file, by its suffix, in natural order of their names.

    Args:
        path: a .safetensors, .gguf or PyTorch file. One shard stands for all shards of its set, and an index for the
            shards that it lists.

    Raises:
        SourceError: the file is missing, empty, truncated or of an unknown kind, or a pickle that holds more than
            tensors.
        MissingDependencyError: the file is a .gguf, and the gguf package is not installed.
    """
    return _together(named_files(path) if path.exists() else ModelFiles((path,)))


def folder_tensors(folder: Path) -> list[StoredTensor]:
    """The tensors of the model in `folder`; see `htsr.matrices.folders`.

    A tensor that lies in several shards is that of the shard its index names. One that the index names and no shard
    holds is listed with a problem, so that its row says that it is missing.

    Raises:
        SourceError: the folder holds no weights or several models, or shards are missing or cannot be read.
    """
    return _together(model_files(folder))


def state_dict_tensors(state: Mapping[str, Any]) -> list[StoredTensor]:
    """The tensors of a `state` dict in memory, bare or wrapped as training scripts save it; other values are left out.

    Raises:
        SourceError: `state` holds several state dicts, or no tensor of torch and no array of NumPy.
    """
    tensors = state_dict_in(state, "the state dict")
    if not tensors and state:
        kind = type(next(iter(state.values()))).__name__
        raise SourceError(
            f"the state dict has no tensors: its values are tensors of torch or arrays of NumPy, not {kind}"
        )
    names = clean_names(tensors)
    return [stored_tensor(names[name], tensor) for name, tensor in tensors.items()]


def _together(model: ModelFiles) -> list[StoredTensor]:
    """The tensors of all files under clean names; of a name in several files the one of the index, else the first."""
    stored: dict[str, StoredTensor] = {}
    for file in model.files:
        for tensor in _read_file(file):
            if tensor.name not in stored or model.assigned.get(tensor.name) == file:
                stored[tensor.name] = tensor
    names = clean_names({**stored, **model.assigned})
    tensors = [replace(tensor, name=names[name]) for name, tensor in stored.items()]
    for name, file in model.assigned.items():
        if name not in stored:
            why = f"{names[name]} is in no shard; {model.index and model.index.name} names {file.name} for it"
            tensors.append(StoredTensor(names[name], (0, 0), "", _absent, problem=("missing", why)))
    return _in_order(tensors)


def _absent(_index: int | slice | None = None) -> Array:
    raise OSError("it is in no shard")


def _read_file(path: Path) -> list[StoredTensor]:
    """The tensors of one file, named as stored."""
    if not path.exists():
        raise SourceError(f"{path} does not exist")
    try:
        if path.stat().st_size == 0:
            raise SourceError(f"{path} is empty")
        with path.open("rb") as file:
            head = file.read(len(_LFS))
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}") from error
    if head == _LFS:
        raise SourceError(f"{path} is a pointer of Git LFS, not the file itself: git lfs pull brings it")
    if path.suffix == ".safetensors":
        return [StoredTensor(name, s.shape, s.dtype, s.array) for name, s in safetensors_header(path).items()]
    if path.suffix == ".gguf":
        return gguf_tensors(path)
    if path.suffix in PICKLES:
        return pickle_tensors(path)
    if path.suffix == ".npz":
        raise SourceError(f"{path} is no checkpoint; if it is a saved analysis, htsr.Analysis.load reads it")
    raise SourceError(f"{path} is no checkpoint: .safetensors, .gguf, {', '.join(PICKLES)} or a folder of them is")


def _in_order(tensors: list[StoredTensor]) -> list[StoredTensor]:
    """By name, numbers by value: files store their tensors in any order."""

    def key(tensor: StoredTensor) -> list[tuple[int, str]]:
        parts = enumerate(re.split(r"([0-9]+)", tensor.name))  # every second one is a number
        return [(len(part.lstrip("0")), part.lstrip("0")) if i % 2 else (-1, part) for i, part in parts]

    return sorted(tensors, key=key)
