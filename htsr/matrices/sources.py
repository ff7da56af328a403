"""Any source to the matrices of a model: a module, a state dict, a folder, a file, an adapter, a hub id."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, Union

from htsr.errors import SourceError, UsageError
from htsr.matrices import adapters, hub, layouts, tying
from htsr.matrices.adapter_config import read_adapter_config
from htsr.matrices.apart import matrices_of
from htsr.matrices.checkpoint_files import file_tensors, folder_tensors, state_dict_tensors
from htsr.matrices.deltas import Delta
from htsr.matrices.differences import Counterparts, Minus, computed_in, differences
from htsr.matrices.folders import SUFFIXES, model_files, named_files, read_config, read_json
from htsr.matrices.gguf_files import gguf_metadata
from htsr.matrices.models import Model
from htsr.matrices.parametrized import computed
from htsr.matrices.quantized import dequantized
from htsr.matrices.stored_tensors import StoredTensor, unshared

if TYPE_CHECKING:
    import torch

Source: TypeAlias = Union[str, "os.PathLike[str]", "torch.nn.Module", Mapping[str, Any]]


def open_model(
    source: Source,
    *,
    revision: str | None = None,
    against: Source | None = None,
    base: Source | None = None,
) -> Model:
    """The matrices of `source`, none of them read yet.

    Args:
        source: an ``nn.Module``, a state dict (of tensors or NumPy arrays), a folder, a file, an adapter folder, or a
            hub id.
        revision: branch, tag or commit of a hub id.
        against: another such source; the matrices are then those of the differences source - against of all tensors
            with the same name and shape. Where one of the two is an adapter and the other a model, the adapter is
            base + ΔW; of two adapters the ΔW are subtracted.
        base: source of an adapter's base model, for the matrices of base + ΔW instead of ΔW. ``auto`` takes the base
            that the adapter names; so does None where an adapter and a model are subtracted.

    Raises:
        SourceError: the source cannot be read; the message says why.
        UsageError: a `base` is given without an adapter, or a `revision` for a local path.
    """
    adapted, other_adapted = adapter_of(source, revision), None if against is None else adapter_of(against)
    if base is None and against is not None and bool(adapted) != bool(other_adapted):
        base = "auto"  # a change less a weight has no meaning
    on_base = base if adapted or not other_adapted else None
    label, tensors, config, fingerprint = _opened(source, revision, on_base)
    if against is not None:
        other_label, other, other_config, other_fingerprint = _opened(against, None, base if other_adapted else None)
        tensors = differences(tensors, layouts.as_named(other, tensors, other_config, config), other_config)
        label = f"{label} - {other_label}"
        fingerprint = fingerprint and other_fingerprint and f"{fingerprint}-{other_fingerprint}"
    matrices = tuple(matrices_of(unshared(tensors), config))
    if not matrices:
        raise SourceError(f"{label} has no weight matrices")
    return Model(label, matrices, fingerprint)


Opened: TypeAlias = tuple[str, list[StoredTensor], dict[str, Any], str | None]


def _opened(source: Source, revision: str | None, base: Source | None) -> Opened:
    return _open(source, revision) if base is None else _on_base(source, base, revision)


def _open(source: Source, revision: str | None) -> Opened:
    """Label, stored tensors as floats, configuration and fingerprint of a model."""
    label, tensors, config, fingerprint = _stored(source, revision)
    return label, dequantized(computed(tensors), config), config, fingerprint


def _stored(source: Source, revision: str | None) -> Opened:
    if isinstance(source, (str, os.PathLike)):
        return _open_path(os.fspath(source), revision)
    if isinstance(source, Mapping):
        tensors = layouts.flax_layout(state_dict_tensors(source))
        return "state dict", tying.tied(adapters.loose_factors(tensors)), {}, None
    if hasattr(source, "named_parameters"):
        from htsr.matrices.modules import module_config, module_tensors, unwrapped

        return type(unwrapped(source)).__name__, module_tensors(source), module_config(source), None
    raise SourceError(f"a model is a module, a state dict, a path or a hub id, not a {type(source).__name__}")


def is_adapter(source: Source) -> bool:
    """Whether `source` names the folder of an adapter, and no model.

    Raises:
        SourceError: there is no such path or model.
        UsageError: the name is empty.

    Examples:
        >>> import torch
        >>> from htsr.matrices.sources import is_adapter
        >>> is_adapter(torch.nn.Linear(2, 2))
        False
    """
    return adapter_of(source) is not None


def adapter_of(source: Source, revision: str | None = None) -> Path | None:
    """The folder of the adapter that `source` names; None where it is none.

    Args:
        source: source of a model, as `open_model` takes it.
        revision: branch, tag or commit of a hub id.

    Raises:
        SourceError: there is no such path or model.
        UsageError: the name is empty, or a revision is given for a local path.
    """
    if not isinstance(source, (str, os.PathLike)):
        return None
    return adapters.adapter_folder(locate(os.fspath(source), revision))


def locate(name: str, revision: str | None = None) -> Path:
    """The local file or folder of a model: a path that exists, or the cached copy of a hub id.

    Args:
        name: a path or a hub id.
        revision: branch, tag or commit of a hub id.

    Raises:
        SourceError: there is no such path or model, or the hub refuses it.
        UsageError: the name is empty, or a revision is given for a local path.
    """
    if not name:
        raise UsageError("the name of the model is empty: MODEL is a path or a hub id")
    try:
        path = Path(name).expanduser()
        there = path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # longer than the file system takes; no such user
        raise SourceError(f"{name if len(name) < 200 else name[:200] + '…'} does not exist: {error}") from error
    if not there:
        looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1 or path.suffix in SUFFIXES
        if looks_local or not hub.is_hub_id(name):
            raise SourceError(f"{name} does not exist")
        path = hub.fetch(name, revision)
    elif revision is not None:
        raise UsageError(f"a revision belongs to a hub id, and {name} is a local path")
    return path


def _open_path(name: str, revision: str | None) -> Opened:
    path = locate(name, revision)
    try:
        if folder := adapters.adapter_folder(path):
            tensors, base = _adapter(folder)
            return name, tensors, {}, "-".join(filter(None, (_fingerprint(folder.iterdir()), base)))
        if path.is_file():
            read = _fingerprint(_files_of(path))
            return name, *_converted(path, file_tensors(path), read_config(path.parent)), read
        return name, *_converted(path, folder_tensors(path), read_config(path)), _fingerprint(path.iterdir())
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}") from error


def _converted(
    path: Path, tensors: list[StoredTensor], config: dict[str, Any]
) -> tuple[list[StoredTensor], dict[str, Any]]:
    """The tensors and the configuration of the model at `path`, in transformers' layout and words."""
    file = (named_files(path) if path.is_file() else model_files(path)).files[0]
    if file.suffix == ".gguf":
        metadata = gguf_metadata(file)
        tensors, config = layouts.original_layout(tensors, metadata), layouts.gguf_config(metadata)
    else:
        params = file.parent / "params.json"
        tensors, config = layouts.meta_layout(tensors, read_json(params) if params.is_file() else {}, config)
    return tying.tied(adapters.loose_factors(layouts.flax_layout(tensors))), config


