"""Selection: signal against its null, the same share of each role, and lists that other tools read as meant."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import htsr
from htsr.errors import MatrixError, UsageError
from htsr.spectra.null import gaussian_eigenvalues
from htsr.spectra.signal import SIGNALS, ecs_share_of_noise, signal
from tests.models import save_folder, state_dict
from tests.test_cli import run


@pytest.mark.parametrize(("M", "N", "pieces"), [(64, 64, 1), (40, 300, 1), (300, 900, 1), (8, 24, 9)])
def test_noise_is_signal_in_few_of_100_matrices_and_not_far_below_it(random, M, N, pieces):
    draws = np.sort(gaussian_eigenvalues(M, N, random, 100 * pieces).reshape(100, -1))
    for name, scored in SIGNALS.items():
        value, null, score = np.array([scored(values, M, N, pieces) for values in draws]).T
        assert np.count_nonzero(score > 0) <= (9 if name == "snr" else 4), name
        assert value.mean() == pytest.approx(null.mean(), rel=0.4, abs=2e-2), name


@pytest.mark.parametrize("by", list(SIGNALS))
def test_no_noise_is_selected_to_fill_the_quota(by):
    random = np.random.default_rng(1)
    state = {f"layers.{i}.mlp.up_proj.weight": random.standard_normal((40, 300)) for i in range(12)}
    assert htsr.select(state, by=by).names == []


def test_the_ratio_is_that_of_planted_directions(random):
    M, N = 100, 300
    left = np.linalg.qr(random.standard_normal((M, 3)))[0]
    right = np.linalg.qr(random.standard_normal((N, 3)))[0]
    W = random.standard_normal((M, N)) + left @ np.diag([200.0, 100.0, 60.0]) @ right.T
    singular = np.linalg.svd(W, compute_uv=False)
    expected = singular[:3].sum() / singular[3:].sum()
    for scale in (1.0, 1e-3, 7.0):  # whatever the units
        assert signal((scale * singular[::-1]) ** 2, M, N, 1)[0] == pytest.approx(expected, rel=1e-9)
    with pytest.raises(MatrixError, match="above the edge"):
        signal(np.array([0.0] * 9 + [1.0]), 10, 10, 1)


@pytest.mark.parametrize(("ratio", "share"), [(1.0, 0.731), (0.5, 0.8145), (0.383, 0.838), (0.25, 0.870), (0.1, 0.918)])
def test_the_ecs_of_noise(ratio, share):
    assert ecs_share_of_noise(ratio) == pytest.approx(share, abs=6e-4)


@pytest.fixture
def model():
    """A LLaMA of 4 blocks, of which 0 … 3 have more and more signal."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for i, layer in enumerate(model.model.layers):
            for part in layer.modules():
                if isinstance(part, torch.nn.Linear) and i:
                    left, right = torch.randn(part.out_features, 1), torch.randn(1, part.in_features)
                    part.weight += 0.02 * i * left @ right
    return model


_PARTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
          "mlp.up_proj", "mlp.down_proj")  # fmt: skip


@pytest.mark.parametrize("by", list(SIGNALS))
def test_the_share_of_each_role_with_the_most_signal(model, by):
    selection = htsr.select(model, top=0.5, by=by)
    assert set(selection.names) == {f"model.layers.{i}.{part}" for i in (2, 3) for part in _PARTS}
    assert {row.place for row in selection.rows if row.selected} == {1, 2}
    assert {row.of for row in selection.rows if row.selected} == {4}
    assert 0 < selection.share < 0.5


def test_noise_is_not_taken_however_few_there_are(model):
    selection = htsr.select(model, top=1.0)
    taken = {row.block for row in selection.rows if row.selected}
    assert taken == {1, 2, 3}
    assert all(row.note == "no more signal than noise" for row in selection.rows if row.block == 0)
    assert "7 matrices have no more signal than noise" in selection.remarks()[1]
    backwards = htsr.select(model, top=0.25, reverse=True)
    assert {row.block for row in backwards.rows if row.selected} == {0}


