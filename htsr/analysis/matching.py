"""Which matrix of one model is which of another, whatever the two call it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from htsr.spectra.metrics import LayerMetrics


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


def _by_end(row: LayerMetrics) -> Any:
    """The name from the first numbered component on, or its last component."""
    found = re.search(r"\w+\.\d+\..*|[^.]+$", row.name)
    return found[0] if found else row.name


def _by_place(row: LayerMetrics) -> Any:
    """Role, block and number of the expert, in a stack or by name; None of a matrix without a role."""
    if row.role.endswith("other"):
        return None
    numbers = re.findall(r"\[(\d+)\]|experts?[._](\d+)", row.name)
    return row.role, row.block, tuple("".join(number) for number in numbers)


def _unique(rows: Sequence[LayerMetrics], key: Callable[[LayerMetrics], Any]) -> dict[Any, LayerMetrics]:
    """Rows by key, without those that have none or whose key is not theirs alone."""
    counts = Counter(key(row) for row in rows)
    return {key(row): row for row in rows if counts[key(row)] == 1 and key(row) is not None}


def of_one_shape(a: LayerMetrics, b: LayerMetrics) -> bool:
    """Whether the matrices of the rows `a` and `b` have one shape, or one has the other's transposed."""

    def shape(row: LayerMetrics) -> Any:
        return sorted((row.rows or 0, row.columns or 0))

    return shape(a) == shape(b) and (a.pieces == b.pieces or None in (a.pieces, b.pieces))