def _files_of(file: Path) -> list[Path]:
    """All files that are read when one `file` names a model, whether or not they exist."""
    model = named_files(file)
    beside = [file.parent / name for name in ("config.json", "params.json")]
    return [*model.files, *beside, *([model.index] if model.index else [])]


def open_changes(source: Source, base: Source, revision: str | None = None) -> Model:
    """The changes that an adapter makes to `base`, none of them read yet: its own ΔW where they are no other on it.

    Args:
        source: folder or hub id of the adapter.
        base: source of its base model; ``auto`` for the one that it names.
        revision: branch, tag or commit of a hub id.

    Raises:
        SourceError: a source cannot be read; the message says why.
        UsageError: `source` is no adapter.
    """
    folder = _adapter_with_base(source, revision)
    tensors, of_base = _changes(folder, _named(folder) if base == "auto" else base)
    fingerprint = None if of_base is None else "-".join(filter(None, (_fingerprint(folder.iterdir()), of_base)))
    return Model(os.fspath(source), tuple(matrices_of(unshared(tensors), {})), fingerprint)  # type: ignore[arg-type]


def _adapter_with_base(source: Source, revision: str | None) -> Path:
    """The folder of the adapter for which a base is given."""
    folder = adapter_of(source, revision)
    if folder is None:
        raise UsageError("a base belongs to an adapter folder")
    return folder


def _adapter(folder: Path) -> tuple[list[StoredTensor], str | None]:
    """The changes that an adapter makes, and the fingerprint of its base where that was read.

    A change that depends on the base is computed on the base that the adapter names, if that is a folder here.
    """
    named = read_adapter_config(folder).base
    return _changes(folder, named if named is not None and Path(named).is_dir() else None)


