"""Tensors by the place of their bytes: one reading of the header, slices, threads; GGUF by its specification."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import safetensors
import torch
from safetensors.torch import save_file

import htsr
from htsr.matrices.checkpoint_files import file_tensors
from htsr.matrices.file_bytes import SAFETENSORS_DTYPES, safetensors_header
from htsr.matrices.gguf_files import gguf_metadata


def test_a_header_is_read_once_for_thousands_of_tensors(tmp_path, monkeypatch):
    state = {f"layers.{i}.mlp.up_proj.weight": torch.full((2, 3), float(i)) for i in range(4000)}
    save_file(state, tmp_path / "model.safetensors")
    opened = []
    real = safetensors.safe_open
    monkeypatch.setattr(safetensors, "safe_open", lambda *args: opened.append(args) or real(*args))
    matrices = htsr.describe(tmp_path).matrices
    assert len(matrices) == 4000
    assert all(matrix.read()[1, 2] == matrix.block for matrix in matrices)
    assert len(opened) == 1


def test_threads_read_from_one_file(tmp_path):
    state = {f"layers.{i}.mlp.up_proj.weight": torch.full((30, 40), float(i)) for i in range(64)}
    save_file(state, tmp_path / "model.safetensors")
    torch.save(state, tmp_path / "model.pt")
    for file in ("model.safetensors", "model.pt"):
        matrices = htsr.describe(tmp_path / file).matrices * 4
        with ThreadPoolExecutor(8) as pool:
            for matrix, values in zip(matrices, pool.map(lambda m: np.asarray(m.read()), matrices), strict=True):
                assert (values == matrix.block).all()


@pytest.mark.parametrize("name", sorted(set(SAFETENSORS_DTYPES.values())))
def test_every_dtype_reads_as_safetensors_own(tmp_path, name):
    dtype = getattr(torch, name)
    values = torch.arange(120, dtype=torch.uint8).view(torch.int64) if dtype.itemsize == 8 else torch.arange(24)
    tensor = (values > 7 if name == "bool" else values.float().to(dtype)).reshape(3, -1)
    save_file({"x": tensor, "empty": tensor[:0]}, tmp_path / "x.safetensors")
    stored = safetensors_header(tmp_path / "x.safetensors")
    assert (stored["x"].dtype, stored["x"].shape) == (name, tuple(tensor.shape))

    def same(a, b):
        return torch.equal(torch.as_tensor(a).view(torch.uint8), b.contiguous().view(torch.uint8))

    assert same(stored["x"].array(), tensor)
    assert same(stored["x"].array(slice(1, 9)), tensor[1:9])
    assert all(same(torch.as_tensor(stored["x"].array(i)), tensor[i]) for i in (0, 2, -1))
    assert stored["empty"].array().shape == (0, *tensor.shape[1:])
    with pytest.raises(IndexError):
        stored["x"].array(3)


def gguf_file(path, tensors, alignment=32, **scalars):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(alignment)
    for name, value in scalars.items():
        writer.add_uint32(name.replace("__", "."), value)
    writer.add_array("tokenizer.ggml.tokens", [f"t{i}" for i in range(500)])
    writer.add_array("llama.attention.head_count_kv", [2, 2, 1])
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_of_float64_and_whole_numbers(tmp_path):
    random = np.random.default_rng(0)
    tensors = {
        "blk.0.attn_q.weight": random.standard_normal((8, 6)),
        "blk.0.ffn_up.weight": random.standard_normal((8, 6)).astype(np.float32),
        "blk.0.ffn_up_exps.weight": random.standard_normal((2, 8, 6)),
        "blk.0.table": np.arange(12, dtype=np.int32).reshape(3, 4),
    }
    gguf_file(tmp_path / "x.gguf", tensors, alignment=64)
    found = {tensor.name: tensor for tensor in file_tensors(tmp_path / "x.gguf")}
    assert {name: tensor.dtype for name, tensor in found.items()} == {n: str(v.dtype) for n, v in tensors.items()}
    for name, values in tensors.items():
        np.testing.assert_array_equal(found[name].read(), values)
        np.testing.assert_array_equal(found[name].read(1), values[1])
    rows = {row.name: row for row in htsr.analyze(tmp_path / "x.gguf", device="cpu")}
    singular = np.linalg.svd(tensors["blk.0.attn_q.weight"], compute_uv=False)
    assert rows["blk.0.attn_q"].norm == pytest.approx((singular**2).sum(), rel=1e-12)


def test_gguf_is_read_as_its_own_package_reads_it(tmp_path):
    gguf = pytest.importorskip("gguf")
    gguf_file(tmp_path / "x.gguf", {"blk.0.attn_q.weight": np.ones((4, 6), np.float32)}, llama__block_count=3)
    metadata, reader = gguf_metadata(tmp_path / "x.gguf"), gguf.GGUFReader(tmp_path / "x.gguf")
    assert metadata["general.architecture"] == "llama"
    assert metadata["llama.block_count"] == reader.fields["llama.block_count"].contents() == 3
    assert list(metadata["llama.attention.head_count_kv"]) == reader.fields["llama.attention.head_count_kv"].contents()
    assert metadata["tokenizer.ggml.tokens"] == 500
    (theirs,), (ours,) = reader.tensors, file_tensors(tmp_path / "x.gguf")
    np.testing.assert_array_equal(ours.read(), theirs.data)


class TestSplitGGUF:
    """llama.cpp's gguf-split: ``NAME-00001-of-00002.gguf``; naming one part loads all."""

    def split(self, folder, name: str = "model", factor: float = 1.0) -> list[str]:
        for i in range(2):
            values = np.full((4, 6), factor * (i + 1), np.float32)
            tensors = {f"blk.{i}.attn_q.weight": values}
            gguf_file(folder / f"{name}-0000{i + 1}-of-00002.gguf", tensors, split__no=i, split__count=2)
        return [f"{name}-0000{i + 1}-of-00002.gguf" for i in range(2)]

    def test_any_part_and_the_folder_are_the_model(self, tmp_path):
        for source in (tmp_path, *(tmp_path / name for name in self.split(tmp_path))):
            assert {m.name: m.read()[0, 0] for m in htsr.describe(source)} == {"blk.0.attn_q": 1, "blk.1.attn_q": 2}

    def test_two_split_models_are_two(self, tmp_path):
        self.split(tmp_path)
        (part, _) = self.split(tmp_path, "other", 5.0)
        with pytest.raises(htsr.SourceError, match="holds several models"):
            htsr.describe(tmp_path)
        assert [m.read()[0, 0] for m in htsr.describe(tmp_path / part)] == [5, 10]

    def test_a_missing_part(self, tmp_path):
        first, second = self.split(tmp_path)
        (tmp_path / second).unlink()
        for source in (tmp_path, tmp_path / first):
            with pytest.raises(htsr.SourceError, match=r"holds 1 of the 2 shards of model\.gguf"):
                htsr.describe(source)
