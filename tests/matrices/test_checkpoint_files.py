"""Checkpoint files: every format reads the same numbers, and every broken one is a sentence."""

from __future__ import annotations

import json
import os
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import htsr
from htsr.matrices.checkpoint_files import file_tensors, folder_tensors
from htsr.matrices.folders import read_json
from tests.models import state_dict


def read(tensors) -> dict[str, np.ndarray]:
    return {e.name: np.asarray(e.read().float() if isinstance(e.read(), torch.Tensor) else e.read()) for e in tensors}


def sharded(folder: Path, state, suffix: str = "safetensors") -> Path:
    """`state` in three shards with an index, as transformers writes them."""
    folder.mkdir(exist_ok=True)
    names, weight_map = list(state), {}
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    for i in range(3):
        file = f"{stem}-0000{i + 1}-of-00003.{suffix}"
        part = {name: state[name] for name in names[i::3]}
        weight_map |= dict.fromkeys(part, file)
        save_file(part, folder / file) if suffix == "safetensors" else torch.save(part, folder / file)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("layout", ["one", "shards", "bin", "bin shards", "pt", "shards without index", "accelerate"])
def test_every_layout_reads_the_same(tmp_path, layout):
    state = state_dict(blocks=11)  # 10 comes after 9, not after 1
    if layout == "one":
        save_file(state, tmp_path / "model.safetensors")
    elif layout == "bin":
        torch.save(state, tmp_path / "pytorch_model.bin")
    elif layout == "pt":
        torch.save({"state_dict": state, "epoch": 3}, tmp_path / "last.pt")
        torch.save({"step": 3}, tmp_path / "optimizer.pt")
    elif layout == "accelerate":
        save_file({f"module.{name}": tensor for name, tensor in state.items()}, tmp_path / "model.safetensors")
    else:
        sharded(tmp_path, state, "bin" if "bin" in layout else "safetensors")
        if "without" in layout:
            (tmp_path / "model.safetensors.index.json").unlink()
    found = folder_tensors(tmp_path)
    assert {e.name: e.shape for e in found} == {name: tuple(t.shape) for name, t in state.items()}
    for name, values in read(found).items():
        np.testing.assert_array_equal(values, state[name].numpy())
    blocks = [m.block for m in htsr.describe(str(tmp_path)) if m.role == "attn.q"]
    assert blocks == list(range(11))


def test_an_older_pickle_without_the_zip_container(tmp_path):
    state = state_dict(blocks=1)
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name, values in read(file_tensors(tmp_path / "old.pt")).items():
        np.testing.assert_array_equal(values, state[name].numpy())


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shape=st.lists(st.integers(1, 5), min_size=1, max_size=4), seed=st.integers(0, 99), half=st.booleans())
def test_a_slice_is_what_the_whole_has_there(tmp_path, suffix, shape, seed, half):
    torch.manual_seed(seed)
    tensor = torch.randn(shape).to(torch.bfloat16 if half else torch.float32)
    file = tmp_path / f"x.{suffix}"
    save_file({"x": tensor}, file) if suffix == "safetensors" else torch.save({"x": tensor}, file)
    (stored,) = file_tensors(file)
    assert (stored.shape, stored.dtype) == (tuple(shape), "bfloat16" if half else "float32")
    for i in range(shape[0]):
        assert torch.equal(torch.as_tensor(stored.read(i)), torch.as_tensor(stored.read())[i])
        assert torch.equal(torch.as_tensor(stored.read(i)), tensor[i])


