"""What a weight matrix does, told from its name: role and block.

Roles: ``embed``, ``embed.position``, ``attn.q`` ``.k`` ``.v`` ``.o`` (and ``.qkv`` … where fused),
``cross_attn.*``, ``mlp.gate`` ``.up`` ``.down``, ``expert.*``, ``shared_expert.*``, ``router``, ``ssm.*``, ``conv``,
``pooler``, ``head``, ``other``. In a model with several stacks (encoder-decoder, vision-language) the roles of the
named stacks carry its name, as in ``decoder.attn.q`` or ``vision.mlp.up``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_ATTENTION_PARTS = {
    "q": "q_proj query q_lin wq q to_q q_attn attn_q query_proj q_linear linear_q",
    "k": "k_proj key k_lin wk k to_k attn_k key_proj k_linear linear_k",
    "v": "v_proj value v_lin wv v to_v attn_v value_proj v_linear linear_v",
    "o": "o_proj out_proj out_lin wo o to_out attn_output attn_out attention_output proj c_proj dense linear_out",
    "qkv": "c_attn qkv qkv_proj query_key_value wqkv in_proj in_proj_weight att_proj w_pack attn_qkv qkv_linear",
    "kv": "kv_proj to_kv key_value kv",
    "q_a": "q_a_proj wq_a attn_q_a",
    "q_b": "q_b_proj wq_b attn_q_b",
    "kv_a": "kv_a_proj kv_a_proj_with_mqa wkv_a attn_kv_a_mqa",
    "kv_b": "kv_b_proj wkv_b attn_kv_b",
}
_MLP_PARTS = {
    "gate": "gate_proj w1 wi_0 ffn_gate ffn_gate_exps gate linear_gate",
    "up": "up_proj w3 fc1 c_fc dense_h_to_4h wi wi_1 lin1 fc_in ffn_up ffn_up_exps linear1 linear_fc1 ff1 up "
    "intermediate",
    "down": "down_proj w2 fc2 c_proj dense_4h_to_h wo lin2 fc_out ffn_down ffn_down_exps linear2 linear_fc2 ff2 down "
    "output",
    "gate_up": "gate_up_proj gate_up w13",
}
_ATTENTION = {leaf: part for part, leaves in _ATTENTION_PARTS.items() for leaf in leaves.split()}
_MLP = {leaf: part for part, leaves in _MLP_PARTS.items() for leaf in leaves.split()}
_AMBIGUOUS = {"o", "proj", "c_proj", "dense", "wo", "in_proj", "kv", "q", "k", "v", "key", "value", "query"}
_PLAIN_ATTENTION = frozenset(_ATTENTION) - _AMBIGUOUS

_ATTENTION_PATH = re.compile(r"attn|attention|(^|\.)att(\.|$)|mixer\.self|selfattention|encdecattention")
_CROSS_PATH = re.compile(r"cross_?att|encoder_attn|encdecattention|attn2|multihead_attn|inter_attention")
_SSM_PATH = re.compile(r"mamba|ssm|mixer|conv\.(in|out)_proj|linear_attn")
_ROUTER = re.compile(r"(moe|mlp|ffn|feed_forward|experts?|block)\.(gate|router|wg)$|router|ffn_gate_inp|gate\.wg$")
_HEAD = re.compile(
    r"^(.*\.)?(lm_head|embed_out|score|classifier|fc_classifier|cls\.predictions\.decoder|mlm_head|vocab_projector|"
    r"qa_outputs|logits|head|generator\.decoder)(\.\w+)?$|^(output|fc|linear|decoder|final_layer)$"
)
_CONTAINER = re.compile(r"^(layer|stage|block|conv|features|down_blocks|up_blocks)_?(\d+)$")


def leaf(name: str) -> str:
    """`name` without what every weight's name ends in."""
    for suffix in (".weight", "_weight", ".base_layer"):
        if name.endswith(suffix) and not name.endswith("in_proj_weight"):
            name = name.removesuffix(suffix)
    return name


