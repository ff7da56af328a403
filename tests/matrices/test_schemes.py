"""Naming schemes of other libraries than transformers, and how many matrices of its architectures have a role.

A wrong role is worse than none: what a name does not tell is ``other``.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
import transformers
from torch import nn

import htsr
from htsr.matrices.apart import matrices_of
from htsr.matrices.modules import module_config, module_tensors
from htsr.matrices.roles import block_of, is_kernel, role_of

SCHEMES = {
    'nanoGPT': {
        'transformer.wte.weight': ('embed', None),
        'transformer.wpe.weight': ('embed.position', None),
        'transformer.h.3.attn.c_attn.weight': ('attn.qkv', 3),
        'transformer.h.3.attn.c_proj.weight': ('attn.o', 3),
        'transformer.h.3.mlp.c_fc.weight': ('mlp.up', 3),
        'transformer.h.3.mlp.c_proj.weight': ('mlp.down', 3),
        'lm_head.weight': ('head', None),
    },
    'nanochat': {
        'transformer.h.3.attn.c_q.weight': ('attn.q', 3),
        'transformer.h.3.attn.c_k.weight': ('attn.k', 3),
        'transformer.h.3.attn.c_v.weight': ('attn.v', 3),
    },
    'LitGPT': {
        'transformer.h.2.attn.attn.weight': ('attn.qkv', 2),
        'transformer.h.2.attn.qkv.weight': ('attn.qkv', 2),
        'transformer.h.2.attn.proj.weight': ('attn.o', 2),
        'transformer.h.2.mlp.fc_1.weight': ('mlp.gate', 2),
        'transformer.h.2.mlp.fc_2.weight': ('mlp.up', 2),
        'transformer.h.2.mlp.proj.weight': ('mlp.down', 2),
        'transformer.h.2.mlp.fc.weight': ('mlp.up', 2),
        'transformer.h.2.mlp.experts.1.fc_1.weight': ('expert.gate', 2),
        'transformer.h.2.mlp.experts.1.proj.weight': ('expert.down', 2),
        'transformer.h.2.mlp.gate.weight': ('router', 2),
    },
    'Megatron-core': {
        'decoder.layers.1.self_attention.linear_qkv.weight': ('attn.qkv', 1),
        'decoder.layers.1.self_attention.linear_proj.weight': ('attn.o', 1),
        'decoder.layers.1.mlp.linear_fc1.weight': ('mlp.up', 1),
        'decoder.layers.1.mlp.linear_fc2.weight': ('mlp.down', 1),
        'embedding.word_embeddings.weight': ('embed', None),
        'output_layer.weight': ('head', None),
        'decoder.layers.1.cross_attention.linear_q.weight': ('cross_attn.q', 1),
        'decoder.layers.1.cross_attention.linear_kv.weight': ('cross_attn.kv', 1),
        'decoder.layers.1.mlp.router.weight': ('router', 1),
        'decoder.layers.1.mlp.experts.local_experts.0.linear_fc2.weight': ('expert.down', 1),
        'decoder.layers.1.self_attention.linear_q_down_proj.weight': ('attn.q_a', 1),
        'decoder.layers.1.self_attention.linear_q_up_proj.weight': ('attn.q_b', 1),
        'decoder.layers.1.self_attention.linear_kv_down_proj.weight': ('attn.kv_a', 1),
        'decoder.layers.1.self_attention.linear_kv_up_proj.weight': ('attn.kv_b', 1),
    },
    'Megatron-LM': {
        'language_model.encoder.layers.0.self_attention.query_key_value.weight': ('attn.qkv', 0),
        'language_model.encoder.layers.0.self_attention.dense.weight': ('attn.o', 0),
        'language_model.encoder.layers.0.mlp.dense_h_to_4h.weight': ('mlp.up', 0),
        'language_model.embedding.word_embeddings.weight': ('embed', None),
    },
    'CTranslate2': {
        'decoder/layer_2/self_attention/linear_0/weight': ('attn.qkv', 2),
        'decoder/layer_2/self_attention/linear_1/weight': ('attn.o', 2),
        'decoder/layer_2/attention/linear_0/weight': ('cross_attn.q', 2),
        'decoder/layer_2/attention/linear_1/weight': ('cross_attn.kv', 2),
        'decoder/layer_2/attention/linear_2/weight': ('cross_attn.o', 2),
        'decoder/layer_2/ffn/linear_1/weight': ('mlp.down', 2),
        'decoder/layer_2/ffn/linear_0_noact/weight': ('mlp.up', 2),
        'decoder/embeddings/weight': ('embed', None),
        'decoder/projection/weight': ('head', None),
        'encoder/layer_0/self_attention/linear_0/weight': ('attn.qkv', 0),
    },
    'torchtune': {
        'layers.0.attn.q_proj.weight': ('attn.q', 0),
        'layers.0.attn.output_proj.weight': ('attn.o', 0),
        'layers.0.mlp.w1.weight': ('mlp.gate', 0),
        'layers.0.mlp.w2.weight': ('mlp.down', 0),
        'layers.0.mlp.w3.weight': ('mlp.up', 0),
    },
    'GPT-NeoX': {
        'gpt_neox.layers.5.attention.query_key_value.weight': ('attn.qkv', 5),
        'gpt_neox.layers.5.attention.dense.weight': ('attn.o', 5),
        'gpt_neox.layers.5.mlp.dense_4h_to_h.weight': ('mlp.down', 5),
        'embed_out.weight': ('head', None),
    },
    'Flux': {
        'double_blocks.3.img_attn.qkv.weight': ('attn.qkv', 3),
        'double_blocks.3.img_attn.proj.weight': ('attn.o', 3),
        'double_blocks.3.txt_attn.qkv.weight': ('attn.qkv', 3),
        'double_blocks.3.img_mlp.0.weight': ('mlp.up', 3),
        'double_blocks.3.img_mlp.2.weight': ('mlp.down', 3),
        'double_blocks.3.txt_mlp.0.weight': ('mlp.up', 3),
        'double_blocks.3.img_mod.lin.weight': ('modulation', 3),
        'single_blocks.5.linear1.weight': ('other', 5),
        'single_blocks.5.linear2.weight': ('other', 5),
        'single_blocks.5.modulation.lin.weight': ('modulation', 5),
    },
    'RWKV': {
        'blocks.4.att.receptance.weight': ('attn.r', 4),
        'blocks.4.att.key.weight': ('attn.k', 4),
        'blocks.4.att.value.weight': ('attn.v', 4),
        'blocks.4.att.gate.weight': ('attn.gate', 4),
        'blocks.4.att.output.weight': ('attn.o', 4),
        'blocks.4.ffn.key.weight': ('mlp.up', 4),
        'blocks.4.ffn.value.weight': ('mlp.down', 4),
        'blocks.4.ffn.receptance.weight': ('mlp.gate', 4),
        'emb.weight': ('embed', None),
        'head.weight': ('head', None),
    },
    'flax': {
        'encoder.layer.0.attention.self.query.kernel': ('attn.q', 0),
        'encoder.layer.0.output.dense.kernel': ('mlp.down', 0),
        'encoder/layer/0/intermediate/dense/kernel': ('mlp.up', 0),
        'embeddings.word_embeddings.embedding': ('embed', None),
        'h.0.attn.c_proj.kernel': ('attn.o', 0),
        'pooler.dense.kernel': ('pooler', None),
    },
    'T5X': {
        'decoder/layers_3/self_attention/query/kernel': ('attn.q', 3),
        'decoder/layers_3/self_attention/out/kernel': ('attn.o', 3),
        'decoder/layers_3/encoder_decoder_attention/key/kernel': ('cross_attn.k', 3),
        'encoder/layers_3/mlp/wi_0/kernel': ('mlp.gate', 3),
        'encoder/layers_3/mlp/wo/kernel': ('mlp.down', 3),
        'token_embedder/embedding': ('embed', None),
        'decoder/logits_dense/kernel': ('head', None),
    },
    'OpenCLIP': {
        'visual.transformer.resblocks.3.attn.in_proj_weight': ('attn.qkv', 3),
        'visual.transformer.resblocks.3.attn.out_proj.weight': ('attn.o', 3),
        'visual.transformer.resblocks.3.mlp.c_fc.weight': ('mlp.up', 3),
        'transformer.resblocks.3.mlp.c_proj.weight': ('mlp.down', 3),
        'token_embedding.weight': ('embed', None),
        'positional_embedding': ('embed.position', None),
        'visual.class_embedding': ('embed', None),
        'text_projection': ('projector', None),
        'visual.conv1.weight': ('other', None),
    },
    'fairseq': {
        'decoder.layers.0.self_attn.q_proj.weight': ('attn.q', 0),
        'decoder.layers.0.encoder_attn.k_proj.weight': ('cross_attn.k', 0),
        'decoder.layers.0.fc1.weight': ('mlp.up', 0),
        'decoder.layers.0.fc2.weight': ('mlp.down', 0),
        'decoder.embed_tokens.weight': ('embed', None),
        'decoder.output_projection.weight': ('head', None),
    },
    'timm': {
        'blocks.0.attn.qkv.weight': ('attn.qkv', 0),
        'blocks.0.attn.proj.weight': ('attn.o', 0),
        'blocks.0.mlp.fc1.weight': ('mlp.up', 0),
        'blocks.0.mlp.fc2.weight': ('mlp.down', 0),
        'patch_embed.proj.weight': ('embed.patch', None),
        'pos_embed': ('embed.position', None),
        'head.weight': ('head', None),
        'blocks.0.mlp.fc1_g.weight': ('mlp.gate', 0),
    },
    'torchvision': {
        'encoder.layers.encoder_layer_3.self_attention.in_proj_weight': ('attn.qkv', 3),
        'encoder.layers.encoder_layer_3.mlp.0.weight': ('mlp.up', 3),
        'encoder.layers.encoder_layer_3.mlp.3.weight': ('mlp.down', 3),
        'conv_proj.weight': ('embed.patch', None),
        'heads.head.weight': ('head', None),
    },
    'x-transformers': {
        'attn_layers.layers.0.1.to_q.weight': ('attn.q', 0),
        'attn_layers.layers.0.1.to_out.weight': ('attn.o', 0),
        'attn_layers.layers.1.1.ff.0.0.weight': ('mlp.up', 1),
        'attn_layers.layers.1.1.ff.2.weight': ('mlp.down', 1),
        'token_emb.emb.weight': ('embed', None),
        'to_logits.weight': ('head', None),
    },
    'ChatGLM': {
        'transformer.encoder.layers.0.self_attention.query_key_value.weight': ('attn.qkv', 0),
        'transformer.encoder.layers.0.mlp.dense_h_to_4h.weight': ('mlp.up', 0),
        'transformer.output_layer.weight': ('head', None),
        'transformer.embedding.word_embeddings.weight': ('embed', None),
    },
    'decoder as a list, not a head': {
        'decoder.0.attn.q_proj.weight': ('attn.q', 0),
        'decoder.3.mlp.up_proj.weight': ('mlp.up', 3),
        'model.decoder.2.self_attn.k_proj.weight': ('attn.k', 2),
    },
    'relative positions': {
        'encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight': ('embed.position', 0),
        'encoder.relative_attention_bias.weight': ('embed.position', None),
    },
    'RNN': {
        'lstm.weight_ih_l0': ('rnn', None),
        'encoder.weight_hh_l1_reverse': ('rnn', None),
        'cell.weight_ih': ('rnn', None),
    },
    'RecurrentGemma': {
        'layers.0.temporal_block.rg_lru.input_gate_weight': ('ssm.input_gate', 0),
        'layers.0.temporal_block.rg_lru.recurrent_gate_weight': ('ssm.recurrent_gate', 0),
    },
    'JetMoE': {
        'layers.0.self_attention.experts.input_linear.weight': ('attn.q', 0),
        'layers.0.self_attention.experts.output_linear.weight': ('attn.o', 0),
    },
    'xLSTM': {
        'backbone.blocks.0.mlstm_layer.q.weight': ('ssm.q', 0),
        'backbone.blocks.0.mlstm_layer.k.weight': ('ssm.k', 0),
        'backbone.blocks.0.mlstm_layer.v.weight': ('ssm.v', 0),
        'backbone.blocks.0.mlstm_layer.ogate_preact.weight': ('ssm.gate', 0),
        'backbone.blocks.0.mlstm_layer.out_proj.weight': ('ssm.out', 0),
        'backbone.blocks.0.ffn.proj_up_gate.weight': ('mlp.gate', 0),
    },
    "DeepSeek's indexer": {
        'layers.0.self_attn.indexer.wq_b.weight': ('other', 0),
        'layers.0.self_attn.indexer.wk.weight': ('other', 0),
    },
    'the annotated transformer': {
        'encoder.layers.0.self_attn.linears.0.weight': ('other', 0),
        'encoder.layers.0.feed_forward.w_1.weight': ('mlp.up', 0),
        'encoder.layers.0.feed_forward.w_2.weight': ('mlp.down', 0),
    },
    "OpenAI's Whisper": {
        'decoder.blocks.0.attn.query.weight': ('attn.q', 0),
        'decoder.blocks.0.attn.out.weight': ('attn.o', 0),
        'decoder.blocks.0.cross_attn.key.weight': ('cross_attn.k', 0),
        'decoder.blocks.0.mlp.0.weight': ('mlp.up', 0),
        'decoder.blocks.0.mlp.2.weight': ('mlp.down', 0),
        'decoder.token_embedding.weight': ('embed', None),
        'decoder.positional_embedding': ('embed.position', None),
    },
    'GPT-J': {
        'transformer.h.0.attn.q_proj.weight': ('attn.q', 0),
        'transformer.h.0.attn.out_proj.weight': ('attn.o', 0),
        'transformer.h.0.mlp.fc_in.weight': ('mlp.up', 0),
        'transformer.h.0.mlp.fc_out.weight': ('mlp.down', 0),
    },
    'Qwen': {
        'transformer.h.0.attn.c_attn.weight': ('attn.qkv', 0),
        'transformer.h.0.attn.c_proj.weight': ('attn.o', 0),
    },
    'Mamba': {
        'backbone.layers.0.mixer.in_proj.weight': ('ssm.in', 0),
        'backbone.layers.0.mixer.x_proj.weight': ('ssm.x', 0),
        'backbone.layers.0.mixer.out_proj.weight': ('ssm.out', 0),
        'backbone.embedding.weight': ('embed', None),
    },
    'Flux in diffusers': {
        'transformer_blocks.0.attn.to_q.weight': ('attn.q', 0),
        'transformer_blocks.0.attn.add_q_proj.weight': ('attn.add_q', 0),
        'transformer_blocks.0.attn.add_k_proj.weight': ('attn.add_k', 0),
        'transformer_blocks.0.attn.add_v_proj.weight': ('attn.add_v', 0),
        'transformer_blocks.0.attn.to_out.0.weight': ('attn.o', 0),
        'transformer_blocks.0.attn.to_add_out.weight': ('attn.add_o', 0),
        'transformer_blocks.0.ff.net.0.proj.weight': ('mlp.up', 0),
        'transformer_blocks.0.ff.net.2.weight': ('mlp.down', 0),
        'transformer_blocks.0.ff_context.net.0.proj.weight': ('mlp.up', 0),
        'transformer_blocks.0.ff_context.net.2.weight': ('mlp.down', 0),
        'transformer_blocks.0.norm1.linear.weight': ('modulation', 0),
        'transformer_blocks.0.norm1_context.linear.weight': ('modulation', 0),
        'single_transformer_blocks.7.norm.linear.weight': ('modulation', 7),
        'single_transformer_blocks.7.proj_mlp.weight': ('mlp.up', 7),
        'single_transformer_blocks.7.proj_out.weight': ('other', 7),
        'single_transformer_blocks.7.attn.to_q.weight': ('attn.q', 7),
        'x_embedder.weight': ('embed.patch', None),
        'context_embedder.weight': ('other', None),
        'norm_out.linear.weight': ('modulation', None),
        'proj_out.weight': ('head', None),
    },
    'Stable Diffusion': {
        'down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q.weight': ('attn.q', 0),
        'down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k.weight': ('cross_attn.k', 0),
        'down_blocks.0.attentions.1.transformer_blocks.0.ff.net.2.weight': ('mlp.down', 0),
        'mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0.weight': ('attn.o', 0),
    },
    "Meta's LLaMA": {
        'layers.0.attention.wq.weight': ('attn.q', 0),
        'layers.0.attention.wo.weight': ('attn.o', 0),
        'layers.0.feed_forward.w1.weight': ('mlp.gate', 0),
        'layers.0.feed_forward.w2.weight': ('mlp.down', 0),
        'layers.0.feed_forward.w3.weight': ('mlp.up', 0),
        'tok_embeddings.weight': ('embed', None),
        'output.weight': ('head', None),
    },
    'torch.nn': {
        'transformer.encoder.layers.0.self_attn.in_proj_weight': ('attn.qkv', 0),
        'transformer.encoder.layers.0.linear1.weight': ('mlp.up', 0),
        'transformer.encoder.layers.0.linear2.weight': ('mlp.down', 0),
        'transformer.decoder.layers.0.multihead_attn.out_proj.weight': ('cross_attn.o', 0),
    },
}  # fmt: skip


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_naming_scheme(scheme):
    names = SCHEMES[scheme]
    assert {name: (role_of(name), block_of(name)) for name in names} == names


def shapes(state: dict[str, tuple[int, ...]]) -> list[tuple[str, str, tuple[int, int]]]:
    """Name, role and shape of the matrices in a state dict of these shapes."""
    described = htsr.describe({name: torch.randn(shape) for name, shape in state.items()})
    return [(m.name, m.role, m.shape) for m in described]


def test_nanogpts_fused_attention_is_that_of_gpt2_transposed():
    torch.manual_seed(0)
    W = torch.randn(48, 16)
    parts = {m.name[-3:]: m.read() for m in htsr.describe({"transformer.h.0.attn.c_attn.weight": W})}
    for part, expected in zip(("[q]", "[k]", "[v]"), W.split(16), strict=True):
        torch.testing.assert_close(torch.as_tensor(parts[part]), expected)


def test_one_name_tells_what_another_means():
    gated = {"l.0.feed_forward.w1.weight": (24, 8), "l.0.feed_forward.w2.weight": (8, 24)}
    assert [role for _, role, _ in shapes(gated)] == ["mlp.up", "mlp.down"]
    gated["l.0.feed_forward.w3.weight"] = (24, 8)
    assert [role for _, role, _ in shapes(gated)] == ["mlp.gate", "mlp.down", "mlp.up"]


@pytest.mark.parametrize(
    ("up", "down", "found"),
    [
        ("blocks.0.ff.net.0.proj", "blocks.0.ff.net.2", {"[up]": "mlp.up", "[gate]": "mlp.gate"}),  # diffusers' GEGLU
        ("layers.0.mlp.linear_fc1", "layers.0.mlp.linear_fc2", {"[gate]": "mlp.gate", "[up]": "mlp.up"}),  # Megatron
        ("layers.0.mlp.fc1", "layers.0.mlp.fc2", {"": "mlp.gate_up"}),  # in which order is not known
    ],
)
def test_gate_and_up_in_one_are_told_by_the_way_down(up, down, found):
    *parts, last = shapes({f"{up}.weight": (48, 8), f"{down}.weight": (8, 24)})
    assert [(name, role) for name, role, _ in parts] == [(up + part, role) for part, role in found.items()]
    assert last == (down, "mlp.down", (8, 24))
    plain = shapes({f"{up}.weight": (24, 8), f"{down}.weight": (8, 24)})
    assert plain[0] == (up, "mlp.up", (24, 8))


@pytest.mark.parametrize(
    ("kind", "gates", "hidden"),
    [(nn.LSTM, "ifgo", 8), (nn.GRU, "rzn", 8), (nn.RNN, "", 8), (nn.LSTMCell, "ifgo", 6), (nn.GRUCell, "rzn", 6)],
)
def test_the_gates_of_an_rnn_are_matrices_of_their_own(kind, gates, hidden):
    net = kind(5, hidden) if "Cell" in kind.__name__ else kind(12, hidden, num_layers=2, bidirectional=True)
    described = htsr.describe(net).matrices
    roles = Counter(m.role for m in described)
    tensors = sum(p.ndim == 2 for p in net.parameters())
    assert roles == ({f"rnn.{gate}": tensors for gate in gates} or {"rnn": tensors})
    assert {m.shape[0] for m in described} == {hidden}
    for name, parameter in net.named_parameters():
        if parameter.ndim == 2:  # torch's order is that of its documentation: in rows, one gate below the other
            parts = [torch.as_tensor(m.read()) for m in described if m.position.tensor == name]
            torch.testing.assert_close(torch.cat(parts), parameter.detach())


def test_an_lstm_with_a_projection_stays_whole():
    assert {m.role for m in htsr.describe(nn.LSTM(12, 8, proj_size=4))} == {"rnn", "other"}


def test_long_kernels_are_kernels_in_a_file_too(tmp_path):
    torch.manual_seed(0)
    config = transformers.Wav2Vec2Config(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=40, vocab_size=32,
        conv_dim=(8,) * 7, num_conv_pos_embeddings=128, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    model = transformers.Wav2Vec2ForCTC(config)
    model.save_pretrained(tmp_path)
    module, file = ({m.name: m for m in htsr.describe(source)} for source in (model, str(tmp_path)))
    assert len(module) == len(file) == 16
    assert not {m.kind for m in file.values()} & {"expert", "stack"}
    del module["wav2vec2.encoder.pos_conv_embed.conv"]
    for name, matrix in module.items():
        assert (file[name].shape, file[name].pieces, file[name].role) == (matrix.shape, matrix.pieces, matrix.role)


@pytest.mark.parametrize(
    ("name", "shape", "kernel"),
    [
        ("encoder.pos_conv_embed.conv.weight", (768, 48, 128), True),
        ("model.encoder.conv1.weight", (288, 1, 127), True),  # Moonshine
        ("_model.stft.forward_basis_buffer", (258, 1, 256), True),  # silero
        ("vocoder.ups.0.weight", (512, 256, 16), True),
        ("decoder.conv_post.weight", (1, 32, 7), True),
        ("layers.0.temporal_block.rg_lru.input_gate_weight", (10, 256, 256), False),
        ("depth_decoder.codebooks_head.weight", (31, 1024, 2051), False),
        ("model.layers.0.mlp.experts.gate_up_proj", (8, 64, 128), False),
        ("block_sparse_moe.experts.w1.weight", (64, 8, 16), False),
        ("embeddings.position_embeddings", (1, 197, 768), False),
    ],
)
def test_a_kernel_or_a_stack(name, shape, kernel):
    assert is_kernel(name, shape) == kernel


def test_a_stack_that_is_no_kernel_is_one_row(tmp_path):
    torch.manual_seed(0)
    gates = torch.randn(3, 8, 8)
    (row,) = htsr.analyze({"layers.0.temporal_block.rg_lru.input_gate_weight": gates}, device="cpu")
    assert (row.kind, row.role, row.rows, row.columns, row.pieces) == ("stack", "ssm.input_gate", 8, 8, 3)
    # the eigenvalues of a block-diagonal matrix are those of its blocks
    assert row.log_norm == pytest.approx(float(torch.block_diag(*gates).pow(2).sum().log10()), rel=1e-5)


def architectures(step: int) -> list[str]:
    """Every `step`-th of transformers' model types, and those with what is easily mistaken."""
    wanted = {
        "wav2vec2",
        "hubert",
        "speecht5",
        "moonshine",
        "recurrent_gemma",
        "xlstm",
        "jetmoe",
        "rwkv",
        "deepseek_v3",
    }
    return [name for i, name in enumerate(transformers.CONFIG_MAPPING) if i % step == 0 or name in wanted]


