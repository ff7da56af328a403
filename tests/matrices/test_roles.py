"""Roles of real architectures, built without values on the meta device, and of names from other libraries."""

from __future__ import annotations

import pytest
import torch
import transformers

import htsr
from htsr.matrices.roles import block_of, number_of, role_of
from htsr.matrices.towers import tower_prefixes

_ATTENTION = {"attn.q", "attn.k", "attn.v", "attn.o"}
_CROSS = {"cross_attn.q", "cross_attn.k", "cross_attn.v", "cross_attn.o"}
_PLAIN = _ATTENTION | {"mlp.up", "mlp.down"}
_GATED = _PLAIN | {"mlp.gate"}
_EXPERTS = {"expert.gate", "expert.up", "expert.down", "router"}
_SHARED = {"shared_expert.gate", "shared_expert.up", "shared_expert.down"}
_BERT = _PLAIN | {"embed", "embed.position", "embed.type"}
_MLA = {"attn.q_a", "attn.q_b", "attn.kv_a", "attn.kv_b", "attn.o"}
_MIXER = {"ssm.in", "ssm.out", "conv"}


def stacked(name: str, roles: set[str]) -> set[str]:
    return {f"{name}.{role}" for role in roles}


_VISION = stacked("vision", _PLAIN | {"embed.patch"})
# model_type, class ("" for the one without a head), exact roles
ARCHITECTURES = [
    ("bert", "BertForMaskedLM", _BERT | {"head"}),
    ("roberta", "", _BERT | {"pooler"}),
    ("distilbert", "", _BERT - {"embed.type"}),
    ("electra", "", _BERT | {"embed.proj"}),
    ("albert", "", _BERT | {"embed.proj", "pooler"}),
    ("modernbert", "ModernBertForMaskedLM", _GATED | {"embed", "head"}),
    ("gpt2", "GPT2LMHeadModel", _PLAIN | {"embed", "embed.position"}),
    ("gpt_neox", "GPTNeoXForCausalLM", _PLAIN | {"embed", "head"}),
    ("gptj", "GPTJForCausalLM", _PLAIN | {"embed", "head"}),
    ("codegen", "", _PLAIN | {"embed"}),
    ("bloom", "BloomForCausalLM", _PLAIN | {"embed"}),
    ("falcon", "FalconForCausalLM", _PLAIN | {"embed"}),
    ("opt", "OPTForCausalLM", _PLAIN | {"embed", "embed.position"}),
    ("mpt", "MptForCausalLM", _PLAIN | {"embed"}),
    ("phi", "PhiForCausalLM", _PLAIN | {"embed", "head"}),
    ("llama", "LlamaForCausalLM", _GATED | {"embed", "head"}),
    ("mistral", "MistralForSequenceClassification", _GATED | {"embed", "head"}),
    ("qwen2", "Qwen2ForCausalLM", _GATED | {"embed", "head"}),
    ("qwen3", "Qwen3ForCausalLM", _GATED | {"embed", "head"}),
    ("gemma", "GemmaForCausalLM", _GATED | {"embed"}),
    ("phi3", "Phi3ForCausalLM", _GATED | {"embed", "head"}),
    ("qwen3_moe", "", _ATTENTION | _EXPERTS | {"embed"}),
    ("mixtral", "MixtralForCausalLM", _ATTENTION | _EXPERTS | {"embed", "head"}),
    ("gpt_oss", "", _ATTENTION | _EXPERTS | {"embed"}),
    ("llama4_text", "", _ATTENTION | _EXPERTS | _SHARED | {"embed"}),
    ("deepseek_v3", "", _MLA | _EXPERTS | _SHARED | {"mlp.gate", "mlp.up", "mlp.down", "embed"}),
    ("mamba", "", _MIXER | {"ssm.x", "ssm.dt", "embed"}),
    ("mamba2", "", _MIXER | {"embed"}),
    (
        "t5",
        "T5ForConditionalGeneration",
        stacked("encoder", _PLAIN | {"embed.position"})
        | stacked("decoder", _PLAIN | _CROSS | {"embed.position"})
        | {"embed"},
    ),
    (
        "bart",
        "BartForConditionalGeneration",
        stacked("encoder", _PLAIN | {"embed.position"})
        | stacked("decoder", _PLAIN | _CROSS | {"embed.position"})
        | {"embed"},
    ),
    (
        "whisper",
        "WhisperForConditionalGeneration",
        stacked("encoder", _PLAIN | {"conv", "embed.position"})
        | stacked("decoder", _PLAIN | _CROSS | {"embed", "embed.position"}),
    ),
    ("wav2vec2", "", _PLAIN | {"conv", "embed.proj"}),
    ("vit", "ViTForImageClassification", _PLAIN | {"embed.patch", "embed.position", "head"}),
    ("swin", "", _PLAIN | {"embed.patch", "downsample"}),
    ("convnext", "ConvNextForImageClassification", {"embed.patch", "conv", "mlp.up", "mlp.down", "head"}),
    ("resnet", "ResNetForImageClassification", {"conv", "head"}),
    ("clip", "", _PLAIN | _VISION | {"embed", "embed.position", "vision.embed.position", "projector"}),
    (
        "llava",
        "LlavaForConditionalGeneration",
        _GATED | _VISION | {"vision.embed.position", "projector", "embed", "head"},
    ),
    ("qwen2_vl", "", _GATED | _VISION | {"vision.projector", "embed"}),
]  # fmt: skip


