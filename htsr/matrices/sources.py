"""Any source to a list of weight matrices, none of them read yet."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, Union

from htsr.errors import MatrixError, SourceError, UsageError
from htsr.matrices import adapters, fused, hub, layouts, roles, tying
from htsr.matrices.adapter_config import read_adapter_config
from htsr.matrices.entries import FLOATS, Entry, unshared
from htsr.matrices.files import file_entries, folder_entries, state_dict_entries
from htsr.matrices.folders import SUFFIXES, model_files, named_files, read_config, read_json
from htsr.matrices.gguf_files import gguf_metadata
from htsr.matrices.naming import leaf
from htsr.matrices.parametrized import computed
from htsr.matrices.patterns import matches, require
from htsr.matrices.positions import Position
from htsr.matrices.quantized import dequantized
from htsr.spectra.esd import Array, as_numpy
from htsr.spectra.product import Product
from htsr.spectra.resolution import Difference

if TYPE_CHECKING:
    import torch

Read = TypeVar("Read")
Source: TypeAlias = Union[str, "os.PathLike[str]", "torch.nn.Module", Mapping[str, Any]]

# floats of two and more dimensions that are no weights
_NOT_WEIGHTS = re.compile(
    r"(^|[._])(bias|biases|(pos_)?bias_[uv]|mask|inv_freq|freqs_cis|cos_cached|sin_cached|position_ids|relative_position_index|"
    r"relative_coords_table|rotary_emb|A_log|ssm_a|ssm_d|running_mean|running_var|original0|weight_g|lora_magnitude_vector)(\.|$)|_bias$"
)
_TEXT_CONFIGS = ("text_config", "llm_config", "language_config", "thinker_config")


@dataclass(frozen=True)
class WeightMatrix:
    """One weight matrix (or stack of kernel slices) of a model, unread.

    Attributes:
        name: as the checkpoint names it without ``.weight``, with ``[q]`` or ``[3]`` for a part of a fused tensor.
        shape: (rows, columns) of the matrix, or of one slice of a kernel.
        pieces: slices of a convolution kernel or of another stack; 1 for a plain matrix.
        role: what it does (`htsr.matrices.roles`).
        block: index of its block; None outside of all.
        kind: ``linear``, ``embedding``, ``conv``, ``expert``, ``adapter``, or ``stack`` of slices that are no kernel
            (one matrix per head, say).
        dtype: it is stored in, as torch names it.
        load: reads it: (rows, columns), or (pieces, rows, columns).
        position: where it stands in its stored tensor.
        problem: (status, sentence) where it cannot be read.
        warning: what a reader of its row should know.
        factors: reads the two factors that it is the product of, such as B and A of a LoRA adapter; None where there
            are none.
    """

    name: str
    shape: tuple[int, int]
    pieces: int
    role: str
    block: int | None
    kind: str
    dtype: str
    load: Callable[[], Array] = field(repr=False, compare=False)
    position: Position = field(repr=False, compare=False)
    problem: tuple[str, str] | None = None
    warning: str = ""
    factors: Callable[[], Product] | None = field(default=None, repr=False, compare=False)

    @property
    def parameters(self) -> int:
        """Number of entries."""
        return self.pieces * self.shape[0] * self.shape[1]

    @property
    def cost(self) -> float:
        """Flops of the exact route, for sharing the work out: Gram matrix and eigenvalues."""
        small, large = sorted(self.shape)
        return float(self.pieces * (small * small * large + 4 / 3 * small**3))

    def read(self) -> Array:
        """The matrix, (rows, columns) or (pieces, rows, columns), as floats; what it is stored as, or float32.

        Raises:
            MatrixError: it cannot be read; the message names the tensor.
        """
        return self._attempt(self.load)

    def opened(self) -> Array | Product:
        """As `read`, (rows, columns) or (pieces, rows, columns), but a product of factors as those.

        Raises:
            MatrixError: as `read`.
        """
        return self._attempt(self.factors or self.load)

    def _attempt(self, load: Callable[[], Read]) -> Read:
        if self.problem:
            raise MatrixError(*self.problem)
        try:
            return load()
        except MatrixError:
            raise
        except Exception as error:
            raise MatrixError("unreadable", f"{self.name} could not be read: {error}") from error


def by_tensor(matrices: Iterable[WeightMatrix]) -> list[list[WeightMatrix]]:
    """The `matrices` that are parts of one tensor together, in their order."""
    tensors: dict[str, list[WeightMatrix]] = {}
    for matrix in matrices:
        tensors.setdefault(roles.whole_name(matrix.name), []).append(matrix)
    return list(tensors.values())


@dataclass(frozen=True)
class Filter:
    """Which matrices are wanted. Patterns are shell-style and match whole names, as in ``*.q_proj`` or ``mlp.*``.

    ``*`` and ``?`` are wildcards, brackets stand for themselves: ``*.c_attn[q]`` is the query in a fused tensor.

    Attributes:
        include: name patterns, any of which must match; empty for all.
        exclude: name patterns, none of which may match.
        roles: role patterns, any of which must match; empty for all.
        blocks: block indices; None for all matrices, also those outside of blocks.
        min_size: least M, the smaller side.
        max_size: largest M; None for any.
        exclude_roles: role patterns, none of which may match.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    roles: tuple[str, ...] = ()
    blocks: frozenset[int] | None = None
    min_size: int = 0
    max_size: int | None = None
    exclude_roles: tuple[str, ...] = ()

    def __call__(self, matrix: WeightMatrix) -> bool:
        """Whether `matrix` is wanted."""
        M = min(matrix.shape)
        return (
            (not self.include or matches(matrix.name, self.include))
            and not matches(matrix.name, self.exclude)
            and (not self.roles or matches(matrix.role, self.roles))
            and not matches(matrix.role, self.exclude_roles)
            and (self.blocks is None or matrix.block in self.blocks)
            and self.min_size <= M
            and (self.max_size is None or self.max_size >= M)
        )

    def check(self, matrices: Iterable[WeightMatrix], of: str) -> None:
        """Refuse what can only be a mistake: a pattern or block that no matrix has.

        Args:
            matrices: of the model or models that it is meant for, before it is applied.
            of: what to call them.

        Raises:
            UsageError: the pattern with the nearest name, or the block with those there are.
        """
        matrices = list(matrices)
        require(self.include + self.exclude, {m.name for m in matrices}, of)
        require(self.roles + self.exclude_roles, {m.role for m in matrices}, of, "role")
        known = {m.block for m in matrices} - {None}
        if unknown := sorted((self.blocks or frozenset()) - known):
            there = f"its blocks are {_ranges(sorted(b for b in known if b is not None))}" if known else "it has none"
            raise UsageError(f"{of} has no block {_ranges(unknown)}; {there}")


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending `numbers` as text, as in ``0-3, 7``."""
    starts = [n for i, n in enumerate(numbers) if i == 0 or numbers[i - 1] != n - 1]
    ends = [n for i, n in enumerate(numbers) if i == len(numbers) - 1 or numbers[i + 1] != n + 1]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


@dataclass(frozen=True, repr=False)
class Model:
    """A model as its matrices.

    Attributes:
        label: what to call it: path, hub id, or class name.
        matrices: all weight matrices, in the model's order, tied ones once.
        fingerprint: changes when the source does; None for sources in memory.
    """

    label: str
    matrices: tuple[WeightMatrix, ...]
    fingerprint: str | None = None

    def __repr__(self) -> str:
        return f"<Model {self.label!r}: {len(self.matrices)} matrices>"

    def __iter__(self) -> Iterator[WeightMatrix]:
        return iter(self.matrices)

    def filtered(self, wanted: Filter, *, checked: bool = False) -> Model:
        """The same model with the wanted matrices only.

        Args:
            wanted: decides on each.
            checked: whether `wanted.check` was called before, on several models together.

        Raises:
            UsageError: none is left, or a pattern or block of `wanted` is not in the model.
        """
        if self.matrices and not checked:
            wanted.check(self.matrices, self.label)
        kept = tuple(matrix for matrix in self.matrices if wanted(matrix))
        if self.matrices and not kept:
            known = ", ".join(sorted({m.role for m in self.matrices}))
            raise UsageError(f"no matrix of {self.label} passes the filter; its roles are {known}")
        return replace(self, matrices=kept)


def open_model(
    source: Source,
    *,
    revision: str | None = None,
    against: Source | None = None,
    base: Source | None = None,
) -> Model:
    """The matrices of `source`.

    Args:
        source: an ``nn.Module``, a state dict, a folder, a file, an adapter folder, or a hub id.
        revision: branch, tag or commit of a hub id.
        against: take the difference source - against of all tensors of the same name and shape.
        base: for an adapter: analyze base + ΔW instead of ΔW. ``auto`` takes the base that the adapter names.

    Raises:
        SourceError: what cannot be read, with the reason.
        UsageError: a `base` without an adapter, or a `revision` of a local path.
    """
    label, entries, config, fingerprint = _open(source, revision) if base is None else _on_base(source, base, revision)
    if against is not None:
        other_label, other, other_config, other_fingerprint = _open(against, None)
        entries = _difference(entries, layouts.as_named(other, entries, other_config, config))
        label = f"{label} - {other_label}"
        fingerprint = fingerprint and other_fingerprint and f"{fingerprint}-{other_fingerprint}"
    matrices = tuple(matrices_of(unshared(entries), config))
    if not matrices:
        raise SourceError(f"{label} has no weight matrices")
    return Model(label, matrices, fingerprint)


Opened: TypeAlias = tuple[str, list[Entry], dict[str, Any], str | None]


def _open(source: Source, revision: str | None) -> Opened:
    """Label, de-quantised entries, configuration and fingerprint."""
    label, entries, config, fingerprint = _stored(source, revision)
    return label, dequantized(computed(entries), config), config, fingerprint


def _stored(source: Source, revision: str | None) -> Opened:
    if isinstance(source, (str, os.PathLike)):
        return _open_path(os.fspath(source), revision)
    if isinstance(source, Mapping):
        return "state dict", tying.tied(adapters.loose_factors(state_dict_entries(source))), {}, None
    if hasattr(source, "named_parameters"):
        from htsr.matrices.modules import module_config, module_entries, unwrapped

        return type(unwrapped(source)).__name__, module_entries(source), module_config(source), None
    raise SourceError(f"a model is a module, a state dict, a path or a hub id, not a {type(source).__name__}")


def locate(name: str, revision: str | None = None) -> Path:
    """The local file or folder of a model: a path that exists, or the cached copy of a hub id.

    Args:
        name: a path or a hub id.
        revision: branch, tag or commit of a hub id.

    Raises:
        SourceError: there is none, or the hub does not give it.
        UsageError: a revision of a local path.
    """
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
            return name, _adapter(folder), {}, _fingerprint(folder.iterdir())
        if path.is_file():
            return (
                name,
                *_converted(path, file_entries(path), read_config(path.parent)),
                _fingerprint(named_files(path).files),
            )
        return name, *_converted(path, folder_entries(path), read_config(path)), _fingerprint(path.iterdir())
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}") from error


def _converted(path: Path, entries: list[Entry], config: dict[str, Any]) -> tuple[list[Entry], dict[str, Any]]:
    """The entries, and the configuration, of the model at `path`; those of other formats as transformers'."""
    file = (named_files(path) if path.is_file() else model_files(path)).files[0]
    if file.suffix == ".gguf":
        metadata = gguf_metadata(file)
        entries, config = layouts.original_layout(entries, metadata), layouts.gguf_config(metadata)
    else:
        params = file.parent / "params.json"
        entries, config = layouts.meta_layout(entries, read_json(params) if params.is_file() else {}, config)
    return tying.tied(adapters.loose_factors(layouts.flax_layout(entries))), config


