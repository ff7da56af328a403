"""A model that FSDP will shard stays in host memory; what is measured before has a block at a time on the device."""

import os
from types import SimpleNamespace

import pytest
import torch
from transformers import BatchEncoding, LlamaConfig, LlamaForCausalLM

import htsr
from htsr.finetuning.placing import load_placed, on_device

BLOCKS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": BLOCKS, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=128, tie_word_embeddings=True))
    model.save_pretrained(found := tmp_path_factory.mktemp("model"))
    return str(found)


@pytest.fixture(scope="module")
def model(folder):
    return LlamaForCausalLM.from_pretrained(folder).eval()


def tokenizer(texts, **_):
    ids = torch.tensor([list(text.encode()) for text in texts])
    return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def places(model):
    return {name: (p.device.type, p.data_ptr()) for name, p in model.named_parameters()}


def size(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_only_a_model_that_nothing_shards_goes_to_the_device_whole(folder, device, monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")

    def where(fsdp):
        found = load_placed(SimpleNamespace(fsdp=fsdp, device=device), folder, causal=True)
        return {p.device.type for p in found.parameters()}

    assert where(fsdp="") == {device.type}
    assert where(fsdp=True) == {"cpu"}
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # as accelerate launch --use_fsdp does
    assert where(fsdp="") == {"cpu"}
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "true"


def test_one_block_at_a_time_lies_on_the_device(model, device, memory):
    ids = torch.arange(10)[None]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    before = places(model)
    block = size(model.model.layers[0].parameters())
    beside = size(p for name, p in model.named_parameters() if ".layers." not in name)
    with memory() as used, torch.no_grad(), on_device(model, device):
        assert next(model.parameters()).device.type == device.type
        found = model(input_ids=ids.to(device)).logits
        torch.testing.assert_close(found.cpu(), expected)
    assert used.peak < beside + 1.6 * block  # activations
    assert places(model) == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_outliers_are_those_of_the_cpu(model, device):
    texts = ["spectra of", "weights 12"]
    expected = htsr.measure_outliers(model, tokenizer, texts)
    with on_device(model, device):
        found = htsr.measure_outliers(model, tokenizer, texts)
    assert [row.counts for row in found.rows] == [row.counts for row in expected.rows]


def test_all_is_home_again_when_something_fails(model, device):
    before = places(model)

    def fail(*_):
        raise RuntimeError("in the third block")

    handle = model.model.layers[2].mlp.register_forward_pre_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="third"), torch.no_grad(), on_device(model, device):
            model(input_ids=torch.arange(10)[None].to(device))
    finally:
        handle.remove()
    assert places(model) == before


def test_a_model_on_the_device_stays(folder, device):
    there = LlamaForCausalLM.from_pretrained(folder).to(device)
    with on_device(there, next(there.parameters()).device):
        assert not there.model.layers[0]._forward_pre_hooks
