"""Adapter folders, as PEFT writes them, against PEFT's own arithmetic."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import htsr

peft = pytest.importorskip("peft")


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    return transformers.LlamaForCausalLM(config).eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2)).eval()


class Convolutions(nn.Module):
    config = transformers.PretrainedConfig()

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


CASES = {
    "linear": (llama, {"target_modules": ["q_proj", "down_proj"]}),
    "rank-stabilised": (llama, {"target_modules": ["q_proj"], "use_rslora": True}),
    "patterns": (
        llama,
        {
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 5, "v_proj": 2},
            "alpha_pattern": {"v_proj": 16, "^model.layers.0.self_attn.q_proj": 1},
        },
    ),
    "embedding": (llama, {"target_modules": ["embed_tokens"]}),
    "embedding and linear": (llama, {"target_modules": ["embed_tokens", "k_proj"]}),
    "conv1d of gpt2": (gpt2, {"target_modules": ["c_attn", "mlp.c_fc"], "fan_in_fan_out": True}),
    "convolution": (Convolutions, {"target_modules": ["first", "second"]}),
}


def saved(folder, case: str, **changes):
    """An adapter with random values: its folder as text, the PeftModel, and W before it."""
    make, options = CASES[case]
    model = make()
    torch.manual_seed(1)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(**{"r": 3, "lora_alpha": 7, "init_lora_weights": False} | options | changes)
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "magnitude" in name:
                parameter *= torch.rand_like(parameter) + 0.5
    adapted.save_pretrained(folder)
    return str(folder), adapted


def kept(matrices) -> dict[str, np.ndarray]:
    return {m.name: np.array(m.read()) for m in matrices}


@pytest.mark.parametrize("case", CASES)
def test_delta_is_pefts_own(tmp_path, case):
    folder, adapted = saved(tmp_path / "adapter", case)
    expected = {
        name.removeprefix("base_model.model."): layer.get_delta_weight("default").detach()
        for name, layer in adapted.named_modules()
        if hasattr(layer, "get_delta_weight")
    }
    for name in [name for name in expected if name.endswith("c_attn")]:
        expected |= {
            f"{name}[{part}]": third for part, third in zip("qkv", expected.pop(name).chunk(3, 1), strict=True)
        }
    found = htsr.describe(folder)
    assert sorted(m.name for m in found) == sorted(expected)
    for matrix in found:
        delta = expected[matrix.name]
        values = np.asarray(matrix.read())
        if delta.ndim == 4:
            delta = delta.flatten(2).permute(2, 0, 1)  # kernel positions first
        np.testing.assert_allclose(values.reshape(delta.shape), delta.numpy(), rtol=0, atol=2e-6)
        assert matrix.kind in ("adapter", "conv")
    ranks = {m.name: int(np.linalg.matrix_rank(np.asarray(m.read()).reshape(m.pieces, *m.shape)[0])) for m in found}
    for matrix in found:
        if matrix.pieces == 1:
            assert matrix.warning == f"ΔW of rank {ranks[matrix.name]}"


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("case", CASES)
def test_on_its_base_it_is_the_merged_model(tmp_path, case, dora):
    make, _ = CASES[case]
    base = make()
    if case == "convolution":
        (tmp_path / "base").mkdir()
        save_file(base.state_dict(), tmp_path / "base" / "model.safetensors")
    else:
        base.save_pretrained(tmp_path / "base")
    folder, adapted = saved(tmp_path / "adapter", case, use_dora=dora)
    found = htsr.describe(folder, base=str(tmp_path / "base"))
    alone = htsr.describe(str(tmp_path / "base"))
    assert [(m.name, m.shape, m.role, m.block) for m in found] == [(m.name, m.shape, m.role, m.block) for m in alone]
    values = kept(found)
    merged = adapted.merge_and_unload()
    if hasattr(merged, "transformer") or hasattr(merged, "model"):
        merged.save_pretrained(tmp_path / "merged")
    else:
        (tmp_path / "merged").mkdir()
        save_file(merged.state_dict(), tmp_path / "merged" / "model.safetensors")
    expected = kept(htsr.describe(str(tmp_path / "merged")))
    assert values.keys() == expected.keys()
    for name in values:
        np.testing.assert_allclose(values[name], expected[name], rtol=0, atol=1e-5, err_msg=name)
    assert max(np.abs(values[m.name] - np.asarray(m.read())).max() for m in alone) > 1e-2


def test_an_embedding_that_was_resized_before_it_was_adapted(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    model = llama()
    model.resize_token_embeddings(50)
    lora = peft.LoraConfig(r=3, target_modules=["embed_tokens"], modules_to_save=["lm_head"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, lora)
    adapted.save_pretrained(tmp_path / "adapter")
    found = kept(htsr.describe(str(tmp_path / "adapter"), base=str(tmp_path / "base")))
    merged = adapted.merge_and_unload()
    np.testing.assert_allclose(found["model.embed_tokens"], merged.model.embed_tokens.weight.detach(), atol=1e-5)
    np.testing.assert_array_equal(found["lm_head"], merged.lm_head.weight.detach())


def test_dora_without_its_base_has_rows_that_say_so(tmp_path):
    folder, _ = saved(tmp_path, "linear", use_dora=True)
    rows = htsr.analyze(folder, device="cpu").rows
    assert {row.status for row in rows} == {"needs_base"}
    assert "layers.0.self_attn.q_proj is a DoRA module" in " ".join(row.warning for row in rows)


def test_modules_to_save_come_along(tmp_path):
    folder, adapted = saved(tmp_path / "adapter", "linear", modules_to_save=["lm_head"])
    assert sum("lm_head" in m.name for m in htsr.describe(folder)) == 1
    llama().save_pretrained(tmp_path / "base")
    with torch.no_grad():
        adapted.base_model.model.lm_head.modules_to_save["default"].weight.fill_(3.0)
    adapted.save_pretrained(folder)
    assert (kept(htsr.describe(folder, base=str(tmp_path / "base")))["lm_head"] == 3).all()


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_an_adapter_against_a_model_is_its_base_with_it_less_the_model(tmp_path, dora):
    """ΔW less W has no meaning, nor has a table in which some rows are ΔW and others are W."""
    folder, adapted = saved(tmp_path / "adapter", "linear", modules_to_save=["lm_head"], use_dora=dora)
    with torch.no_grad():
        adapted.base_model.model.lm_head.modules_to_save["default"].weight.mul_(1.5)
    adapted.save_pretrained(folder)
    base, other = str(tmp_path / "base"), str(tmp_path / "other")
    llama().save_pretrained(base)
    twice = llama()
    with torch.no_grad():
        for parameter in twice.parameters():
            parameter *= 2
    twice.save_pretrained(other)
    with pytest.raises(htsr.UsageError, match="names no base model"):
        htsr.describe(folder, against=base)
    alone = {m.name.removeprefix("model."): m for m in htsr.describe(folder)}
    assert alone["lm_head"].problem[0] == "needs_base"
    change_config(tmp_path / "adapter", base_model_name_or_path=base)
    merged = adapted.merge_and_unload().state_dict()

    def less(model, name):
        return merged[f"{name}.weight"] - model.state_dict()[f"{name}.weight"]

    for model, against in ((llama(), base), (twice, other)):
        found = kept(htsr.describe(folder, against=against))
        assert len(found) == 16
        back = kept(htsr.describe(against, against=folder))
        for name, values in found.items():
            np.testing.assert_allclose(values, less(model, name).numpy(), rtol=0, atol=2e-6, err_msg=name)
            np.testing.assert_allclose(back[name], -values, rtol=0, atol=2e-6, err_msg=name)
    changes = kept(htsr.describe(folder))
    assert sorted(name.removeprefix("model.") for name in changes) == sorted(alone)
    for name, values in changes.items():
        whole = name if name.startswith(("model.", "lm_head")) else f"model.{name}"
        np.testing.assert_allclose(values, less(llama(), whole).numpy(), rtol=0, atol=2e-6, err_msg=name)
    assert {m.kind for m in htsr.describe(folder)} == {"adapter"}
    assert not any(np.abs(values).max() for values in kept(htsr.describe(folder, against=folder)).values())


@pytest.mark.parametrize("start", [True, "pissa"])
def test_a_tied_head_that_an_adapter_saves_beside_its_embedding_counts_once(tmp_path, start):
    config = transformers.LlamaConfig(
        vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    base, folder = str(tmp_path / "base"), tmp_path / "adapter"
    model.save_pretrained(base)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=start)
    peft.get_peft_model(model, lora).save_pretrained(folder)
    change_config(folder, base_model_name_or_path=base, modules_to_save=["embed_tokens", "lm_head"])
    before = load_file(f"{base}/model.safetensors")["model.embed_tokens.weight"]
    table, stored = before + 0.1, load_file(folder / "adapter_model.safetensors")

    def save(**names):
        more = {f"base_model.model.{name}.weight": tensor.clone() for name, tensor in names.items()}
        save_file(stored | more, folder / "adapter_model.safetensors")

    save(**{"model.embed_tokens": table, "lm_head": table})
    for more in ({}, {"base": base}, {"against": base}):
        found = [m for m in htsr.describe(str(folder), **more) if "embed" in m.name or "head" in m.name]
        assert [m.name for m in found] == ["model.embed_tokens"]
        np.testing.assert_allclose(found[0].read(), table if "base" in more else table - before, atol=1e-6)
    change_config(folder, modules_to_save=["lm_head"])
    save(lm_head=2 * before)  # no longer tied: it was the embedding
    for more in ({}, {"against": base}):
        (head,) = (m for m in htsr.describe(str(folder), **more) if m.name == "lm_head")
        np.testing.assert_allclose(head.read(), before, atol=1e-6)


def test_the_base_that_the_adapter_names(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    folder, _ = saved(tmp_path / "adapter", "linear")
    with pytest.raises(htsr.UsageError, match="names no base model; say which one it is"):
        htsr.describe(folder, base="auto")
    change_config(tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "base"))
    named, given = htsr.describe(folder, base="auto"), htsr.describe(folder, base=str(tmp_path / "base"))
    assert [m.name for m in named] == [m.name for m in given]
    assert named.fingerprint == given.fingerprint != htsr.describe(folder).fingerprint
    loaded = htsr.describe(folder, base=llama())
    np.testing.assert_allclose(kept(named)["lm_head"], kept(loaded)["lm_head"])
    q = "model.layers.0.self_attn.q_proj"
    np.testing.assert_allclose(kept(named)[q], kept(loaded)[q])


def test_a_base_without_its_head(tmp_path):
    """A base that was saved without its task head has names without the leading ``model.``."""
    llama().model.save_pretrained(tmp_path / "base")
    folder, adapted = saved(tmp_path / "adapter", "linear")
    found = kept(htsr.describe(folder, base=str(tmp_path / "base")))
    merged = adapted.merge_and_unload().state_dict()
    np.testing.assert_allclose(
        found["layers.1.mlp.down_proj"], merged["model.layers.1.mlp.down_proj.weight"].numpy(), atol=1e-5
    )


def change_config(folder, **changes) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        ("method", r"is a IA3 adapter, whose change is computed on its base: give the base \(base=…"),
        ("prompts", "is a PREFIX_TUNING adapter: it adds to the input and changes no weight"),
        ("no weights", "has no adapter_model.safetensors"),
        ("no B", "lora_A.weight has no B beside it"),
        ("no JSON", "adapter_config.json is not readable JSON"),
        ("truncated", "is not a readable safetensors file, truncated perhaps"),
    ],
)
def test_adapters_that_cannot_be_read(tmp_path, spoil, sentence):
    folder, _ = saved(tmp_path, "linear")
    weights = tmp_path / "adapter_model.safetensors"
    if spoil == "method":
        change_config(tmp_path, peft_type="IA3")
    elif spoil == "prompts":
        change_config(tmp_path, peft_type="PREFIX_TUNING")
    elif spoil == "no weights":
        weights.unlink()
    elif spoil == "no B":
        save_file({name: t for name, t in load_file(weights).items() if "lora_A" in name}, weights)
    elif spoil == "no JSON":
        (tmp_path / "adapter_config.json").write_text("{")
    else:
        weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(htsr.SourceError, match=sentence):
        htsr.describe(folder)


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        ({"other.layers.0.mlp.gate_proj.weight": (4, 4)}, "matches 0 tensors of the base model, not one"),
        ({"model.layers.0.mlp.down_proj.weight": (4, 24)}, r"\(4, 24\) in the base model and \(16, 24\)"),
        (
            {"a.model.layers.0.mlp.down_proj.weight": (16, 24), "b.model.layers.0.mlp.down_proj.weight": (16, 24)},
            "matches 2 tensors of the base model, not one",
        ),
    ],
)
def test_a_base_that_does_not_fit(tmp_path, names, sentence):
    folder, _ = saved(tmp_path, "linear")
    with pytest.raises(htsr.SourceError, match=sentence):
        htsr.describe(folder, base={name: torch.ones(shape) for name, shape in names.items()})


def test_a_b_of_another_rank_spoils_one_row(tmp_path):
    folder, _ = saved(tmp_path, "linear")
    weights = tmp_path / "adapter_model.safetensors"
    state = load_file(weights)
    state["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"] = torch.ones(16, 2)
    save_file(state, weights)
    status = {row.name: row.status for row in htsr.analyze(folder, device="cpu")}
    assert status.pop("model.layers.0.self_attn.q_proj") == "unreadable"
    assert set(status.values()) == {"tiny"}  # read, but of rank 4


def test_adapted_parameters_are_told(tmp_path):
    config = transformers.MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])
    peft.get_peft_model(transformers.MixtralModel(config), lora).save_pretrained(tmp_path)
    rows = {row.name: row for row in htsr.analyze(str(tmp_path), device="cpu")}
    (name,) = (name for name in rows if "experts" in name)
    assert rows[name].status == "needs_base"
    assert "it adapts parameters, not layers: analyze it with base=…" in rows[name].warning
    assert rows["layers.0.self_attn.q_proj"].status == "zero"  # B starts at zero


def test_the_file_of_an_adapter_means_its_folder(tmp_path):
    """Given alone, its A and B were two unrelated matrices."""
    folder, _ = saved(tmp_path / "adapter", "linear")
    llama().save_pretrained(tmp_path / "base")
    file = f"{folder}/adapter_model.safetensors"
    for base in (None, str(tmp_path / "base")):
        of_file, of_folder = kept(htsr.describe(file, base=base)), kept(htsr.describe(folder, base=base))
        assert of_file.keys() == of_folder.keys()
        assert all(np.array_equal(of_file[name], of_folder[name]) for name in of_file)


@pytest.mark.parametrize("writer", ["peft", "diffusers", "state dict of a PeftModel", "lycoris"])
def test_factors_without_their_configuration_are_no_matrices(tmp_path, writer):
    _, adapted = saved(tmp_path / "adapter", "linear")
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    if writer == "diffusers":
        factors = {name.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): t for name, t in factors.items()}
    if writer == "lycoris":
        factors = {"up.hada_w1_a": torch.ones(8, 2), "up.hada_w1_b": torch.ones(2, 8), "up.alpha": torch.tensor(1.0)}
    whole = dict(adapted.state_dict()) if writer.startswith("state") else factors
    save_file({name: t.contiguous().clone() for name, t in whole.items()}, tmp_path / "x.safetensors")
    rows = list(htsr.analyze(str(tmp_path / "x.safetensors"), device="cpu", null=False))
    bad = [row for row in rows if row.status == "adapter"]
    assert len(bad) == (2 if writer == "lycoris" else len(factors))
    assert "is a part of an adapter, no weight" in bad[0].warning
    assert all(row.status == "ok" for row in rows if row not in bad)
    assert len(rows) - len(bad) == (len(kept(htsr.describe(llama()))) if writer.startswith("state") else 0)


def test_kohyas_files_hold_their_scaling(tmp_path):
    torch.manual_seed(0)
    down, up, kernel = torch.randn(4, 12), torch.randn(10, 4), torch.randn(4, 6, 3, 3)
    state = {
        "lora_unet_to_q.lora_down.weight": down, "lora_unet_to_q.lora_up.weight": up,
        "lora_unet_to_q.alpha": torch.tensor(2.0),
        "lora_unet_conv.lora_down.weight": kernel, "lora_unet_conv.lora_up.weight": up[..., None, None].clone(),
        "lora_unet_conv.alpha": torch.tensor(4.0),
    }  # fmt: skip
    save_file(state, tmp_path / "x.safetensors")
    analysis = htsr.analyze(str(tmp_path / "x.safetensors"), device="cpu", null=False)
    assert [row.name for row in analysis] == ["lora_unet_conv", "lora_unet_to_q"]
    assert analysis["lora_unet_to_q"].matrix_rank == 4
    found = kept(htsr.describe(str(tmp_path / "x.safetensors")))
    np.testing.assert_allclose(found["lora_unet_to_q"], 2 / 4 * up @ down, atol=1e-5)
    dense = torch.einsum("or,rikl->klio", up, kernel).reshape(9, 6, 10).transpose(1, 2)
    np.testing.assert_allclose(found["lora_unet_conv"], dense, atol=1e-5)
    with pytest.raises(htsr.UsageError, match="is an adapter: merge it into its base model first"):
        htsr.project(str(tmp_path / "x.safetensors"), str(tmp_path / "out"), 2)


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_and_an_embedding_that_were_resized_and_saved_whole(tmp_path, tied):
    """Refused whole with its base, and without it the head was there twice under one name."""
    from htsr.matrices.adapters import adapter_changes, merged_with_base
    from htsr.matrices.checkpoint_files import folder_tensors

    model = llama()
    model.config.tie_word_embeddings = tied
    model.tie_weights()
    model.save_pretrained(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(50)
    lora = peft.LoraConfig(
        r=3, target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"], init_lora_weights=False
    )
    adapted = peft.get_peft_model(model, lora)
    with torch.no_grad():
        adapted.base_model.model.lm_head.modules_to_save["default"].weight.fill_(3.0)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    alone = [m.name for m in htsr.describe(str(tmp_path / "adapter"))]
    assert len(alone) == len(set(alone)) == 4
    folder = tmp_path / "adapter"
    tensors = {e.name: e for e in merged_with_base(adapter_changes(folder), folder_tensors(tmp_path / "base"))}
    assert (np.asarray(tensors["lm_head.weight"].read()) == 3).all()
    assert tensors["model.embed_tokens.weight"].shape == tensors["lm_head.weight"].shape == (50, 16)
    merged = dict(adapted.merge_and_unload().named_parameters())
    for name in ("model.layers.1.self_attn.q_proj.weight", "lm_head.weight"):
        np.testing.assert_allclose(tensors[name].read(), merged[name].detach(), atol=1e-6)


@pytest.mark.parametrize("dora", [False, True])
def test_a_change_that_depends_on_the_base_is_taken_on_the_one_it_names(tmp_path, dora):
    llama().save_pretrained(tmp_path / "base")
    options = {"use_dora": True, "init_lora_weights": False} if dora else {"init_lora_weights": "pissa"}
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=["q_proj"], **options))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter += 0.1 * torch.randn_like(parameter)
    adapted.save_pretrained(tmp_path / "adapter")
    found = {m.name: m for m in htsr.describe(str(tmp_path / "adapter"))}
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    merged = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").merge_and_unload()
    assert list(found) == [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    for name, matrix in found.items():
        change = merged.get_submodule(name).weight.detach() - llama().get_submodule(name).weight.detach()
        np.testing.assert_allclose(matrix.read(), change, atol=1e-5)
        assert matrix.warning == f"ΔW on {tmp_path / 'base'}"
    before = htsr.describe(str(tmp_path / "adapter")).fingerprint
    with torch.no_grad():
        plain.get_submodule(next(iter(found))).weight.mul_(2)
    plain.save_pretrained(tmp_path / "base")
    assert htsr.describe(str(tmp_path / "adapter")).fingerprint != before
    change_config(tmp_path / "adapter", base_model_name_or_path=None)
    rows = htsr.analyze(str(tmp_path / "adapter"), device="cpu").rows
    assert {row.status for row in rows} == {"needs_base"}


def test_trained_tokens_alone_are_told(tmp_path):
    lora = peft.LoraConfig(r=3, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [1, 2]})
    model = peft.get_peft_model(llama(), lora)
    model.save_pretrained(tmp_path)
    rows = {row.name: row for row in htsr.analyze(str(tmp_path), device="cpu")}
    assert rows["model.embed_tokens"].status == "needs_base"
    assert "has 2 rows that replace its base's" in rows["model.embed_tokens"].warning
    assert rows["model.layers.0.self_attn.q_proj"].status == "zero"


def test_a_change_on_a_half_precision_base_is_not_taken_for_its_rounding(tmp_path):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=48, hidden_size=96, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    options = {"boft_block_size": 4, "target_modules": ["q_proj"]}
    adapted = peft.get_peft_model(model, peft.BOFTConfig(**options))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 1e-3 * torch.randn_like(parameter)
    adapted.save_pretrained(tmp_path / "adapter")
    (row,) = htsr.analyze(str(tmp_path / "adapter"), device="cpu", null=False)
    assert row.stored == "float32"
    assert row.matrix_rank == 96