def _adapter(folder: Path) -> list[Entry]:
    """The changes of an adapter; one that depends on its base is taken on the one it names, where that lies here."""
    settings = read_adapter_config(folder)
    on_base = settings.changes_weights and (settings.dora or settings.needs_base)
    if not on_base or settings.base is None or not Path(settings.base).is_dir():
        return adapters.adapter_entries(folder)
    _, base, config, _ = _open(settings.base, None)
    before = {entry.name: entry for entry in base}
    changes = []
    for entry in _merged(folder, base, config):
        old = before.get(entry.name)
        if old is None or entry.shape != old.shape:
            changes.append(entry)
        elif entry.read is not old.read:
            # both are computed from the same stored numbers, so that these bring in no rounding of their own
            dtype = "float64" if old.dtype == "float64" else "float32"
            read = _Minus(replace(entry, dtype=dtype), replace(old, dtype=dtype))
            more: dict[str, Any] = {"kind": "adapter", "storage": None, "warning": f"ΔW on {settings.base}"}
            changes.append(replace(entry, read=read, dtype=dtype, **more))
    return changes


def _merged(folder: Path, base: list[Entry], config: dict[str, Any]) -> list[Entry]:
    """The base with the adapter in `folder`, under the base's names."""
    settings = read_adapter_config(folder)
    if settings.needs_base:
        from htsr.matrices.peft_folders import computed_by_peft

        return computed_by_peft(settings, base)
    entries = layouts.as_named(adapters.adapter_entries(folder), base, {}, config)
    if unmatched := [entry.problem[1] for entry in entries if entry.problem and entry.problem[0] == "unmatched"]:
        raise SourceError(unmatched[0])
    return adapters.merged_with_base(entries, base)