def test_what_is_outside_of_the_blocks_trains_where_it_is_asked_for(model):
    rows = {row.name: row for row in htsr.select(model, top=0.25).rows}
    assert rows["lm_head"].note == rows["model.embed_tokens"].note == "outside of the blocks"
    also = htsr.select(model, top=0.25, also=["head", "*.layers.0.mlp.up_proj"])
    assert {"lm_head", "model.layers.0.mlp.up_proj"} < set(also.names)
    with pytest.raises(UsageError, match="heads"):
        htsr.select(model, also=["heads"])


def test_peft_adapts_exactly_what_is_selected_with_the_parameters_of_the_uniform_rank(model):
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    selection = htsr.select(model, top=0.5)
    config = json.loads(selection.export("peft", rank=4))
    tuned = get_peft_model(model, LoraConfig(**config))
    adapted = {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.default"): module.out_features
        for name, module in tuned.named_modules()
        if name.endswith(".lora_A.default")
    }
    assert adapted == dict.fromkeys(selection.names, 8)
    scales = [module.scaling["default"] for module in tuned.modules() if isinstance(module, LoraLayer)]
    assert set(scales) == {2.0}
    uniform = sum(4 * (row.parameters // row.side + row.side) for row in selection.rows if row.of)
    trained = sum(p.numel() for p in tuned.parameters() if p.requires_grad)
    assert trained == uniform


def test_peft_leaves_a_module_whose_name_ends_as_that_of_a_selected_one():
    from peft import LoraConfig, get_peft_model
    from torch import nn

    torch.manual_seed(0)

    def tower(strongest):
        layers = nn.ModuleList(nn.ModuleDict({"up_proj": nn.Linear(60, 40, bias=False)}) for _ in range(4))
        with torch.no_grad():
            layers[strongest]["up_proj"].weight += 1.0
        return layers

    model = nn.ModuleDict({"layers": tower(1), "vision": nn.ModuleDict({"layers": tower(2)})})
    selection = htsr.select(model)
    assert selection.names == ["layers.1.up_proj", "vision.layers.2.up_proj"]
    tuned = get_peft_model(model, LoraConfig(**selection.peft()))
    adapted = [name for name, _ in tuned.named_modules() if name.endswith(".lora_A.default")]
    assert [
        name.removeprefix("base_model.model.").removesuffix(".lora_A.default") for name in adapted
    ] == selection.names


def _unfrozen(model, found):
    return {name for name, _ in model.named_parameters() if found(name)}


def test_regular_expressions_find_what_trains_and_nothing_else(model):
    selection = htsr.select(model, top=0.5)
    wanted = {f"{name}.weight" for name in selection.names}
    patterns = [re.compile(line) for line in selection.export("regex").splitlines()]
    assert _unfrozen(model, lambda name: any(pattern.match(name) for pattern in patterns)) == wanted


def test_axolotl_finds_what_trains_and_nothing_else(model):
    import yaml

    selection = htsr.select(model, top=0.5)
    listed = yaml.safe_load(selection.export("axolotl"))["unfrozen_parameters"]
    patterns = [re.compile(re.sub(r"\.(?!\+)", r"\\.", text)) for text in listed]  # it escapes dots itself
    wanted = {f"{name}.weight" for name in selection.names}
    assert _unfrozen(model, lambda name: any(pattern.match(name) for pattern in patterns)) == wanted
    assert not any(re.match(r"^(.+)\[([0-9]*)(?::([0-9]*))?\]$", text) for text in listed)  # no ranges


@pytest.mark.parametrize("reverse", [False, True])
def test_the_script_of_spectrum_takes_the_same_from_its_file(model, reverse):
    selection = htsr.select(model, top=0.5, reverse=reverse)
    types: dict[str, list[tuple[str, float]]] = {}
    for name, info in json.loads(selection.export("spectrum")).items():
        assert math.isfinite(info["snr"])
        types.setdefault(info["type"], []).append((name, info["snr"]))
    assert set(types) == {*_PARTS, "lm_head", "model.embed_tokens"}
    best = [
        sorted(found, key=lambda each: each[1], reverse=True)[: int(len(found) * 50 / 100)] for found in types.values()
    ]
    assert {name for found in best for name, _ in found} == set(selection.names)


def test_parts_of_one_tensor_train_together(random):
    state = {}
    for i in range(4):
        fused = random.standard_normal((40, 120))
        fused[:, 40:80] += 0.3 * i  # of the keys
        state[f"h.{i}.attn.c_attn.weight"] = fused
        state[f"h.{i}.attn.c_proj.weight"] = random.standard_normal((40, 40)) + 0.3 * i
    selection = htsr.select(state, top=0.25)
    assert selection.names == ["h.3.attn.c_attn", "h.3.attn.c_proj"]
    assert {row.role for row in selection.rows} == {"attn.qkv", "attn.o"}
    assert selection.rows[0].parameters == 4800


def test_outliers_go_by_their_share(tmp_path, capsys):
    rows = tuple(
        htsr.OutlierRow(f"layers.{i}.up_proj", "mlp.up", i, 1000, mean_score=1.0, counts=(n,), block_counts=(n,))
        for i, n in enumerate((0, 7, 2, 0))
    )
    outliers = htsr.Outliers("model", (13.0,), rows, tuple(f"layers.{i}" for i in range(4)), samples=8, tokens=512)
    selection = htsr.select(outliers, top=0.5, by="outliers")
    assert selection.names == ["layers.1.up_proj", "layers.2.up_proj"]
    assert selection.rows[1].value == 0.007
    outliers.save(tmp_path / "outliers.json")
    code, out, _ = run(capsys, "select", str(tmp_path / "outliers.json"), "--by", "outliers", "--for", "axolotl", "-q")
    assert (code, out) == (0, "unfrozen_parameters:\n- ^layers.1.up_proj(.weight)?$\n")
    weights = np.abs(np.random.default_rng(0).standard_normal(200_000))
    share = np.quantile([np.mean(part > 3 * part.mean()) for part in weights.reshape(200, 1000)], 0.99)
    null = htsr.select(htsr.Outliers("m", (3.0,), rows, (), 1, 1), by="outliers", threshold=3.0).rows[0].null
    assert null == pytest.approx(share, rel=0.15)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"top": 0}, "share of each role"),
        ({"top": 1.5}, "share of each role"),
        ({"top": True}, "share of each role, above 0 and at most 1, not True"),
        ({"by": "noise"}, "no selection by 'noise'"),
        ({"by": "outliers"}, "takes htsr.Outliers"),
    ],
)
def test_what_has_no_meaning_is_one_sentence(arguments, sentence):
    with pytest.raises(UsageError, match=sentence):
        htsr.select({"layers.0.up_proj.weight": torch.ones(20, 20)}, **arguments)