def _changes(folder: Path, base: Source | None) -> tuple[list[StoredTensor], str | None]:
    """The changes that an adapter makes to `base`, and what tells that base: nothing where they do not depend on it."""
    settings = read_adapter_config(folder)
    if base is not None and settings.changes_weights and (settings.dora or settings.needs_base):
        label, before, config, fingerprint = _open(base, None)
        return _minus_base(_merged(folder, before, config), before, config, label), fingerprint
    changes = adapters.adapter_changes(folder)
    whole = [tensor for tensor in changes if _is_whole(tensor)]
    if not whole:
        return changes, ""
    if base is None:
        return [_of_unknown(tensor, settings.base) if _is_whole(tensor) else tensor for tensor in changes], ""
    label, before, config, fingerprint = _open(base, None)
    merged = adapters.merged_with_base(layouts.as_named(whole, before, {}, config), before)
    factors = [tensor for tensor in changes if not _is_whole(tensor)]
    return factors + _minus_base(merged, before, config, label), fingerprint


def _minus_base(
    merged: list[StoredTensor], base: list[StoredTensor], config: dict[str, Any], label: str
) -> list[StoredTensor]:
    """What an adapter changes: of the tensors of a model that has it, less those of the `base`, those that differ."""
    untouched = {id(tensor.read) for tensor in base}
    again = tying.repeated(merged)
    find = Counterparts(base, config)
    result = []
    for tensor in merged:
        if id(tensor.read) in untouched or tensor.name in again:
            continue
        old = find(tensor)
        tensor = replace(tensor, kind="adapter", storage=None, warning=f"ΔW on {label}")
        if old is None or old.shape != tensor.shape:
            there = "it is not" if old is None else f"it is {old.shape}, and {tensor.shape} here,"
            problem = ("unmatched", f"{tensor.name} is saved whole, and no change: {there} in {label}")
            result.append(replace(tensor, problem=problem))
        elif isinstance(getattr(tensor.read, "base", None), StoredTensor):
            result.append(replace(tensor, read=Minus(tensor, old, exact=True), dtype=computed_in(old)))
        else:  # saved whole, and rounded by itself
            result.append(replace(tensor, read=Minus(tensor, old)))
    return result


def _is_whole(tensor: StoredTensor) -> bool:
    """Whether an adapter holds a tensor whole, and no factors of its change."""
    return not isinstance(tensor.read, Delta) and tensor.problem is None


def _of_unknown(tensor: StoredTensor, base: str | None) -> StoredTensor:
    """A tensor that an adapter holds whole, whose change is not known without the base."""
    why = f"{tensor.name} is saved whole, and its change depends on the base{f' {base}' if base else ''}: "
    return replace(tensor, problem=("needs_base", f"{why}analyze it with base=…"))


def _merged(folder: Path, base: list[StoredTensor], config: dict[str, Any]) -> list[StoredTensor]:
    """The base with the adapter in `folder`, under the base's names."""
    settings = read_adapter_config(folder)
    if settings.needs_base:
        from htsr.matrices.peft_folders import computed_by_peft

        return computed_by_peft(settings, base)
    tensors = layouts.as_named(adapters.adapter_changes(folder), base, {}, config)
    if unmatched := [tensor.problem[1] for tensor in tensors if tensor.problem and tensor.problem[0] == "unmatched"]:
        raise SourceError(unmatched[0])
    return adapters.merged_with_base(tensors, base)


def _fingerprint(files: Any) -> str:
    """Path, size and date of all `files` but journals and trajectories, which may be written beside a model."""
    import hashlib

    digest = hashlib.sha256()
    for file in sorted(files):
        if file.is_file() and file.suffix != ".jsonl":
            stat = file.stat()
            digest.update(f"{file.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def _on_base(source: Source, base: Source, revision: str | None) -> Opened:
    folder = _adapter_with_base(source, revision)
    _, base_tensors, config, fingerprint = _open(_named(folder) if base == "auto" else base, None)
    merged = _merged(folder, base_tensors, config)
    return os.fspath(source), merged, config, fingerprint and f"{_fingerprint(folder.iterdir())}-{fingerprint}"  # type: ignore[arg-type]


def _named(folder: Path) -> str:
    """The base that the adapter in `folder` names, which is there."""
    base = adapters.base_of(folder)
    if base is None:
        raise UsageError(f"{folder} names no base model; say which one it is (base=…, --base)")
    with adapters.named_by(folder):
        locate(base, None)
    return base
