"""PyTorch files: the state dict is found by what it holds, and what cannot be read is called what it is."""

from __future__ import annotations

import argparse
import pickle
import struct
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import htsr
from htsr.matrices import pickles
from htsr.matrices.checkpoint_files import file_tensors
from tests.models import state_dict

STATE = state_dict(blocks=1)
KEYS = (
    "state_dict", "model_state_dict", "model", "module", "model_state", "net", "network", "generator", "G", "ema",
    "ema_state_dict", "student", "weights", "weights_dict", "params", "params_ema", "encoder", "backbone", "policy",
    "agent", "model_weights", "pytorch_model", "checkpoint",
)  # fmt: skip


def named(source) -> dict[str, tuple[int, int]]:
    return {m.name: m.shape for m in htsr.describe(source)}


@pytest.mark.parametrize("key", KEYS)
def test_a_state_dict_under_any_key(tmp_path, key):
    parameter = nn.Parameter(torch.ones(3, 4))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    rest = {"optimizer": optimizer.state_dict(), "epoch": 3, "args": {"lr": 1e-3}, "best": torch.tensor(0.5)}
    for content in ({key: STATE} | rest, {"checkpoint": {key: OrderedDict(STATE)}} | rest):
        torch.save(content, tmp_path / "model.pth.tar")
        for source in (tmp_path / "model.pth.tar", content):
            assert named(source) == named(STATE)


def test_several_state_dicts_are_named(tmp_path):
    """timm's and torchvision's training scripts store the weights and their average."""
    content = {"epoch": 3, "model": STATE, "model_ema": {"module": STATE | {"n": torch.ones(2, 2)}}, "optimizer": {}}
    torch.save(content, tmp_path / "last.pth")
    for source in (tmp_path / "last.pth", content):
        with pytest.raises(
            htsr.SourceError, match=r"several state dicts: model \(6 tensors\), model_ema\.module \(7 tensors\); give"
        ):
            htsr.describe(source)
    assert named(content["model"]) == named(STATE)


def test_a_lightning_checkpoint(tmp_path):
    content = {
        "state_dict": {f"model.{name}": tensor for name, tensor in STATE.items()},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(4, 4)}}, "param_groups": [{}]}],
        "callbacks": {"EMA": {"weights": {"a.weight": torch.ones(4, 4)}}},
        "loops": {"fit_loop": {"state_dict": {}}},
        "pytorch-lightning_version": "2.4.0",
    }
    torch.save(content, tmp_path / "epoch=3.ckpt")
    assert named(tmp_path / "epoch=3.ckpt").keys() == {f"model.{name}" for name in named(STATE)}


def test_fabric_and_deepspeed_wrap_names(tmp_path):
    torch.save({"model": {f"_forward_module.{n}": t for n, t in STATE.items()}}, tmp_path / "fabric.ckpt")
    assert named(tmp_path / "fabric.ckpt") == named(STATE)


def test_an_optimizer_is_no_model(tmp_path):
    torch.save({"state": {"a.weight": {"exp_avg": torch.ones(4, 4)}}, "param_groups": []}, tmp_path / "optim.pt")
    with pytest.raises(htsr.SourceError, match=r"optim\.pt has no weight matrices"):
        htsr.describe(tmp_path / "optim.pt")


class Own:
    """A class of someone's training script."""


def ctranslate2() -> bytes:
    """The head of a model.bin as CTranslate2's ModelSpec.save writes it: versions and counts around strings."""
    name = b"TransformerSpec\0"
    return struct.pack("<IH", 6, len(name)) + name + struct.pack("<II", 3, 180) + bytes(400)


