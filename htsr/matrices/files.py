"""Checkpoint files, one tensor at a time: safetensors, PyTorch pickles (weights only), GGUF, and folders of them.

A file is opened anew for each tensor, so the pages of the previous one are given back and memory stays at one tensor.
No code of the model is executed, and a pickle that holds more than tensors is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from htsr.errors import MissingDependencyError, SourceError
from htsr.matrices.entries import Entry, clean_name, tensor_entry
from htsr.spectra.esd import Array

SAFETENSORS_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
_NUMPY_READS = {"float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"}
_NESTED = ("state_dict", "model_state_dict", "model", "module", "params", "weights")
_NOT_WEIGHTS = ("optimizer", "scheduler", "training_args", "rng_state", "scaler", "trainer_state")
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def file_entries(path: Path) -> list[Entry]:
    """The tensors of one file, by its suffix, in natural order of their names.

    Args:
        path: a .safetensors, .gguf or PyTorch file.

    Raises:
        SourceError: missing, empty, truncated, of unknown kind, or a pickle of more than tensors.
        MissingDependencyError: a .gguf file without the gguf package.
    """
    return _in_order(_read_file(path))


def _read_file(path: Path) -> list[Entry]:
    if not path.exists():
        raise SourceError(f"{path} does not exist")
    if path.stat().st_size == 0:
        raise SourceError(f"{path} is empty")
    if path.suffix == ".safetensors":
        return _safetensors(path)
    if path.suffix == ".gguf":
        return _gguf(path)
    if path.suffix in PICKLES:
        return _pickle(path)
    raise SourceError(f"{path} is no checkpoint: .safetensors, .gguf, {', '.join(PICKLES)} or a folder of them is")


def folder_entries(folder: Path) -> list[Entry]:
    """The tensors of a model `folder` as transformers lays it out: an index with shards, or one file.

    Raises:
        SourceError: no weights in it, or an index that names a file that is not there.
    """
    return _merged(weight_files(folder))


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights of a model `folder`; see `folder_entries`.

    Raises:
        SourceError: no weights in it, several models, or an index that names a file that is not there.
    """
    for index in (folder / "model.safetensors.index.json", folder / "pytorch_model.bin.index.json"):
        if index.is_file():
            return _indexed(index)
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name]
    for suffix in (".safetensors", ".gguf", *PICKLES):
        files = sorted(f for f in folder.glob(f"*{suffix}") if not f.stem.startswith(_NOT_WEIGHTS))
        if suffix == ".gguf" and len(files) > 1 and not any("-of-" in f.name for f in files):
            names = ", ".join(f.name for f in files)
            raise SourceError(f"{folder} holds several models ({names}); name one of them")
        if files:
            return files
    inner = sorted({f.parent.name for f in folder.glob("*/*.safetensors")})
    hint = f"; its subfolders {', '.join(inner)} do, name one of them" if inner else ""
    raise SourceError(f"{folder} holds no weights (.safetensors, .bin, .pt, .gguf){hint}")


