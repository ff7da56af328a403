"""Stored tensors taken apart into the matrices that they hold: fused parts, experts, slices of kernels."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from htsr.arrays import Array, Product
from htsr.matrices import fused, roles
from htsr.matrices.axes import axes_of, conv1d_leaves, has_inputs_first
from htsr.matrices.models import WeightMatrix
from htsr.matrices.naming import leaf
from htsr.matrices.positions import Position
from htsr.matrices.quantized import is_packed
from htsr.matrices.stored_tensors import FLOATS, StoredTensor
from htsr.matrices.towers import tower_of, tower_prefixes

# a layer's weight, whatever the layer is called: a bias that is computed has weights, too
_WEIGHTS = re.compile(r"(^|[._/])(weight(_[ih][hr]_l\d+(_reverse)?)?|kernel|embedding)$")
# floats of two and more dimensions that are no weights
_NOT_WEIGHTS = re.compile(
    r"(^|[._])(bias|biases|(pos_)?bias_[uv]|mask|inv_freq|freqs_cis|cos_cached|sin_cached|position_ids|relative_position_index|"
    r"relative_coords_table|rotary_emb|A_log|ssm_a|ssm_d|running_mean|running_var|original0|weight_g|lora_magnitude_vector)(\.|$)|_bias$"
)
_TEXT_CONFIGS = ("text_config", "llm_config", "language_config", "thinker_config")


def matrices_of(tensors: list[StoredTensor], config: dict[str, Any]) -> Iterator[WeightMatrix]:
    """The weight matrices in stored tensors: tied heads once, fused and stacked ones apart.

    Args:
        tensors: stored tensors of a model, in its order.
        config: the model's ``config.json``; empty where it is not known.

    Returns:
        The matrices one after the other. A tensor that cannot be taken apart gives one matrix that says why.
    """
    weights = [tensor for tensor in tensors if _is_weight(tensor)]
    found = roles.roles_of((tensor.name, tensor.kind) for tensor in weights)
    towers = tower_prefixes(tensor.name for tensor in weights)
    blocks = [roles.block_of(tensor.name) for tensor in weights]
    if not any(block is not None for block in blocks):
        blocks = [roles.number_of(tensor.name) for tensor in weights]
    conv1d = conv1d_leaves((tensor.name, tensor.shape) for tensor in weights)
    stems = Counter(roles.stem(tensor.name) for tensor in weights)
    inner = roles.inner_widths([(tensor.name, role, tensor.shape) for tensor, role in zip(weights, found, strict=True)])
    for tensor, role, block in zip(weights, found, blocks, strict=True):
        tower = tower_of(tensor.name, towers)
        name, width = roles.stem(tensor.name), inner.get(tensor.name, 0)
        weight = _StoredWeight(tensor, role, tower, block, config, width, conv1d)
        if 0 in tensor.shape and (tensor.problem is not None or len(tensor.shape) > 2):  # of a stack no empty elements
            yield weight.unread(f"{tensor.name} has no entries", "empty")
            continue
        try:
            matrices = list(replace(weight, config=_part_config(config, tower)).matrices())
        except Exception as error:  # a configuration that does not fit: this tensor's row says so
            matrices = [weight.unread(f"{tensor.name} could not be taken apart by the model's configuration: {error}")]
        if stems[name] > 1 and tensor.name != f"{name}.weight":  # lin_weight beside lin.weight
            matrices = [replace(m, name=tensor.name + m.name.removeprefix(name)) for m in matrices]
        yield from matrices


def _text(config: dict[str, Any]) -> dict[str, Any]:
    return next((config[key] for key in _TEXT_CONFIGS if isinstance(config.get(key), dict)), config)


def _part_config(config: dict[str, Any], tower: str) -> dict[str, Any]:
    """The configuration of the tower that a role's prefix names."""
    name = tower.rstrip(".")
    for key in (f"{name}_config", name):
        if isinstance(config.get(key), dict):
            return config[key]  # type: ignore[no-any-return]
    return config if name in ("vision", "audio") else _text(config)


def _is_weight(tensor: StoredTensor) -> bool:
    name, empty = roles.stem(tensor.name), 0 in tensor.shape
    if len(tensor.shape) < 2:
        return False
    layer = _WEIGHTS.search(tensor.name) and "lora_magnitude_vector" not in name
    no_weight = not layer and _NOT_WEIGHTS.search(name)
    if empty or no_weight:
        return empty and (tensor.name.endswith("weight") or not (tensor.problem is None or no_weight))
    kernel = tensor.kind is not None or "conv" in name.lower() or tensor.name.endswith(".weight")
    if sum(size > 1 for size in tensor.shape) < 2 and len(tensor.shape) > 2 and not kernel:
        return False  # a vector with axes of one: class tokens, scales
    numeric = tensor.dtype in FLOATS or tensor.problem is not None or bool(tensor.warning)
    return numeric or tensor.name.endswith("weight") or is_packed(tensor)


