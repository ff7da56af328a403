import json

import numpy as np
import pytest
import torch
from htsr_cli.main import main
from safetensors.torch import load_file, save_file

import htsr
from htsr.errors import SourceError, UsageError
from htsr.spectra.denoising import denoise, intruders
from tests.models import save_folder, state_dict
from tests.transformer import llama


def tensors(folder):
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def fine_tuned(state, seed=1, dtype=torch.float32):
    """A change of two strong directions and noise for each tensor of two axes, and a small one for all others."""
    draw = torch.Generator().manual_seed(seed)
    found = {}
    for name, W in state.items():
        change = 0.002 * torch.randn(W.shape, generator=draw)
        if W.ndim == 2:
            left, right = (torch.randn(size, 2, generator=draw) for size in W.shape)
            change += 0.02 * left @ right.T
        found[name] = (W + change).to(dtype)
    return found


@pytest.fixture
def models(tmp_path):
    """A base and its fine-tuned model."""
    state = state_dict(2)
    base, tuned = (tmp_path / name for name in ("base", "tuned"))
    save_folder(base, state)
    save_folder(tuned, fine_tuned(state))
    return tuned, base


def test_each_matrix_is_its_base_and_what_is_left_of_the_change(models, tmp_path):
    tuned, base = models
    found = htsr.repair(tuned, base, tmp_path / "out")
    old, new, after = (tensors(folder) for folder in (base, tuned, tmp_path / "out"))
    assert {row.status for row in found.matrices} == {"ok"}
    for row in found.matrices:
        name = f"{row.name}.weight"
        expected = denoise(new[name] - old[name])
        assert (row.kept, row.total) == (2, expected.total)
        torch.testing.assert_close(after[name], old[name] + expected.matrix)
        left, change = after[name] - old[name], new[name] - old[name]
        assert row.norm_kept == pytest.approx(float((left.norm() / change.norm()) ** 2), rel=1e-4)
        assert row.relative == pytest.approx(float(change.norm() / old[name].norm()), rel=1e-5)
    norms = [name for name in new if "norm" in name]
    assert found.others == len(norms) == 2
    assert all(torch.equal(after[name], new[name]) for name in norms)
    record = json.loads((tmp_path / "out" / "htsr_repair.json").read_text())
    assert record["method"]["name"] == "denoise"
    assert record["matrices"] == found.records()


@pytest.mark.parametrize("factor", [0, 0.25, 1])
def test_interpolation_is_the_line_between_the_two_in_every_tensor(models, tmp_path, factor):
    tuned, base = models
    found = htsr.repair(tuned, base, tmp_path / "out", "interpolate", factor=factor)
    old, new, after = (tensors(folder) for folder in (base, tuned, tmp_path / "out"))
    for name in new:
        exact = {0: old, 1: new}.get(factor)
        expected = exact[name] if exact else old[name] + factor * (new[name] - old[name])
        torch.testing.assert_close(after[name], expected, rtol=0, atol=0 if exact else 1e-7)
    assert found.norm_kept == pytest.approx(factor**2)
    only = htsr.repair(tuned, base, tmp_path / "some", "interpolate", where=htsr.Filter(roles="mlp.*"))
    assert not only.others_changed
    after = tensors(tmp_path / "some")
    assert torch.equal(after["model.layers.0.input_layernorm.weight"], new["model.layers.0.input_layernorm.weight"])


