"""Fused tensors and their parts: q, k, v in one; gate and up in one; the gates of an LSTM or GRU.

A tensor is split only where its layout is known, from the name, the shapes and the model's configuration; elsewhere it
stays whole and its role says so (``attn.qkv``). Splitting matters: the spectrum of a concatenation is not that of its
parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# names under which q, k and v follow one another in whatever model
_ALWAYS_IN_SEQUENCE = frozenset(
    {"qkv", "in_proj_weight", "to_qkv", "qkv_linear", "att_proj", "w_pack", "attn_qkv"}  # attn_qkv is GGUF's
)
# layouts of the other names, by model_type
_IN_SEQUENCE = frozenset(
    {"phi3", "phi3_v", "phi4_multimodal", "modernbert", "modernbert-decoder", "mpt", "dbrx", "nomic_bert", "qwen"}
)
_PER_HEAD = frozenset({"gpt_neox", "gpt_neox_japanese", "bloom", "persimmon", "deberta", "minimax"})
_PER_GROUP = frozenset({"internlm2"})
_SOMETIMES_MULTI_QUERY = frozenset({"falcon", "gpt_bigcode", "chatglm"})  # per head where they are not
_GATED_QUERY = ("qwen3_next", "qwen3_5", "qwen4_exp", "qwen3next", "qwen35")  # the last two are llama.cpp's

# the last is llama.cpp's
EXPERTS_IN_BY_OUT = frozenset({"gpt_oss", "llama4_text", "llama4", "aria_text", "openai_privacy_filter", "gpt-oss"})
# names under which gate and up are one where the shapes say so, and their order: of llama.cpp, Megatron and diffusers
_DOUBLED = {"ffn_up": ("gate", "up"), "linear_fc1": ("gate", "up"), "proj": ("up", "gate")}
_DOUBLED_FC1 = {"moonshine": ("up", "gate"), "moshi": ("gate", "up"), "kyutai_speech_to_text": ("gate", "up")}
_UP_FIRST = frozenset({"phi4_multimodal_audio"})


@dataclass(frozen=True)
class Part:
    """One matrix inside a fused one.

    Attributes:
        suffix: what the part is: ``q``, ``k``, ``v``, ``gate``, ``up``, or a gate of an RNN.
        shape: (rows, columns) of the part.
        index: NumPy index that takes the part out of the loaded tensor.
    """

    suffix: str
    shape: tuple[int, int]
    index: Any


def split(
    leaf: str,
    part: str,
    shape: tuple[int, int],
    config: dict[str, Any],
    *,
    stacked: bool = False,
    inner: int = 0,
) -> list[Part]:
    """Parts of a matrix; none where it is not fused, or its layout is not known.

    Args:
        leaf: last component of the matrix's name, lower case, such as ``c_attn``.
        part: last component of the matrix's role, such as ``qkv``.
        shape: (m, n) of the matrix.
        config: configuration of this part of the model (from its ``config.json``); empty where it is not known.
        stacked: whether the matrix is one of several experts in a 3-D tensor.
        inner: width that another tensor of the model gives: the number of inputs of the ``down`` beside an ``up``, or
            the hidden size of the RNN; 0 where it is not known.

    Examples:
        >>> from htsr.matrices.fused import split
        >>> [(part.suffix, part.shape) for part in split("c_attn", "qkv", (64, 192), {"model_type": "gpt2"})]
        [('q', (64, 64)), ('k', (64, 64)), ('v', (64, 64))]
        >>> split("query_key_value", "qkv", (192, 64), {})  # head by head or in sequence? Nothing says so
        []
    """
    model_type = str(config.get("model_type", ""))
    if part == "gate_up" or (leaf, model_type) == ("dense_h_to_4h", "chatglm"):
        return _gate_up(leaf, shape, config, model_type, stacked)
    order = _DOUBLED_FC1.get(model_type) if leaf == "fc1" else _DOUBLED.get(leaf)
    if part == "up" and is_doubled(shape, inner) and order:
        return _sequential(shape, 0, **dict.fromkeys(order, inner))
    if part == "rnn" and inner and shape[0] in (gates := {4 * inner: "ifgo", 3 * inner: "rzn"}):
        return _sequential(shape, 0, **dict.fromkeys(gates[shape[0]], inner))
    if part == "qkv":
        return _qkv(leaf, shape, config, model_type)
    if part == "kv" and shape[0] == 2 * shape[1] and (leaf != "kv_proj" or model_type == "jetmoe"):
        return _sequential(shape, 0, k=shape[1], v=shape[1])
    if part == "q" and (model_type or str(config.get("gguf_architecture"))).startswith(_GATED_QUERY):
        heads, _, head_dim = head_counts(config)
        return _grouped(shape, heads, q=1, gate=1) if shape[0] == 2 * heads * head_dim else []
    return []


def is_doubled(shape: Sequence[int], inner: int) -> bool:
    """Whether a matrix of this `shape`, beside a ``down`` that takes in `inner`, is gate and up in one."""
    return inner > 0 and shape[0] == 2 * inner


def experts_in_rows(config: dict[str, Any]) -> int:
    """Number of experts whose matrices one tensor holds one below the other, by the model's `config`; 0 for none."""
    experts = config.get("ffn_config")
    if config.get("model_type") != "dbrx" or not isinstance(experts, dict):
        return 0
    return int(experts.get("moe_num_experts", 0))