def _shrunk(config: transformers.PretrainedConfig) -> transformers.PretrainedConfig:
    """Two blocks and two experts: the names are those of the whole."""
    for key in ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"):
        if isinstance(getattr(config, key, None), int):
            setattr(config, key, 2)
    for key, least in (("num_local_experts", 2), ("num_experts", 2), ("n_routed_experts", 8)):
        if isinstance(getattr(config, key, None), int):
            setattr(config, key, least)
    if hasattr(config, "first_k_dense_replace"):
        config.first_k_dense_replace = 1  # one block of each kind
    for key in ("text_config", "vision_config"):
        if part := getattr(config, key, None):
            _shrunk(part)
    return config


def build(model_type: str, architecture: str = "") -> torch.nn.Module:
    config = _shrunk(transformers.CONFIG_MAPPING[model_type]())
    with torch.device("meta"):
        if architecture:
            return getattr(transformers, architecture)(config)
        return transformers.AutoModel.from_config(config)


@pytest.mark.parametrize(("model_type", "architecture", "expected"), ARCHITECTURES, ids=[a[0] for a in ARCHITECTURES])
def test_roles_and_blocks_of_an_architecture(model_type, architecture, expected):
    described = htsr.describe(build(model_type, architecture))
    assert {matrix.role for matrix in described} == expected
    for matrix in described:
        inside = matrix.role.rpartition(".")[0].rpartition(".")[2] in (
            "attn",
            "cross_attn",
            "mlp",
            "expert",
            "shared_expert",
            "ssm",
        )
        if inside:
            assert matrix.block is not None, matrix.name
        elif matrix.role not in ("conv", "downsample", "router") and "relative_attention_bias" not in matrix.name:
            assert matrix.block is None, matrix.name
    blocks = {matrix.block for matrix in described} - {None}
    assert blocks == set(range(max(blocks) + 1))


def test_every_linear_layer_of_a_model_is_there_once():
    """Parameters of two axes and more, counted independently: all but the tied head, which is the embedding."""
    for model_type, architecture in (("gpt2", "GPT2LMHeadModel"), ("mixtral", "MixtralForCausalLM")):
        model = build(model_type, architecture)
        expected = sum(p.numel() for p in model.parameters() if p.ndim > 1)
        assert sum(matrix.parameters for matrix in htsr.describe(model)) == expected


