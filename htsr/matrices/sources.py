"""Any source to the matrices of a model: a module, a state dict, a folder, a file, an adapter, a hub id."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, Union

import numpy as np

from htsr.arrays import Array, Difference, as_numpy
from htsr.errors import SourceError, UsageError
from htsr.matrices import adapters, hub, layouts, tying
from htsr.matrices.adapter_config import read_adapter_config
from htsr.matrices.apart import matrices_of
from htsr.matrices.checkpoint_files import file_tensors, folder_tensors, state_dict_tensors
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
            with the same name and shape.
        base: source of an adapter's base model, for the matrices of base + ΔW instead of ΔW. ``auto`` takes the base
            that the adapter names.

    Raises:
        SourceError: the source cannot be read; the message says why.
        UsageError: a `base` is given without an adapter, or a `revision` for a local path.
    """
    label, tensors, config, fingerprint = _open(source, revision) if base is None else _on_base(source, base, revision)
    if against is not None:
        other_label, other, other_config, other_fingerprint = _open(against, None)
        tensors = _difference(tensors, layouts.as_named(other, tensors, other_config, config))
        label = f"{label} - {other_label}"
        fingerprint = fingerprint and other_fingerprint and f"{fingerprint}-{other_fingerprint}"
    matrices = tuple(matrices_of(unshared(tensors), config))
    if not matrices:
        raise SourceError(f"{label} has no weight matrices")
    return Model(label, matrices, fingerprint)


Opened: TypeAlias = tuple[str, list[StoredTensor], dict[str, Any], str | None]


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
    return isinstance(source, (str, os.PathLike)) and adapters.adapter_folder(locate(os.fspath(source))) is not None


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


def _adapter(folder: Path) -> tuple[list[StoredTensor], str | None]:
    """The changes that an adapter makes, and the fingerprint of its base where that was read.

    A change that depends on the base is computed on the base that the adapter names, if that is a folder here.
    """
    settings = read_adapter_config(folder)
    on_base = settings.changes_weights and (settings.dora or settings.needs_base)
    if not on_base or settings.base is None or not Path(settings.base).is_dir():
        return adapters.adapter_changes(folder), None
    _, base, config, fingerprint = _open(settings.base, None)
    before = {tensor.name: tensor for tensor in base}
    changes = []
    for tensor in _merged(folder, base, config):
        old = before.get(tensor.name)
        if old is None or tensor.shape != old.shape:
            changes.append(tensor)
        elif tensor.read is not old.read:
            dtype, read = _computed_in(old), _Minus(tensor, old, exact=True)
            more: dict[str, Any] = {"kind": "adapter", "storage": None, "warning": f"ΔW on {settings.base}"}
            changes.append(replace(tensor, read=read, dtype=dtype, **more))
    return changes, fingerprint


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
    path = locate(os.fspath(source), revision) if isinstance(source, (str, os.PathLike)) else None
    folder = path and adapters.adapter_folder(path)
    if folder is None:
        raise UsageError("a base belongs to an adapter folder")
    if base == "auto":
        base = adapters.base_of(folder) or ""
        if not base:
            raise UsageError(f"{folder} names no base model; say which one it is")
    _, base_tensors, config, fingerprint = _open(base, None)
    merged = _merged(folder, base_tensors, config)
    return os.fspath(source), merged, config, fingerprint and f"{_fingerprint(folder.iterdir())}-{fingerprint}"  # type: ignore[arg-type]


def _difference(tensors: list[StoredTensor], other: list[StoredTensor]) -> list[StoredTensor]:
    by_name = {tensor.name: tensor for tensor in other}
    again = tying.repeated(tensors)
    result = []
    for tensor in tensors:
        match = by_name.get(tensor.name)
        if match is None and tensor.name in again:
            continue  # a tied weight that the other model stores once
        if match is None:
            result.append(
                replace(tensor, problem=("unmatched", f"{tensor.name} is not in the model it is compared against"))
            )
        elif match.shape != tensor.shape:
            sizes = f"{tensor.shape} here and {match.shape} there"
            result.append(replace(tensor, problem=("unmatched", f"{tensor.name} is {sizes}")))
        elif match.order != tensor.order:
            why = f"the rows or columns of {tensor.name} may be in another order there: {tensor.order or match.order}"
            result.append(replace(tensor, problem=("unmatched", why)))
        else:
            both = (tensor.storage, match.storage) if tensor.storage and match.storage else None
            read, problem = _Minus(tensor, match), tensor.problem or match.problem
            result.append(replace(tensor, read=read, storage=both, problem=problem))
    if not any(tensor.name in by_name for tensor in tensors):
        raise SourceError("the two models have no tensor name in common")
    return result


def _computed_in(tensor: StoredTensor) -> str:
    return "float64" if tensor.dtype == "float64" else "float32"


@dataclass(frozen=True)
class _Minus:
    """Reads a - b, as a `Difference` that knows its rounding errors.

    `exact` says that both were computed from the same stored numbers: their rounding cancels in the difference, and
    only that of the computation is left. So it is where `a` is `b` with an adapter added.
    """

    a: StoredTensor
    b: StoredTensor
    exact: bool = False

    def __call__(self, index: int | None = None) -> Array:
        which = () if index is None else (index,)
        a, b = (self._read(e, *which) for e in (self.a, self.b))
        base = getattr(self.a.read, "base", None)
        if self.exact or (isinstance(base, StoredTensor) and np.array_equal(as_numpy(base.read(*which)), as_numpy(b))):
            return Difference.of(as_numpy(a), as_numpy(b), (_computed_in(self.a), _computed_in(self.b)))
        return Difference.of(a, b, (self.a.dtype, self.b.dtype))

    @staticmethod
    def _read(tensor: StoredTensor, *which: int) -> Any:
        values = tensor.read(*which)
        return values if isinstance(values, Difference) else as_numpy(values)