def test_the_share_that_is_left_says_of_which_matrices(models, tmp_path):
    tuned, base = models
    whole = htsr.repair(tuned, base, method="interpolate", factor=0.5)
    assert whole.remarks()[0] == "25.0% of ‖ΔW‖² is left, summed over all 9 matrices"
    found = htsr.repair(tuned, base, tmp_path / "out", "interpolate", factor=0.5, where=htsr.Filter(roles="mlp.*"))
    assert found.norm_kept == pytest.approx(0.25)
    said, rest = found.remarks()[0].split("; ")
    assert said == "25.0% of ‖ΔW‖² is left, summed over 4 of the model's 9 matrices"
    assert rest == "what of the 5 not chosen has changed is kept whole"
    record = json.loads((tmp_path / "out" / "htsr_repair.json").read_text())
    assert (record["compared"], record["chosen"], record["in_model"]) == (4, 4, 9)
    state = tensors(tuned)
    one = htsr.Filter(include="*layers.1.mlp.up_proj")
    state["model.layers.1.mlp.up_proj.weight"] = tensors(base)["model.layers.1.mlp.up_proj.weight"]
    save_file(state, tuned / "model.safetensors")
    same = htsr.repair(tuned, base, where=one)  # of the others nothing is said
    assert same.remarks()[0] == "no matrix of those chosen has changed, there is nothing to repair in them"
    state["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(state, tuned / "model.safetensors")
    broken = htsr.repair(tuned, base, method="interpolate")
    assert "over 8 of the model's 9 matrices; of 1 the change is not known" in broken.remarks()[0]


def test_what_an_adapters_rank_does_not_hold_is_not_left(adapter):
    found = htsr.repair(*adapter, method="intruders", factor=0.3)
    before = sum(row.change_norm**2 for row in found.matrices)
    left = sum(row.change_norm**2 * row.norm_kept * (1 - (row.norm_lost or 0)) for row in found.matrices)
    assert any(row.norm_lost for row in found.matrices)
    assert found.norm_kept == pytest.approx(left / before)


def test_folders_with_weights_of_their_own_are_left_out_and_named(models, tmp_path):
    tuned, base = models
    for inside, name in (("adapter", "adapter_model.safetensors"), ("runs/checkpoint-5", "model.safetensors")):
        (tuned / inside).mkdir(parents=True)
        (tuned / inside / "config.json").write_text("{}")
        save_file({"w": torch.ones(2)}, tuned / inside / name)
    for inside in ("1_Pooling", "2_Dense"):
        (tuned / inside).mkdir()
        (tuned / inside / "config.json").write_text("{}")
    save_file({"w": torch.ones(2)}, tuned / "2_Dense" / "model.safetensors")
    paths = ["", "1_Pooling", "2_Dense"]
    (tuned / "modules.json").write_text(json.dumps([{"idx": i, "path": path} for i, path in enumerate(paths)]))
    left_out = ["adapter", "runs/checkpoint-5"]
    found = htsr.repair(tuned, base, tmp_path / "repaired")
    surgery = htsr.project(tuned, tmp_path / "projected", 4)
    for folder, result in ((tmp_path / "repaired", found), (tmp_path / "projected", surgery)):
        files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        record = {name for name in files if name.startswith("htsr_")}
        modules = {"modules.json", "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"}
        assert files - record == {"model.safetensors"} | modules
        assert json.loads((folder / record.pop()).read_text())["folders_left_out"] == left_out
        assert list(result.facts()["folders_left_out"]) == left_out
        assert any("not copied: adapter, runs/checkpoint-5" in remark for remark in result.remarks())


def test_the_other_methods(models, tmp_path):
    tuned, base = models
    old, new = tensors(base), tensors(tuned)
    name = "model.layers.1.mlp.up_proj"
    change = new[f"{name}.weight"] - old[f"{name}.weight"]

    def after(method, **more):
        found = htsr.repair(tuned, base, tmp_path / method, method, **more)
        (row,) = [row for row in found.matrices if row.name == name]
        return tensors(tmp_path / method)[f"{name}.weight"] - old[f"{name}.weight"], row

    left, row = after("leading", k=1)
    U, S, Vt = torch.linalg.svd(change, full_matrices=False)
    torch.testing.assert_close(left, S[0] * torch.outer(U[:, 0], Vt[0]), atol=1e-6, rtol=1e-4)
    assert (row.kept, row.total) == (1, 32)
    left, row = after("ecs")
    torch.testing.assert_close(left, htsr.project_tail(change, "erg").matrix, atol=1e-6, rtol=1e-4)
    left, row = after("intruders", factor=0.0, k=5, epsilon=0.7)
    W = new[f"{name}.weight"]
    assert row.intruders_before == intruders(old[f"{name}.weight"], W, 5, 0.7) > row.intruders_after
    assert float((left - change).norm()) > 0.1 * float(change.norm())


def test_a_head_of_one_label_and_a_depthwise_kernel(tmp_path):
    shapes = {"score": (1, 32), "conv": (24, 1, 3, 3), "layers.0.up_proj": (20, 32)}
    state = {f"{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
    changed = {name: W + 0.1 * torch.randn(W.shape) for name, W in state.items()}
    save_folder(tmp_path / "base", state)
    save_folder(tmp_path / "tuned", changed)
    for method in ("denoise", "leading", "ecs", "intruders", "interpolate"):
        found = htsr.repair(tmp_path / "tuned", tmp_path / "base", tmp_path / method, method)
        statuses = {row.name: row.status for row in found.matrices}
        assert statuses["score"] in ({"no_ecs"} if method == "ecs" else {"ok", "kept"}), method
    rows = {row["name"]: row for row in htsr.compare(state, changed, directions=3).records()}
    assert rows["score"]["directions"] == rows["conv"]["directions"] == 1


def test_a_dry_run_says_the_same_and_writes_nothing(models, tmp_path):
    tuned, base = models
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    dry = htsr.repair(tuned, base, method="leading", k=1)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    wet = htsr.repair(tuned, base, tmp_path / "out", "leading", k=1)
    for a, b in zip(dry.matrices, wet.matrices, strict=True):
        assert (a.kept, a.norm_kept) == (b.kept, b.norm_kept)
        assert a.intruders_before is not None
    assert any("nothing is written" in remark for remark in dry.remarks())
    assert (dry.others, dry.norm_kept) == (wet.others, wet.norm_kept)


def test_transformers_loads_it_tied_and_in_bfloat16(tmp_path):
    model = llama(tie_word_embeddings=True).bfloat16()
    model.save_pretrained(tmp_path / "base")
    state = {k: v.float() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    model.load_state_dict(fine_tuned(state, dtype=torch.bfloat16), strict=False)
    model.save_pretrained(tmp_path / "tuned", max_shard_size="20KB")
    assert len(list((tmp_path / "tuned").glob("*.safetensors"))) > 1
    found = htsr.repair(tmp_path / "tuned", tmp_path / "base", tmp_path / "out")
    assert {row.status for row in found.matrices} == {"ok"}
    assert all(row.kept <= 3 for row in found.matrices)
    loaded = type(model).from_pretrained(tmp_path / "out", dtype="auto")
    assert loaded.dtype == torch.bfloat16
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    for name, W in loaded.state_dict().items():
        if W.ndim == 2 and name != "lm_head.weight":
            change = model.state_dict()[name].float() - state[name]
            expected = (state[name] + denoise(change).matrix).bfloat16()
            torch.testing.assert_close(W, expected, atol=0, rtol=2**-7)


def test_parts_of_a_fused_tensor_are_repaired_one_by_one(tmp_path):
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=80, n_positions=16)
    model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path / "base")
    W = model.transformer.h[0].attn.c_attn.weight
    old = W.detach().clone()
    W.data += fine_tuned({"w": torch.zeros_like(W)})["w"]
    model.save_pretrained(tmp_path / "tuned")
    found = htsr.repair(tmp_path / "tuned", tmp_path / "base", tmp_path / "out")
    rows = {row.name: row for row in found.matrices}
    assert [rows[f"transformer.h.0.attn.c_attn[{part}]"].kept for part in "qkv"] == [2, 2, 2]
    assert {row.status for name, row in rows.items() if "c_attn" not in name} == {"unchanged"}
    after = tensors(tmp_path / "out")["transformer.h.0.attn.c_attn.weight"]
    k = slice(32, 64)
    torch.testing.assert_close(after[:, k], old[:, k] + denoise((W.detach() - old)[:, k]).matrix)


def test_experts_kernels_and_pytorch_files(tmp_path):
    draw = torch.Generator().manual_seed(0)
    base = {
        "layers.0.mlp.experts.up_proj.weight": torch.randn(3, 24, 40, generator=draw),
        "conv1.weight": torch.randn(20, 16, 2, 2, generator=draw),
        "step": torch.tensor(3),
    }
    strong = {name: torch.randn(*W.shape, generator=draw) for name, W in base.items() if W.ndim}
    tuned = {
        name: W + 0.01 * strong[name] + 0.3 * (name != "step") if name in strong else W for name, W in base.items()
    }
    for folder, state in (("base", base), ("tuned", tuned)):
        (tmp_path / folder).mkdir()
        torch.save(state, tmp_path / folder / "pytorch_model.bin")
    found = htsr.repair(tmp_path / "tuned", tmp_path / "base", tmp_path / "out")
    assert {(row.status, row.kept // (4 if row.name == "conv1" else 1)) for row in found.matrices} == {("ok", 1)}
    after = tensors(tmp_path / "out")
    name = "layers.0.mlp.experts.up_proj.weight"
    for before, new, expert in zip(base[name], tuned[name], after[name], strict=True):
        torch.testing.assert_close(expert, before + denoise(new - before).matrix)
    before, new, kernel = (state["conv1.weight"] for state in (base, tuned, after))
    torch.testing.assert_close(
        kernel[:, :, 1, 0], before[:, :, 1, 0] + denoise(new[:, :, 1, 0] - before[:, :, 1, 0]).matrix
    )
    assert after["step"] == 3


def test_names_may_differ_by_a_prefix_and_what_has_no_base_is_left(tmp_path):
    state = state_dict(1)
    save_folder(tmp_path / "base", {name.removeprefix("model."): W for name, W in state.items()})
    tuned = fine_tuned(state) | {"lm_head.weight": torch.randn(160, 32)}
    tuned["model.embed_tokens.weight"] = torch.randn(170, 32)
    save_folder(tmp_path / "tuned", tuned)
    found = htsr.repair(tmp_path / "tuned", tmp_path / "base", tmp_path / "out")
    rows = {row.name: row for row in found.matrices}
    assert rows["lm_head"].status == rows["model.embed_tokens"].status == "unmatched"
    assert "(170, 32) here and (160, 32)" in rows["model.embed_tokens"].warning
    assert rows["model.layers.0.mlp.up_proj"].status == "ok"
    after = tensors(tmp_path / "out")
    assert torch.equal(after["lm_head.weight"], tuned["lm_head.weight"])


def test_broken_numbers_are_a_row_and_equal_models_a_sentence(models, tmp_path):
    tuned, base = models
    state = tensors(tuned)
    state["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(state, tuned / "model.safetensors")
    for method in ("denoise", "interpolate"):
        found = htsr.repair(tuned, base, tmp_path / method, method)
        (row,) = [row for row in found.matrices if row.status == "nan"]
        assert row.name == "model.layers.0.mlp.up_proj"
        assert tensors(tmp_path / method)["model.layers.0.mlp.up_proj.weight"].isnan().sum() == 1
    same = htsr.repair(base, base)
    assert {row.status for row in same.matrices} == {"unchanged"}
    assert "the same weights" in same.remarks()[0]


def test_refusals(models, tmp_path):
    tuned, base = models
    with pytest.raises(UsageError, match="say what it was fine-tuned from"):
        htsr.repair(tuned, output=tmp_path / "out")
    for wrong in ({"method": "svd"}, {"k": 3}, {"method": "interpolate", "factor": -1}, {"method": "leading", "k": 0}):
        with pytest.raises(UsageError):
            htsr.repair(tuned, base, tmp_path / "out", **wrong)
    with pytest.raises(UsageError, match="exists already"):
        htsr.repair(tuned, base, base)
    with pytest.raises(UsageError, match="lies inside"):
        htsr.repair(tuned, base, base / "out")
    save_folder(tmp_path / "other", {"fc.weight": torch.ones(9, 9)})
    with pytest.raises(SourceError, match="in common"):
        htsr.repair(tuned, tmp_path / "other", tmp_path / "out")
    save_folder(tmp_path / "wide", state_dict(2, width=48))
    with pytest.raises(SourceError, match=r"no matrix of .*tuned has its shape in .*wide: model.* is \("):
        htsr.repair(tuned, tmp_path / "wide", tmp_path / "out")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(UsageError, match="no base model"):
        htsr.repair(tuned, tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_command_line(models, tmp_path, capsys):
    tuned, base = map(str, models)
    assert main(["repair", tuned, "--against", base, "--dry-run", "--role", "mlp.*"]) == 0
    out, err = capsys.readouterr()
    assert "mlp.up_proj" in out
    assert "q_proj" not in out
    assert "nothing is written, 4 of 4 matrices changed" in err
    assert main(["repair", tuned, "--against", base, "-o", str(tmp_path / "out"), "--format", "json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["method"]["name"] == "denoise"
    assert 0.9 < content["norm_kept"] < 1
    for wrong in ([], ["--dry-run", "-o", str(tmp_path / "more")], ["--dry-run", "--method", "more"]):
        assert main(["repair", tuned, "--against", base, *wrong]) == 2


@pytest.fixture
def adapter(tmp_path):
    """A LLaMA with a LoRA adapter that is strong enough to intrude."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = llama()
    model.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"])
    model = peft.get_peft_model(type(model).from_pretrained(tmp_path / "base"), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.5 if "layers.0" in name else 0.01)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", tmp_path / "base"


def deltas(folder, base, name="default"):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    layers = {
        n.removeprefix("base_model.model."): m for n, m in model.named_modules() if hasattr(m, "get_delta_weight")
    }
    return {n: layer.get_delta_weight(name).detach() for n, layer in layers.items()}, model


def test_intruders_of_an_adapter_shrink_as_pefts_do(adapter, tmp_path):
    from peft.tuners.lora.intruders import reduce_intruder_dimension

    folder, base = adapter
    found = htsr.repair(folder, base, tmp_path / "out", "intruders", factor=0.3)
    ours, _ = deltas(tmp_path / "out", base)
    before, model = deltas(folder, base)
    reduce_intruder_dimension(model, mitigation_lambda=0.3, logging_sink=None)
    layers = {
        n.removeprefix("base_model.model."): m for n, m in model.named_modules() if hasattr(m, "get_delta_weight")
    }
    rows = {row.name: row for row in found.matrices}
    assert rows.keys() == before.keys() == layers.keys()
    assert any(row.intruders_before for row in rows.values())
    assert {row.status for row in rows.values()} == {"ok", "kept"}
    for name, layer in layers.items():
        theirs = layer.get_delta_weight("intruder_reduced").detach()
        torch.testing.assert_close(ours[name], theirs, atol=1e-5, rtol=1e-3)
        assert torch.equal(ours[name], before[name]) == (rows[name].status == "kept")
        if rows[name].norm_lost is not None:
            kept = rows[name].norm_kept * float(before[name].norm()) ** 2
            assert float(ours[name].norm()) ** 2 == pytest.approx((1 - rows[name].norm_lost) * kept, rel=1e-3)


def test_intruders_after_are_those_of_the_adapter_that_is_written(adapter, tmp_path):
    """Rank 1 next to strong directions of the base: what is cut off with the rank makes or hides intruders."""
    folder, base = adapter
    config = json.loads((folder / "adapter_config.json").read_text()) | {"r": 1, "lora_alpha": 1}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    file, draw = folder / "adapter_model.safetensors", torch.Generator().manual_seed(0)
    state = {}
    for name, W in load_file(file).items():
        shape = (1, W.shape[1]) if "lora_A" in name else (W.shape[0], 1)
        state[name] = torch.randn(shape, generator=draw) * (0.3 if "layers.0" in name else 0.15)
    save_file(state, file, metadata={"format": "pt"})
    old, cut = tensors(base), 0
    for factor in (0.25, 0.5):
        found = htsr.repair(folder, base, tmp_path / str(factor), "intruders", factor=factor)
        after, _ = deltas(tmp_path / str(factor), base)
        dry = htsr.repair(folder, base, None, "intruders", factor=factor)
        for row in found.matrices:
            W = old[f"{row.name}.weight"]
            assert row.intruders_after == intruders(W, W + after[row.name], 10, 0.5)
            cut += (row.norm_lost or 0) > 0.01
        assert [row.intruders_after for row in dry.matrices] == [row.intruders_after for row in found.matrices]
    assert cut
    save_file(
        {name: W[:, :-1].contiguous() if W.ndim == 2 else W for name, W in old.items()}, base / "model.safetensors"
    )
    with pytest.raises(SourceError, match=r"no matrix of .*adapter has its shape in .*base: "):
        htsr.repair(folder, base, None, "intruders")


def test_other_methods_of_an_adapter_need_no_base(adapter, tmp_path):
    folder, base = adapter
    before, _ = deltas(folder, base)
    found = htsr.repair(folder, output=tmp_path / "half", method="interpolate", factor=0.5)
    assert found.norm_kept == pytest.approx(0.25)
    half, _ = deltas(tmp_path / "half", base)
    htsr.repair(folder, output=tmp_path / "one", method="leading", k=1)
    one, _ = deltas(tmp_path / "one", base)
    for name, change in before.items():
        torch.testing.assert_close(half[name], change / 2)
        U, S, Vt = torch.linalg.svd(change)
        torch.testing.assert_close(one[name], S[0] * torch.outer(U[:, 0], Vt[0]), atol=1e-5, rtol=1e-3)
    state = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(state, folder / "adapter_model.bin")  # as older versions of PEFT wrote it
    noise = htsr.repair(folder, output=tmp_path / "same", method="denoise")
    assert {(row.status, row.kept) for row in noise.matrices} == {("kept", 4)}
    assert "rank 4" in noise.matrices[0].warning
    same, _ = deltas(tmp_path / "same", base)
    assert all(torch.equal(same[name], before[name]) for name in before)
    named = htsr.repair(folder, method="intruders")  # the base that it names
    assert named.against == str(base)
    np.testing.assert_array_equal(named.changed, sum(row.intruders_before > 0 for row in named.matrices))
