"""What rows and columns stand for: told by transformers' own modules, and by how their checkpoints are stored."""

import numpy as np
import pytest
import torch
import transformers

import htsr

TINY = {"vocab_size": 40, "num_hidden_layers": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def axes(source) -> dict[str, tuple[bool | None, int]]:
    return {matrix.role: (matrix.axes.inputs_first, matrix.axes.heads) for matrix in htsr.describe(source)}


@pytest.mark.parametrize("given", ["module", "state dict"])
def test_a_gpt2_is_stored_by_inputs(given):
    config = transformers.GPT2Config(vocab_size=40, n_positions=8, n_embd=32, n_layer=1, n_head=4)
    model = transformers.GPT2Model(config)
    found = axes(model if given == "module" else model.state_dict())
    heads = 4 if given == "module" else 0  # a state dict has no configuration
    assert {found[f"attn.{part}"] for part in "qkvo"} == {(True, heads)}
    assert found["mlp.up"] == found["mlp.down"] == (True, 0)
    assert found["embed"] == (False, 0)


def test_linear_layers_under_the_names_of_gpt2_are_not():
    """nanoGPT's."""
    shapes = {"attn.c_attn": (96, 32), "attn.c_proj": (32, 32), "mlp.c_fc": (128, 32), "mlp.c_proj": (32, 128)}
    found = axes({f"h.0.{name}.weight": torch.randn(shape) for name, shape in shapes.items()})
    assert {inputs_first for inputs_first, _ in found.values()} == {False}


def test_heads_of_grouped_queries():
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=16, **TINY
    )
    found = axes(transformers.LlamaForCausalLM(config))
    assert [found[f"attn.{part}"][1] for part in "qkvo"] == [4, 2, 2, 4]
    assert {found[role] for role in ("embed", "head", "mlp.up")} == {(False, 0)}


@pytest.mark.parametrize(("architecture", "expected"), [("GptOss", True), ("Qwen3Moe", False)])
def test_stacked_experts_are_stored_as_their_architecture_says(architecture, expected):
    """All square, as those of gpt-oss are: no shape tells."""
    config = getattr(transformers, f"{architecture}Config")(
        hidden_size=32, intermediate_size=32, moe_intermediate_size=32, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, num_local_experts=2, num_experts=2, layer_types=["full_attention"], **TINY,
    )  # fmt: skip
    model = getattr(transformers, f"{architecture}ForCausalLM")(config)
    found = axes(model)
    assert {found[f"expert.{part}"][0] for part in ("gate", "up", "down")} == {expected}
    assert {entry for role, entry in axes(model.state_dict()).items() if role == "expert.down"} == {(None, 0)}


def test_kernels_of_flax_are_stored_by_inputs():
    assert axes({"layers.0.mlp.wi.kernel": np.ones((8, 8), np.float32)})["mlp.up"] == (True, 0)
