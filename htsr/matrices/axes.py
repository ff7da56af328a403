"""What the rows and columns of a weight matrix stand for, as far as it takes to lay it over another model's.

Two checkpoints of one model can store a matrix in several ways that no spectrum tells apart: transposed, with heads
side by side or one below the other, with rows in another order.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from htsr.matrices.fused import EXPERTS_IN_BY_OUT
from htsr.matrices.naming import leaf
from htsr.matrices.positions import Position

# the leaves of a GPT-2 in transformers' words and in llama.cpp's, whose q, k and v in one tells how all are stored
_CONV1D = {
    "c_attn": frozenset({"c_attn", "c_proj", "c_fc", "q_attn"}),
    "attn_qkv": frozenset({"attn_qkv", "attn_output", "ffn_up", "ffn_down", "ffn_gate"}),
}


@dataclass(frozen=True)
class Axes:
    """What the rows and columns of a weight matrix stand for.

    Attributes:
        inputs_first: whether the rows are the inputs, as GPT-2's Conv1D and kernels of flax have them, and not the
            outputs, as a Linear has them; None where it is not known, of stacked experts without a configuration.
        heads: number of attention heads whose outputs (of q, k and v) or inputs (of o) lie one after the other; 0 where
            it is not known, and for matrices of other roles.
        order: what is not known of the order of rows or columns, where that may not be transformers'; empty where it
            is. Two matrices can be subtracted where this is the same of both.
    """

    inputs_first: bool | None = False
    heads: int = 0
    order: str = ""


def conv1d_leaves(tensors: Iterable[tuple[str, Sequence[int]]]) -> frozenset[str]:
    """Leaves of the names of all tensors that a model stores (in, out), by the shape of its q, k and v in one.

    Args:
        tensors: name and shape of each tensor of the model.

    Examples:
        >>> from htsr.matrices.axes import conv1d_leaves
        >>> sorted(conv1d_leaves([("h.0.attn.c_attn.weight", (8, 24)), ("h.0.attn.c_proj.weight", (8, 8))]))
        ['c_attn', 'c_fc', 'c_proj', 'q_attn']
        >>> conv1d_leaves([("h.0.attn.c_attn.weight", (24, 8))])  # nanoGPT's Linear
        frozenset()
    """
    for name, shape in tensors:
        if len(shape) == 2 and shape[1] == 3 * shape[0] and (found := _CONV1D.get(leaf(name))):
            return found
    return frozenset()


def has_inputs_first(name: str, position: Position, conv1d: frozenset[str], config: Mapping[str, Any]) -> bool | None:
    """Whether a matrix is stored (in, out); None where that is not known.

    Args:
        name: name of the stored tensor.
        position: place of the matrix in it. What is a number of columns of a fused tensor has its outputs there.
        conv1d: leaves of tensors that are stored so, from `conv1d_leaves`.
        config: configuration of the model, which tells how stacked experts are stored; empty where it is not known.
    """
    index = position.index
    if isinstance(index, tuple) and len(index) == 2 and index[0] == slice(None):
        return True
    if position.element is not None:
        architecture = str(config.get("model_type") or config.get("gguf_architecture") or "")
        return architecture in EXPERTS_IN_BY_OUT if architecture else None
    return leaf(name) in conv1d or re.search(r"[./]kernel$", name) is not None


def axes_of(
    role: str, shape: Sequence[int], inputs_first: bool | None, counts: tuple[int, int, int], order: str
) -> Axes:
    """The axes of a matrix.

    Args:
        role: role of the matrix, without the name of its tower.
        shape: (rows, columns) of the matrix.
        inputs_first: whether the rows are the inputs; None where it is not known.
        counts: number of heads, number of key-value heads, and the dimension of a head; 0 where not known.
        order: what is not known of the order of rows or columns.

    Examples:
        >>> from htsr.matrices.axes import axes_of
        >>> axes_of("attn.k", (16, 64), inputs_first=False, counts=(8, 2, 8), order="").heads  # grouped queries
        2
        >>> axes_of("attn.k", (24, 64), inputs_first=False, counts=(8, 2, 8), order="").heads  # another layer's heads
        0
    """
    outputs, inputs = reversed(shape) if inputs_first else shape
    family, _, part = role.rpartition(".")
    heads, groups, size = counts
    of_part = {"q": (heads, outputs), "k": (groups, outputs), "v": (groups, outputs), "o": (heads, inputs)}
    count, side = of_part.get(part, (0, 0)) if family in ("attn", "cross_attn") else (0, 0)
    return Axes(inputs_first, count if count * size == side else 0, order)