@dataclass(frozen=True)
class _StoredWeight:
    """A stored tensor that holds weights, with what its name and the configuration say of it."""

    tensor: StoredTensor
    role: str
    tower: str
    block: int | None
    config: dict[str, Any]
    inner: int = 0
    conv1d: frozenset[str] = frozenset()

    def matrices(self) -> Iterator[WeightMatrix]:
        """What counts as a matrix of its own in this tensor."""
        tensor, shape = self.tensor, self.tensor.shape
        name = roles.stem(tensor.name)
        if len(shape) == 2 and self.role.startswith("expert") and (count := fused.experts_in_rows(self.config)):
            rows = shape[0] // count
            for i in range(count):
                part = slice(i * rows, (i + 1) * rows)
                load = partial(_part, tensor.read, part)
                position = Position(tensor.name, index=part)
                yield self._matrix(f"{name}[{i}]", (rows, shape[1]), load, position, kind="expert")
        elif len(shape) == 2:
            yield from self._parts(name, shape, tensor.read)
        elif roles.is_kernel(tensor.name, shape, tensor.kind):
            role = self.role if self.role in ("conv", "embed.patch") else roles.role_of(tensor.name, "conv")
            pieces = math.prod(shape[2:])
            position = Position(tensor.name, kernel=True)
            yield self._matrix(name, shape[:2], self._kernel, position, kind="conv", role=role, pieces=pieces)
        elif shape[0] == 1:  # ViT's position embeddings
            yield self._matrix(name, shape[1:], partial(tensor.read, 0), Position(tensor.name, 0))
        elif not (self.role.startswith("expert") or "expert" in tensor.name):
            yield self._matrix(name, shape[1:], tensor.read, Position(tensor.name), kind="stack", pieces=shape[0])
        else:
            for i in range(shape[0]):
                yield from self._parts(f"{name}[{i}]", shape[1:], partial(tensor.read, i), i)

    def unread(self, why: str, status: str = "unreadable") -> WeightMatrix:
        """One row for the tensor that says `why` it was not read."""
        shape, problem = self.tensor.shape, self.tensor.problem or (status, why)
        weight = replace(self, tensor=replace(self.tensor, problem=problem))
        return weight._matrix(roles.stem(self.tensor.name), shape, self.tensor.read, Position(self.tensor.name))

    def _parts(
        self, name: str, shape: tuple[int, ...], read: Callable[[], Array], element: int | None = None
    ) -> Iterator[WeightMatrix]:
        family, _, part = self.role.rpartition(".")
        stacked = element is not None
        kind = "expert" if stacked else None
        parts = fused.split(
            leaf(self.tensor.name), part, (shape[0], shape[1]), self.config, stacked=stacked, inner=self.inner
        )
        if not parts:
            role = f"{family}.gate_up" if part == "up" and fused.is_doubled(shape, self.inner) else self.role
            yield self._matrix(name, shape, read, Position(self.tensor.name, element), kind=kind, role=role)
        for piece in parts:
            role = f"{family or self.role}.{piece.suffix}"
            load = partial(_part, read, piece.index)
            position = Position(self.tensor.name, element, piece.index)
            yield self._matrix(f"{name}[{piece.suffix}]", piece.shape, load, position, kind=kind, role=role)

    def _kernel(self) -> Array:
        return Position(self.tensor.name, kernel=True).take(self.tensor.read())

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
        tensor, role = self.tensor, role or self.role
        problem = tensor.problem
        if problem is None and tensor.dtype not in FLOATS and not tensor.warning:
            problem = ("quantized", f"{name} is stored as {tensor.dtype} without a scale that htsr knows")
        inputs_first = has_inputs_first(tensor.name, position, self.conv1d, self.config)
        factors = getattr(tensor.read, "factors", None)  # a reader that has no such method reads whole matrices
        return WeightMatrix(
            name=name,
            shape=(shape[0], shape[1]),
            pieces=pieces,
            role=self.tower + role,
            block=self.block,
            kind=kind or tensor.kind or ("embedding" if role.startswith("embed") else "linear"),
            dtype=tensor.dtype,
            load=load,
            position=position,
            problem=problem,
            warning=tensor.warning,
            factors=factors and partial(_factors, factors, position),
            axes=axes_of(role, shape[:2], inputs_first, fused.head_counts(self.config), tensor.order),
        )


def _factors(read: Callable[[], Product], position: Position) -> Product:
    product = read()
    if position.element is not None and product.ndim == 3:
        product = product[position.element]
    return product if position.index is None else product[position.index]


def _part(read: Callable[[], Array], index: Any) -> Array:
    return read()[index]