def _fingerprint(files: Any) -> str:
    import hashlib

    digest = hashlib.sha256()
    for file in sorted(files):
        if file.is_file():
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
    _, base_entries, config, fingerprint = _open(base, None)
    merged = _merged(folder, base_entries, config)
    return os.fspath(source), merged, config, fingerprint and f"{_fingerprint(folder.iterdir())}-{fingerprint}"  # type: ignore[arg-type]


def _difference(entries: list[Entry], other: list[Entry]) -> list[Entry]:
    by_name = {entry.name: entry for entry in other}
    again = tying.repeated(entries)
    result = []
    for entry in entries:
        match = by_name.get(entry.name)
        if match is None and entry.name in again:
            continue  # a tied weight that the other model stores once
        if match is None:
            result.append(
                replace(entry, problem=("unmatched", f"{entry.name} is not in the model it is compared against"))
            )
        elif match.shape != entry.shape:
            sizes = f"{entry.shape} here and {match.shape} there"
            result.append(replace(entry, problem=("unmatched", f"{entry.name} is {sizes}")))
        else:
            both = (entry.storage, match.storage) if entry.storage and match.storage else None
            read, problem = _Minus(entry, match), entry.problem or match.problem
            result.append(replace(entry, read=read, storage=both, problem=problem))
    if not any(entry.name in by_name for entry in entries):
        raise SourceError("the two models have no tensor name in common")
    return result


