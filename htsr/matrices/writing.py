"""Writing changed weights: a copy of a checkpoint's files as safetensors, in which tensors are overwritten in place.

Only one tensor is in memory at a time, and what is not overwritten stays as it was, bit for bit.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from htsr.errors import HtsrError, SourceError
from htsr.matrices.adapter_config import CONFIG
from htsr.matrices.file_bytes import SAFETENSORS_DTYPES, TensorInFile, safetensors_header
from htsr.matrices.folders import ModelFiles
from htsr.matrices.pickles import PICKLES, load_pickle
from htsr.matrices.stored_tensors import clean_names

_WEIGHT_SUFFIXES = (".safetensors", ".gguf", ".h5", ".msgpack", ".onnx", ".npz", *PICKLES)
_INDEX = re.compile(r"\.(?:safetensors|bin)\.index(\.\w+)?\.json$")
_ALIGNMENT = 8
_CODES = {name: code for code, name in SAFETENSORS_DTYPES.items()}


def copy_checkpoint(source: Path, model: ModelFiles, target: Path) -> dict[str, TensorInFile]:
    """Copy a model: its weights as safetensors, and of a folder what else is in it (configuration, tokenizer).

    Folders inside of it are copied but for `folders_left_out`.

    Args:
        source: folder or file of the model.
        model: weight files of the model.
        target: empty folder for the copy.

    Returns:
        The tensors of the copy, by name without wrappers' prefixes.

    Raises:
        SourceError: the model has a format that is not written (GGUF), or a file cannot be read.
        HtsrError: a PyTorch file holds a dtype that safetensors does not store.
    """
    files = model.files
    for file in files:
        if file.suffix not in (".safetensors", *PICKLES):
            raise SourceError(f"{file} cannot be changed: load it with transformers, save_pretrained it, and take that")
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True, ignore=_ignored(source))
    names = {file.name: _target_name(file, len(files)) for file in files}
    stored: dict[str, TensorInFile] = {}
    for file in files:
        copy = target / names[file.name]
        if file.suffix == ".safetensors":
            shutil.copyfile(file, copy)
        else:
            _convert(file, copy)
        for name, tensor in safetensors_header(copy).items():
            if name not in stored or model.assigned.get(name) == file:
                stored[name] = tensor
    if model.index is not None:
        index = json.loads(model.index.read_text(encoding="utf-8"))
        index["weight_map"] = {name: names[file.name] for name, file in model.assigned.items()}
        (target / _INDEX.sub(r".safetensors.index\1.json", _renamed(model.index.name))).write_text(
            json.dumps(index, indent=2) + "\n"
        )
    cleaned = clean_names(stored)
    return {cleaned[name]: tensor for name, tensor in stored.items()}


def folders_left_out(source: Path) -> tuple[str, ...]:
    """Folders inside of a model's that hold weights of their own: an adapter, earlier checkpoints, other formats.

    What belongs to the model does not count: the modules of sentence-transformers that its ``modules.json`` names.

    Args:
        source: folder or file of the model.

    Returns:
        Their paths from `source` on, sorted; none for a file.
    """
    modules = _modules(source)
    found = []
    for folder, inside, names in os.walk(source):
        path = Path(folder).relative_to(source).as_posix()
        if path in modules:
            inside.clear()
        elif path != "." and any(_is_weight(name) or name == CONFIG for name in names):
            inside.clear()
            found.append(path)
    return tuple(sorted(found))


def _ignored(source: Path) -> Callable[[str, list[str]], set[str]]:
    left_out = set(folders_left_out(source))

    def ignored(folder: str, names: list[str]) -> set[str]:
        own = Path(folder).relative_to(source)
        top = own == Path()
        return {name for name in names if (own / name).as_posix() in left_out or (top and _is_weight(name))}

    return ignored


def _is_weight(name: str) -> bool:
    return name.endswith(_WEIGHT_SUFFIXES) or _INDEX.search(name) is not None


def _modules(source: Path) -> set[str]:
    """Folders of the modules of a model of sentence-transformers, but for the model's own."""
    file = source / "modules.json"
    try:
        listed = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    except ValueError:
        return set()
    paths = [entry.get("path") for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
    return {Path(path).as_posix() for path in paths if isinstance(path, str)} - {"."}


def _target_name(file: Path, count: int) -> str:
    if file.suffix == ".safetensors":
        return file.name
    if count == 1:
        return "adapter_model.safetensors" if file.stem == "adapter_model" else "model.safetensors"
    return f"{_renamed(file.stem)}.safetensors"


def _renamed(name: str) -> str:
    """The `name` of a PyTorch file as that of a safetensors file begins."""
    return f"model{name.removeprefix('pytorch_model')}" if name.startswith("pytorch_model") else name


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
