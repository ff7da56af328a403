"""Fused tensors and their parts: q, k, v in one; gate and up in one.

A tensor is split only where its layout is known, from the name, the shapes and the model's configuration; elsewhere it
stays whole and its role says so (``attn.qkv``). Splitting matters: the spectrum of a concatenation is not that of its
parts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

# one per head: (heads, [q, k, v], head_dim) along the output axis
_PER_HEAD = frozenset({"gpt_neox", "gpt_neox_japanese", "bloom", "persimmon", "deberta", "minimax"})
# one per key-value group: (groups, [q … q, k, v], head_dim)
_PER_GROUP = frozenset({"internlm2", "falcon"})
_LAST_AXIS_OUT = frozenset({"gpt_oss", "llama4", "llama4_text", "aria", "aria_text", "openai_privacy_filter"})
_SEQUENTIAL = frozenset({"c_attn", "qkv", "qkv_proj", "wqkv", "in_proj_weight", "att_proj", "w_pack", "attn_qkv"})


@dataclass(frozen=True)
class Part:
    """One matrix inside a fused one.

    Attributes:
        suffix: ``q``, ``k``, ``v``, ``gate`` or ``up``.
        shape: of the part.
        index: picks the part out of the loaded tensor.
    """

    suffix: str
    shape: tuple[int, int]
    index: Any


def split(leaf: str, shape: tuple[int, int], config: dict[str, Any]) -> list[Part]:
    """Parts of the fused matrix that ends in `leaf`; empty where it is not fused or its layout is not known.

    Args:
        leaf: last component of the name, lower case, such as ``c_attn``.
        shape: (m, n) of the matrix.
        config: the model's configuration (``config.json``), which may be empty.
    """
    config = config.get("text_config") or config
    model_type = str(config.get("model_type", ""))
    if leaf in ("gate_up_proj", "wi", "ffn_gate_up", "gate_up") and (leaf != "wi" or "modernbert" in model_type):
        return _gate_up(shape, config, model_type)
    if leaf == "c_attn" and shape[1] == 3 * shape[0]:  # GPT-2's Conv1D stores in × out
        return _sequential(shape, 1, [shape[0]] * 3)
    heads, kv_heads, head_dim = _head_counts(config, shape)
    if leaf == "query_key_value" or leaf in ("wqkv", "in_proj", "qkv_proj"):
        if model_type in _PER_HEAD and _divides(shape[0], 3 * heads):
            return _grouped(shape, heads, 1)
        if model_type == "falcon" and not config.get("new_decoder_architecture") and not config.get("multi_query"):
            return _grouped(shape, heads, 1) if _divides(shape[0], 3 * heads) else []
        if model_type in _PER_GROUP and kv_heads and shape[0] == (heads + 2 * kv_heads) * head_dim:
            return _grouped(shape, kv_heads, heads // kv_heads)
        if model_type == "codegen" or leaf == "in_proj":
            return []
        if leaf == "query_key_value" and model_type not in ("chatglm", "glm"):
            return []
    if leaf in _SEQUENTIAL or leaf == "query_key_value":
        if heads and shape[0] == (heads + 2 * kv_heads) * head_dim:
            return _sequential(shape, 0, [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim])
        if shape[0] == 3 * shape[1]:
            return _sequential(shape, 0, [shape[1]] * 3)
    return []


def _head_counts(config: dict[str, Any], shape: tuple[int, int]) -> tuple[int, int, int]:
    def first(*keys: str) -> int:
        return next((int(config[key]) for key in keys if isinstance(config.get(key), int)), 0)

    hidden = first("hidden_size", "n_embd", "d_model", "dim") or shape[1]
    heads = first("num_attention_heads", "n_head", "n_heads", "num_heads")
    default = 1 if config.get("multi_query") else heads
    kv_heads = first("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num") or default
    if config.get("multi_query") and not config.get("new_decoder_architecture"):
        kv_heads = first("multi_query_group_num") or 1
    head_dim = first("head_dim", "kv_channels") or (hidden // heads if heads else 0)
    return heads, kv_heads, head_dim


def _divides(total: int, parts: int) -> bool:
    return parts > 0 and total % parts == 0


def _sequential(shape: tuple[int, int], axis: int, sizes: list[int], names: str = "q k v") -> list[Part]:
    parts = []
    start = 0
    for suffix, size in zip(names.split(), sizes, strict=True):
        where = slice(start, start + size)
        index = (where, slice(None)) if axis == 0 else (slice(None), where)
        part_shape = (size, shape[1]) if axis == 0 else (shape[0], size)
        parts.append(Part(suffix, part_shape, lambda array, index=index: array[index]))  # type: ignore[misc]
        start += size
    return parts


def _grouped(shape: tuple[int, int], groups: int, queries: int) -> list[Part]:
    """Rows laid out (groups, queries + 2, head_dim): `queries` of q, then one of k, one of v."""
    rows = np.arange(shape[0]).reshape(groups, queries + 2, -1)
    chosen = {"q": rows[:, :queries], "k": rows[:, queries : queries + 1], "v": rows[:, queries + 1 :]}
    return [Part(suffix, (index.size, shape[1]), index.ravel()) for suffix, index in chosen.items()]


def _gate_up(shape: tuple[int, int], config: dict[str, Any], model_type: str) -> list[Part]:
    hidden = config.get("hidden_size")
    axis = 0
    if shape[0] == hidden and (shape[1] != hidden or model_type in _LAST_AXIS_OUT):
        axis = 1
    if shape[axis] % 2:
        return []
    half = shape[axis] // 2
    if model_type in ("gpt_oss", "openai_privacy_filter"):  # gate and up alternate
        picks = (slice(0, None, 2), slice(1, None, 2))
        part_shape = (half, shape[1]) if axis == 0 else (shape[0], half)
        return [
            Part(name, part_shape, (pick, slice(None)) if axis == 0 else (slice(None), pick))
            for name, pick in zip(("gate", "up"), picks, strict=True)
        ]
    return _sequential(shape, axis, [half, half], "gate up")