GGUF = {
    "token_embd.weight": ("embed", None),
    "position_embd.weight": ("embed.position", None),
    "blk.0.attn_q.weight": ("attn.q", 0),
    "blk.11.attn_k.weight": ("attn.k", 11),
    "blk.0.attn_v.weight": ("attn.v", 0),
    "blk.0.attn_output.weight": ("attn.o", 0),
    "blk.3.attn_qkv.weight": ("attn.qkv", 3),
    "blk.0.attn_q_a.weight": ("attn.q_a", 0),
    "blk.0.attn_kv_a_mqa.weight": ("attn.kv_a", 0),
    "blk.0.ffn_gate.weight": ("mlp.gate", 0),
    "blk.0.ffn_up.weight": ("mlp.up", 0),
    "blk.0.ffn_down.weight": ("mlp.down", 0),
    "blk.0.ffn_gate_inp.weight": ("router", 0),
    "blk.0.ffn_gate_exps.weight": ("expert.gate", 0),
    "blk.0.ffn_down_exps.weight": ("expert.down", 0),
    "blk.0.ffn_up_shexp.weight": ("shared_expert.up", 0),
    "blk.5.ssm_in.weight": ("ssm.in", 5),
    "blk.5.ssm_out.weight": ("ssm.out", 5),
    "output.weight": ("head", None),
}
TORCHVISION_TIMM_AND_OTHERS = {
    "encoder.layers.encoder_layer_3.self_attention.in_proj_weight": ("attn.qkv", 3),
    "encoder.layers.encoder_layer_3.self_attention.out_proj.weight": ("attn.o", 3),
    "encoder.layers.encoder_layer_3.mlp.linear_1.weight": ("mlp.up", 3),
    "features.1.0.block.3.weight": ("mlp.up", 1),
    "features.1.0.block.5.weight": ("mlp.down", 1),
    "blocks.2.attn.qkv.weight": ("attn.qkv", 2),
    "blocks.2.attn.proj.weight": ("attn.o", 2),
    "stages.1.downsample.reduction.weight": ("downsample", 1),
    "layers.0.linear1.weight": ("mlp.up", 0),
    "layers.0.linear2.weight": ("mlp.down", 0),
    "layers.0.multihead_attn.in_proj_weight": ("cross_attn.qkv", 0),
    "transformer.h.7.attn.Wqkv.weight": ("attn.qkv", 7),
    "model.layers.4.block_sparse_moe.experts.6.w1.weight": ("expert.gate", 4),
    "model.layers.4.block_sparse_moe.experts.6.w3.weight": ("expert.up", 4),
    "model.layers.4.block_sparse_moe.gate.weight": ("router", 4),
    "model.layers.4.mlp.experts.17.down_proj.weight": ("expert.down", 4),
    "model.layers.4.mlp.shared_experts.up_proj.weight": ("shared_expert.up", 4),
    "layers.0.attention.wq.weight": ("attn.q", 0),
    "layers.0.feed_forward.w2.weight": ("mlp.down", 0),
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight": ("cross_attn.k", 0),
    "lstm.weight_ih_l0": ("rnn", None),
    "classifier.weight": ("head", None),
    "base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight": ("attn.q", 2),
    "something.entirely.unknown.weight": ("other", None),
}  # fmt: skip


@pytest.mark.parametrize(("name", "expected"), (GGUF | TORCHVISION_TIMM_AND_OTHERS).items())
def test_names_of_other_libraries(name, expected):
    assert (role_of(name), block_of(name)) == expected


@pytest.mark.parametrize(
    ("name", "kind", "role"),
    [
        ("layer1.0.conv1.weight", "conv", "conv"),
        ("embeddings.patch_embeddings.projection.weight", "conv", "embed.patch"),
        ("anything.weight", "embedding", "embed"),
        ("encoder.embed_positions.weight", "embedding", "embed.position"),
    ],
)
def test_the_source_knows_convolutions_and_embeddings(name, kind, role):
    assert role_of(name, kind) == role


def test_numbered_layers_of_models_without_blocks():
    assert [number_of(name) for name in ("conv3.weight", "fc_2.weight", "layer1.0.conv1.weight")] == [3, 2, None]


def test_stacks():
    alone = ["encoder.layer.0.attention.q.weight", "encoder.layer.1.attention.q.weight"]
    assert tower_prefixes(alone) == {}
    both = ["model.encoder.layers.0.fc1.weight", "model.decoder.layers.0.fc1.weight"]
    assert tower_prefixes(both) == {"model.encoder.": "encoder.", "model.decoder.": "decoder."}
    beside = ["vision_tower.encoder.layers.0.fc1.weight", "language_model.layers.0.mlp.up_proj.weight"]
    assert tower_prefixes(beside) == {"vision_tower.": "vision."}
    assert tower_prefixes([]) == {}