def block_of(name: str) -> int | None:
    """Index of the block or stage: the first number in the path, but for an expert's or a Sequential's own."""
    parts = leaf(name).lower().split(".")
    for before, part in zip(["", *parts], parts, strict=False):
        if part.isdigit() and not before.startswith("expert"):
            return int(part) if part is not parts[-1] or before in ("layers", "h", "blocks") else None
    for part in parts:
        if match := _CONTAINER.match(part):
            return int(match[2])
    return None


def role_of(name: str, kind: str | None = None) -> str:
    """Role of a matrix by its name; `kind` is ``conv`` or ``embedding`` where the source knows."""
    path = leaf(name).lower()
    parts = [part for part in path.split(".") if not part.isdigit()]
    last = parts[-1] if parts else path
    above = ".".join(parts[:-1])
    if "lora_" in path:
        return role_of(re.split(r"\.lora_", name)[0], kind)
    if kind == "conv":
        return "embed.patch" if "patch_embed" in path else "conv"
    if kind == "embedding" or "embed" in path.replace("embedder", "") or last in ("wte", "wpe", "shared", "token_embd"):
        if not _HEAD.match(path) and not _ATTENTION_PATH.search(above) and last not in _MLP:
            return _embedding(path, last)
    if "relative_attention_bias" in path:
        return "embed.position"
    if _ROUTER.search(".".join(parts)) and "gate_proj" not in path:
        return "router"
    if last in ("patch_embd", "patch_embedding"):
        return "embed.patch"
    in_experts = re.search(r"(shared_)?experts?(\.|$)|_exps$|_shexp$", path)
    if in_experts and (part := _MLP.get(last.replace("_shexp", ""))):
        shared = "shared_" if "shared_exp" in path or "_shexp" in path else ""
        return f"{shared}expert.{part}"
    if _ATTENTION_PATH.search(above) or last in _PLAIN_ATTENTION:
        if "linear_attn" not in above and (part := _ATTENTION.get(last)):
            return f"{'cross_attn' if _CROSS_PATH.search(path) else 'attn'}.{part}"
    if _SSM_PATH.search(path) and last in (
        "in_proj",
        "out_proj",
        "x_proj",
        "dt_proj",
        "in_proj_qkv",
        "in_proj_qkvz",
    ):
        return f"ssm.{last.removesuffix('_proj')}"
    if (last == "dense" and parts[-2:-1] == ["pooler"]) or last == "pooler":
        return "pooler"
    if part := _MLP.get(last):
        if _HEAD.match(path):
            return "head"
        return f"mlp.{part}"
    if last == "dense" and parts[-2:-1] in (["intermediate"], ["output"]):
        return "mlp.up" if parts[-2] == "intermediate" else "mlp.down"
    if _HEAD.match(path):
        return "head"
    return "other"


def _embedding(path: str, last: str) -> str:
    if re.search(r"position|wpe|pos_emb|\bpos\b", path):
        return "embed.position"
    if re.search(r"token_type|segment|type_emb", path):
        return "embed.type"
    return "embed.patch" if "patch" in path else "embed"


def stack_prefixes(names: Iterable[str]) -> dict[str, str]:
    """Prefix of the role for each container of numbered blocks, where a model has several stacks of them."""
    containers = sorted({found for name in names if (found := _container(name))})
    named = {container: _stack_name(container) for container in containers}
    if len(set(named.values())) < 2:
        return {}
    return {container: f"{stack}." for container, stack in named.items() if stack}


def stack_of(name: str, prefixes: dict[str, str]) -> str:
    """The prefix of this matrix's role, or nothing."""
    return prefixes.get(_container(name) or "", "")


def _container(name: str) -> str | None:
    found = re.match(r"^(.*?)\.\d+(\.|$)", name)
    return found[1] if found else None


def _stack_name(container: str) -> str:
    path = container.lower()
    for stack, pattern in (
        ("vision", r"vision|visual|image|vit"),
        ("audio", r"audio|speech"),
        ("decoder", r"decoder"),
        ("encoder", r"encoder"),
    ):
        if re.search(pattern, path):
            return stack
    return ""
