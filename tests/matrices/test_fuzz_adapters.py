"""Adapters with their configuration or tensors spoiled: one sentence, or rows with a status; nothing else."""

from __future__ import annotations

import json
import random
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

import htsr
from tests.matrices.test_adapters import llama, saved

peft = pytest.importorskip("peft")
ODD = [
    None, True, 0, -1, 3, 1.5, float("nan"), float("inf"), 10**400, "", "(", "linear", "pissa", [], [1], [None], ["("],
    [["q_proj"]], {}, {"(": 3}, {"q_proj": "x"}, {"q_proj": None}, {"q_proj": 0}, {"": 1}, {"a": {"b": []}},
]  # fmt: skip
KEYS = [
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "target_parameters", "modules_to_save",
    "use_rslora", "use_dora", "fan_in_fan_out", "init_lora_weights", "peft_type", "base_model_name_or_path",
    "trainable_token_indices", "layers_to_transform", "bias", "task_type", "exclude_modules", "alora_invocation_tokens",
    "layer_replication", "runtime_config", "revision", "unknown_to_peft",
]  # fmt: skip
KINDS = ["LORA", "LOHA", "IA3", "VERA", "OFT", "PREFIX_TUNING", "XLORA", "LN_TUNING", "NO_SUCH"]
TENSORS = [
    lambda t: t[:0], lambda t: t[:, :0], lambda t: t.flatten(), lambda t: t[None], lambda t: t.T.contiguous(),
    lambda t: t.to(torch.int32), lambda t: t * float("nan"), lambda t: t.double(), lambda t: torch.zeros(()),
    lambda t: torch.cat([t, t]), lambda t: t.to(torch.bool), lambda t: torch.zeros(2, 2, 2, 2),
]  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base, and a plain and a DoRA adapter for it."""
    place = tmp_path_factory.mktemp("fuzz")
    llama().save_pretrained(place / "base")
    saved(place / "plain", "linear")
    saved(place / "dora", "linear", use_dora=True, modules_to_save=["lm_head"])
    return place


def refused_or_told(folder, base) -> None:
    """Rows, each with a status, or one sentence."""
    for arguments in ({}, {"base": str(base)}):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                rows = htsr.analyze(str(folder), device="cpu", null=False, **arguments).rows
            except htsr.HtsrError as error:
                sentence = str(error)
            else:
                sentence = "rows"
                assert all(row.status == "ok" or row.warning for row in rows)
        assert sentence
        assert "\n" not in sentence


@pytest.mark.parametrize("seed", range(6))
def test_spoiled_configurations(tmp_path, folders, seed):
    choose = random.Random(seed)
    for number in range(25):
        source = folders / choose.choice(["plain", "dora"])
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "adapter_model.safetensors").symlink_to(source / "adapter_model.safetensors")
        config = json.loads((source / "adapter_config.json").read_text())
        for _ in range(choose.choice([1, 1, 2])):
            config[choose.choice(KEYS)] = choose.choice(ODD)
        if choose.random() < 0.2:
            config["peft_type"] = choose.choice(KINDS)
        (folder / "adapter_config.json").write_text(json.dumps(config))
        refused_or_told(folder, folders / "base")


@pytest.mark.parametrize("seed", range(6))
def test_spoiled_tensors(tmp_path, folders, seed):
    choose = random.Random(seed)
    for number in range(15):
        source = folders / choose.choice(["plain", "dora"])
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "adapter_config.json").symlink_to(source / "adapter_config.json")
        state = load_file(source / "adapter_model.safetensors")
        for _ in range(choose.choice([1, 2])):
            name = choose.choice(sorted(state))
            what = choose.choice(["drop", "rename", "spoil", "spoil", "spoil", "spoil"])
            if what == "drop":
                del state[name]
            elif what == "rename":
                state[choose.choice(["x", ".", "lora_A.weight", name + ".lora_A.weight", name[17:]])] = state.pop(name)
            elif state[name].ndim == 2:
                state[name] = choose.choice(TENSORS)(state[name]).clone()
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "adapter_model.safetensors")
        refused_or_told(folder, folders / "base")
