"""Writing changed weights: a copy of a checkpoint's files as safetensors, in which tensors are overwritten in place.

Only one tensor is in memory at a time, and what is not overwritten stays as it was, bit for bit.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from htsr.errors import HtsrError, SourceError
from htsr.matrices.entries import clean_name
from htsr.matrices.files import PICKLES, SAFETENSORS_DTYPES, load_pickle

if TYPE_CHECKING:
    import torch

_WEIGHT_SUFFIXES = (".safetensors", ".gguf", ".h5", ".msgpack", ".onnx", ".npz", *PICKLES)
_PICKLE_INDEX = "pytorch_model.bin.index.json"
_ALIGNMENT = 8
_CODES = {name: code for code, name in SAFETENSORS_DTYPES.items()}


@dataclass(frozen=True)
class Stored:
    """Where a tensor's bytes lie.

    Attributes:
        file: a safetensors file.
        offset: of the first byte, from the start of the file.
        dtype: as torch names it.
        shape: of the tensor.
    """

    file: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]

    def read(self) -> torch.Tensor:
        """The tensor, of `shape` and `dtype`, a copy in memory."""
        import torch

        dtype = getattr(torch, self.dtype)
        count = math.prod(self.shape) * dtype.itemsize
        data = np.fromfile(self.file, dtype=np.uint8, count=count, offset=self.offset)
        return torch.from_numpy(data).view(dtype).reshape(self.shape)

    def write(self, tensor: torch.Tensor) -> None:
        """Overwrite the tensor by `tensor`, whose dtype and shape are those that `read` gave."""
        import torch

        with self.file.open("r+b") as file:
            file.seek(self.offset)
            tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tofile(file)


def copy_checkpoint(source: Path, files: list[Path], target: Path) -> dict[str, Stored]:
    """Copy a model: its weight `files` as safetensors, and of a folder what else is in it (configuration, tokenizer).

    Args:
        source: the folder, or the one file.
        files: its weight files.
        target: an empty folder.

    Returns:
        The tensors of the copy, by name without wrappers' prefixes.

    Raises:
        SourceError: a format that is not written (GGUF), or a file that cannot be read.
        HtsrError: a dtype of a PyTorch file that safetensors does not store.
    """
    for file in files:
        if file.suffix not in (".safetensors", *PICKLES):
            raise SourceError(f"{file} cannot be changed: load it with transformers, save_pretrained it, and take that")
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True, ignore=_no_weights)
    names = {file.name: _target_name(file, len(files)) for file in files}
    stored: dict[str, Stored] = {}
    for file in files:
        copy = target / names[file.name]
        if file.suffix == ".safetensors":
            shutil.copyfile(file, copy)
        else:
            _convert(file, copy)
        for name, place in stored_tensors(copy).items():
            stored.setdefault(name, place)
    if (source / _PICKLE_INDEX).is_file() and any(file.suffix in PICKLES for file in files):
        index = json.loads((source / _PICKLE_INDEX).read_text())
        index["weight_map"] = {tensor: names[Path(file).name] for tensor, file in index["weight_map"].items()}
        (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return stored


def stored_tensors(file: Path) -> dict[str, Stored]:
    """The tensors of a safetensors `file` by name without wrappers' prefixes, from its header."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header: dict[str, Any] = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    return {
        clean_name(name): Stored(
            file,
            8 + length + about["data_offsets"][0],
            SAFETENSORS_DTYPES.get(about["dtype"], about["dtype"].lower()),
            tuple(about["shape"]),
        )
        for name, about in header.items()
    }


def _no_weights(_folder: str, names: list[str]) -> set[str]:
    return {name for name in names if name.endswith((*_WEIGHT_SUFFIXES, _PICKLE_INDEX))}


def _target_name(file: Path, count: int) -> str:
    if file.suffix == ".safetensors":
        return file.name
    if count == 1:
        return "model.safetensors"
    return f"{file.stem.replace('pytorch_model', 'model', 1)}.safetensors"


def _convert(source: Path, target: Path) -> None:
    """A PyTorch file as safetensors, tensor by tensor; those that share memory are written once each."""
    import torch

    state, _ = load_pickle(source)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in state.items():
        code = _CODES.get(str(tensor.dtype).removeprefix("torch."))
        if code is None:
            raise HtsrError(f"{name} of {source} has the dtype {tensor.dtype}, which safetensors does not store")
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with target.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in state.values():
            if tensor.numel():
                tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tofile(file)