def _qkv(leaf: str, shape: tuple[int, int], config: dict[str, Any], model_type: str) -> list[Part]:
    heads, groups, head_dim = head_counts(config)
    if leaf in ("c_attn", "attn_qkv") and shape[1] == 3 * shape[0]:  # GPT-2's Conv1D stores in × out
        return _sequential(shape, 1, q=shape[0], k=shape[0], v=shape[0])
    if leaf == "c_attn" and shape[0] == 3 * shape[1] and model_type != "gpt_bigcode":  # nanoGPT's Linear
        return _sequential(shape, 0, q=shape[1], k=shape[1], v=shape[1])
    if leaf == "c_attn" and shape[1] == 2 * shape[0]:  # in its cross-attention
        return _sequential(shape, 1, k=shape[0], v=shape[0])
    grouped = bool(heads) and groups != heads and shape[0] == (heads + 2 * groups) * head_dim
    if (
        leaf in _ALWAYS_IN_SEQUENCE and not grouped and shape[0] in (3 * shape[1], 6 * shape[1])
    ):  # 6: Hiera's stages double the width
        third = shape[0] // 3
        return _sequential(shape, 0, q=third, k=third, v=third)
    if not heads or shape[0] != (heads + 2 * groups) * head_dim:
        return []
    if model_type == "codegen":  # as laid out for four TPU cores
        return _grouped(shape, 4, q=1, v=1, k=1)
    per_head = model_type in _PER_HEAD or (model_type in _SOMETIMES_MULTI_QUERY and heads == groups)
    if per_head or model_type in _PER_GROUP or config.get("new_decoder_architecture"):
        return _grouped(shape, groups, q=heads // groups, k=1, v=1)
    if leaf in _ALWAYS_IN_SEQUENCE or model_type in _IN_SEQUENCE | _SOMETIMES_MULTI_QUERY:
        return _sequential(shape, 0, q=heads * head_dim, k=groups * head_dim, v=groups * head_dim)
    return []


def head_counts(config: dict[str, Any]) -> tuple[int, int, int]:
    """Number of heads, number of key-value heads, and the dimension of a head, by a model's `config`; 0 where unknown.

    Examples:
        >>> from htsr.matrices.fused import head_counts
        >>> head_counts({"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 64})
        (8, 2, 8)
    """

    def first(*keys: str) -> int:
        return next((int(config[key]) for key in keys if isinstance(config.get(key), int)), 0)

    heads = first("num_attention_heads", "n_head", "n_heads", "num_heads")
    groups = first("num_key_value_heads", "num_kv_heads", "n_head_kv") or heads
    multi_query = config.get("multi_query_attention", config.get("multi_query"))
    model_type = config.get("model_type")
    if model_type == "minimax" or (model_type == "falcon" and not config.get("new_decoder_architecture")):
        groups = heads  # the number in the configuration is that of Falcon's new architecture, MiniMax's other layers
    if multi_query and not config.get("new_decoder_architecture"):
        groups = first("multi_query_group_num") or 1
    if isinstance(attention := config.get("attn_config"), dict):  # DBRX
        groups = attention.get("kv_n_heads") or groups
    hidden = first("hidden_size", "n_embd", "d_model", "dim")
    return heads, groups, first("head_dim", "kv_channels", "d_kv") or (hidden // heads if heads else 0)


def _gate_up(leaf: str, shape: tuple[int, int], config: dict[str, Any], model_type: str, stacked: bool) -> list[Part]:
    axis = 0
    if stacked:
        hidden = config.get("hidden_size")
        if hidden not in shape:
            return []
        if shape[0] == hidden:
            axis = 1 if shape[1] != hidden or model_type in EXPERTS_IN_BY_OUT else 0
    if shape[axis] % 2:
        return []
    half = shape[axis] // 2
    if model_type == "gpt_oss" and stacked:
        return [Part(name, (shape[0], half), (slice(None), slice(i, None, 2))) for i, name in enumerate(("gate", "up"))]
    if leaf == "up_gate_proj" or model_type in _UP_FIRST:
        return _sequential(shape, axis, up=half, gate=half)
    return _sequential(shape, axis, gate=half, up=half)


def _sequential(shape: tuple[int, int], axis: int, **sizes: int) -> list[Part]:
    """Parts that follow one another along an axis."""
    parts, start = [], 0
    for suffix, size in sizes.items():
        where = slice(start, start + size)
        start += size
        parts.append(
            Part(suffix, (size, shape[1]), (where, slice(None)))
            if axis == 0
            else Part(suffix, (shape[0], size), (slice(None), where))
        )
    return parts


def _grouped(shape: tuple[int, int], groups: int, **counts: int) -> list[Part]:
    """Parts of rows laid out (groups, members, head_dim), where `counts` says how many members are whose."""
    rows = np.arange(shape[0]).reshape(groups, sum(counts.values()), -1)
    parts, start = [], 0
    for suffix, count in counts.items():
        chosen = rows[:, start : start + count].ravel()
        start += count
        parts.append(Part(suffix, (chosen.size, shape[1]), chosen))
    return parts
