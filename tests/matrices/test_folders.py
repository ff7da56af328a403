"""Which files of a folder are the model: transformers' own order, complete sets, and no blends."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from safetensors.torch import load_file, save_file

import htsr
from htsr.matrices.folders import model_files
from tests.matrices.test_sources import tiny
from tests.models import state_dict

NAME = "model.layers.0.self_attn.q_proj"


def weights(source) -> dict[str, np.ndarray]:
    return {m.name: np.asarray(m.read()) for m in htsr.describe(source)}


def as_transformers_loads(folder: Path) -> dict[str, np.ndarray]:
    return weights(transformers.AutoModelForCausalLM.from_pretrained(folder))


def assert_is_what_transformers_loads(folder: Path) -> None:
    ours, theirs = weights(folder), as_transformers_loads(folder)
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        np.testing.assert_array_equal(ours[name], values, err_msg=name)


def changed(state, factor: float):
    return {name: tensor.clone() * factor for name, tensor in state.items()}


class TestTransformersOrder:
    """What `from_pretrained` gives is what is read, whatever else lies in the folder."""

    def test_a_single_file_before_an_older_index(self, tmp_path):
        model = tiny("LlamaForCausalLM")
        model.save_pretrained(tmp_path, max_shard_size="5KB")
        assert len(list(tmp_path.glob("model-*"))) > 2
        save_file(changed(model.state_dict(), 3), tmp_path / "model.safetensors", metadata={"format": "pt"})
        assert_is_what_transformers_loads(tmp_path)

    def test_two_saves_into_one_folder(self, tmp_path):
        model = tiny("LlamaForCausalLM")
        model.save_pretrained(tmp_path, max_shard_size="5KB")
        model.save_pretrained(tmp_path)  # deletes the shards, leaves the index
        assert (tmp_path / "model.safetensors.index.json").is_file()
        assert_is_what_transformers_loads(tmp_path)

    def test_safetensors_before_pickles_and_what_others_left(self, tmp_path):
        model = tiny("LlamaForCausalLM")
        torch.save(changed(model.state_dict(), 5), tmp_path / "pytorch_model.bin")
        save_file(changed(model.state_dict(), 7), tmp_path / "model.fp16.safetensors")
        save_file({"tok_embeddings.weight": torch.ones(3, 4)}, tmp_path / "consolidated.safetensors")
        model.save_pretrained(tmp_path, max_shard_size="5KB")
        assert_is_what_transformers_loads(tmp_path)

    def test_the_file_that_the_configuration_names(self, tmp_path):
        model = tiny("LlamaForCausalLM")
        model.save_pretrained(tmp_path)
        save_file(changed(model.state_dict(), 2), tmp_path / "better.safetensors", metadata={"format": "pt"})
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {"transformers_weights": "better.safetensors"}))
        assert_is_what_transformers_loads(tmp_path)


def shards(folder: Path, parts, weight_map=None, stem: str = "model") -> Path:
    names = [f"{stem}-{i + 1:05d}-of-{len(parts):05d}.safetensors" for i in range(len(parts))]
    for name, part in zip(names, parts, strict=True):
        save_file(part, folder / name)
    if weight_map is not None:
        content = {"weight_map": {tensor: names[shard] for tensor, shard in weight_map.items()}}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(content))
    return folder


class TestIndex:
    @pytest.mark.parametrize("assigned", [0, 1])
    def test_a_tensor_is_that_of_its_shard(self, tmp_path, assigned):
        W = torch.randn(8, 6)
        copies = [W * 100, W]
        parts = [{f"{NAME}.weight": copies[0], "a.weight": torch.ones(4, 4)}, {f"{NAME}.weight": copies[1]}]
        shards(tmp_path, parts, {"a.weight": 0, f"{NAME}.weight": assigned})
        np.testing.assert_array_equal(weights(tmp_path)[NAME], copies[assigned])

    def test_what_changes_weights_follows_the_index_too(self, tmp_path):
        (tmp_path / "model").mkdir()
        W = torch.randn(20, 12)
        parts = [{f"{NAME}.weight": W * 100, "a.weight": torch.randn(9, 7)}, {f"{NAME}.weight": W}]
        shards(tmp_path / "model", parts, {"a.weight": 0, f"{NAME}.weight": 1})
        htsr.project(tmp_path / "model", tmp_path / "out", 3)
        singular = np.linalg.svd(weights(tmp_path / "out")[NAME], compute_uv=False)
        np.testing.assert_allclose(singular[:3], torch.linalg.svdvals(W)[:3], rtol=1e-5)
        np.testing.assert_allclose(singular[3:], 0, atol=1e-4)
        stale = load_file(tmp_path / "out" / "model-00001-of-00002.safetensors")[f"{NAME}.weight"]
        assert torch.equal(stale, W * 100)

    def test_a_tensor_that_no_shard_has_is_a_row_that_says_so(self, tmp_path):
        state = state_dict(blocks=1)
        weight_map = dict.fromkeys(state, 0) | {"model.layers.0.mlp.experts.gate_up_proj": 0, "lm_head.weight": 0}
        shards(tmp_path, [state], weight_map)
        rows = {row.name: row for row in htsr.analyze(tmp_path, device="cpu")}
        for name in ("lm_head", "model.layers.0.mlp.experts.gate_up_proj"):
            assert rows[name].status == "missing"
            assert "is in no shard; model.safetensors.index.json names model-00001-of-00001" in rows[name].warning
        assert rows[NAME].status == "ok"

    def test_a_tensor_in_another_shard_than_its_index_says_is_read(self, tmp_path):
        """transformers loads what the listed files hold."""
        parts = [{"a.weight": torch.ones(4, 4)}, {"b.weight": torch.full((4, 4), 2.0)}]
        shards(tmp_path, parts, {"a.weight": 1, "b.weight": 1, "c.bias": 0})
        assert weights(tmp_path)["a"].sum() == 16

    def test_a_truncated_shard_is_named(self, tmp_path):
        tiny("LlamaForCausalLM").save_pretrained(tmp_path, max_shard_size="5KB")
        shard = sorted(tmp_path.glob("model-*"))[1]
        shard.write_bytes(shard.read_bytes()[:-100])
        with pytest.raises(htsr.SourceError, match=f"{shard.name} is not a readable safetensors file"):
            htsr.describe(tmp_path)


STATE = state_dict(blocks=1)


def save(state, file: Path) -> None:
    save_file(state, file) if file.suffix == ".safetensors" else torch.save(state, file)


@pytest.mark.parametrize(
    "names",
    [
        ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.non_ema.safetensors"),
        ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"),
        ("before.safetensors", "after.safetensors"),
        ("epoch=1.ckpt", "epoch=2.ckpt"),
        ("best.pt", "last.pt"),
        ("model_best.pth.tar", "checkpoint.pth.tar"),
        ("model-00001-of-00001.safetensors", "consolidated.safetensors"),
        ("consolidated.00.pth", "consolidated.01.pth"),
        ("a.safetensors", "b.bin"),
        ("a-00001-of-00002.safetensors", "a-00002-of-00002.safetensors", "b.safetensors"),
    ],
)
def test_several_models_are_listed_and_none_is_guessed(tmp_path, names):
    for i, name in enumerate(names):
        save(changed(STATE, i + 1), tmp_path / name)
    with pytest.raises(htsr.SourceError, match=r"holds several models .*name one of them") as caught:
        htsr.describe(tmp_path)
    assert all(name in str(caught.value) for name in names if "00002-of" not in name)
    for name in names:  # naming one is the way out
        assert len(htsr.describe(tmp_path / name).matrices) == 5


def test_a_diffusers_index_beside_a_whole_file_is_no_guess_either(tmp_path):
    shards(tmp_path, [STATE], dict.fromkeys(STATE, 0), stem="diffusion_pytorch_model")
    assert len(htsr.describe(tmp_path).matrices) == 5
    save_file(changed(STATE, 2), tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(htsr.SourceError, match=r"several models \(diffusion_pytorch_model.safetensors, .*index.json\)"):
        htsr.describe(tmp_path)
    name = next(iter(weights(STATE)))
    for file, factor in (("safetensors", 2), ("safetensors.index.json", 1)):
        found = weights(tmp_path / f"diffusion_pytorch_model.{file}")
        np.testing.assert_array_equal(found[name], weights(STATE)[name] * factor)


@pytest.mark.parametrize(
    "name",
    ["model.fp16.safetensors", "diffusion_pytorch_model.safetensors", "resnet50-0676ba61.pth", "model_best.pth.tar"],
)
def test_one_model_under_any_name_with_what_training_leaves_beside_it(tmp_path, name):
    save(STATE, tmp_path / name)
    left = (
        "optimizer.pt", "optimizer.bin", "optimizer_1.bin", "scheduler.pt", "scaler.pt", "training_args.bin",
        "rng_state.pth", "sampler.bin", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "adam_state.pt",
    )  # fmt: skip
    for other in left:
        (tmp_path / other).write_bytes(b"not a state dict")
    (tmp_path / f"._{name}").write_bytes(b"what macOS leaves")
    assert len(htsr.describe(tmp_path).matrices) == 5
    assert [file.name for file in model_files(tmp_path).files] == [name]


def test_the_same_model_in_two_formats_is_read_as_safetensors(tmp_path):
    save_file(STATE, tmp_path / "diffusion_pytorch_model.safetensors")
    torch.save(STATE, tmp_path / "diffusion_pytorch_model.bin")
    assert model_files(tmp_path).files == (tmp_path / "diffusion_pytorch_model.safetensors",)


def test_a_variant_that_transformers_shards(tmp_path):
    tiny("LlamaForCausalLM").save_pretrained(tmp_path, max_shard_size="5KB", variant="fp16")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, variant="fp16")
    for name, values in weights(model).items():
        np.testing.assert_array_equal(weights(tmp_path)[name], values)


class TestShardsWithoutIndex:
    def test_complete(self, tmp_path):
        names = list(STATE)
        shards(tmp_path, [{n: STATE[n] for n in names[i::3]} for i in range(3)])
        assert weights(tmp_path).keys() == weights(STATE).keys()
        for shard in tmp_path.iterdir():  # one of a set stands for the set: naming it is the way to choose the set
            assert weights(shard).keys() == weights(STATE).keys()

    def test_incomplete(self, tmp_path):
        shards(tmp_path, [STATE, {"a.weight": torch.ones(4, 4)}, {"b.weight": torch.ones(4, 4)}])
        (tmp_path / "model-00002-of-00003.safetensors").unlink()
        for source in (tmp_path, tmp_path / "model-00001-of-00003.safetensors"):
            with pytest.raises(htsr.SourceError, match=r"holds 2 of the 3 shards of model\.safetensors, and no index"):
                htsr.describe(source)

    def test_a_shard_of_an_index_stands_for_it(self, tmp_path):
        W = torch.randn(8, 6)
        parts = [{f"{NAME}.weight": W * 100}, {f"{NAME}.weight": W}]
        shards(tmp_path, parts, {f"{NAME}.weight": 1, "a.weight": 0})
        found = {row.name: row for row in htsr.analyze(tmp_path / "model-00001-of-00002.safetensors", device="cpu")}
        assert found[NAME].norm == pytest.approx(float(W.square().sum()), rel=1e-5)


def test_a_deepspeed_folder_is_its_model_states(tmp_path):
    module = {f"module.{name}": tensor for name, tensor in STATE.items()}
    states = {
        "module": module,
        "optimizer": None,
        "ds_version": "0.16",
        "global_steps": 3,
        "frozen_param_fragments": None,
    }
    torch.save(states, tmp_path / "mp_rank_00_model_states.pt")
    torch.save({"optimizer_state_dict": {"x": object}}, tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    assert {m.name: m.shape for m in htsr.describe(tmp_path)} == {m.name: m.shape for m in htsr.describe(STATE)}


def test_folders_that_cannot_be_read_say_what_they_hold(tmp_path):
    for name, sentence in (("__0_0.distcp", "distributed checkpoint"), ("tf_model.h5", "TensorFlow")):
        folder = tmp_path / name.split(".")[-1]
        folder.mkdir()
        (folder / name).write_bytes(b"x")
        with pytest.raises(htsr.SourceError, match=f"holds no weights .*{name} is .*{sentence}"):
            htsr.describe(folder)
    folder = tmp_path / "lfs"
    folder.mkdir()
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n")
    with pytest.raises(htsr.SourceError, match=r"model\.safetensors is a pointer of Git LFS"):
        htsr.describe(folder)


def test_shards_of_a_training_come_with_what_joins_them(tmp_path):
    dcp.save({"model": {f"{NAME}.weight": torch.ones(4, 4)}}, checkpoint_id=tmp_path / "fsdp" / "pytorch_model_fsdp_0")
    with pytest.raises(htsr.SourceError, match=r"accelerate merge-weights .*pytorch_model_fsdp_0 OUTPUT"):
        htsr.describe(tmp_path / "fsdp")
    states = tmp_path / "zero" / "global_step2"
    states.mkdir(parents=True)
    torch.save({}, states / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    with pytest.raises(htsr.SourceError, match=r"python .*zero_to_fp32\.py .*zero OUTPUT"):
        htsr.describe(tmp_path / "zero")
