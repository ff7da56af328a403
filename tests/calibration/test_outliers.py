import json

import numpy as np
import pytest
import torch
from htsr_cli.main import main
from torch import nn
from transformers import GptOssConfig, GptOssForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import htsr
from htsr.calibration.activations import input_norms
from htsr.calibration.loading import resolve
from htsr.calibration.records import read_records, text_of
from htsr.matrices.blocks import find_blocks
from tests.transformer import bert, gpt2, llama, word_tokenizer


@pytest.fixture
def texts(random):
    return [" ".join(f"w{i}" for i in random.integers(4, 64, size)) for size in (3, 17, 1, 9, 12, 30, 5)]


def brute_force(model, tokenizer, texts, thresholds):
    """D_l by the definition, in float64, one text at a time, whole matrices of scores at once."""
    inputs: dict[str, list[np.ndarray]] = {}
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"}
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: inputs.setdefault(name, []).append(args[0].double().numpy())
        )
        for name, module in linears.items()
    ]
    with torch.no_grad():
        for text in texts:
            model.eval()(**{k: v for k, v in tokenizer(text, return_tensors="pt").items() if k != "token_type_ids"})
    for handle in handles:
        handle.remove()
    blocks = find_blocks(model)
    scores: list[list[np.ndarray]] = [[] for _ in blocks.names]
    of_matrix = {}
    for name, module in linears.items():
        X = np.concatenate([x.reshape(-1, x.shape[-1]) for x in inputs[name]])
        W = np.abs(module.weight.detach().double().numpy())
        A = (W.T if isinstance(module, nn.Linear) else W) * np.sqrt((X**2).sum(0))[:, None]
        of_matrix[name] = [(A.mean() * t < A).mean() for t in thresholds]
        for i, block in enumerate(blocks.names):
            if name.startswith(block + "."):
                scores[i].append(A.ravel())
    whole = [np.concatenate(parts) for parts in scores]
    return np.array([[(A.mean() * t < A).mean() for A in whole] for t in thresholds]), of_matrix


@pytest.mark.parametrize("make", [llama, gpt2, bert])
def test_distribution_is_the_definition(make, texts):
    model, tokenizer, thresholds = make(), word_tokenizer(), (1.5, 2.0, 4.0)
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):  # outliers, more in some blocks than in others
            parameter.view(-1)[:: 7 + i % 5] *= 5
    found = htsr.measure_outliers(model, tokenizer, texts, thresholds=thresholds, batch_size=3)
    expected, of_matrix = brute_force(model, tokenizer, texts, thresholds)
    assert found.samples == len(texts)
    assert found.tokens == sum(len(text.split()) for text in texts)
    for threshold, shares in zip(thresholds, expected, strict=True):
        np.testing.assert_allclose(found.distribution(threshold), shares, rtol=0, atol=1e-4)
        assert shares.min() > 0
        assert len(set(shares)) > 1
    for name, share in found.of_matrices(2.0).items():
        assert share == pytest.approx(of_matrix[name][1], abs=1e-3)


def mixture(kind):
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    if kind == "gpt_oss":  # stored (in, out), with biases and a gate of its own
        return GptOssForCausalLM(
            GptOssConfig(**sizes, intermediate_size=24, num_local_experts=4, num_experts_per_tok=2, vocab_size=64)
        )
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**sizes, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2, vocab_size=64)
    )


