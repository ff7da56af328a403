"""Outliers and answers are the same on a device, which is waited for once a batch and not for each layer or token."""

import copy

import pytest
import torch
from transformers import BatchEncoding, LlamaConfig, LlamaForCausalLM

import htsr
from htsr.calibration.multiple_choice import log_likelihoods, multiple_choice_accuracy

TEXTS = ["spectra of weights", "and", "of activations", "padding is told from tokens"]
QUESTIONS = [{"question": text, "choices": ["yes", "no", "perhaps"], "answer": i % 3} for i, text in enumerate(TEXTS)]


def tokenizer(texts, **_):
    if isinstance(texts, str):
        return {"input_ids": list(texts.encode())}
    rows = [torch.tensor(list(text.encode())) for text in texts]
    masks = [torch.ones_like(row) for row in rows]
    padded = (torch.nn.utils.rnn.pad_sequence(part, batch_first=True) for part in (rows, masks))
    return BatchEncoding(dict(zip(("input_ids", "attention_mask"), padded, strict=True)))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    found = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=128))
    for i, layer in enumerate(found.model.layers):
        layer.mlp.up_proj.weight.data[0, :i] = 1.0
    return found


@pytest.mark.parametrize("batch_size", [1, 4])
def test_outliers(model, device, batch_size):
    expected = htsr.measure_outliers(model, tokenizer, TEXTS, batch_size=batch_size)
    found = htsr.measure_outliers(copy.deepcopy(model).to(device), tokenizer, TEXTS, batch_size=batch_size)
    assert found.tokens == expected.tokens == sum(map(len, TEXTS))
    assert found.distribution(13.0).any()
    for a, b in zip(found.rows, expected.rows, strict=True):
        assert (a.name, a.counts, a.block_counts) == (b.name, b.counts, b.block_counts)
        assert a.mean_score == pytest.approx(b.mean_score, rel=1e-4)


def test_outliers_wait_for_the_device_a_few_times_a_batch(model, device, synchronisations):
    there = copy.deepcopy(model).to(device)
    plain = BatchEncoding(tokenizer(TEXTS))
    with synchronisations() as forward, torch.no_grad():
        there(**{key: value.to(device) for key, value in plain.items()})
    with synchronisations() as counted:
        htsr.measure_outliers(there, tokenizer, TEXTS, batch_size=4)
    matrices = 3 * 7 + 1
    beyond = 1 + 3 + matrices  # places of the tokens; norms, sums and counts back; each matrix's norms there
    assert counted.count is None or counted.count <= forward.count + beyond, counted.names


def test_answers(model, device, synchronisations):
    there = copy.deepcopy(model).to(device)
    pairs = [(record["question"], " " + choice) for record in QUESTIONS for choice in record["choices"]]
    assert log_likelihoods(there, tokenizer, pairs, batch_size=5) == pytest.approx(
        log_likelihoods(model, tokenizer, pairs, batch_size=5), rel=1e-4
    )
    assert multiple_choice_accuracy(there, tokenizer, QUESTIONS) == multiple_choice_accuracy(
        model, tokenizer, QUESTIONS
    )
    ids = torch.tensor([tokenizer(pairs[0][0] + pairs[0][1])["input_ids"]])
    with synchronisations() as forward, torch.no_grad():
        there(input_ids=ids.to(device), attention_mask=torch.ones_like(ids).to(device), use_cache=False)
    with synchronisations() as counted:
        log_likelihoods(there, tokenizer, pairs, batch_size=len(pairs))
    assert counted.count is None or counted.count <= forward.count + 2, counted.names  # it asks twice of padding
