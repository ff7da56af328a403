"""What a weight matrix does, told from its name: role and block.

============================== =======================================================================================
role                           what
============================== =======================================================================================
``embed``                      token table; ``.position`` ``.type`` of positions, segments; ``.patch`` the projection of
                               patches; ``.proj`` a linear map behind the table (factorized embeddings)
``attn.q`` ``.k`` ``.v`` ``.o`` self-attention; ``.qkv`` ``.kv`` fused; ``.q_a`` ``.q_b`` ``.kv_a`` … factorized (MLA);
                               ``.gate`` output gate; ``.pos_q`` ``.pos_k`` maps of relative positions; ``.add_q`` …
                               those of a second stream (Flux)
``cross_attn.*``               the same of cross-attention
``mlp.gate`` ``.up`` ``.down`` feed-forward; ``.gate`` is the one that the activation acts on; ``.gate_up`` fused
``expert.*`` ``shared_expert.*`` the same of a mixture's experts; ``router`` picks them
``ssm.*``                      state-space and linear-attention mixers, by the names of their projections
``conv`` ``downsample``        convolution kernels; Swin's patch merging
``rnn.i`` ``.f`` ``.g`` ``.o`` gates of an LSTM; of a GRU ``.r`` ``.z`` ``.n``; ``rnn`` where they are not told apart
``modulation``                 scales and shifts from a condition (adaptive layer norm)
``projector``                  between modalities (LLaVA's projector, CLIP's projections)
``pooler`` ``head`` ``other``  the rest
============================== =======================================================================================

In a model with several towers (encoder and decoder, vision and language) a role begins with the name of its tower, as
in ``decoder.attn.q`` or ``vision.mlp.up``; a language model beside a vision tower goes without.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache

from htsr.matrices.naming import canonical
from htsr.matrices.naming import stem as stem
from htsr.matrices.naming import whole_name as whole_name


def _table(**parts: str) -> dict[str, str]:
    return {leaf: part for part, leaves in parts.items() for leaf in leaves.split()}


# last component of a name → part: anywhere in a network …
_ATTENTION = _table(
    q="q_proj query_proj q_lin q_linear linear_q wq to_q to_query q_attn c_q linear_q_proj project_q projection_query",
    k="k_proj key_proj k_lin k_linear linear_k wk to_k to_key c_k project_k projection_key",
    v="v_proj value_proj v_lin v_linear linear_v wv to_v to_value c_v project_v projection_value",
    o="o_proj out_lin to_out attention_output attention_out",
    qkv="qkv qkv_proj to_qkv c_attn query_key_value wqkv w_pack att_proj in_proj_weight qkv_linear linear_qkv",
    kv="kv_proj to_kv",
    q_a="q_a_proj wq_a linear_q_down_proj",
    q_b="q_b_proj wq_b linear_q_up_proj",
    kv_a="kv_a_proj kv_a_proj_with_mqa wkv_a linear_kv_down_proj",
    kv_b="kv_b_proj wkv_b linear_kv_up_proj",
    o_a="o_a_proj wo_a",
    o_b="o_b_proj wo_b",
    add_q="add_q_proj",
    add_k="add_k_proj",
    add_v="add_v_proj",
    add_o="to_add_out",
    pos_q="pos_query_proj pos_q_proj",
    pos_k="pos_key_proj pos_proj relative_k_proj linear_pos r_kernel",
)
_MLP = _table(
    gate="gate_proj w1 wi_0 fc1_g linear_gate",
    up="up_proj w3 v1 wi wi_1 fc1 fc_1 fc1_x fc_in c_fc proj_mlp lin1 linear1 linear_1 linear_fc1 ff1 ffn "
    "dense_h_to_4h intermediate intermediate_dense intermediate_query pwconv1 pointwise_conv1",
    down="down_proj w2 wo fc2 fc_2 fc_out c_proj lin2 linear2 linear_2 linear_fc2 ff2 dense_4h_to_h output "
    "output_dense output_query pwconv2 pointwise_conv2",
    gate_up="gate_up_proj w12 w13 weights_in up_gate_proj",
)
# … and only where the path says so
_INSIDE_ATTENTION = _ATTENTION | _table(
    q="q query queries q_head query_global",
    k="k key keys k_head key_global",
    v="v value values v_head value_global",
    r="receptance",
    o="o out output wo out_proj output_proj proj c_proj dense linear_out project projection projection_layer post "
    "post_proj linear_proj",
    qkv="in_proj",
    kv="kv key_value linear_kv",
    q_a="q_a",
    q_b="q_b",
    kv_a="kv_a_mqa",
    kv_b="kv_b",
    k_b="k_b",
    v_b="v_b",
    pos_k="r",
    gate="gate g g_proj q_gate_proj gate_proj output_gate",
    gate_a="g_a_proj",
    gate_b="g_b_proj",
)
_INSIDE_MLP = _MLP | _table(
    gate="gate receptance proj_up_gate",
    up="up key in_proj input layer1 layer_1 ffw_layer_1 dense1 proj_in proj_up w_in w_1",
    down="down value out_proj output_linear weights_out proj dense layer2 layer_2 ffw_layer_2 dense2 proj_out "
    "proj_down w_out w_2",
    gate_up="gate_up input_linear",
)
_SSM = {"in": "in", "in_proj": "in"} | _table(
    conv="conv1d",
    x="x x_proj linear_x",
    y="linear_y",
    dt="dt dt_proj",
    out="out out_proj linear_out",
    qkv="in_proj_qkv",
    qkvz="in_proj_qkvz",
    z="in_proj_z",
    ba="in_proj_ba",
    a="in_proj_a a_proj",
    b="in_proj_b b_proj",
    q="q",
    k="k",
    v="v",
    gate="ogate_preact",
    input_gate="input_gate igate_preact",
    forget_gate="fgate_preact",
    recurrent_gate="recurrent_gate",
)

# where a path leads; paths are lower case, without numbers and without ".weight"
_EMBEDDINGS = {
    "embed.position": r"(^|[._])position|pos_?emb|(^|\.)(wpe|pos)$|rel(ative)?_pos|relative_(attention_)?bias|"
    r"rel_attn_emb|rel_emb|distance_emb|attn\.rel_b",
    "embed.type": r"token_type|segment_|type_emb",
    "embed.patch": r"patch_?emb|patch_(proj|conv)|conv_proj$|(^|\.)x_embedder$",
    "embed.proj": r"embeddings?_(proj|hidden_mapping|transf)|embed_proj|(^|\.)feature_projection\.|"
    r"(^|\.)project_(in|out)$",
    "embed": r"(embed(ding)?s?|embed_(?!out$)\w+|(^|\.)(wte|shared|token_embd|embed_in|emb))$",
}
# parts of attention that are neither of q, k, v and o: DeepSeek's choice of tokens, and their summaries
_OTHER = re.compile(r"(^|\.)(indexer|compressor)\.")
_ROUTER = re.compile(
    r"(^|[._])router(_mlp)?\b|(moe|mlp|ffn|feed_forward|mixer)\.(gate|wg|gate_inp\w*)$|gate\.wg$|expert_gate$"
)
_PROJECTOR = (
    r"projector|connector|aligner|merger|embed_(vision|audio)|^mm(_\w+)?\b|^visual\.proj$|_to_\w+_projection|"
    r"(^|\.)(text|language|visual|vision|image|audio|speech|modality|multi_modal)_proj(ection)?\b"
)
_HEAD = (
    r"(^|\.)(\w*lm_head\w*|cls|(\w+_)?heads?(_\w+)?|\w*classif\w*|score|\w*logits\w*|embed_out|qa_outputs|vocab_\w+|"
    r"generator\w*|output_projection|output_layer|\w*predictions|seq_relationship)(\.|$)|"
    r"^(model\.)?(output|fc|linear|decoder|final_layer|last_linear|proj_out)$"
)
_CROSS = r"(cross_?att|encoder_attn|encdecatt|attn2|multihead_attn|inter_att)(?!.*mlp)"
_SELF = r"((attn|attention|token_mixer|mhsa|xca)\w*|(^|[._])att)\.(?!.*mlp)"
# family, where it is, and its leaves (none: any); the first that fits is taken
_FAMILIES = [
    (family, re.compile(where), leaves)
    for family, where, leaves in (
        ("shared_expert", r"shared_?(experts?|mlp)\b", _INSIDE_MLP),
        ("expert", r"(?<!attention\.)experts?\b|expert_\d|(mlp|moe)\.(in|out)put_linear$", _INSIDE_MLP),
        ("ssm", r"mamba|(^|\.)(ssm|mixer|temporal_block|conv)\.\w+$|linear_attn|mlstm_layer|rg_lru", _SSM),
        ("cross_attn", _CROSS, _INSIDE_ATTENTION),
        ("attn", _SELF, _INSIDE_ATTENTION),
        ("attn", "", _ATTENTION),
        ("projector", _PROJECTOR, None),
        ("mlp", r"(mlp|ffn|ffw|feed_?forward|densereludense)\w*\.|(^|\.)ff\.", _INSIDE_MLP),
        ("pooler", r"pooler|sequence_summary", None),
        ("head", _HEAD, None),
        ("mlp", "", _MLP),
        ("modulation", r"adaln|(^|\.)(\w*norm\w*|\w*_mod|modulation)\.(lin|linear\d?)$", None),
        ("downsample", r"(^|\.)reduction$", None),
        ("rnn", r"(^|\.)weight_[ih]h(_l\d+(_reverse)?)?$", None),
    )
]

_NO_BLOCK = re.compile(rf"embed|experts?$|(^|\.)stem|{_PROJECTOR}|{_HEAD}")
_NUMBERED = re.compile(r"(?:layers?|stage|blocks?|level|cell|inception|mixed|transition|^s)_?(\d+)[a-e]?$")


def is_stack_of_experts(name: str, shape: Sequence[int]) -> bool:
    """Whether the tensor `name`, of this `shape`, holds the matrices of a mixture's experts along its first axis."""
    return len(shape) == 3 and role_of(name).startswith("expert.")