def built(model_type: str) -> nn.Module | None:
    """A model without values, of few blocks where its configuration says how many; None where it cannot be built."""
    try:
        config = transformers.CONFIG_MAPPING[model_type]()
        for part in (config, *(v for v in vars(config).values() if isinstance(v, transformers.PretrainedConfig))):
            for key in ("num_hidden_layers", "num_local_experts", "num_experts"):
                if isinstance(getattr(part, key, None), int) and not getattr(part, "layer_types", None):
                    setattr(part, key, 2)
        with torch.device("meta"):
            return transformers.AutoModel.from_config(config)
    except Exception:  # needs another package, or is no model of its own
        return None


def coverage(step: int) -> tuple[int, int, int]:
    """Architectures built, their matrices, and those of them with a role; rows of modules and files are compared."""
    models = matrices = told = 0
    for model_type in architectures(step):
        if (model := built(model_type)) is None:
            continue
        tensors, config = list(module_tensors(model)), module_config(model)
        module = list(matrices_of(tensors, config))
        file = list(matrices_of([replace(tensor, kind=None) for tensor in tensors], config))
        rows = [{(m.name, m.shape, m.pieces) for m in found} for found in (module, file)]
        assert rows[0] == rows[1], model_type
        for m in module:
            assert m.kind != "expert" or "expert" in m.name + m.role, m.name
            assert m.name.count("[") <= 2, m.name
        models, matrices = models + 1, matrices + len(module)
        told += sum(not m.role.endswith("other") for m in module)
    return models, matrices, told


def test_nearly_all_matrices_of_transformers_architectures_have_a_role():
    models, matrices, told = coverage(step=200)
    assert models >= 10
    assert told / matrices > 0.95, f"{told} of {matrices} matrices in {models} architectures"