@pytest.mark.parametrize("tool", ["peft", "axolotl", "regex"])
def test_an_empty_list_is_not_written_since_it_would_train_everything(tool, random, tmp_path, capsys):
    noise = {"layers.0.up_proj.weight": torch.from_numpy(random.standard_normal((40, 80)))}
    with pytest.raises(UsageError, match="nothing to train: 1 matrix has no more signal than noise"):
        htsr.select(noise).export(tool)
    folder = save_folder(tmp_path / "model", noise)
    file = tmp_path / "list"
    code, _, err = run(capsys, "select", folder, "--for", tool, "--output", str(file), "-q")
    assert (code, file.exists(), "nothing to train" in err) == (2, False, True)


def test_where_nothing_trains_it_says_why():
    adapter = {"layers.0.up_proj.weight": torch.randn(4, 80), "norm.weight": torch.ones(4, 4)}
    remarks = htsr.select(adapter).remarks()
    assert any("1 matrix does not train: tiny: 4 eigenvalues" in line for line in remarks)


def test_the_command(capsys, tmp_path):
    folder = save_folder(tmp_path / "model", state_dict())
    code, out, err = run(capsys, "select", folder, "--top", "0.34", "--format", "json")
    found = json.loads(out)
    assert code == 0
    assert found["selected"] == [row["name"] for row in found["rows"] if row["selected"]]
    assert "matrices train" not in err
    code, out, err = run(capsys, "select", folder, "--top", "0.34", "--for", "regex")
    assert len(out.splitlines()) == len(found["selected"])
    assert "matrices train" in err
    code, _, err = run(capsys, "select", folder, "--for", "regex", "--format", "json")
    assert (code, "leave out --format" in err) == (2, True)
    assert run(capsys, "select", folder, "--for", "llama", "-q")[0] == 2
    file = tmp_path / "unfrozen.yaml"
    assert run(capsys, "select", folder, "--for", "axolotl", "--output", str(file), "-q")[:2] == (0, "")
    assert file.read_text().startswith("unfrozen_parameters:\n- ^model.layers.")


