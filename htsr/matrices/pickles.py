"""PyTorch files: weights only, memory-mapped, and the state dict found by what it holds rather than by its key."""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from htsr.arrays import Array
from htsr.errors import SourceError
from htsr.matrices.stored_tensors import StoredTensor, stored_tensor

if TYPE_CHECKING:
    import torch

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".tar")  # of .pth.tar
_NO_MODEL = re.compile(r"optim|sched|scaler|rng|^(callbacks|loops|frozen_param_\w+)$", re.IGNORECASE)
_DEPTH = 5
_KEPT = 64 << 20  # bytes that are read from one mapping before it is made anew


def pickle_tensors(path: Path) -> list[StoredTensor]:
    """The tensors of a PyTorch file, named as stored.

    Args:
        path: the PyTorch file.

    Raises:
        SourceError: `load_pickle` refuses the file.
    """
    state, mapped = load_pickle(path)
    if not mapped:
        return [stored_tensor(name, tensor) for name, tensor in state.items()]
    mapping = _Mapping(path, state)

    def unread(name: str, mapped: torch.Tensor) -> StoredTensor:
        found = stored_tensor(name, mapped)

        def read(index: int | slice | None = None) -> Array:
            return stored_tensor(name, mapping.tensor(name)).read(index)

        return replace(found, read=read, storage=found.storage and (str(path), found.storage))

    return [unread(name, tensor) for name, tensor in state.items()]


class _Mapping:
    """A PyTorch file in memory, mapped anew every `_KEPT` bytes: pages are given back, and its index is parsed seldom.

    Args:
        path: the PyTorch file.
        state: tensors of the file by name, just loaded.
    """

    def __init__(self, path: Path, state: dict[str, torch.Tensor]) -> None:
        self._path, self._state, self._read = path, state, 0
        self._version: tuple[int, int] | None = _version(path)
        self._lock = threading.Lock()

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor `name`, mapped.

        Raises:
            SourceError: the file was changed since it was opened, and cannot be read any more.
        """
        with self._lock:
            version = _version(self._path)
            if self._read > _KEPT or version != self._version:  # touching a cut file's old mapping ends the process
                self._state, self._version = {}, None
                self._state = load_pickle(self._path)[0]
                self._read, self._version = 0, version
            tensor = self._state[name]
            self._read += tensor.numel() * tensor.element_size()
            return tensor


def _version(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def load_pickle(path: Path) -> tuple[dict[str, torch.Tensor], bool]:
    """The state dict of a PyTorch file, memory-mapped where its format allows it.

    Args:
        path: file that holds a state dict, bare or inside of dictionaries under any keys.

    Returns:
        Tensors of any shape by name, and whether they are memory-mapped.

    Raises:
        SourceError: the file holds Python objects besides tensors, no dictionary, or several state dicts, or it is
            truncated.
    """
    import pickle

    import torch

    def load(mmap: bool) -> Any:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)

    mapped = True
    try:
        try:
            content = load(mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):  # written before torch 1.6, without the zip container
                raise
            mapped = False
            content = load(mmap=False)
    except pickle.UnpicklingError as error:
        raise SourceError(_refusal(path, str(error))) from error
    except Exception as error:
        raise SourceError(_unreadable(path, str(error))) from error
    return state_dict_in(content, str(path)), mapped


def state_dict_in(content: Any, label: str) -> dict[str, torch.Tensor]:
    """The tensors of the state dict in `content`, which dictionaries under any keys may wrap.

    Args:
        content: object that was loaded. A dictionary that holds a matrix is a state dict; states of optimizers and
            the like are passed over.
        label: what to call it in errors.

    Returns:
        Tensors of any shape, by name; arrays of NumPy are tensors, too.

    Raises:
        SourceError: `content` is not a dictionary, holds several state dicts, or an array of a dtype that torch lacks.
    """
    if not isinstance(content, Mapping):
        raise SourceError(f"{label} holds a {type(content).__name__}, not a dictionary of tensors")
    found = list(_state_dicts(content, (), _DEPTH))
    if len(found) > 1:
        names = ", ".join(f"{'.'.join(path) or 'the top level'} ({len(tensors)} tensors)" for path, tensors in found)
        raise SourceError(f"{label} holds several state dicts: {names}; give the one that is meant on its own")
    return found[0][1] if found else _tensors(content)


def _state_dicts(
    content: Mapping[Any, Any], path: tuple[str, ...], depth: int
) -> Iterator[tuple[tuple[str, ...], dict[str, torch.Tensor]]]:
    tensors = _tensors(content)
    if any(_is_matrix(tensor) for tensor in tensors.values()):
        yield path, tensors
    if depth == 0 or "param_groups" in content:  # an optimizer's
        return
    for key, inner in content.items():
        if isinstance(inner, Mapping) and isinstance(key, str) and not _NO_MODEL.search(key):
            yield from _state_dicts(inner, (*path, key), depth - 1)


def _tensors(content: Mapping[Any, Any]) -> dict[str, torch.Tensor]:
    import torch

    found = {}
    for key, value in content.items():
        if isinstance(value, np.ndarray) and (value.dtype.kind in "fiub" or value.dtype.name == "bfloat16"):
            found[str(key)] = _from_numpy(str(key), value)
        elif isinstance(value, torch.Tensor):
            found[str(key)] = value
    return found


def _from_numpy(name: str, array: npt.NDArray[Any]) -> torch.Tensor:
    """The array itself as a tensor, or a copy of one in another order."""
    import torch

    native = np.asarray(array, array.dtype.newbyteorder("="), order="C")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an array that may not be written to: nobody does
            if native.dtype.name == "bfloat16":  # of ml_dtypes
                return torch.from_numpy(native.view(np.int16)).view(torch.bfloat16)
            return torch.from_numpy(native)
    except TypeError as error:
        raise SourceError(f"{name} is an array of {array.dtype}, which torch does not have") from error


def _is_matrix(tensor: torch.Tensor) -> bool:
    return tensor.is_nested or tensor.ndim >= 2


def _refusal(path: Path, why: str) -> str:
    with path.open("rb") as file:
        head = file.read(2)
    if head != b"PK" and head[:1] != b"\x80":  # neither a zip container nor a pickle of protocol 2 or later
        return _unreadable(path, why)
    found = re.search(r"GLOBAL ([\w.]+)", why)
    what = f" ({found[1]})" if found else ""
    if found and found[1].startswith("numpy"):
        return (
            f"{path} is refused: it holds Python objects besides tensors{what}, NumPy's arrays or numbers: "
            "save them as tensors (torch.from_numpy), best as safetensors"
        )
    return (
        f"{path} is refused: it holds Python objects besides tensors{what}, and loading those could run code; "
        "save its state_dict, best as safetensors"
    )


def _unreadable(path: Path, why: str) -> str:
    if "TorchScript" in why:
        return (
            f"{path} is a TorchScript archive, which is code and weights in one: "
            "save the state_dict() of what torch.jit.load gives"
        )
    with path.open("rb") as file:
        head = file.read(64)
    if re.match(rb"[\x01-\x20]\0\0\0..[\x20-\x7e]+\0", head, re.DOTALL):  # version, length and name of its class
        return f"{path} is a CTranslate2 model, which htsr does not read: give the model that it was converted from"
    sentence = next((line.strip() for line in reversed(why.splitlines()) if line.strip() and "http" not in line), "")
    return f"{path} is not a readable PyTorch file, truncated perhaps: {sentence}"
