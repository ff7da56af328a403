"""Tied or not is a fact of the tensors: of their memory in a module, of their numbers in a file."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import htsr
from htsr.matrices.checkpoint_files import folder_tensors
from htsr.matrices.tying import repeated, tied
from tests.matrices.test_sources import tiny


def tables(source, **kwargs) -> dict[str, np.ndarray]:
    return {m.name: np.asarray(m.read()) for m in htsr.describe(source, **kwargs) if m.role in ("embed", "head")}


def other_head(model: nn.Module) -> torch.Tensor:
    torch.manual_seed(5)
    return torch.randn(model.get_output_embeddings().weight.shape)


def save(model: nn.Module, folder, head: torch.Tensor, tie: bool | None) -> None:
    """A folder that stores the head, whose configuration says it is tied (or not, or nothing)."""
    model.save_pretrained(folder)
    state = load_file(folder / "model.safetensors") | {"lm_head.weight": head}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config.pop("tie_word_embeddings", None)
    (folder / "config.json").write_text(json.dumps(config if tie is None else config | {"tie_word_embeddings": tie}))


@pytest.mark.parametrize("tie", [True, None])
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Gemma2ForCausalLM"])  # Gemma's class is tied by default
def test_a_head_that_is_stored_counts_as_transformers_loads_it(tmp_path, architecture, tie, caplog):
    model = tiny(architecture, tie_word_embeddings=True, head_dim=8)
    same = model.get_input_embeddings().weight.detach().clone()
    for head, rows in ((same, ["model.embed_tokens"]), (other_head(model), ["lm_head", "model.embed_tokens"])):
        save(model, tmp_path, head, tie)
        with caplog.at_level(logging.ERROR):
            loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        stored = tables(tmp_path)
        assert sorted(stored) == rows
        np.testing.assert_array_equal(stored[rows[0]], head if "lm_head" in rows else same)
        if len(rows) == 2 or loaded.lm_head.weight is loaded.get_input_embeddings().weight:
            assert tables(loaded).keys() == stored.keys()


def test_a_head_that_differs_in_its_last_row_alone(tmp_path):
    """A vocabulary that was enlarged, and only the new rows of the head trained."""
    model = tiny("LlamaForCausalLM", tie_word_embeddings=True)
    head = model.lm_head.weight.detach().clone()
    head[-1, -1] += 1
    save(model, tmp_path, head, tie=True)
    assert sorted(tables(tmp_path)) == ["lm_head", "model.embed_tokens"]


def test_in_memory_the_parameter_decides():
    model = tiny("LlamaForCausalLM", tie_word_embeddings=True)
    assert list(tables(model)) == ["model.embed_tokens"]
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())  # equal now, trained apart
    assert sorted(tables(model)) == ["lm_head", "model.embed_tokens"]
    assert sorted(tables(model.state_dict())) == ["model.embed_tokens"]  # numbers are all that a state dict has
    model.lm_head.weight = nn.Parameter(other_head(model))
    for source in (model, model.state_dict()):
        np.testing.assert_array_equal(tables(source)["lm_head"], model.lm_head.weight.detach())


def test_layerwise_sets_a_head_of_its_own():
    model = tiny("LlamaForCausalLM", tie_word_embeddings=True)
    model.lm_head.weight = nn.Parameter(other_head(model))
    optimizer = htsr.layerwise(torch.optim.AdamW(model.parameters(), lr=1e-3), model, score=None, embeddings=5.0)
    inputs = torch.arange(8)[None]
    model(input_ids=inputs, labels=inputs).loss.backward()
    optimizer.step()
    found = {group["name"]: group["multiplier"] for group in optimizer.param_groups}
    assert found["model.embed_tokens"] == found["lm_head"] == 5.0


def test_an_adapter_on_a_tied_head_unties_it():
    model = tiny("LlamaForCausalLM", tie_word_embeddings=True)
    base = model.lm_head.weight.detach().clone()
    adapted = get_peft_model(model, LoraConfig(target_modules=["lm_head"], r=2, init_lora_weights=False))
    found = tables(adapted)
    assert sorted(found) == ["lm_head", "model.embed_tokens"]
    np.testing.assert_array_equal(found["model.embed_tokens"], base)
    delta = adapted.base_model.model.lm_head.get_delta_weight("default").detach()
    np.testing.assert_allclose(found["lm_head"], base + delta, rtol=1e-6, atol=1e-7)


def test_a_saved_copy_of_a_head_is_one_row_in_peft():
    """`modules_to_save` trains a copy of the head beside the embedding it was tied to."""
    model = tiny("LlamaForCausalLM", tie_word_embeddings=True)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with torch.no_grad():
        adapted.base_model.model.lm_head.modules_to_save["default"].weight.mul_(3)
    found = tables(adapted)
    np.testing.assert_array_equal(found["lm_head"], found["model.embed_tokens"] * 3)


def test_encoder_decoders_that_store_their_embedding_three_times(tmp_path):
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    model = transformers.T5ForConditionalGeneration(config)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")  # as converters write it
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    names = {m.name for m in htsr.describe(tmp_path)}
    assert names == {m.name for m in htsr.describe(model)}
    assert "shared" in names
    assert not {"encoder.embed_tokens", "decoder.embed_tokens"} & names


def test_what_a_difference_makes_of_tied_weights():
    """The head's change is its own where only one of the two models is tied."""
    one, other = tiny("LlamaForCausalLM", tie_word_embeddings=True), tiny("LlamaForCausalLM", tie_word_embeddings=True)
    with torch.no_grad():
        other.model.embed_tokens.weight.mul_(2)
    assert list(tables(one, against=other)) == ["model.embed_tokens"]
    other.lm_head.weight = nn.Parameter(other_head(other))
    found = tables(one, against=other)
    np.testing.assert_array_equal(found["lm_head"], (one.lm_head.weight - other.lm_head.weight).detach())


def test_tables_are_compared_piece_by_piece(tmp_path, monkeypatch):
    from htsr.matrices import tying

    model = tiny("LlamaForCausalLM", tie_word_embeddings=True)
    save(model, tmp_path, model.lm_head.weight.detach().clone(), tie=True)
    monkeypatch.setattr(tying, "_COMPARED", 8 * 16 * 7)  # seven rows of forty
    assert repeated(tied(folder_tensors(tmp_path))) == {"lm_head.weight": "model.embed_tokens.weight"}