@pytest.mark.parametrize(
    ("name", "write", "sentence"),
    [
        ("m.pt", lambda f: torch.jit.script(nn.Linear(3, 4)).save(f), r"m\.pt is a TorchScript archive"),
        ("model.bin", lambda f: Path(f).write_bytes(ctranslate2()), r"model\.bin is a CTranslate2 model"),
        ("m.pt", lambda f: torch.save({"w": np.ones((3, 4))}, f), r"refused: .*\(numpy.*NumPy's arrays.*from_numpy"),
        ("m.pt", lambda f: torch.save({"w": Own()}, f), r"refused: .*\(tests\.matrices\.test_pickles\.Own\)"),
        ("m.pt", lambda f: torch.save(nn.Linear(3, 4), f), r"refused: .*\(torch\.nn\.modules\.linear\.Linear\)"),
        ("m.pt", lambda f: torch.save({"a": argparse.Namespace()}, f), r"refused: .*\(argparse\.Namespace\)"),
        ("m.pkl.pt", lambda f: Path(f).write_bytes(pickle.dumps({"w": np.ones(3)})), r"is refused: it holds Python"),
        ("m.pt", lambda f: Path(f).write_bytes(b"<!DOCTYPE html>" * 9), r"m\.pt is not a readable PyTorch file"),
        ("x.npz", lambda f: np.savez(f, w=np.ones((3, 4))), r"x\.npz is no checkpoint"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_called_what_it_is(tmp_path, name, write, sentence):
    write(str(tmp_path / name))
    with pytest.raises(htsr.SourceError, match=sentence) as caught:
        htsr.describe(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)


W = torch.from_numpy(np.random.default_rng(0).standard_normal((30, 20)).astype(np.float32))
W[W.abs() < 1] = 0
LAYOUTS = {
    "coo": W.to_sparse(),
    "csr": W.to_sparse_csr(),
    "bsr": W.to_sparse_bsr((5, 4)),
}


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stored", [False, True])
def test_sparse_tensors_read_dense(tmp_path, layout, stored):
    source = STATE | {"fc.weight": LAYOUTS[layout]}
    if stored:
        torch.save(source, tmp_path / "model.pt")
        source = tmp_path / "model.pt"
    rows = {row.name: row for row in htsr.analyze(source, device="cpu")}
    assert {row.status for row in rows.values()} == {"ok"}
    assert rows["fc"].norm == pytest.approx(float(W.square().sum()), rel=1e-6)


@pytest.mark.filterwarnings("ignore:Sparse")
def test_a_sparse_tensor_whose_indices_lie_outside_does_not_end_the_process(tmp_path):
    one = torch.ones(2)
    outside = {
        "coo.weight": torch.sparse_coo_tensor([[0, 9], [1, 10**6]], one, (4, 4), check_invariants=False),
        "csr.weight": torch.sparse_csr_tensor([0, 10**7, 3, 3, 2], [0, 10**8], one, (4, 4), check_invariants=False),
        "csc.weight": torch.sparse_csc_tensor([0, 1, 1, 1, 2], [0, 10**8], one, (4, 4), check_invariants=False),
    }
    torch.save(STATE | outside, tmp_path / "model.pt")
    rows = {row.name: row.status for row in htsr.analyze(tmp_path / "model.pt", device="cpu")}
    assert [rows.pop(name) for name in ("coo", "csr", "csc")] == ["unreadable"] * 3
    assert set(rows.values()) == {"ok"}


def test_a_sparse_parameter_of_a_module_reads_dense():
    model = nn.Linear(20, 30, bias=False)
    model.weight = nn.Parameter(W.to_sparse(), requires_grad=False)
    (matrix,) = htsr.describe(model)
    assert torch.equal(torch.as_tensor(matrix.read()), W)


def test_odd_tensors_are_rows_and_the_rest_is_analyzed():
    few = torch.sparse_coo_tensor(torch.tensor([[0], [1]]), torch.ones(1), (1 << 20, 1 << 20))
    state = STATE | {
        "huge.weight": few,
        "meta.weight": torch.empty(4, 4, device="meta"),
        "nested.weight": torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)]),
        "q.weight": torch.quantize_per_tensor(W, 0.05, 0, torch.qint8),
    }
    rows = {row.name: row for row in htsr.analyze(state, device="cpu")}
    assert {n: rows[n].status for n in ("huge", "meta", "nested", "q")} == {
        "huge": "sparse", "meta": "meta", "nested": "nested", "q": "ok",
    }  # fmt: skip
    assert "1 entries of (1048576, 1048576) are stored" in rows["huge"].warning
    assert sum(row.status == "ok" for row in rows.values()) == 6


def test_a_mapping_is_made_anew_after_a_while_and_not_for_each_tensor(tmp_path, monkeypatch):
    """Many small tensors cost a few readings of the index, and what was read before can be given back."""
    state = {f"layers.{i}.up_proj.weight": torch.full((8, 8), float(i)) for i in range(300)}
    torch.save(state, tmp_path / "model.pt")
    loads = []
    monkeypatch.setattr(pickles, "load_pickle", lambda path, load=pickles.load_pickle: loads.append(path) or load(path))
    monkeypatch.setattr(pickles, "_KEPT", 100 * 8 * 8 * 4)
    for tensor in file_tensors(tmp_path / "model.pt"):
        assert float(torch.as_tensor(tensor.read())[0, 0]) == float(tensor.name.split(".")[1])
    assert len(loads) == 3


def test_a_pickle_that_is_cut_after_it_was_opened_spoils_its_rows_only(tmp_path):
    torch.save(STATE, tmp_path / "model.pt")
    model = htsr.describe(tmp_path / "model.pt")
    assert model.matrices[0].read() is not None
    with (tmp_path / "model.pt").open("r+b") as file:
        file.truncate(1000)
    for matrix in model:
        with pytest.raises(htsr.HtsrError, match=f"{matrix.name} could not be read: .*truncated perhaps"):
            matrix.read()