def is_kernel(name: str, shape: Sequence[int], kind: str | None = None) -> bool:
    """Whether a tensor of three axes or more is a convolution kernel (out, in, …) rather than a stack of matrices.

    A source that knows its modules says so. In a file the name does, and else the shape: a kernel has more channels
    than positions, a stack more rows and columns than slices. Length decides nothing: wav2vec 2.0's has 128 positions.

    Args:
        name: name of the tensor.
        shape: shape of the tensor.
        kind: ``conv`` or ``embedding`` where the source knows; else None.
    """
    if kind is not None or len(shape) != 3:
        return kind == "conv" or len(shape) > 3
    if role_of(name).startswith(("expert.", "shared_expert.")) or "expert" in name:
        return False
    return "conv" in name.lower() or min(shape[1:]) < shape[0] > 1


@lru_cache(maxsize=1 << 17)  # a mixture has tens of thousands of tensors, and each is asked for more than once
def role_of(name: str, kind: str | None = None) -> str:
    """Role of a matrix by its `name`; `kind` is ``conv`` or ``embedding`` where the source knows.

    Examples:
        >>> from htsr.matrices.roles import role_of
        >>> role_of("model.layers.0.self_attn.q_proj.weight"), role_of("h.0.mlp.c_fc"), role_of("blk.0.ffn_down.weight")
        ('attn.q', 'mlp.up', 'mlp.down')
    """
    path = canonical(name)
    if _OTHER.search(path):
        return "other"
    embedding = next((role for role, pattern in _EMBEDDINGS.items() if re.search(pattern, path)), None)
    if kind == "conv":
        return "embed.patch" if embedding == "embed.patch" else "conv"
    if embedding or kind == "embedding":
        return embedding or "embed"
    if _ROUTER.search(path):
        return "router"
    for family, where, leaves in _FAMILIES:
        if where.search(path):
            if leaves is None:
                return family
            if part := _part(path, leaves):
                return f"{family}.{part}"
    return "other"