class Apart(nn.Module):
    """Stacked experts as Linear modules."""

    def __init__(self, stacked):
        super().__init__()
        self.gate = stacked._apply_gate
        for name in ("gate_up_proj", "down_proj"):
            linears = []
            for i, W in enumerate(getattr(stacked, name).detach()):
                W = W.t() if stacked.is_transposed else W
                linear = nn.Linear(W.shape[1], W.shape[0], bias=stacked.has_bias)
                linear.weight = nn.Parameter(W.clone())
                if stacked.has_bias:
                    linear.bias = nn.Parameter(getattr(stacked, f"{name}_bias")[i].detach().clone())
                linears.append(linear)
            setattr(self, name, nn.ModuleList(linears))

    def forward(self, x, chosen, weights):
        result = torch.zeros_like(x)
        for i in chosen.unique().tolist():
            token, place = torch.where(chosen == i)
            inner = self.gate(self.gate_up_proj[i](x[token]))
            result.index_add_(0, token, self.down_proj[i](inner) * weights[token, place, None])
        return result


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_stacked_experts_are_scored_as_linear_modules_are(kind, texts):
    model, tokenizer, thresholds = mixture(kind), word_tokenizer(), (1.5, 2.0, 4.0)
    implementation = model.get_experts_implementation()
    found = htsr.measure_outliers(model, tokenizer, texts, thresholds=thresholds)
    assert model.get_experts_implementation() == implementation
    for layer in model.model.layers:
        layer.mlp.experts = Apart(layer.mlp.experts)
    apart = htsr.measure_outliers(model, tokenizer, texts, thresholds=thresholds, batch_size=1)
    twins = {row.name.replace("[", ".").rstrip("]"): row for row in found.rows}
    assert twins.keys() == {row.name for row in apart.rows}
    assert sum("experts" in name for name in twins) == 2 * 2 * 4
    for row in apart.rows:
        twin = twins[row.name]
        assert (twin.role, twin.block, twin.parameters) == (row.role, row.block, row.parameters)
        assert twin.mean_score == pytest.approx(row.mean_score, rel=1e-4)
        np.testing.assert_allclose(twin.counts, row.counts, atol=2)
        np.testing.assert_allclose(twin.block_counts, row.block_counts, atol=2)
    for threshold in thresholds:
        np.testing.assert_allclose(found.distribution(threshold), apart.distribution(threshold), rtol=1e-3)


def test_batch_size_and_padding_do_not_matter(texts):
    model, tokenizer = llama(), word_tokenizer()
    results = []
    for size in (1, 2, 7):
        with input_norms(model) as norms:
            for start in range(0, len(texts), size):
                batch = tokenizer(texts[start : start + size], return_tensors="pt", padding=True)
                norms.forward(batch["input_ids"], batch["attention_mask"])
        results.append(norms.result())
    for other in results[1:]:
        for name, norm in results[0].items():
            np.testing.assert_allclose(other[name], norm, rtol=2e-6)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_save_and_load(tmp_path, texts):
    found = htsr.measure_outliers(llama(), word_tokenizer(), texts, thresholds=[2, 3])
    found.save(tmp_path / "outliers.json")
    assert htsr.Outliers.load(tmp_path / "outliers.json") == found
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(htsr.SourceError, match="not a file of outliers"):
        htsr.Outliers.load(tmp_path / "broken.json")
    content = json.loads((tmp_path / "outliers.json").read_text())
    for key, value in (("block", 99), ("counts", [1]), ("parameters", 0), ("block_counts", [])):
        rows = [content["rows"][0] | {key: value}, *content["rows"][1:]]
        (tmp_path / "broken.json").write_text(json.dumps(content | {"rows": rows}))
        with pytest.raises(htsr.SourceError, match="not a file of outliers"):
            htsr.Outliers.load(tmp_path / "broken.json")
    with pytest.raises(htsr.UsageError, match="τ = 2, 3, not at 13"):
        found.distribution(13.0)


def test_what_is_not_finite_is_named(texts):
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("inf")
    with pytest.raises(htsr.HtsrError, match=r"layers\.1\.mlp\.down_proj holds NaN or infinite activations"):
        htsr.measure_outliers(model, word_tokenizer(), texts)
    with pytest.raises(htsr.UsageError, match="empty"):
        htsr.measure_outliers(model, word_tokenizer(), [])


def test_blocks_are_found_by_structure():
    assert find_blocks(llama()).names == ("model.layers.0", "model.layers.1", "model.layers.2")
    assert find_blocks(gpt2()).index_of("h.1.attn.c_attn.weight") == 1
    assert find_blocks(bert()).index_of("encoder.layer.0.output.dense.weight") == 0
    assert find_blocks(bert()).index_of("embeddings.word_embeddings.weight") is None

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(9))

    model = nn.Module()
    model.encoder, model.decoder = (nn.ModuleList(Experts() for _ in range(2)) for _ in range(2))
    model.short = nn.ModuleList([nn.Linear(2, 2)])
    assert find_blocks(model).names == ("encoder.0", "encoder.1", "decoder.0", "decoder.1")
    assert find_blocks(model).index_of("decoder.1.experts.8.weight") == 3
    with pytest.raises(htsr.SourceError, match=r"no nn\.ModuleList"):
        find_blocks(nn.Linear(2, 2))


