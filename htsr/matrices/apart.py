"""Stored tensors taken apart into the matrices that they hold: fused parts, experts, slices of kernels."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from htsr.arrays import Array, Product
from htsr.matrices import fused, roles
from htsr.matrices.models import WeightMatrix
from htsr.matrices.naming import leaf
from htsr.matrices.positions import Position
from htsr.matrices.quantized import is_packed
from htsr.matrices.stored_tensors import FLOATS, StoredTensor

if TYPE_CHECKING:
    pass


# a layer's weight, whatever the layer is called: a bias that is computed has weights, too
_WEIGHTS = re.compile(r"(^|[._/])(weight(_[ih][hr]_l\d+(_reverse)?)?|kernel|embedding)$")
# floats of two and more dimensions that are no weights
_NOT_WEIGHTS = re.compile(
    r"(^|[._])(bias|biases|(pos_)?bias_[uv]|mask|inv_freq|freqs_cis|cos_cached|sin_cached|position_ids|relative_position_index|"
    r"relative_coords_table|rotary_emb|A_log|ssm_a|ssm_d|running_mean|running_var|original0|weight_g|lora_magnitude_vector)(\.|$)|_bias$"
)
_TEXT_CONFIGS = ("text_config", "llm_config", "language_config", "thinker_config")


def matrices_of(entries: list[StoredTensor], config: dict[str, Any]) -> Iterator[WeightMatrix]:
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


def _is_weight(entry: StoredTensor) -> bool:
    name, empty = roles.stem(entry.name), 0 in entry.shape
    if len(entry.shape) < 2:
        return False
    layer = _WEIGHTS.search(entry.name) and "lora_magnitude_vector" not in name
    no_weight = not layer and _NOT_WEIGHTS.search(name)
    if empty or no_weight:
        return empty and (entry.name.endswith("weight") or not (entry.problem is None or no_weight))
    kernel = entry.kind is not None or "conv" in name.lower() or entry.name.endswith(".weight")
    if sum(size > 1 for size in entry.shape) < 2 and len(entry.shape) > 2 and not kernel:
        return False  # a vector with axes of one: class tokens, scales
    numeric = entry.dtype in FLOATS or entry.problem is not None or bool(entry.warning)
    return numeric or entry.name.endswith("weight") or is_packed(entry)


@dataclass(frozen=True)
class _Place:
    """A stored weight and where it stands in the model."""

    entry: StoredTensor
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