@dataclass(frozen=True)
class _Minus:
    a: Entry
    b: Entry

    def __call__(self, index: int | None = None) -> Array:
        which = () if index is None else (index,)
        a, b = (as_numpy(e.read(*which)) for e in (self.a, self.b))
        return Difference.of(a, b, (self.a.dtype, self.b.dtype))


def matrices_of(entries: list[Entry], config: dict[str, Any]) -> Iterator[WeightMatrix]:
    """The weight matrices in stored tensors: tied heads once, fused and stacked ones apart.

    Args:
        entries: of a model, in its order.
        config: its ``config.json``, empty where not known.
    """
    weights = [entry for entry in entries if _is_weight(entry)]
    found = roles.roles_of((entry.name, entry.kind) for entry in weights)
    stacks = roles.stack_prefixes(entry.name for entry in weights)
    blocks = [roles.block_of(entry.name) for entry in weights]
    if not any(block is not None for block in blocks):
        blocks = [roles.number_of(entry.name) for entry in weights]
    stems = Counter(roles.stem(entry.name) for entry in weights)
    inner = roles.inner_widths([(entry.name, role, entry.shape) for entry, role in zip(weights, found, strict=True)])
    for entry, role, block in zip(weights, found, blocks, strict=True):
        stack = roles.stack_of(entry.name, stacks)
        name, place = roles.stem(entry.name), _Place(entry, role, stack, block, config, inner.get(entry.name, 0))
        if 0 in entry.shape and (entry.problem is not None or len(entry.shape) > 2):  # of a stack no empty elements
            yield place.unread(f"{entry.name} has no entries", "empty")
            continue
        try:
            matrices = list(replace(place, config=_part_config(config, stack)).matrices())
        except Exception as error:  # a configuration that does not fit: this tensor's row says so
            matrices = [place.unread(f"{entry.name} could not be taken apart by the model's configuration: {error}")]
        if stems[name] > 1 and entry.name != f"{name}.weight":  # lin_weight beside lin.weight
            matrices = [replace(m, name=entry.name + m.name.removeprefix(name)) for m in matrices]
        yield from matrices


def _text(config: dict[str, Any]) -> dict[str, Any]:
    return next((config[key] for key in _TEXT_CONFIGS if isinstance(config.get(key), dict)), config)


def _part_config(config: dict[str, Any], stack: str) -> dict[str, Any]:
    """The configuration of the stack that a role's prefix names."""
    name = stack.rstrip(".")
    for key in (f"{name}_config", name):
        if isinstance(config.get(key), dict):
            return config[key]  # type: ignore[no-any-return]
    return config if name in ("vision", "audio") else _text(config)


def _is_weight(entry: Entry) -> bool:
    name, empty = roles.stem(entry.name), 0 in entry.shape
    if len(entry.shape) < 2:
        return False
    if empty or _NOT_WEIGHTS.search(name):
        return empty and (entry.name.endswith("weight") or not (entry.problem is None or _NOT_WEIGHTS.search(name)))
    kernel = entry.kind is not None or "conv" in name.lower() or entry.name.endswith(".weight")
    if sum(size > 1 for size in entry.shape) < 2 and len(entry.shape) > 2 and not kernel:
        return False  # a vector with axes of one: class tokens, scales
    numeric = entry.dtype in FLOATS or entry.problem is not None or bool(entry.warning)
    return numeric or entry.name.endswith("weight")


