"""Fused layouts, proven by what the parts do in a living model, not by repeating the arithmetic of their indices.

q, k and v: every token of the attention's input is one-hot, so that column t of a part of the fused weight acts on
token t alone. Without v attention returns zero; k weighs a token for all the tokens that see it, q for itself only.

gate and up: the hidden state of a gated feed-forward network is affine in up and vanishes without gate.
"""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

import htsr
from htsr.matrices.fused import split

HIDDEN, HEADS, TOKENS, SEEN = 16, 4, 6, 2

_TINY = {
    "vocab_size": 32, "hidden_size": HIDDEN, "num_hidden_layers": 1, "num_attention_heads": HEADS,
    "intermediate_size": 24, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "hidden_dropout": 0.0,
    "attention_dropout": 0.0, "attn_implementation": "eager",
    "experts_implementation": "eager", "max_position_embeddings": 32,
}  # fmt: skip


def tiny(architecture: str, **changes) -> nn.Module:
    """A model of one block, random float64, without biases."""
    torch.manual_seed(0)
    config = getattr(transformers, architecture.removesuffix("Model").removesuffix("VisionTransformer") + "Config")
    model = getattr(transformers, architecture)(config(**_TINY | changes)).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim > 1:
                parameter.normal_(std=0.5)
    return model


def parts_of(model: nn.Module, name: str) -> dict[str, torch.Tensor]:
    """Which entries of the fused weight `name` each part is made of: boolean masks, by suffix."""
    weight = dict(model.named_parameters())[name]
    values = weight.detach().clone()
    masks = {}
    with torch.no_grad():
        weight.copy_(torch.arange(weight.numel()).reshape(weight.shape))
        for matrix in htsr.describe(model):
            if matrix.name.startswith(name.removesuffix(".weight") + "[") and not matrix.name.endswith("[0]"):
                suffix = matrix.name.rpartition("[")[2].rstrip("]")
                found = torch.as_tensor(matrix.read()).long()
                assert found.shape == matrix.shape
                assert matrix.role.endswith(f".{suffix}")
                mask = masks.setdefault(suffix, torch.zeros(weight.numel(), dtype=torch.bool))
                assert not mask[found.ravel()].any()
                mask[found.ravel()] = True
        weight.copy_(values)
    masks = {suffix: mask.reshape(weight.shape) for suffix, mask in masks.items()}
    assert (sum(mask.int() for mask in masks.values()) == 1).all()  # every entry is in one part
    return masks


ATTENTION = {
    "gpt2": ("GPT2Model", {}, "h.0.attn.c_attn", "h.0.attn.c_proj"),
    "gpt_bigcode": ("GPTBigCodeModel", {"n_head": HEADS, "multi_query": True}, "h.0.attn.c_attn", "h.0.attn.c_proj"),
    "gpt_bigcode, no multi-query": (
        "GPTBigCodeModel", {"n_head": HEADS, "multi_query": False}, "h.0.attn.c_attn", "h.0.attn.c_proj",
    ),
    "gpt_neox": ("GPTNeoXModel", {}, "layers.0.attention.query_key_value", "layers.0.attention.dense"),
    "gpt_neox_japanese": (
        "GPTNeoXJapaneseModel", {}, "layers.0.attention.query_key_value", "layers.0.attention.dense",
    ),
    "bloom": ("BloomModel", {"n_head": HEADS}, "h.0.self_attention.query_key_value", "h.0.self_attention.dense"),
    "falcon, multi-query": (
        "FalconModel", {"multi_query": True}, "h.0.self_attention.query_key_value", "h.0.self_attention.dense",
    ),
    "falcon, rw": (
        "FalconModel", {"multi_query": False, "alibi": True},
        "h.0.self_attention.query_key_value", "h.0.self_attention.dense",
    ),
    "falcon, new": (
        "FalconModel", {"new_decoder_architecture": True, "num_kv_heads": 2},
        "h.0.self_attention.query_key_value", "h.0.self_attention.dense",
    ),
    "persimmon": ("PersimmonModel", {}, "layers.0.self_attn.query_key_value", "layers.0.self_attn.dense"),
    "phi3": ("Phi3Model", {}, "layers.0.self_attn.qkv_proj", "layers.0.self_attn.o_proj"),
    "phi3, grouped": (
        "Phi3Model", {"num_key_value_heads": 2}, "layers.0.self_attn.qkv_proj", "layers.0.self_attn.o_proj",
    ),
    "codegen": ("CodeGenModel", {"rotary_dim": 2}, "h.0.attn.qkv_proj", "h.0.attn.out_proj"),
    "mpt": ("MptModel", {"n_heads": HEADS}, "blocks.0.attn.Wqkv", "blocks.0.attn.out_proj"),
    "modernbert": ("ModernBertModel", {}, "layers.0.attn.Wqkv", "layers.0.attn.Wo"),
    "dbrx": (
        "DbrxModel",
        {"d_model": HIDDEN, "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
         "ffn_config": {"ffn_hidden_size": 8, "moe_num_experts": 2, "moe_top_k": 1}},
        "blocks.0.norm_attn_norm.attn.Wqkv", "blocks.0.norm_attn_norm.attn.out_proj",
    ),
}  # fmt: skip