def roles_of(tensors: Iterable[tuple[str, str | None]]) -> list[str]:
    """`role_of` of all tensors of a model, where one name tells what another means.

    ``w1`` is the gate where a ``w3`` or ``v1`` stands beside it, and else the way up.

    Args:
        tensors: name and kind of each tensor, as `role_of` takes them.
    """
    tensors = list(tensors)
    stems = {stem(name) for name, _ in tensors}

    def corrected(name: str, kind: str | None) -> str:
        role = role_of(name, kind)
        before, dot, last = stem(name).rpartition(".")
        if last == "w1" and role.endswith(".gate") and not {f"{before}{dot}w3", f"{before}{dot}v1"} & stems:
            return f"{role.removesuffix('gate')}up"
        return role

    return [corrected(name, kind) for name, kind in tensors]


def inner_widths(tensors: Sequence[tuple[str, str, Sequence[int]]]) -> dict[str, int]:
    """What other tensors say of the width inside a feed-forward network or RNN, for those that may be fused.

    Args:
        tensors: name, role and shape of each tensor of a model.

    Returns:
        Widths by name: for an ``up`` the columns of the ``down`` beside it, for an RNN's weight its hidden size.
    """
    downs = {_beside(name): shape[1] for name, role, shape in tensors if role.endswith(".down") and len(shape) == 2}
    hidden = {name: shape[1] for name, role, shape in tensors if role == "rnn" and len(shape) == 2}
    found = {}
    for name, role, shape in tensors:
        if len(shape) == 2 and role.endswith(".up"):
            found[name] = downs.get(_beside(name), 0)
        elif len(shape) == 2 and role == "rnn":
            found[name] = hidden.get(name.replace("weight_ih", "weight_hh"), 0)
    return found


def _beside(name: str) -> str:
    """The feed-forward network that a tensor of the name is in."""
    return re.sub(r"(\.net)?\.\d+(\.proj)?$|[._/]\w+$", "", stem(name))


def _part(path: str, leaves: dict[str, str]) -> str | None:
    before, last = ("." + path).split(".")[-2:]
    if last in ("dense", "linear") and before in leaves:  # BERT's output.dense
        return leaves[before]
    return leaves.get(last)


def block_of(name: str) -> int | None:
    """Index of the transformer block or CNN stage: the first number in `name` outside embeddings and heads, or None."""
    parts = stem(name).lower().replace("/", ".").split(".")
    for i, part in enumerate(parts):
        match = re.fullmatch(r"\d+", part) or _NUMBERED.search(part)
        inside = (
            parts[i - 1 : i] == ["decoder"] and len(parts) > i + 2
        )  # blocks; ``decoder.0`` itself is a head's layer
        if match and (inside or not _NO_BLOCK.search(".".join(parts[max(0, i - 2) : i]))):
            return int(match[match.lastindex or 0])
    return None


def number_of(name: str) -> int | None:
    """The number in a `name` such as ``conv3`` or ``fc2``, for models that number their layers and have no blocks."""
    found = re.match(r"[a-z]+_?(\d+)$", stem(name).lower())
    return int(found[1]) if found else None