@dataclass(frozen=True)
class _Place:
    """A stored weight and where it stands in the model."""

    entry: Entry
    role: str
    stack: str
    block: int | None
    config: dict[str, Any]
    inner: int = 0

    def matrices(self) -> Iterator[WeightMatrix]:
        """What counts as a matrix of its own in this tensor."""
        entry, shape = self.entry, self.entry.shape
        name = roles.stem(entry.name)
        if len(shape) == 2 and self.role.startswith("expert") and (count := fused.experts_in_rows(self.config)):
            rows = shape[0] // count
            for i in range(count):
                part = slice(i * rows, (i + 1) * rows)
                load = partial(_part, entry.read, part)
                where = Position(entry.name, index=part)
                yield self._matrix(f"{name}[{i}]", (rows, shape[1]), load, where, kind="expert")
        elif len(shape) == 2:
            yield from self._parts(name, shape, entry.read)
        elif roles.is_kernel(entry.name, shape, entry.kind):
            role = self.role if self.role in ("conv", "embed.patch") else roles.role_of(entry.name, "conv")
            pieces = math.prod(shape[2:])
            where = Position(entry.name, kernel=True)
            yield self._matrix(name, shape[:2], self._kernel, where, kind="conv", role=role, pieces=pieces)
        elif shape[0] == 1:  # ViT's position embeddings
            yield self._matrix(name, shape[1:], partial(entry.read, 0), Position(entry.name, 0))
        elif not (self.role.startswith("expert") or "expert" in entry.name):
            yield self._matrix(name, shape[1:], entry.read, Position(entry.name), kind="stack", pieces=shape[0])
        else:
            for i in range(shape[0]):
                yield from self._parts(f"{name}[{i}]", shape[1:], partial(entry.read, i), i)

    def unread(self, why: str, status: str = "unreadable") -> WeightMatrix:
        """One row for the tensor that says `why` it was not read."""
        shape, problem = self.entry.shape, self.entry.problem or (status, why)
        place = replace(self, entry=replace(self.entry, problem=problem))
        return place._matrix(roles.stem(self.entry.name), shape, self.entry.read, Position(self.entry.name))

    def _parts(
        self, name: str, shape: tuple[int, ...], read: Callable[[], Array], element: int | None = None
    ) -> Iterator[WeightMatrix]:
        family, _, part = self.role.rpartition(".")
        stacked = element is not None
        kind = "expert" if stacked else None
        parts = fused.split(
            leaf(self.entry.name), part, (shape[0], shape[1]), self.config, stacked=stacked, inner=self.inner
        )
        if not parts:
            role = f"{family}.gate_up" if part == "up" and fused.is_doubled(shape, self.inner) else self.role
            yield self._matrix(name, shape, read, Position(self.entry.name, element), kind=kind, role=role)
        for piece in parts:
            role = f"{family or self.role}.{piece.suffix}"
            load = partial(_part, read, piece.index)
            where = Position(self.entry.name, element, piece.index)
            yield self._matrix(f"{name}[{piece.suffix}]", piece.shape, load, where, kind=kind, role=role)

    def _kernel(self) -> Array:
        return Position(self.entry.name, kernel=True).take(self.entry.read())

    def _matrix(
        self,
        name: str,
        shape: tuple[int, ...],
        load: Callable[[], Array],
        position: Position,
        *,
        kind: str | None = None,
        role: str | None = None,
        pieces: int = 1,
    ) -> WeightMatrix:
        entry, role = self.entry, role or self.role
        problem = entry.problem
        if problem is None and entry.dtype not in FLOATS and not entry.warning:
            problem = ("quantized", f"{name} is stored as {entry.dtype} without a scale that htsr knows")
        factors = getattr(entry.read, "factors", None)  # a reader that has no such method reads whole matrices
        return WeightMatrix(
            name=name,
            shape=(shape[0], shape[1]),
            pieces=pieces,
            role=self.stack + role,
            block=self.block,
            kind=kind or entry.kind or ("embedding" if role.startswith("embed") else "linear"),
            dtype=entry.dtype,
            load=load,
            position=position,
            problem=problem,
            warning=entry.warning,
            factors=factors and partial(_factors, factors, position),
        )


def _factors(read: Callable[[], Product], position: Position) -> Product:
    product = read()
    if position.element is not None and product.ndim == 3:
        product = product[position.element]
    return product if position.index is None else product[position.index]


def _part(read: Callable[[], Array], index: Any) -> Array:
    return read()[index]