def test_command(capsys, tmp_path, texts):
    pytest.importorskip("matplotlib")
    llama().save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    saved, picture = tmp_path / "outliers.json", tmp_path / "outliers.png"
    args = ["outliers", tmp_path / "model", "--data", data, "--threshold", 2, "--threshold", 3]
    code = main([str(a) for a in [*args, "--save", saved, "--picture", picture, "--samples", 5]])
    out, err = capsys.readouterr()
    assert code == 0
    assert "model.layers.2" in out
    assert "5 samples" in err
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert main([str(a) for a in [*args, "--samples", 5, "-q"]]) == 0
    assert capsys.readouterr() == (out, "")
    found = htsr.Outliers.load(saved)
    assert found.thresholds == (2.0, 3.0)
    assert found.distribution(2.0).shape == (3,)
    assert main(["outliers", str(tmp_path / "model"), "--data", str(tmp_path / "none.jsonl")]) == 1
    assert capsys.readouterr().err.endswith("none.jsonl cannot be read: No such file or directory\n")


def test_records_and_their_text(tmp_path):
    (tmp_path / "a.txt").write_text("one\nline\n\n\n two\n")
    assert read_records(str(tmp_path / "a.txt")) == [{"text": "one\nline"}, {"text": "two"}]
    assert text_of({"prompt": "a", "completion": " b"}) == "a b"
    assert text_of({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}) == "a\nb"
    question = {"question": "Why?", "choices": ["x", "y"], "answer": 1}
    assert text_of(question) == "Question: Why?\nAnswer: y"
    with pytest.raises(htsr.SourceError, match="no index of the choices"):
        text_of(question | {"answer": 2})
    with pytest.raises(htsr.SourceError, match="this one has other"):
        text_of({"other": 1})
    (tmp_path / "b.jsonl").write_text('{"text": "a"}\n[1]\n')
    with pytest.raises(htsr.SourceError, match="line 2: a JSON object is wanted, not a list"):
        read_records(str(tmp_path / "b.jsonl"))
    assert resolve("package:htsr/py.typed").endswith("htsr/py.typed")
    with pytest.raises(htsr.SourceError, match="carries no nothing"):
        resolve("package:htsr/nothing")


def test_texts_that_a_model_cannot_take():
    with pytest.raises(htsr.SourceError, match=r"makes token 63 of the texts, and the model's embedding has 60 rows"):
        htsr.measure_outliers(llama(vocabulary=60), word_tokenizer(), ["w4 w63"])
    with pytest.raises(htsr.HtsrError, match="does not run on the samples from 1 on, 300 tokens each"):
        htsr.measure_outliers(gpt2(), word_tokenizer(), ["w5 " * 300])  # it has 256 positions


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--picture", "a.foo"], 2, "the picture a.foo is one of .png, .svg, .pdf"),
        (["--picture", "no/a.png"], 1, "no/a.png cannot be written: the folder no does not exist"),
        (["--save", "no/a.json"], 1, "no/a.json cannot be written: the folder no does not exist"),
        (["--threshold", "nan"], 2, "thresholds are positive multiples"),
        (["--threshold", "0"], 2, "thresholds are positive multiples"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_loaded(capsys, options, code, message):
    assert main(["outliers", "no/model", "--data", "no.jsonl", *options]) == code
    assert message in capsys.readouterr().err


def test_thresholds_and_progress(texts):
    for thresholds in ([], [0.0, 5.0], [-1.0], [float("nan")], [float("inf")]):
        with pytest.raises(htsr.UsageError, match="positive multiples of the mean"):
            htsr.measure_outliers(llama(2), word_tokenizer(), texts, thresholds=thresholds)
    seen = []
    htsr.measure_outliers(
        llama(2), word_tokenizer(), texts[:3], batch_size=2, progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(2, 3), (3, 3)]