def context_of(model: nn.Module, fused: str, out: str):
    """A function that returns what `model` hands to the output projection, (tokens, HIDDEN), for one-hot input."""
    one_hot = torch.eye(TOKENS, HIDDEN, dtype=torch.float64)
    seen = []
    fused_module, out_module = model.get_submodule(fused), model.get_submodule(out)
    fused_module.register_forward_pre_hook(lambda _m, args: (one_hot.expand(1, -1, -1), *args[1:]))
    out_module.register_forward_pre_hook(lambda _m, args: seen.append(args[0].detach().reshape(TOKENS, -1).clone()))

    def context() -> torch.Tensor:
        seen.clear()
        with torch.no_grad():
            model(torch.arange(3, 3 + TOKENS)[None])
        return seen[-1]

    return context


def check_attention(weight: torch.Tensor, masks: dict[str, torch.Tensor], context, inputs_first: bool = False) -> None:
    assert set(masks) == {"q", "k", "v"}
    token = torch.zeros_like(weight, dtype=torch.bool)
    token[SEEN if inputs_first else (slice(None), SEEN)] = True

    def without(mask: torch.Tensor) -> torch.Tensor:
        values = weight.detach().clone()
        with torch.no_grad():
            weight[mask] = 0
            result = context()
            weight.copy_(values)
        return result

    whole = context()
    assert torch.count_nonzero(without(masks["v"])) == 0
    unqueried, unkeyed = without(masks["q"]), without(masks["k"])
    torch.testing.assert_close(unqueried, unkeyed)
    assert not torch.allclose(unqueried, whole)
    moved = {part: (without(masks[part] & token) - whole).abs().amax(1) > 1e-9 for part in "qk"}
    assert moved["q"].nonzero().flatten().tolist() == [SEEN]
    assert set(range(SEEN + 1, TOKENS)) <= set(moved["k"].nonzero().flatten().tolist())


@pytest.mark.parametrize("case", ATTENTION)
def test_q_k_and_v_do_what_their_names_say(case):
    architecture, changes, fused, out = ATTENTION[case]
    model = tiny(architecture, **changes)
    masks = parts_of(model, f"{fused}.weight")
    module = model.get_submodule(fused)
    inputs_first = isinstance(module, transformers.pytorch_utils.Conv1D)
    check_attention(module.weight, masks, context_of(model, fused, out), inputs_first)


def test_torchs_multihead_attention():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(HIDDEN, HEADS, bias=False, batch_first=True, dtype=torch.float64)
    nn.init.eye_(attention.out_proj.weight)
    one_hot = torch.eye(TOKENS, HIDDEN, dtype=torch.float64)[None]
    model = nn.ModuleDict({"attention": attention})
    masks = parts_of(model, "attention.in_proj_weight")
    causal = nn.Transformer.generate_square_subsequent_mask(TOKENS, dtype=torch.float64)
    attend = lambda: attention(one_hot, one_hot, one_hot, attn_mask=causal, need_weights=False)[0][0].detach()  # noqa: E731
    check_attention(attention.in_proj_weight, masks, attend)


