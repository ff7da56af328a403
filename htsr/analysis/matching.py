"""Which matrix of one model is which of another, whatever the two call it and however they store it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol, TypeVar

from htsr.matrices.models import Model, WeightMatrix
from htsr.matrices.positions import Position
from htsr.spectra.metrics import LayerMetrics

_PART = re.compile(r"(.*)\[[a-z_]+\]")  # a part of a fused tensor; the numbers of experts stand in brackets, too
Row = TypeVar("Row")


class _Named(Protocol):
    @property
    def name(self) -> str: ...


def match(a: Sequence[LayerMetrics], b: Sequence[LayerMetrics]) -> list[tuple[LayerMetrics, LayerMetrics]]:
    """Pairs of rows of `a` and `b` that are of one matrix: by name, then by its end, then by role, block and part.

    Examples:
        >>> from htsr.analysis.matching import match
        >>> from htsr.spectra.metrics import LayerMetrics
        >>> ours = LayerMetrics(name="model.layers.0.self_attn.q_proj", role="attn.q", block=0)
        >>> theirs = LayerMetrics(name="blk.0.attn_q", role="attn.q", block=0)  # llama.cpp
        >>> [(a.name, b.name) for a, b in match([ours], [theirs])]
        [('model.layers.0.self_attn.q_proj', 'blk.0.attn_q')]
    """
    pairs: list[tuple[LayerMetrics, LayerMetrics]] = []
    left_a, left_b = list(a), list(b)
    for key in (_by_name, _by_end, _by_place):
        there = _unique(left_b, key)
        found = [(row, there[k]) for k, row in _unique(left_a, key).items() if k in there]
        pairs += found
        taken_a, taken_b = ({id(pair[i]) for pair in found} for i in (0, 1))
        left_a = [row for row in left_a if id(row) not in taken_a]
        left_b = [row for row in left_b if id(row) not in taken_b]
    order = {row.name: i for i, row in enumerate(a)}
    return sorted(pairs, key=lambda pair: order[pair[0].name])


def _by_name(row: LayerMetrics) -> Any:
    return row.name


def _by_end(row: _Named) -> Any:
    return _end(row.name)


def _end(name: str) -> str:
    """The `name` from the first numbered component on, or its last component."""
    found = re.search(r"\w+\.\d+\..*|[^.]+$", name)
    return found[0] if found else name


def _by_place(row: LayerMetrics) -> Any:
    """Role, block and number of the expert, in a stack or by name; None of a matrix without a role."""
    if row.role.endswith("other"):
        return None
    numbers = re.findall(r"\[(\d+)\]|experts?[._](\d+)", row.name)
    return row.role, row.block, tuple("".join(number) for number in numbers)


def _unique(rows: Sequence[Row], key: Callable[[Row], Any]) -> dict[Any, Row]:
    """Rows by key, without those that have none or whose key is not theirs alone."""
    counts = Counter(key(row) for row in rows)
    return {key(row): row for row in rows if counts[key(row)] == 1 and key(row) is not None}


def of_one_shape(a: LayerMetrics, b: LayerMetrics) -> bool:
    """Whether the matrices of the rows `a` and `b` have one shape, or one has the other's transposed."""

    def shape(row: LayerMetrics) -> Any:
        return sorted((row.rows or 0, row.columns or 0))

    return shape(a) == shape(b) and (a.pieces == b.pieces or None in (a.pieces, b.pieces))


def split_alike(a: Model, b: Model) -> tuple[Model, Model]:
    """Both models, with a fused tensor that only one of them knows how to split taken apart in both.

    How q, k and v lie in one tensor, a model's configuration says, which a state dict has not. Where the other model
    has a tensor of the same name and size, the layout is that one's.

    Args:
        a: first model.
        b: second model.

    Examples:
        >>> import torch
        >>> from htsr.analysis.matching import split_alike
        >>> from htsr.matrices.apart import matrices_of
        >>> from htsr.matrices.models import Model
        >>> from htsr.matrices.stored_tensors import stored_tensor
        >>> tensors = [stored_tensor("layers.0.self_attn.qkv_proj.weight", torch.ones(24, 8))]
        >>> config = {"model_type": "phi3", "num_attention_heads": 2, "hidden_size": 8}
        >>> known, unknown = (Model("", tuple(matrices_of(tensors, known))) for known in (config, {}))
        >>> [matrix.role for matrix in unknown], [matrix.role for matrix in split_alike(known, unknown)[1]]
        (['attn.qkv'], ['attn.q', 'attn.k', 'attn.v'])
    """
    return _split_like(a, b), _split_like(b, a)


def _split_like(model: Model, other: Model) -> Model:
    """The `model`, with whole tensors split where `other` splits the tensor of that name."""
    parts: dict[Any, list[WeightMatrix]] = {}
    for matrix in other:
        if found := _PART.fullmatch(matrix.name):
            parts.setdefault(_end(found[1]), []).append(matrix)
    whole = _unique(model.matrices, _by_end) if parts else {}
    taken = {
        id(matrix): list(_taken_apart(matrix, parts[key]))
        for key, matrix in whole.items()
        if key in parts and _is_whole_of(matrix, parts[key])
    }
    return replace(model, matrices=tuple(new for old in model for new in taken.get(id(old), [old]))) if taken else model


def _is_whole_of(matrix: WeightMatrix, parts: Sequence[WeightMatrix]) -> bool:
    """Whether the `parts`, of another model, are all of a tensor of the shape of `matrix`, side by side or stacked."""
    if (
        matrix.pieces != 1
        or matrix.position.index is not None
        or any(part.pieces != 1 or part.position.index is None for part in parts)
    ):
        return False
    rows, columns = (sum(part.shape[axis] for part in parts) for axis in (0, 1))
    same = [len({part.shape[axis] for part in parts} | {matrix.shape[axis]}) == 1 for axis in (0, 1)]
    return (rows == matrix.shape[0] and same[1]) or (columns == matrix.shape[1] and same[0])


def _taken_apart(matrix: WeightMatrix, parts: Iterable[WeightMatrix]) -> Iterable[WeightMatrix]:
    """The parts of `matrix`, laid out as those of another model."""
    for part in parts:
        index = part.position.index
        yield replace(
            matrix,
            name=f"{matrix.name}{part.name[part.name.rindex('[') :]}",
            shape=part.shape,
            role=part.role,
            load=partial(_indexed, matrix.load, index),
            factors=matrix.factors and partial(_indexed, matrix.factors, index),
            position=Position(matrix.position.tensor, matrix.position.element, index),
            axes=replace(part.axes, order=matrix.axes.order),
        )


def _indexed(read: Callable[[], Any], index: Any) -> Any:
    return read()[index]
