"""Naming schemes: how libraries name the same matrix, brought to names that `htsr.matrices.roles` and `fused` know.

A scheme is a list of rewritings of paths. Most libraries differ in single words only, which are in the tables of
`htsr.matrices.roles`; here is what takes the path to tell: LitGPT's ``fc_1`` is a gate where torchvision's ``fc1`` is
not, a number in a Sequential, a slash.
"""

from __future__ import annotations

import re

_MLP = r"(mlp|img_mlp|txt_mlp|ffn|ff|ff_context|feed_forward)"
# applied one after the other to the name without ".weight"; blocks' numbers go last but one
_SCHEMES: dict[str, tuple[tuple[str, str], ...]] = {
    "PEFT": ((r"\.lora_.*", ""),),
    "CTranslate2": (
        (r"/self_attention/linear_0$", "/self_attention/qkv"),
        (r"/self_attention/linear_1$", "/self_attention/out_proj"),
        (r"/attention/linear_0$", "/cross_attention/q_proj"),
        (r"/attention/linear_1$", "/cross_attention/kv"),
        (r"/attention/linear_2$", "/cross_attention/out_proj"),
        (r"/ffn/linear_0$", "/ffn/gate_or_up"),  # a gate where there is a linear_0_noact
        (r"/ffn/linear_0_noact$", "/ffn/up_proj"),
        (r"/ffn/linear_1$", "/ffn/down_proj"),
        (r"^(\w+)/projection$", r"\1/lm_head"),
    ),
    "flax, T5X": ((r"/", "."), (r"(^|\.)encoder_decoder_attention\.", r"\1cross_attention.")),
    "LitGPT": (
        (r"(^|\.)(h\.\d+\.mlp(?:\.experts\.\d+)?)\.fc_1$", r"\1\2.gate_proj"),
        (r"(^|\.)(h\.\d+\.mlp(?:\.experts\.\d+)?)\.fc(_2)?$", r"\1\2.up_proj"),
        (r"(^|\.)(h\.\d+\.attn)\.attn$", r"\1\2.query_key_value"),
    ),
    "Flux": ((r"(^|\.)single_blocks\.\d+\.linear[12]$", r"\1fused_with_mlp"),),
    "JetMoE": (
        (r"(self_attention)\.experts\.input_linear$", r"\1.q_proj"),
        (r"(self_attention)\.experts\.output_linear$", r"\1.o_proj"),
    ),
    "ModernBERT": ((r"\.Wi$", ".gate_up"),),  # gated, and T5's wi is not
    "Sequential": (
        (rf"\.{_MLP}(\.net)?\.0(\.proj|\.0)?$", r".\1.fc1"),
        (rf"\.{_MLP}(\.net)?\.[1-9]$", r".\1.fc2"),
        (r"\.block\.3$", ".fc1"),  # torchvision's ConvNeXt
        (r"\.block\.5$", ".fc2"),
    ),
    "numbers": ((r"(^|\.)\d+(?=\.|$)", ""),),
    "GGUF": (
        (r"(^|\.)ffn_gate$", r"\1ffn.gate_proj"),  # its router is ffn_gate_inp
        (r"(^|\.)(cross_attn|attn|ffn|ssm)_(\w+)$", r"\1\2.\3"),  # attn_q, ffn_up, ffn_up_exps …
        (r"ffn\.(\w+)_exps$", r"ffn.experts.\1"),
        (r"ffn\.(\w+)_shexp$", r"ffn.shared_expert.\1"),
    ),
}
_REWRITINGS = tuple((re.compile(p), replacement) for scheme in _SCHEMES.values() for p, replacement in scheme)
_PART = re.compile(r"(\[[^\]]*\])+$")


def stem(name: str) -> str:
    """`name` without what every weight's name ends in."""
    for suffix in (".weight", "_weight", "/weight", ".kernel", "/kernel", ".base_layer"):
        if not name.endswith("in_proj_weight"):
            name = name.removesuffix(suffix)
    return name


def whole_name(name: str) -> str:
    """The tensor that the matrix `name` is or is part of: the name without what stands in brackets at its end."""
    return _PART.sub("", name)


def canonical(name: str) -> str:
    """The path of a tensor in the words of `htsr.matrices.roles`: lower case, dots, no numbers, no ``.weight``.

    Args:
        name: name of the tensor, as its checkpoint has it.

    Examples:
        >>> from htsr.matrices.naming import canonical
        >>> canonical("model.layers.3.self_attn.q_proj.weight")
        'model.layers.self_attn.q_proj'
        >>> canonical("blk.3.ffn_gate.weight")  # llama.cpp
        'blk.ffn.gate_proj'
    """
    path = stem(name)
    for pattern, replacement in _REWRITINGS:
        path = pattern.sub(replacement, path)
    return path.lstrip(".").lower()


def leaf(name: str) -> str:
    """The last word of a tensor's own name, lower case: what tells how a fused tensor is laid out.

    A name that stands for something else in its scheme (CTranslate2's ``linear_0``) gives the canonical word.

    Args:
        name: name of the tensor, as its checkpoint has it.
    """
    own = stem(name).replace("/", ".").rsplit(".", 1)[-1].lower()
    return canonical(name).rsplit(".", 1)[-1] if re.fullmatch(r"linear_\d|attn|wi", own) else own