def test_a_vision_towers_qkv():
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel as Tower

    config = transformers.Qwen2VLConfig().vision_config
    config.depth, config.embed_dim, config.num_heads, config._attn_implementation = 1, HIDDEN, HEADS, "eager"
    torch.manual_seed(0)
    attention = Tower(config).double().blocks[0].attn
    model = nn.ModuleDict({"attn": attention})
    nn.init.zeros_(attention.qkv.bias)
    nn.init.normal_(attention.qkv.weight)
    masks = parts_of(model, "attn.qkv.weight")
    one_hot = torch.eye(TOKENS, HIDDEN, dtype=torch.float64)
    lengths = torch.tensor([0, TOKENS])
    rotation = (torch.ones(TOKENS, HIDDEN // HEADS).double(), torch.zeros(TOKENS, HIDDEN // HEADS).double())
    seen = []
    attention.proj.register_forward_pre_hook(lambda _m, args: seen.append(args[0].detach().clone()))

    def context():
        with torch.no_grad():
            attention(one_hot, cu_seqlens=lengths, position_embeddings=rotation)
        return seen[-1]

    check_attention(attention.qkv.weight, masks, context)


def test_the_key_and_value_of_gpt2s_cross_attention():
    model = tiny("GPT2Model", add_cross_attention=True)
    cross = model.h[0].crossattention
    masks = parts_of(model, "h.0.crossattention.c_attn.weight")
    assert set(masks) == {"k", "v"}
    seen = []
    cross.c_proj.register_forward_pre_hook(lambda _m, args: seen.append(args[0].detach().clone()))
    encoded = torch.randn(1, TOKENS, HIDDEN, dtype=torch.float64)
    values = cross.c_attn.weight.detach().clone()
    contexts = {}
    for part in masks:
        with torch.no_grad():
            cross.c_attn.weight[masks[part]] = 0
            model(torch.arange(3, 6)[None], encoder_hidden_states=encoded)
            contexts[part] = seen[-1]
            cross.c_attn.weight.copy_(values)
    assert torch.count_nonzero(contexts["v"]) == 0
    # without keys every token attends to all alike
    torch.testing.assert_close(contexts["k"], contexts["k"][:, :1].expand_as(contexts["k"]))
    assert torch.count_nonzero(contexts["k"]) > 0


def test_qwen3_nexts_query_carries_the_gate_of_its_output():
    model = tiny("Qwen3NextModel", layer_types=["full_attention"], head_dim=HIDDEN // HEADS, num_key_value_heads=2)
    attention = model.layers[0].self_attn
    masks = parts_of(model, "layers.0.self_attn.q_proj.weight")
    assert set(masks) == {"q", "gate"}
    contexts = []
    attention.o_proj.register_forward_pre_hook(lambda _m, args: contexts.append(args[0].detach().clone()))
    tokens = torch.arange(3, 3 + TOKENS)[None]

    def without(mask: torch.Tensor | None = None) -> torch.Tensor:
        values = attention.q_proj.weight.detach().clone()
        with torch.no_grad():
            if mask is not None:
                attention.q_proj.weight[mask] = 0
            model(tokens)
            attention.q_proj.weight.copy_(values)
        return contexts[-1]

    assert not torch.allclose(without(masks["q"]), without())
    with torch.no_grad():
        attention.k_proj.weight.zero_()  # then no query makes a difference, and the gate still does
    torch.testing.assert_close(without(masks["q"]), without())
    assert not torch.allclose(without(masks["gate"]), without())


def test_minimaxs_linear_attention():
    changes = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"], "block_size": 2}
    model = tiny("MiniMaxModel", **_EXPERTS | changes)
    masks = parts_of(model, "layers.0.self_attn.qkv_proj.weight")
    assert set(masks) == {"q", "k", "v"}
    weight = model.layers[0].self_attn.qkv_proj.weight
    context = context_of(model, "layers.0.self_attn.qkv_proj", "layers.0.self_attn.out_proj")
    # one value in all heads reaches one column of the context; one key reaches a whole head
    values = weight.detach().clone()
    columns = {}
    for part, mask in masks.items():
        rows = mask.all(1).nonzero().flatten()[1:]
        with torch.no_grad():
            weight[rows] = 0
            columns[part] = int((context().abs().amax(0) > 0).sum())
            weight.copy_(values)
    assert columns == {"q": HIDDEN // HEADS, "k": HIDDEN // HEADS, "v": 1}
    assert (context()[:SEEN] != 0).all()
    with torch.no_grad():
        whole = context()
        weight[masks["q"] & (torch.arange(HIDDEN) == SEEN)] = 0
        moved = (context() - whole).abs().amax(1) > 1e-9
    assert moved.nonzero().flatten().tolist() == [SEEN]


_EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 2, "num_experts": 2, "head_dim": 4, "num_key_value_heads": 2}
# (architecture, configuration, gated network, fused weight in it); `square`: 2 · intermediate size = hidden size
GATED = {
    "phi3": ("Phi3Model", {}, "layers.0.mlp", "gate_up_proj.weight"),
    "glm": ("GlmModel", {"head_dim": 4}, "layers.0.mlp", "gate_up_proj.weight"),
    "modernbert": ("ModernBertModel", {}, "layers.0.mlp", "Wi.weight"),
    "mixtral": ("MixtralModel", _EXPERTS, "layers.0.mlp", "experts.gate_up_proj"),
    "mixtral, square": (
        "MixtralModel", _EXPERTS | {"intermediate_size": HIDDEN // 2}, "layers.0.mlp", "experts.gate_up_proj",
    ),
    "qwen3_moe": (
        "Qwen3MoeModel", _EXPERTS | {"moe_intermediate_size": 12, "mlp_only_layers": []},
        "layers.0.mlp", "experts.gate_up_proj",
    ),
    "deepseek_v3, square": (
        "DeepseekV3Model",
        {"num_experts_per_tok": 2, "n_routed_experts": 2, "first_k_dense_replace": 0, "moe_intermediate_size": 8,
         "n_group": 1, "topk_group": 1, "q_lora_rank": 4, "kv_lora_rank": 4, "qk_rope_head_dim": 2,
         "qk_nope_head_dim": 2, "v_head_dim": 4, "num_key_value_heads": HEADS, "n_shared_experts": 1},
        "layers.0.mlp", "experts.gate_up_proj",
    ),
    "gpt_oss": ("GptOssModel", _EXPERTS, "layers.0.mlp", "experts.gate_up_proj"),
    "gpt_oss, square": (
        "GptOssModel", _EXPERTS | {"intermediate_size": HIDDEN // 2}, "layers.0.mlp", "experts.gate_up_proj",
    ),
    "llama4": (
        "Llama4TextModel", _EXPERTS | {"intermediate_size_mlp": 24, "moe_layers": [0]},
        "layers.0.feed_forward", "experts.gate_up_proj",
    ),
    "llama4, square": (
        "Llama4TextModel",
        _EXPERTS | {"intermediate_size_mlp": 24, "moe_layers": [0], "intermediate_size": HIDDEN // 2},
        "layers.0.feed_forward", "experts.gate_up_proj",
    ),
    "aria, square": (
        "AriaTextModel",
        {"moe_num_experts": 2, "moe_topk": 2, "moe_num_shared_experts": 1, "intermediate_size": HIDDEN // 2},
        "layers.0.mlp", "experts.gate_up_proj",
    ),
    "privacy filter, square": (
        "OpenAIPrivacyFilterModel", _EXPERTS | {"intermediate_size": HIDDEN // 2},
        "layers.0.mlp", "experts.gate_up_proj",
    ),
    "jetmoe": ("JetMoeModel", _EXPERTS | {"kv_channels": 4}, "layers.0.mlp", "input_linear.weight"),
    "granitemoeshared": (
        "GraniteMoeSharedModel", _EXPERTS | {"shared_intermediate_size": 12},
        "layers.0.shared_mlp", "input_linear.weight",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", GATED)
def test_gate_and_up_do_what_their_names_say(case):
    architecture, changes, where, fused = GATED[case]
    model = tiny(architecture, **changes)
    network = model.get_submodule(where)
    weight = network.get_parameter(fused)
    check_gated(weight, parts_of(model, f"{where}.{fused}"), network)


def test_phi4s_audio_tower_stores_up_before_gate():
    from transformers.models.phi4_multimodal import modeling_phi4_multimodal as phi4

    config = phi4.Phi4MultimodalAudioConfig(hidden_size=HIDDEN, intermediate_size=24)
    torch.manual_seed(0)
    network = phi4.Phi4MultimodalAudioMLP(config).double().eval()
    for linear in (network.gate_up_proj, network.down_proj):
        nn.init.zeros_(linear.bias)
    model = nn.ModuleDict({"mlp": network})
    model.config = config
    check_gated(network.gate_up_proj.weight, parts_of(model, "mlp.gate_up_proj.weight"), network)


@pytest.mark.parametrize("name", ["moonshine", "moshi", "kyutai_speech_to_text"])
def test_gate_and_up_of_an_fc1_that_is_twice_as_wide(name):
    from transformers.models.kyutai_speech_to_text import modeling_kyutai_speech_to_text as kyutai
    from transformers.models.moonshine import modeling_moonshine as moonshine
    from transformers.models.moshi import modeling_moshi as moshi

    config = transformers.CONFIG_MAPPING[name](hidden_size=HIDDEN, intermediate_size=12, ffn_dim=24)
    torch.manual_seed(0)
    network = {
        "moonshine": lambda: moonshine.MoonshineDecoderMLP(config, "silu"),
        "moshi": lambda: moshi.MoshiGatingMLP(config),
        "kyutai_speech_to_text": lambda: kyutai.KyutaiSpeechToTextGatingMLP(config),
    }[name]().double()
    for parameter in network.parameters():
        nn.init.zeros_(parameter) if parameter.ndim == 1 else nn.init.normal_(parameter)
    model = nn.ModuleDict({"mlp": network})
    model.config = config
    check_gated(network.fc1.weight, parts_of(model, "mlp.fc1.weight"), network)


def check_gated(weight: torch.Tensor, masks: dict[str, torch.Tensor], network) -> None:
    assert set(masks) == {"gate", "up"}
    torch.manual_seed(1)
    hidden = 0.3 * torch.randn(1, TOKENS, HIDDEN, dtype=torch.float64)

    def scaled(part: str, factor: float) -> torch.Tensor:
        values = weight.detach().clone()
        with torch.no_grad():
            weight[masks[part]] *= factor
            result = network(hidden)
            weight.copy_(values)
        return result[0] if isinstance(result, tuple) else result

    base = scaled("gate", 0.0)  # what a shared expert adds; zero elsewhere
    torch.testing.assert_close(scaled("up", -1.0) + scaled("up", 1.0), 2 * scaled("up", 0.0), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(scaled("gate", -1.0) + scaled("gate", 1.0), 2 * base)
    assert not torch.allclose(scaled("up", 1.0), base)
    if not hasattr(network, "shared_experts") and not hasattr(network, "shared_expert"):
        assert torch.count_nonzero(base) == 0


def test_dbrx_experts_are_told_apart_in_the_rows_of_one_matrix():
    _, changes, *_ = ATTENTION["dbrx"]
    model = tiny("DbrxModel", **changes)
    experts = model.blocks[0].ffn.experts
    found = {m.name: m for m in htsr.describe(model) if ".experts." in m.name}
    assert {m.role for m in found.values()} == {"expert.gate", "expert.up", "expert.down"}
    assert {m.shape for m in found.values()} == {(8, HIDDEN)}
    hidden = torch.randn(5, HIDDEN, dtype=torch.float64)
    first, one = torch.zeros(5, 1, dtype=torch.long), torch.ones(5, 1, dtype=torch.float64)
    gate, up, down = (
        torch.as_tensor(found[f"blocks.0.ffn.experts.mlp.{leaf}[0]"].read()) for leaf in ("w1", "v1", "w2")
    )
    expected = (nn.functional.silu(hidden @ gate.T) * (hidden @ up.T)) @ down
    with torch.no_grad():
        torch.testing.assert_close(experts(hidden, first, one).reshape(5, HIDDEN), expected)


@pytest.mark.parametrize(
    ("leaf", "part", "shape", "config"),
    [
        ("query_key_value", "qkv", (48, 16), {}),  # per head or one after the other: only the configuration tells
        ("wqkv", "qkv", (48, 16), {"model_type": "unheard_of", "num_attention_heads": 4, "hidden_size": 16}),
        ("c_attn", "qkv", (48, 20), {}),
        ("qkv", "qkv", (50, 16), {}),
        ("gate_up_proj", "gate_up", (25, 16), {}),
        ("kv_proj", "kv", (32, 16), {}),
        ("q_proj", "q", (16, 16), {"model_type": "qwen3_next", "num_attention_heads": 4, "head_dim": 4}),
        ("q_proj", "q", (32, 16), {"model_type": "llama", "num_attention_heads": 4}),
    ],
)
def test_what_has_no_known_layout_stays_whole(leaf, part, shape, config):
    assert split(leaf, part, shape, config) == []


def test_experts_of_unknown_orientation_stay_whole():
    assert split("gate_up_proj", "gate_up", (32, 16), {}, stacked=True) == []
    assert split("gate_up_proj", "gate_up", (32, 16), {"hidden_size": 8}, stacked=True) == []
