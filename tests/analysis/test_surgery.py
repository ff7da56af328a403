import json

import numpy as np
import pytest
import torch
from htsr_cli.main import main
from safetensors.torch import load_file, save_file

import htsr
from htsr.analysis.surgery import project
from htsr.errors import HtsrError, SourceError, UsageError
from htsr.matrices.models import Filter
from htsr.matrices.sources import open_model
from htsr.spectra.directions import project_tail
from tests.models import heavy_matrix, save_folder, state_dict


@pytest.fixture
def gpt2(tmp_path):
    """A GPT-2 in two shards: fused q, k, v, transposed storage, tied embedding."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=80, n_positions=16)
    model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained(tmp_path / "gpt2", max_shard_size="40KB")
    (tmp_path / "gpt2" / "tokenizer.json").write_text("{}")
    (tmp_path / "gpt2" / "optimizer.pt").write_bytes(b"not a weight")
    assert len(list((tmp_path / "gpt2").glob("*.safetensors"))) > 1
    return tmp_path / "gpt2"


def tensors(folder):
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def test_the_result_loads_in_transformers_with_every_part_projected_on_its_own(gpt2, tmp_path):
    import transformers

    surgery = project(gpt2, tmp_path / "out", 3, where=Filter(roles=("attn.*", "mlp.*")))
    assert {o.status for o in surgery.operations} == {"ok"}
    assert {o.name.rsplit(".", 1)[-1] for o in surgery.operations} >= {"c_attn[q]", "c_attn[k]", "c_attn[v]"}
    before = transformers.GPT2LMHeadModel.from_pretrained(gpt2)
    after = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    W, P = (model.transformer.h[1].attn.c_attn.weight.detach().double() for model in (before, after))
    for part in range(3):
        columns = slice(32 * part, 32 * (part + 1))
        expected = project_tail(W[:, columns], 3).matrix
        torch.testing.assert_close(P[:, columns], expected, atol=1e-6, rtol=1e-5)
    assert np.linalg.matrix_rank(P, tol=1e-5) == 9  # three of each part
    assert torch.equal(before.transformer.wte.weight, after.transformer.wte.weight)
    assert after(torch.arange(5)[None]).logits.isfinite().all()


def test_what_is_not_wanted_is_the_same_file_bit_for_bit(gpt2, tmp_path):
    out = tmp_path / "out"
    project(gpt2, out, 2, where=Filter(include=("*h.0.mlp.c_fc",)))
    before, after = tensors(gpt2), tensors(out)
    assert before.keys() == after.keys()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == ["transformer.h.0.mlp.c_fc.weight"]
    for name in ("config.json", "tokenizer.json", "model.safetensors.index.json", "generation_config.json"):
        assert (out / name).read_bytes() == (gpt2 / name).read_bytes()
    assert not (out / "optimizer.pt").exists()
    record = json.loads((out / "htsr_project.json").read_text())
    assert record["keep"] == 2
    assert [o["kept"] for o in record["operations"]] == [2]
    assert not list(tmp_path.glob(".*"))


def test_experts_kernels_and_dtypes(tmp_path, random):
    state = {
        "layers.0.mlp.experts.up_proj.weight": torch.stack([heavy_matrix(random, 24, 80) for _ in range(3)]),
        "conv1.weight": torch.from_numpy(random.standard_normal((12, 10, 3, 3))),
        "fc.weight": heavy_matrix(random, 20, 30).bfloat16(),
        "norm.weight": torch.ones(8),
    }
    save_folder(tmp_path / "model", state)
    project(tmp_path / "model", tmp_path / "out", 4)
    after = tensors(tmp_path / "out")
    for name, tensor in state.items():
        assert after[name].dtype == tensor.dtype
    for before, expert in zip(
        state["layers.0.mlp.experts.up_proj.weight"], after["layers.0.mlp.experts.up_proj.weight"], strict=True
    ):
        torch.testing.assert_close(expert, project_tail(before, 4).matrix)
    for i in range(3):
        for j in range(3):
            expected = project_tail(state["conv1.weight"][:, :, i, j], 4).matrix
            torch.testing.assert_close(after["conv1.weight"][:, :, i, j], expected)
    torch.testing.assert_close(after["fc.weight"], project_tail(state["fc.weight"], 4).matrix)
    rows = {row.name: row for row in htsr.analyze(tmp_path / "out", dtype="float64", null=False)}
    assert rows["conv1"].matrix_rank == 4 * 9


def test_tied_weights_change_together(tmp_path, random):
    W = heavy_matrix(random, 60, 20)
    state = {"model.embed_tokens.weight": W, "lm_head.weight": W.clone(), "model.norm.weight": torch.ones(20)}
    save_folder(tmp_path / "model", state)
    (tmp_path / "model" / "config.json").write_text(json.dumps({"tie_word_embeddings": True}))
    surgery = project(tmp_path / "model", tmp_path / "out", 5)
    assert [o.name for o in surgery.operations] == ["model.embed_tokens"]
    after = tensors(tmp_path / "out")
    assert torch.equal(after["lm_head.weight"], after["model.embed_tokens.weight"])
    assert not torch.equal(after["lm_head.weight"], W)


def test_pytorch_files_become_safetensors_and_shared_memory_stays_shared_in_value(tmp_path, random):
    W = heavy_matrix(random, 30, 20)
    folder = tmp_path / "model"
    folder.mkdir()
    shards = {"embed.weight": W, "head.weight": W, "fc.weight": W.T}, {"fc2.weight": W + 1, "step": torch.tensor(3)}
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        torch.save(shard, folder / f"pytorch_model-{i:05}-of-00002.bin")
        weight_map |= dict.fromkeys(shard, f"pytorch_model-{i:05}-of-00002.bin")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    project(folder, tmp_path / "out", 5, where=Filter(exclude=("fc2",)))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "htsr_project.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert index["fc2.weight"] == "model-00002-of-00002.safetensors"
    after = tensors(tmp_path / "out")
    expected = project_tail(W, 5).matrix
    torch.testing.assert_close(after["embed.weight"], expected)
    assert torch.equal(after["head.weight"], after["embed.weight"])
    torch.testing.assert_close(after["fc.weight"], expected.T)
    assert torch.equal(after["fc2.weight"], W + 1)
    assert after["step"] == 3
    assert {m.name for m in open_model(tmp_path / "out")} == {"embed", "fc", "fc2"}


def test_traps_are_removed_before_the_projection(tmp_path, random):
    W = torch.from_numpy(random.standard_normal((90, 60))) + 1.0
    save_file({"fc.weight": W}, tmp_path / "model.safetensors")
    (operation,) = project(tmp_path / "model.safetensors", tmp_path / "out", traps=True).operations
    assert (operation.traps_before, operation.traps_after, operation.kept) == (1, 0, None)
    after = tensors(tmp_path / "out")["fc.weight"]
    torch.testing.assert_close(after, W - W.mean())
    (operation,) = project(tmp_path / "model.safetensors", tmp_path / "both", 7, traps=True).operations
    both = tensors(tmp_path / "both")["fc.weight"]
    torch.testing.assert_close(both, project_tail(after, 7).matrix)


def test_a_matrix_without_a_tail_is_left_and_said(tmp_path, random):
    state = {"a.weight": heavy_matrix(random, 20, 20), "b.weight": torch.zeros(9, 9), "c.weight": torch.eye(9)}
    state["d.weight"] = torch.full((9, 9), float("nan"))
    save_folder(tmp_path / "model", state)
    surgery = project(tmp_path / "model", tmp_path / "out", "tail")
    assert {o.name: o.status for o in surgery.operations} == {"a": "ok", "b": "zero", "c": "degenerate", "d": "nan"}
    after = tensors(tmp_path / "out")
    assert torch.equal(after["c.weight"], state["c.weight"])
    assert after["d.weight"].isnan().all()


def test_refusals_leave_nothing_behind(tmp_path):
    folder = save_folder(tmp_path / "model", state_dict(1))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(UsageError, match="exists already"):
        project(folder, tmp_path / "full", "erg")
    with pytest.raises(UsageError, match="which directions"):
        project(folder, tmp_path / "out")
    with pytest.raises(UsageError, match="keep is"):
        project(folder, tmp_path / "out", 0)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(UsageError, match="merge it"):
        project(tmp_path / "adapter", tmp_path / "out", "erg")
    save_folder(tmp_path / "int8", {"fc.weight": torch.ones(9, 9, dtype=torch.int8), "fc.SCB": torch.ones(9)})
    with pytest.raises(SourceError, match="quantised"):
        project(tmp_path / "int8", tmp_path / "out", 2)
    with pytest.raises(HtsrError, match="cannot be written"):
        project(folder, tmp_path / "none" / "out", 2)
    assert not (tmp_path / "out").exists()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_command_line(capsys, tmp_path):
    folder = save_folder(tmp_path / "model", state_dict(2))
    code = main(["project", folder, "--keep", "erg", "--role", "mlp.*", "-o", str(tmp_path / "out")])
    out, err = capsys.readouterr()
    assert code == 0
    assert "mlp.up_proj" in out
    assert "q_proj" not in out
    assert "4 matrices changed" in err
    rows = {row.name: row for row in htsr.analyze(tmp_path / "out", null=False)}
    record = json.loads((tmp_path / "out" / "htsr_project.json").read_text())
    for operation in record["operations"]:
        assert 1 < operation["kept"] < operation["total"]
        assert rows[operation["name"]].matrix_rank >= operation["kept"]
    assert main(["project", folder, "--keep", "most", "-o", str(tmp_path / "other")]) == 2
    assert "--keep takes" in capsys.readouterr().err
    assert main(["project", folder, "-o", str(tmp_path / "other")]) == 2


def test_an_output_inside_of_the_model_is_refused(tmp_path):
    folder = save_folder(tmp_path / "model", state_dict(blocks=1))
    for inside in ("projected", "some/where"):
        with pytest.raises(UsageError, match="lies inside the model"):
            project(folder, tmp_path / "model" / inside, 3)
    assert [file.name for file in (tmp_path / "model").iterdir()] == ["model.safetensors"]


def test_a_model_in_metas_layout_is_written_in_it(tmp_path):
    """A projection does not feel the order of rows; what is written is where it was read, with a warning or without."""
    torch.manual_seed(0)
    state = {f"layers.0.attention.{leaf}.weight": torch.randn(16, 16) for leaf in ("wq", "wk", "wv")}
    for name, params in (("told", '{"dim": 16, "n_heads": 2}'), ("untold", None)):
        folder = tmp_path / name
        save_folder(folder, state)
        if params:
            (folder / "params.json").write_text(params)
        surgery = project(folder, tmp_path / f"{name}-out", 3)
        assert {operation.status for operation in surgery.operations} == {"ok"}
        for tensor, W in load_file(tmp_path / f"{name}-out" / "model.safetensors").items():
            torch.testing.assert_close(W, project_tail(state[tensor], 3).matrix)