def test_a_slice_is_read_without_the_rest(tmp_path):
    """A stack of experts of which all bytes but one expert's are a hole in the file costs one expert's memory."""
    import struct
    import tracemalloc

    experts, rows, columns = 64, 512, 512
    file = tmp_path / "stack.safetensors"
    size = experts * rows * columns * 4
    header = json.dumps({"experts": {"dtype": "F32", "shape": [experts, rows, columns], "data_offsets": [0, size]}})
    header += " " * (-len(header) % 8)
    one = np.random.default_rng(0).standard_normal((rows, columns)).astype(np.float32)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(header)) + header.encode())
        stream.seek(8 + len(header) + 40 * one.nbytes)
        stream.write(one.tobytes())
        stream.truncate(8 + len(header) + size)
    (tensor,) = file_tensors(file)

    def peak(read) -> int:
        tracemalloc.start()
        np.testing.assert_array_equal(read(), one)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    assert peak(lambda: tensor.read(40)) < 8 * one.nbytes
    assert peak(lambda: tensor.read()[40]) > experts * one.nbytes  # the measure sees what it should


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float64], ids=str
)
def test_low_precision_is_up_cast(tmp_path, dtype):
    torch.manual_seed(0)
    W = torch.randn(40, 24).to(dtype)
    save_file({"up_proj.weight": W}, tmp_path / "model.safetensors")
    assert htsr.describe(str(tmp_path)).matrices[0].dtype == str(dtype).removeprefix("torch.")
    row = htsr.analyze(str(tmp_path), device="cpu")[0]
    assert row.status == "ok"
    assert row.norm == pytest.approx(float((W.double() ** 2).sum()), rel=1e-5)


