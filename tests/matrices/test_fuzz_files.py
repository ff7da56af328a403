"""Spoiled files: a few hundred mutations of each format, the same in every run, give an HtsrError or rows."""

from __future__ import annotations

import io
import json
import random
import struct
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save as safetensors_bytes

import htsr

STATE = {
    "model.embed_tokens.weight": torch.arange(24, dtype=torch.float32).reshape(6, 4),
    "model.layers.0.self_attn.q_proj.weight": torch.eye(4).to(torch.bfloat16),
    "model.layers.0.mlp.experts.down_proj": torch.ones(2, 4, 6, dtype=torch.float16),
    "lm_head.weight": torch.ones(6, 4).to(torch.float8_e4m3fn),
}
NUMBERS = (0, 1, 255, 1 << 31, (1 << 31) - 1, (1 << 32) - 1, 1 << 60, (1 << 63) - 1, (1 << 64) - 1)


def mutations(content: bytes, count: int, seed: int = 0) -> Iterator[bytes]:
    """Bytes changed, numbers made extreme, pieces cut out, doubled, or missing at the end."""
    draw = random.Random(seed)
    for _ in range(count):
        spoiled = bytearray(content)
        for _ in range(draw.choice((1, 1, 2, 5))):
            at, size = draw.randrange(len(spoiled)), draw.choice((1, 2, 4, 8, 40))
            match draw.randrange(6):
                case 0:
                    spoiled[at : at + 1] = bytes([draw.randrange(256)])
                case 1:
                    spoiled[at : at + 8] = draw.choice(NUMBERS).to_bytes(8, draw.choice(("little", "big")))
                case 2:
                    spoiled[at : at + 4] = (draw.choice(NUMBERS) & 0xFFFFFFFF).to_bytes(4, "little")
                case 3:
                    del spoiled[at : at + size]
                case 4:
                    spoiled[at:at] = spoiled[at : at + size]
                case 5 if draw.random() < 0.3:
                    del spoiled[at:]
            if not spoiled:
                break
        yield bytes(spoiled)


def assert_harmless(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    try:
        model = htsr.describe(file)
    except htsr.HtsrError:
        return
    for matrix in model:
        with suppress(htsr.HtsrError):
            assert np.prod(matrix.read().shape) == matrix.parameters


def pickled(zipped: bool) -> bytes:
    stream = io.BytesIO()
    torch.save({"state_dict": STATE, "epoch": 3}, stream, _use_new_zipfile_serialization=zipped)
    return stream.getvalue()


def with_record(content: bytes, change) -> bytes:
    """A PyTorch file whose pickle is changed, in a container that is sound."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(stream, "w") as new:
        for name in old.namelist():
            record = old.read(name)
            new.writestr(name, change(record) if name.endswith("/data.pkl") else record)
    return stream.getvalue()


def gguf_bytes(folder: Path) -> bytes:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(folder / "made.gguf", "llama")
    writer.add_block_count(1)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "c"])
    writer.add_array("llama.rope.factors", [1.0, 2.0])
    W = np.random.default_rng(0).standard_normal((8, 32)).astype(np.float32)
    writer.add_tensor("token_embd.weight", W)
    kind = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor("blk.0.attn_q.weight", gguf.quantize(W, kind), raw_dtype=kind)
    writer.add_tensor("blk.0.ffn_up_exps.weight", np.stack([W, W]).astype(np.float64))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return (folder / "made.gguf").read_bytes()


def test_safetensors(tmp_path):
    content = safetensors_bytes(STATE)
    end = 8 + int.from_bytes(content[:8], "little")
    for spoiled in mutations(content, 200):
        assert_harmless(tmp_path / "x.safetensors", spoiled)
    for header in mutations(content[8:end], 200, seed=1):  # in a file whose first number is right
        assert_harmless(tmp_path / "x.safetensors", len(header).to_bytes(8, "little") + header + content[end:])


def test_gguf(tmp_path):
    content = gguf_bytes(tmp_path)
    for spoiled in mutations(content[:700], 400):
        assert_harmless(tmp_path / "x.gguf", spoiled + content[700:])


@pytest.mark.filterwarnings("ignore")
def test_pickles(tmp_path):
    whole, old = pickled(zipped=True), pickled(zipped=False)
    for spoiled in mutations(whole, 150):
        assert_harmless(tmp_path / "x.pt", spoiled)
    for spoiled in mutations(old, 150):
        assert_harmless(tmp_path / "x.pt", spoiled)
    with zipfile.ZipFile(io.BytesIO(whole)) as file:
        record = next(file.read(name) for name in file.namelist() if name.endswith("/data.pkl"))
    for spoiled in mutations(record, 150):
        assert_harmless(tmp_path / "x.pt", with_record(whole, lambda _, spoiled=spoiled: spoiled))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda d: d.pop("weight_map"),
        lambda d: d.update(weight_map={"a": 3}),
        lambda d: d.update(weight_map={"a": ["model.safetensors"]}),
        lambda d: d.update(weight_map={"a": "x\0y"}),
        lambda d: d.update(weight_map={"a": "x" * 5000}),
        lambda d: d.update(weight_map={"a": ""}),
    ],
)
def test_indexes(tmp_path, spoil):
    content = {"weight_map": dict.fromkeys(STATE, "part.safetensors")}
    (tmp_path / "part.safetensors").write_bytes(safetensors_bytes(STATE))
    spoil(content)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(content))
    with pytest.raises(htsr.SourceError):
        htsr.describe(tmp_path)


def gguf_header(*parts: bytes, tensors: int = 0, pairs: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, pairs) + b"".join(parts)


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


HUGE = 1 << 60


@pytest.mark.parametrize(
    "content",
    [
        gguf_header(tensors=HUGE),
        gguf_header(pairs=HUGE),
        gguf_header(struct.pack("<Q", HUGE), pairs=1),
        *(gguf_header(text(b"a"), struct.pack("<IIQ", 9, kind, HUGE), pairs=1) for kind in (0, 4, 8, 9, 12)),
        gguf_header(text(b"a"), struct.pack("<IIQ", 9, 9, 1) * 1, struct.pack("<IQ", 9, 1) * 5000, pairs=1),
        gguf_header(text(b"w"), struct.pack("<IQQIQ", 2, HUGE, 8, 0, 0), bytes(64), tensors=1),
        gguf_header(text(b"w"), struct.pack("<I", 1 << 31), bytes(64), tensors=1),
        gguf_header(text(b"w"), struct.pack("<IQQIQ", 2, 8, 8, 0, HUGE), bytes(512), tensors=1),
        gguf_header(text(b"general.alignment"), struct.pack("<II", 4, 0), pairs=1),
    ],
)  # fmt: skip
def test_gguf_counts_are_held_against_the_file(tmp_path, content):
    pytest.importorskip("gguf")
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(htsr.SourceError, match=r"x\.gguf is not a readable GGUF file|has no weight matrices"):
        htsr.describe(tmp_path / "x.gguf")


@pytest.mark.parametrize("count", [200_000])
def test_a_header_that_is_longer_than_what_it_describes(tmp_path, count):
    tensors = ",".join(f'"a{i}.weight":{{"dtype":"F32","shape":[0,4],"data_offsets":[0,0]}}' for i in range(count))
    header = f"{{{tensors}}}".encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(htsr.SourceError, match=r"its header of .* bytes describes 0 bytes of tensors"):
        htsr.describe(tmp_path / "x.safetensors")