def test_stacked_experts_are_adapted_as_parameters():
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        hidden_size=32, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_experts=2, num_experts_per_tok=1, vocab_size=32, head_dim=16,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config)
    with torch.no_grad():
        for parameter in model.model.layers[1].parameters():
            if parameter.ndim > 1:
                left, right = (
                    torch.randn(*parameter.shape[:-1], 1),
                    torch.randn(*parameter.shape[:-2], 1, parameter.shape[-1]),
                )
                parameter += left * right
    selection = htsr.select(model, top=0.5)
    experts = [name for name in selection.names if ".experts." in name]
    assert experts == [f"model.layers.1.mlp.experts.{part}" for part in ("gate_up_proj", "down_proj")]
    tuned = get_peft_model(model, LoraConfig(**selection.peft(rank=3)))
    ranks = {
        name: parameter.shape[0]
        for name, parameter in tuned.named_parameters()
        if parameter.requires_grad and name.endswith("lora_A.default.weight")
    }
    assert sum("experts" in name for name in ranks) == 2
    assert all("layers.1." in name for name in ranks)
    assert all(rank == (2 * 6 if "experts" in name else 6) for name, rank in ranks.items())  # one for each expert
    patterns = [re.compile(line) for line in selection.export("regex").splitlines()]
    base = Qwen3MoeForCausalLM(config)
    trained = _unfrozen(base, lambda name: any(pattern.match(name) for pattern in patterns))
    assert {*experts} < trained
    assert len(trained) == len(selection.names)


def test_names_are_those_of_the_loaded_model(tmp_path, capsys):
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    torch.manual_seed(0)
    text = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "vocab_size": 40,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3], "rope_type": "default"},
    }  # fmt: skip
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2}
    model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision, vocab_size=40))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter += 0.05 * torch.outer(*map(torch.randn, parameter.shape))
    model.save_pretrained(tmp_path / "vl")
    selection = htsr.select(tmp_path / "vl", top=0.5)
    assert any(name.startswith("model.language_model.layers.") for name in selection.names)
    assert set(selection.names) == set(htsr.select(model, top=0.5).names)
    code, out, _ = run(capsys, "select", str(tmp_path / "vl"), "--top", "0.5", "--for", "regex")
    patterns = [re.compile(line) for line in out.splitlines()]
    wanted = {f"{name}.weight" for name in selection.names}
    assert (code, _unfrozen(model, lambda name: any(p.match(name) for p in patterns))) == (0, wanted)
    tuned = get_peft_model(model, LoraConfig(**selection.peft(rank=2)))
    assert sum(name.endswith("lora_A.default") for name, _ in tuned.named_modules()) == len(selection.names)


def test_names_that_nobody_tells_are_a_warning(tmp_path, caplog):
    folder = Path(save_folder(tmp_path / "model", state_dict(2)))
    (folder / "config.json").write_text(json.dumps({"model_type": "unheard", "vision_config": {}}))
    selection = htsr.select(folder, reverse=True)
    assert "may be called otherwise in the loaded model" in caplog.text
    assert "may be called otherwise in the loaded model" in selection.remarks()[1]