def read_config(folder: Path) -> dict[str, Any]:
    """The ``config.json`` of a model `folder`; empty where there is none.

    Raises:
        SourceError: it is not a JSON object.
    """
    file = folder / "config.json"
    return read_json(file) if file.is_file() else {}


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a `file`.

    Raises:
        SourceError: not JSON, or not an object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise SourceError(f"{file} is not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise SourceError(f"{file} is not a JSON object")
    return content


def _indexed(index: Path) -> list[Path]:
    shards = shards_of(index)
    for shard in shards:
        if not (index.parent / shard).is_file():
            raise SourceError(
                f"{index.parent / shard} is missing; {index.name} says {len(shards)} files make the model"
            )
    return [index.parent / shard for shard in shards]


def shards_of(index: Path) -> list[str]:
    """The file names in an `index` of shards.

    Raises:
        SourceError: not an index, or one that names files elsewhere.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{index} has no weight_map")
    shards = sorted({str(file) for file in weight_map.values()})
    for shard in shards:
        if Path(shard).name != shard:
            raise SourceError(f"{index} names a file outside its folder: {shard}")
    return shards


def _merged(files: Iterable[Path]) -> list[Entry]:
    found: dict[str, Entry] = {}
    for file in files:
        for entry in _read_file(file):
            found.setdefault(entry.name, entry)
    return _in_order(list(found.values()))


def _in_order(entries: list[Entry]) -> list[Entry]:
    """By name, numbers by value: files store their tensors in any order."""

    def key(entry: Entry) -> list[tuple[int, str]]:
        return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", entry.name)]

    return sorted(entries, key=key)


def _safetensors(path: Path) -> list[Entry]:
    from safetensors import SafetensorError, safe_open

    def entry(name: str, shape: list[int], dtype: str) -> Entry:
        known = SAFETENSORS_DTYPES.get(dtype, dtype.lower())
        framework = "numpy" if known in _NUMPY_READS else "pt"

        def read(index: int | None = None) -> Array:
            with safe_open(path, framework) as file:
                return file.get_tensor(name) if index is None else file.get_slice(name)[index]

        return Entry(clean_name(name), tuple(shape), known, read)

    try:
        with safe_open(path, "numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return [entry(name, part.get_shape(), part.get_dtype()) for name, part in slices.items()]
    except (SafetensorError, OSError, ValueError) as error:
        raise SourceError(f"{path} is not a readable safetensors file, truncated perhaps: {error}") from error


def _pickle(path: Path) -> list[Entry]:
    state, mapped = load_pickle(path)

    def entry(name: str, tensor: Any) -> Entry:
        found = tensor_entry(name, tensor)
        if not mapped:
            return found

        def read(index: int | None = None) -> Array:
            again = load_pickle(path)[0][name].detach()
            return again if index is None else again[index]

        storage = found.storage and (str(path), found.storage)
        return Entry(found.name, found.shape, found.dtype, read, storage=storage)

    return [entry(name, tensor) for name, tensor in state.items()]


def load_pickle(path: Path) -> tuple[dict[str, Any], bool]:
    """The state dict of a pickle, memory-mapped where the file's format allows it.

    Args:
        path: of a file that holds a state dict, bare or under a usual key such as ``state_dict``.

    Returns:
        Tensors by name, and whether they are memory-mapped.

    Raises:
        SourceError: it holds Python objects besides tensors, no dictionary, or is truncated.
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
        raise SourceError(
            f"{path} is refused: it holds Python objects besides tensors, and loading those could run code; "
            "save its state_dict, best as safetensors"
        ) from error
    except Exception as error:
        raise SourceError(f"{path} is not a readable PyTorch file, truncated perhaps: {error}") from error
    for key in _NESTED:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise SourceError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors")
    return {str(k): v for k, v in content.items() if isinstance(v, torch.Tensor)}, mapped


def state_dict_entries(state: dict[str, Any]) -> list[Entry]:
    """The tensors of a `state` dict in memory; what else it holds is left out."""
    import torch

    return [tensor_entry(str(name), t) for name, t in state.items() if isinstance(t, torch.Tensor)]


def _gguf(path: Path) -> list[Entry]:
    try:
        from gguf import GGUFReader, dequantize
    except ImportError as error:
        raise MissingDependencyError(f"reading {path.name} needs the gguf package: pip install 'htsr[gguf]'") from error

    try:
        tensors = GGUFReader(path).tensors
    except (ValueError, OSError, IndexError, KeyError) as error:
        raise SourceError(f"{path} is not a readable GGUF file, truncated perhaps: {error}") from error

    def entry(tensor: Any) -> Entry:
        kind, offset, dtype, stored = (
            tensor.tensor_type,
            tensor.data_offset,
            tensor.data.dtype,
            tensor.data.shape,
        )

        def read(index: int | None = None) -> Array:
            data = np.memmap(path, mode="r", offset=offset, dtype=dtype, shape=stored)
            return np.asarray(dequantize(data if index is None else data[index], kind), dtype=np.float32)

        plain = SAFETENSORS_DTYPES.get(kind.name)
        warning = "" if plain else f"de-quantised from {kind.name}"
        shape = tuple(int(d) for d in reversed(tensor.shape))
        return Entry(tensor.name, shape, plain or kind.name.lower(), read, warning=warning)

    return [entry(tensor) for tensor in tensors]