class Hostile:
    """Unpickling this writes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (Path.touch, (self.target,))


@pytest.mark.parametrize("container", ["zip", "legacy", "bare"])
@pytest.mark.parametrize("suffix", ["bin", "pt", "pth", "ckpt"])
def test_a_hostile_pickle_is_refused_and_not_run(tmp_path, suffix, container):
    marker, file = tmp_path / "executed", tmp_path / f"model.{suffix}"
    content = {"weight": torch.ones(4, 4), "extra": Hostile(marker)}
    if container == "bare":
        file.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=container == "zip")
    for source in (file, tmp_path):
        with pytest.raises(htsr.SourceError, match="is refused: it holds Python objects besides tensors"):
            htsr.analyze(source)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Hostile(marker)))
    assert marker.exists()  # it would have been


def test_a_hostile_shard_is_refused(tmp_path):
    sharded(tmp_path, state_dict(blocks=2), "bin")
    torch.save({"x": Hostile(tmp_path / "executed")}, tmp_path / "pytorch_model-00002-of-00003.bin")
    with pytest.raises(htsr.SourceError, match=r"pytorch_model-00002-of-00003\.bin is refused"):
        htsr.describe(str(tmp_path))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("part", [0.0001, 0.3, 0.99])
@pytest.mark.parametrize("suffix", ["safetensors", "bin", "pt"])
def test_truncated_files(tmp_path, suffix, part):
    file = tmp_path / f"model.{suffix}"
    state = state_dict(blocks=1)
    save_file(state, file) if suffix == "safetensors" else torch.save(state, file)
    whole = file.read_bytes()
    file.write_bytes(whole[: max(1, int(part * len(whole)))])
    with pytest.raises(htsr.SourceError, match=r"truncated perhaps|is refused"):
        htsr.describe(str(file))


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(min_size=1, max_size=200), suffix=st.sampled_from(["safetensors", "bin", "pt", "gguf"]))
def test_any_bytes_are_a_sentence(tmp_path, content, suffix):
    file = tmp_path / f"noise.{suffix}"
    file.write_bytes(content)
    with pytest.raises(htsr.SourceError, match=r"noise\."):
        htsr.describe(str(file))


def index(folder: Path, **content) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda f: (f / "model-00002-of-00003.safetensors").unlink(), "model-00002-of-00003.safetensors is missing"),
        (lambda f: index(f, weight_map={"a": "../secret.safetensors"}), "names a file outside its folder"),
        (lambda f: index(f, weight_map={"a": "/etc/passwd"}), "names a file outside its folder"),
        (lambda f: index(f, weight_map={"a": "sub/x.safetensors"}), "names a file outside its folder"),
        (lambda f: index(f, weight_map={"a": ".."}), "names a file outside its folder|is missing"),
        (lambda f: index(f, weight_map={}), "has no weight_map"),
        (lambda f: index(f, weight_map=[1]), "has no weight_map"),
        (lambda f: index(f), "has no weight_map"),
        (lambda f: (f / "model.safetensors.index.json").write_text("[" * 100_000), "is not readable JSON"),
        (lambda f: (f / "model.safetensors.index.json").write_text("[1]"), "is not a JSON object"),
        (lambda f: (f / "model.safetensors.index.json").write_bytes(b"\xff\xfe"), "is not readable JSON"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is not readable JSON"),
        (lambda f: (f / "model-00001-of-00003.safetensors").write_bytes(b""), "00001-of-00003.safetensors is empty"),
    ],
)  # fmt: skip
def test_spoiled_folders(tmp_path, spoil, sentence):
    folder = sharded(tmp_path / "model", state_dict(blocks=1))
    spoil(folder)
    with pytest.raises(htsr.SourceError, match=sentence):
        htsr.describe(str(folder))


def test_a_header_that_lies_about_its_tensor(tmp_path):
    header = json.dumps({"x.weight": {"dtype": "F32", "shape": [1 << 40, 8], "data_offsets": [0, 64]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
    with pytest.raises(htsr.SourceError, match="is not a readable safetensors file"):
        htsr.describe(str(tmp_path / "x.safetensors"))


def test_files_that_are_no_checkpoints(tmp_path):
    for name, content, sentence in (
        ("notes.txt", b"weights", r"notes\.txt is no checkpoint"),
        ("empty.safetensors", b"", r"empty\.safetensors is empty"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(htsr.SourceError, match=sentence):
            htsr.describe(str(tmp_path / name))
    with pytest.raises(htsr.SourceError, match=r"gone\.pt does not exist"):
        htsr.describe(str(tmp_path / "gone.pt"))
    torch.save([torch.ones(2, 2)], tmp_path / "list.pt")
    with pytest.raises(htsr.SourceError, match=r"list\.pt holds a list, not a dictionary of tensors"):
        htsr.describe(str(tmp_path / "list.pt"))
    torch.save({"epoch": 3}, tmp_path / "none.pt")
    with pytest.raises(htsr.SourceError, match=r"none\.pt has no weight matrices"):
        htsr.describe(str(tmp_path / "none.pt"))


def test_a_file_that_may_not_be_read(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    file = tmp_path / "model.safetensors"
    save_file(state_dict(blocks=1), file)
    file.chmod(0)
    with pytest.raises(htsr.SourceError, match=r"model\.safetensors"):
        htsr.describe(str(file))


def test_a_folder_without_weights_names_the_one_that_has(tmp_path):
    with pytest.raises(htsr.SourceError, match="holds no weights"):
        htsr.describe(str(tmp_path))
    for name in ("unet", "vae"):
        (tmp_path / name).mkdir()
        save_file({"a.weight": torch.ones(2, 2)}, tmp_path / name / "diffusion.safetensors")
    with pytest.raises(htsr.SourceError, match="its subfolders unet, vae do, name one of them"):
        htsr.describe(str(tmp_path))


def test_a_file_cut_after_it_was_opened_spoils_its_rows_only(tmp_path):
    folder = sharded(tmp_path / "model", state_dict(blocks=2))
    model = htsr.describe(str(folder))
    shard = folder / "model-00002-of-00003.safetensors"
    with shard.open("r+b") as file:
        file.truncate(100)
    failed, sentences = [], []
    for matrix in model:
        try:
            matrix.read()
        except htsr.HtsrError as error:
            failed.append(matrix.name)
            sentences.append(str(error))
    assert all(s.startswith(f"{name} could not be read: ") for name, s in zip(failed, sentences, strict=True))
    assert 0 < len(failed) < len(model.matrices)


def test_pickles_tie_what_shares_memory(tmp_path):
    W = torch.randn(6, 4)
    torch.save(OrderedDict(a=W, b=W, c=W.clone()), tmp_path / "x.pt")
    described = htsr.describe(str(tmp_path / "x.pt"))
    assert [m.name for m in described] == ["a", "c"]


def test_json_is_an_object(tmp_path):
    file = tmp_path / "x.json"
    for content in ("", "nonsense", '"text"', '{"a":' * 50_000):
        file.write_text(content)
        with pytest.raises(htsr.SourceError, match=r"x\.json is not"):
            read_json(file)
    file.write_text('{"a": 1}')
    assert read_json(file) == {"a": 1}
