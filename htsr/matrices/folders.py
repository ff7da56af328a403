"""Which files of a folder are the model.

transformers' order comes first: ``model.safetensors``, its index, ``pytorch_model.bin``, its index. In other folders
what can be one model is told by name: an index with its shards, a complete set of ``…-00001-of-00003``, a single file;
the same name in two formats is one model, read as safetensors. Where several are left, none is guessed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from htsr.errors import SourceError
from htsr.matrices.pickles import PICKLES

SUFFIXES = (".safetensors", ".gguf", *PICKLES)
TRANSFORMERS_ORDER = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_NOT_WEIGHTS = re.compile(
    r"^(optim|adam|scheduler|lr_scheduler|training_args|rng_|random_states|scaler|sampler|trainer_state|dl_state_dict|"
    r"custom_checkpoint)|optim_states|(^|[_.-])optimizers?([_.-]|$)",
    re.IGNORECASE,
)
_INDEX = re.compile(r"\.(safetensors|bin)\.index(\.\w+)?\.json$")
_PART = re.compile(r"^(?P<stem>.+?)[-_.](?P<part>\d+)[-_]of[-_](?P<count>\d+)$")
_UNREAD = {
    ".distcp": "torch's distributed checkpoint: python -m torch.distributed.checkpoint.format_utils dcp_to_torch",
    ".h5": "TensorFlow or Keras weights",
    ".msgpack": "Flax weights",
    ".onnx": "ONNX",
    ".npz": "NumPy arrays: save them as safetensors",
    ".index": "a TensorFlow checkpoint",
}


@dataclass(frozen=True)
class ModelFiles:
    """The files that make a model.

    Attributes:
        files: the weight files, in their order.
        assigned: the file of each tensor by name, as an index gives it; empty where there is no index.
        index: the index file; None where there is none.
    """

    files: tuple[Path, ...]
    assigned: Mapping[str, Path] = field(default_factory=dict)
    index: Path | None = None


def model_files(folder: Path) -> ModelFiles:
    """The files that hold the weights of the model in `folder`.

    Raises:
        SourceError: the folder holds no weights or several models, shards are missing, or its index cannot be used.
    """
    names = [name for name in (_named_by_config(folder), *TRANSFORMERS_ORDER) if name and (folder / name).is_file()]
    if names:
        file = folder / names[0]
        return _indexed(file) if file.suffix == ".json" else ModelFiles((file,))
    candidates = _candidates(folder)
    if len(candidates) == 1:
        (found,) = candidates.values()
        return _complete(found)
    if candidates:
        listed = ", ".join(sorted(candidates))
        raise SourceError(f"{folder} holds several models ({listed}); name one of them")
    raise SourceError(f"{folder} holds no weights (.safetensors, .bin, .pt, .gguf){_hint(folder)}")


def named_files(file: Path) -> ModelFiles:
    """The files of the model that a `file` stands for: an index, or a shard with all others of its set.

    Raises:
        SourceError: shards are missing, or the index cannot be used.
    """
    if _INDEX.search(file.name):
        return _indexed(file)
    if _PART.match(file.stem) is None:
        return ModelFiles((file,))
    for index in _indexes(file.parent):
        if file.name in weight_map(index).values():
            return _indexed(index)
    return _complete(ModelFiles(tuple(_set_of(file))))


def read_config(folder: Path) -> dict[str, Any]:
    """The ``config.json`` of a model `folder`; empty where there is none.

    Raises:
        SourceError: the file is not a JSON object.
    """
    file = folder / "config.json"
    return read_json(file) if file.is_file() else {}


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a `file`.

    Raises:
        SourceError: the file is not JSON, or not an object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise SourceError(f"{file} is not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise SourceError(f"{file} is not a JSON object")
    return content


def weight_map(index: Path) -> dict[str, str]:
    """The file name of each tensor, as an `index` of shards says.

    Raises:
        SourceError: the file is not an index, or it names files in other folders.
    """
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise SourceError(f"{index} has no weight_map")
    for shard in found.values():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise SourceError(f"{index} names a file outside its folder: {shard}")
    return found


def shards_of(index: Path) -> list[str]:
    """The file names in an `index` of shards.

    Raises:
        SourceError: the file is not an index, or it names files in other folders.
    """
    return sorted(set(weight_map(index).values()))


def _indexed(index: Path) -> ModelFiles:
    assigned = {name: index.parent / shard for name, shard in weight_map(index).items()}
    files = tuple(sorted(set(assigned.values())))
    for file in files:
        if not file.is_file():
            raise SourceError(f"{file} is missing; {index.name} says {len(files)} files make the model")
    return ModelFiles(files, assigned, index)


def _named_by_config(folder: Path) -> str | None:
    """The file that transformers takes first where a configuration names one."""
    name = read_config(folder).get("transformers_weights")
    return name if isinstance(name, str) and Path(name).name == name else None


def _candidates(folder: Path) -> dict[str, ModelFiles]:
    """What can be one model each, by the name of its file, index or first shard."""
    weights = [f for f in sorted(folder.iterdir()) if _may_hold_weights(f)]
    found: dict[str, ModelFiles] = {}
    sharded: set[Path] = set()
    for index in _indexes(folder):
        found[index.name] = _indexed(index)
        sharded.update(found[index.name].files)
    sets: dict[tuple[str, str], list[Path]] = {}
    for file in weights:
        if file not in sharded:
            match = _PART.match(file.stem)
            key = f"{match['stem']} of {match['count']}" if match else _stem(file)
            sets.setdefault((key, file.suffix), []).append(file)
    for (key, suffix), files in sets.items():
        if not any((key, better) in sets for better in SUFFIXES[: SUFFIXES.index(suffix)]):  # the same model
            found[files[0].name] = ModelFiles(tuple(files))
    return found


def _indexes(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if _INDEX.search(file.name))


def _may_hold_weights(file: Path) -> bool:
    hidden = file.name.startswith(".")  # half-written, or another system's companion of a file
    return file.suffix in SUFFIXES and not hidden and not _NOT_WEIGHTS.search(file.stem) and file.is_file()


def _stem(file: Path) -> str:
    return file.stem.removesuffix(".pth") if file.suffix == ".tar" else file.stem


def _set_of(file: Path) -> list[Path]:
    """The files beside a `file` named ``…-00001-of-00003`` that are named like it but for their number."""
    match = _PART.match(file.stem)
    start, end = match.span("part") if match else (0, 0)
    alike = [f for f in file.parent.glob(f"*{file.suffix}") if len(f.stem) == len(file.stem)]
    return sorted(f for f in alike if f.stem[:start] + f.stem[end:] == file.stem[:start] + file.stem[end:])


def _complete(found: ModelFiles) -> ModelFiles:
    """`found`, if it is a file, an index with its shards, or a set without gaps."""
    match = _PART.match(found.files[0].stem)
    if found.index is not None or match is None:
        return found
    count, there = int(match["count"]), {int(m["part"]) for f in found.files if (m := _PART.match(f.stem))}
    if len(there) != count:
        first = found.files[0]
        raise SourceError(
            f"{first.parent} holds {len(there)} of the {count} shards of {match['stem']}{first.suffix}, and no index"
        )
    return found


def _hint(folder: Path) -> str:
    if sharded := _sharded_by(folder):
        return f"; {sharded}"
    inner = sorted({f.parent.name for f in folder.glob("*/*") if _may_hold_weights(f)})
    if inner:
        return f"; its subfolders {', '.join(inner)} do, name one of them"
    other = next((f for f in sorted(folder.iterdir()) if f.suffix in _UNREAD), None)
    return f"; {other.name} is {_UNREAD[other.suffix]}, which htsr does not read" if other else ""


def _sharded_by(folder: Path) -> str:
    """How the shards that each process of a training has saved become one model; empty where there are none."""
    if shards := next(folder.glob("*/*.distcp"), None):  # FSDP's, by accelerate
        return f"{shards.parent.name} holds shards of FSDP: accelerate merge-weights {shards.parent} OUTPUT joins them"
    if (folder / "zero_to_fp32.py").is_file() or next(folder.glob("*/*zero_pp_rank_*_states.pt"), None):
        return (
            f"it holds states of DeepSpeed: python {folder / 'zero_to_fp32.py'} {folder} OUTPUT makes weights of them"
        )
    return ""
