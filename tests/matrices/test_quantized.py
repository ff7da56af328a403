"""Quantised checkpoints: de-quantised as their makers do, or a row that says why not."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import htsr
from tests.models import heavy_matrix, state_dict

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)  # OCP's E2M1


def only(source) -> tuple[htsr.Model, np.ndarray]:
    """The one matrix of a source, and its values."""
    (matrix,) = htsr.describe(source).matrices
    return matrix, np.asarray(matrix.read())


def test_llm_int8():
    torch.manual_seed(0)
    W = torch.randn(12, 20)
    absmax = W.abs().amax(1)
    quantized = (W / absmax[:, None] * 127).round().to(torch.int8)
    state = {"up_proj.weight": quantized, "up_proj.SCB": absmax, "up_proj.weight_format": torch.tensor(0)}
    matrix, values = only(state)
    np.testing.assert_allclose(values, quantized.float() * absmax[:, None] / 127, rtol=1e-6)
    assert np.abs(values - W.numpy()).max() <= float(absmax.max()) / 127
    assert (matrix.role, matrix.warning) == ("mlp.up", "de-quantised from 8-bit")


@settings(max_examples=25)
@given(rows=st.integers(1, 300), columns=st.integers(1, 300), seed=st.integers(0, 99))
def test_fp8_in_blocks_of_128(rows, columns, seed):
    torch.manual_seed(seed)
    W = torch.randn(rows, columns).to(torch.float8_e4m3fn)
    scale = torch.rand(-(-rows // 128), -(-columns // 128)) + 0.1
    _, values = only({"up_proj.weight": W, "up_proj.weight_scale_inv": scale})
    expected = W.double()
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            expected[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)] *= scale[i, j].double()
    np.testing.assert_allclose(values, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "scale", "shape"),
    [
        ("weight_scale", [2.0], ()),
        ("weight_scale", [2.0], (1,)),
        ("weight_scale", [1.0, 2.0, 4.0, 8.0], (4,)),
        ("weight_scale", [1.0, 2.0, 4.0, 8.0], (4, 1)),
        ("scale_weight", [0.5], (1,)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8], ids=str)
def test_scales_per_tensor_and_per_row(name, scale, shape, dtype):
    torch.manual_seed(0)
    W = (torch.randn(4, 6) * 8).to(dtype)
    factor = torch.tensor(scale).reshape(shape)
    matrix, values = only({"up_proj.weight": W, f"up_proj.{name}": factor, "up_proj.input_scale": torch.ones(1)})
    np.testing.assert_array_equal(values, W.float() * (factor[:, None] if shape == (4,) else factor))
    assert matrix.warning == f"de-quantised from {'8-bit' if dtype == torch.int8 else 'FP8'}"


@pytest.mark.parametrize("scales", ["one per expert", "blocks"])
def test_stacked_fp8_experts(scales):
    torch.manual_seed(0)
    W = torch.randn(3, 130, 200).to(torch.float8_e4m3fn)
    scale = torch.rand(3) + 0.5 if scales == "one per expert" else torch.rand(3, 2, 2) + 0.5
    state = {"mlp.experts.down_proj": W, "mlp.experts.down_proj_scale_inv": scale}
    found = htsr.describe(state).matrices
    assert [m.name for m in found] == [f"mlp.experts.down_proj[{i}]" for i in range(3)]
    for i, matrix in enumerate(found):
        blocks = torch.kron(torch.atleast_2d(scale[i]), torch.ones((200, 200) if scale.ndim == 1 else (128, 128)))
        np.testing.assert_allclose(matrix.read(), W[i].float() * blocks[:130, :200], rtol=1e-6)
    zero = {"mlp.experts.down_proj": torch.zeros(W.shape)}
    for matrix, difference in zip(found, htsr.describe(state, against=zero), strict=True):
        np.testing.assert_array_equal(difference.read(), matrix.read())


def test_a_model_without_a_scale_has_rows_that_say_so():
    state = state_dict(blocks=1)
    name = "model.layers.0.mlp.up_proj.weight"
    state[name] = (state[name] * 100).to(torch.int8)
    rows = {row.name: row for row in htsr.analyze(state, device="cpu")}
    bad = rows.pop(name.removesuffix(".weight"))
    assert bad.status == "quantized"
    assert bad.warning == "model.layers.0.mlp.up_proj is stored as int8 without a scale that htsr knows"
    assert {row.status for row in rows.values()} == {"ok"}


def write(folder, tensors, quantization) -> str:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    return str(folder)


@pytest.mark.parametrize("block", [(128, 128), (64, 64), (100, 60), (32, 256), (1, 128), (48, 1)], ids=str)
@pytest.mark.parametrize("shape", [(200, 130), (256, 384), (130, 64)], ids=str)
@pytest.mark.parametrize("name", ["weight_scale_inv", "scale"])
def test_fp8_in_the_blocks_that_the_configuration_says(tmp_path, block, shape, name):
    """Against transformers' own arithmetic. 200 rows with two scales are two blocks of 100, or 128 and the rest."""
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    torch.manual_seed(0)
    W = torch.randn(shape).to(torch.float8_e4m3fn)
    scale = torch.rand(-(-shape[0] // block[0]), -(-shape[1] // block[1])) + 0.1
    config = {"quant_method": "fp8", "weight_block_size": list(block)}
    matrix, values = only(write(tmp_path, {"up_proj.weight": W, f"up_proj.{name}": scale}, config))
    expected = fp8._dequantize_fp8_weight(W, scale, list(block), torch.float32)
    np.testing.assert_allclose(values, expected, rtol=1e-6)
    assert matrix.warning == "de-quantised from FP8"


SCHEMES = {
    "tensor": {"strategy": "tensor"},
    "channel": {"strategy": "channel"},
    "block": {"strategy": "block", "block_structure": [20, 12]},
    "group": {"strategy": "group", "group_size": 12},
}


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", ["float", "int"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_8_bits_as_compressed_tensors_writes_them(tmp_path, scheme, kind, symmetric):
    quantization = pytest.importorskip("compressed_tensors.quantization")
    base = pytest.importorskip("compressed_tensors.compressors.naive_quantized.base")
    if kind == "float" and not symmetric:
        pytest.skip("FP8 has no zero points")
    options = {"num_bits": 8, "type": kind, "symmetric": symmetric, **SCHEMES[scheme]}
    arguments = quantization.QuantizationArgs(**options)
    torch.manual_seed(0)
    W = torch.randn(40, 60)
    blocks = {"tensor": (1,), "channel": (40, 1), "block": (2, 5), "group": (40, 5)}[scheme]
    state = {"weight": W, "weight_scale": torch.rand(blocks) / 20 + 0.02}
    if not symmetric:
        state["weight_zero_point"] = torch.randint(-20, 20, blocks).to(torch.int8)
    scheme_ = quantization.QuantizationScheme(targets=["Linear"], weights=arguments)
    packed = base.NaiveQuantizationCompressor.compress(state, scheme_)
    expected = base.NaiveQuantizationCompressor.decompress(packed, scheme_)["weight"]
    config = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": options}}}
    _, values = only(write(tmp_path, {f"up_proj.{key}": t for key, t in packed.items()}, config))
    np.testing.assert_allclose(values, expected.float(), rtol=1e-5, atol=1e-6)


def test_scales_that_are_exponents(tmp_path):
    """MXFP8: groups of 32, their scales powers of two."""
    torch.manual_seed(0)
    W, exponents = torch.randn(8, 64).to(torch.float8_e4m3fn), torch.randint(120, 134, (8, 2), dtype=torch.uint8)
    expected = W.float() * torch.exp2(exponents.float() - 127).repeat_interleave(32, 1)
    group = {"weights": {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32}}
    config = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
    for scale in (exponents, torch.exp2(exponents.float() - 127).to(torch.float8_e8m0fnu)):
        _, values = only(write(tmp_path, {"up_proj.weight": W, "up_proj.weight_scale": scale}, config))
        np.testing.assert_array_equal(values, expected)


UNKNOWN = {
    "another name": (
        {"up_proj.weight_amax": torch.ones(1), "up_proj.weight_scales": torch.ones(1)}, None, "htsr does not",
    ),
    "no scale": ({}, {"quant_method": "fp8"}, "without a scale, in a model whose weights are scaled"),
    "blocks that do not fit": (
        {"up_proj.weight_scale_inv": torch.ones(7, 3)}, {"weight_block_size": [128, 128]}, "128 × 128 do not fit",
    ),
    "another shape": ({"up_proj.weight_scale": torch.ones(7)}, None, "which its scale of (7,) does not fit"),
    "too many axes": ({"up_proj.weight_scale": torch.ones(2, 4, 3)}, None, "does not fit"),
    "no numbers": ({"up_proj.weight_scale": torch.ones(0)}, None, "does not fit"),
    "anybody's guess": ({"up_proj.weight_scale_inv": torch.ones(7, 3)}, None, "no configuration says which blocks"),
    "a configuration that is none": (
        {"up_proj.weight_scale_inv": torch.ones(7, 3)}, {"weight_block_size": "x", "config_groups": [1]},
        "no configuration",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNKNOWN)
def test_fp8_whose_scale_is_not_known_gives_no_numbers(tmp_path, kind):
    more, config, sentence = UNKNOWN[kind]
    state = {"down_proj.weight": torch.randn(16, 16), "up_proj.weight": torch.randn(48, 40).to(torch.float8_e4m3fn)}
    rows = {row.name: row for row in htsr.analyze(write(tmp_path, state | more, config), device="cpu", null=False)}
    assert rows["up_proj"].status == "quantized"
    assert rows["up_proj"].alpha is None
    assert sentence in rows["up_proj"].warning
    assert rows["down_proj"].status == "ok"


def test_fp8_that_was_only_cast_is_taken_as_it_is(tmp_path):
    W = torch.randn(16, 24).to(torch.float8_e5m2)
    (matrix,) = htsr.describe({"up_proj.weight": W})
    np.testing.assert_array_equal(matrix.read().float(), W.float())
    assert matrix.warning == "FP8 without a scale, taken as it is"


def test_what_no_configuration_says_is_said():
    state = {
        "up_proj.weight": torch.randn(200, 200).to(torch.float8_e4m3fn),
        "up_proj.weight_scale_inv": torch.ones(2, 2),
    }
    assert only(state)[0].warning == "de-quantised from FP8 in blocks of 128 × 128, which no configuration says"


def test_mxfp4_experts(tmp_path):
    torch.manual_seed(0)
    experts, rows, groups = 2, 12, 3
    blocks = torch.randint(0, 256, (experts, rows, groups, 16), dtype=torch.uint8)
    scales = torch.randint(120, 135, (experts, rows, groups), dtype=torch.uint8)
    table = torch.tensor(FP4)
    # a byte holds two numbers, the first in its low half; they follow one another along the input axis
    numbers = torch.stack([table[(blocks & 15).long()], table[(blocks >> 4).long()]], -1).flatten(3)
    expected = (numbers * 2.0 ** (scales[..., None].float() - 127)).flatten(2).transpose(1, 2)
    name = "model.layers.0.mlp.experts.down_proj"
    save_file({f"{name}_blocks": blocks, f"{name}_scales": scales}, tmp_path / "model.safetensors")
    found = htsr.describe(str(tmp_path)).matrices
    assert [(m.name, m.shape, m.role, m.dtype) for m in found] == [
        (f"{name}[{i}]", (groups * 32, rows), "expert.down", "mxfp4") for i in range(experts)
    ]
    for i, matrix in enumerate(found):
        np.testing.assert_array_equal(matrix.read(), expected[i])
        assert matrix.warning == "de-quantised from MXFP4"


def words_of(numbers: np.ndarray, bits: int, order=None) -> np.ndarray:
    """Rows of numbers in 32-bit words, by the definition; a word's numbers may be put in another order first."""
    each = 32 // bits
    rows = []
    for row in numbers:
        words = []
        for start in range(0, len(row), each):
            group = [int(x) for x in row[start : start + each]]
            group += [0] * (each - len(group))
            word = sum(x << (bits * i) for i, x in enumerate(group[k] for k in order or range(each)))
            words.append(word - 2**32 if word >= 2**31 else word)
        rows.append(words)
    return np.array(rows, dtype=np.int32)


def quantised(random, out, inputs, bits, groups):
    """Numbers (out, in), zero points and scales (out, groups), the group of each input, and the weight."""
    q = random.integers(0, 2**bits, (out, inputs))
    z = random.integers(0, 2**bits, (out, groups))
    s = random.random((out, groups)).astype(np.float16)
    group = np.arange(inputs) // (inputs // groups)
    return q, z, s, group, (q - z[:, group]) * s[:, group].astype(np.float32)


def read_packed(tmp_path, parts, config=None):
    tensors = {f"model.layers.0.mlp.up_proj.{k}": torch.from_numpy(np.ascontiguousarray(v)) for k, v in parts.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config or {}))
    (matrix,) = htsr.describe(str(tmp_path)).matrices
    return matrix


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq(tmp_path, random, bits, version, act_order):
    q, z, s, group, W = quantised(random, 32, 64, bits, 4)
    if act_order:
        group = random.permutation(group)
        W = (q - z[:, group]) * s[:, group].astype(np.float32)
    stored = z if version == 2 else (z - 1) % 2**bits
    parts = {"qweight": words_of(q, bits).T, "qzeros": words_of(stored.T, bits), "scales": s.T}
    if act_order:
        parts["g_idx"] = group.astype(np.int32)
    config = {"quantization_config": {"checkpoint_format": "gptq_v2"}} if version == 2 else None
    matrix = read_packed(tmp_path, parts, config)
    assert (matrix.name, matrix.shape, matrix.role, matrix.dtype) == (
        "model.layers.0.mlp.up_proj", (32, 64), "mlp.up", f"{bits}-bit",
    )  # fmt: skip
    assert matrix.warning == f"de-quantised from {bits}-bit"
    np.testing.assert_allclose(matrix.read(), W, rtol=1e-6)


def test_awq(tmp_path, random):
    q, z, s, _, W = quantised(random, 32, 64, 4, 2)
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    parts = {"qweight": words_of(q.T, 4, order), "qzeros": words_of(z.T, 4, order), "scales": s.T}
    matrix = read_packed(tmp_path, parts)
    assert matrix.shape == (32, 64)
    np.testing.assert_allclose(matrix.read(), W, rtol=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_compressed_tensors(tmp_path, random, bits, symmetric):
    pack = pytest.importorskip("compressed_tensors.compressors.pack_quantized").pack_to_int32
    q, z, s, group, _ = quantised(random, 36, 60, bits, 3)
    q, z = q - 2 ** (bits - 1), z - 2 ** (bits - 1)
    W = (q - (0 if symmetric else z[:, group])) * s[:, group].astype(np.float32)
    parts = {
        "weight_packed": pack(torch.from_numpy(q).to(torch.int8), bits).numpy(),
        "weight_scale": s,
        "weight_shape": np.array([36, 60]),
    }
    if not symmetric:
        parts["weight_zero_point"] = pack(torch.from_numpy(z).to(torch.int8), bits, packed_dim=0).numpy()
    matrix = read_packed(tmp_path, parts)
    assert (matrix.name, matrix.shape) == ("model.layers.0.mlp.up_proj", (36, 60))
    assert matrix.warning == f"de-quantised from {bits}-bit in groups of 20, which no configuration says"
    np.testing.assert_allclose(matrix.read(), W, rtol=1e-6)


def in_groups(random, format, size, inputs=160):
    """A weight whose last group is shorter, as `format` stores it, and its configuration."""
    group = np.arange(inputs) // size
    q, z = random.integers(0, 16, (32, inputs)), random.integers(0, 16, (32, group[-1] + 1))
    s = random.random(z.shape).astype(np.float16)
    W = (q - (8 if format == "compressed-tensors" else z[:, group])) * s[:, group].astype(np.float32)
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    if format == "compressed-tensors":
        parts = {"weight_packed": words_of(q, 4), "weight_scale": s, "weight_shape": np.array(q.shape)}
        return parts, {"config_groups": {"group_0": {"weights": {"group_size": size, "strategy": "group"}}}}, W
    if format == "awq":
        parts = {"qweight": words_of(q.T, 4, order), "qzeros": words_of(z.T, 4, order), "scales": s.T}
    else:
        parts = {"qweight": words_of(q, 4).T, "qzeros": words_of((z.T - 1) % 16, 4), "scales": s.T}
    return parts, {"group_size": size}, W


@pytest.mark.parametrize("format", ["gptq", "awq", "compressed-tensors"])
def test_the_configuration_says_how_large_groups_are(tmp_path, random, format):
    parts, config, W = in_groups(random, format, 128)
    matrix = read_packed(tmp_path, parts, {"quantization_config": config})
    np.testing.assert_allclose(matrix.read(), W, rtol=1e-6)
    assert matrix.warning == "de-quantised from 4-bit"


@pytest.mark.parametrize("format", ["gptq", "awq", "compressed-tensors"])
def test_groups_that_the_configuration_does_not_say_give_no_numbers(tmp_path, random, format):
    parts, _, _ = in_groups(random, format, 80)
    _, config, _ = in_groups(random, format, 32)
    matrix = read_packed(tmp_path, parts, {"quantization_config": config})
    assert matrix.problem[0] == "quantized"
    assert "2 scales for 160 inputs are not those of groups of 32" in matrix.problem[1]


def test_a_packed_model_is_compared_with_its_original(tmp_path, random):
    q, z, s, _, W = quantised(random, 64, 64, 4, 2)
    parts = {"qweight": words_of(q, 4).T, "qzeros": words_of((z.T - 1) % 16, 4), "scales": s.T}
    read_packed(tmp_path, parts)
    original = {"model.layers.0.mlp.up_proj.weight": torch.from_numpy(W)}
    (row,) = htsr.analyze(str(tmp_path), against=original, device="cpu")
    assert row.status == "zero"


PACKED = {
    "gptq, 3 bits": {
        "qweight": torch.ones(3, 32, dtype=torch.int32),
        "qzeros": torch.ones(1, 3, dtype=torch.int32),
        "scales": torch.ones(1, 32, dtype=torch.float16),
        "g_idx": torch.zeros(32, dtype=torch.int32),
    },
    "rearranged": {
        "qweight": torch.ones(2, 64, dtype=torch.int32),
        "qzeros": torch.ones(1, 4, dtype=torch.int32),
        "scales": torch.ones(1, 32, dtype=torch.float16),
    },
    "without scales": {"qweight": torch.ones(32, 4, dtype=torch.int32)},
    "compressed-tensors of another width": {
        "weight_packed": torch.ones(32, 3, dtype=torch.int32),
        "weight_scale": torch.ones(32, 1),
        "weight_shape": torch.tensor([32, 32]),
    },
    "fp4 in bytes": {"weight": torch.ones(32, 16, dtype=torch.int8), "weight_scale_inv": torch.ones(32, 1)},
}


@pytest.mark.parametrize("kind", PACKED)
def test_packed_formats_have_one_row_and_the_rest_is_analyzed(kind, tmp_path):
    state = state_dict(blocks=1)
    name = "model.layers.0.mlp.up_proj"
    del state[f"{name}.weight"]
    state |= {f"{name}.{part}": tensor for part, tensor in PACKED[kind].items()}
    save_file(state, tmp_path / "model.safetensors")
    rows = {row.name: row for row in htsr.analyze(str(tmp_path), device="cpu")}
    assert len(rows) == 5
    bad = rows.pop(name)
    assert (bad.status, bad.role) == ("quantized", "mlp.up")
    assert bad.warning.startswith(f"{name} is stored in ")
    assert "that htsr does not unpack" in bad.warning
    assert {row.status for row in rows.values()} == {"ok"}


BYTES, WORDS = torch.ones(32, 16, dtype=torch.uint8), torch.ones(16, 32, dtype=torch.int32)
FOREIGN = {
    "HQQ": {"W_q": BYTES, "scale": torch.rand(32, 16), "zero": torch.rand(32, 16)},
    "HQQ, saved by itself": {"W_q": BYTES, "meta.scale": torch.rand(32, 16), "meta.zero": torch.rand(32, 16)},
    "quanto": {"weight._data": BYTES, "weight._scale": torch.rand(32, 16), "weight._shift": torch.rand(32, 16)},
    "torchao": {"_weight_qdata": BYTES, "_weight_scale": torch.rand(32, 16), "_weight_zero_point": BYTES + 1},
    "Marlin": {"B": WORDS, "s": torch.rand(16, 32).half()},
    "AQLM": {
        "codebooks": torch.rand(2, 256, 1, 8),
        "codes": torch.ones(32, 4, 2, dtype=torch.int8),
        "scales": torch.rand(32, 1, 1, 1),
    },
    "VPTQ": {
        "centroids.weight": torch.rand(16, 64),
        "res_centroids.weight": torch.rand(16, 64),
        "indices": WORDS[None],
        "weight_scale": torch.rand(32),
    },
    "SpQR": {
        "dense_weights": torch.ones(512, dtype=torch.int64),
        "row_offsets": torch.ones(33, dtype=torch.int32),
        "col_vals": torch.ones(64, dtype=torch.int32),
    },
    "one that nobody knows": {"secret": BYTES, "secret_scales": torch.rand(32, 16)},
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_formats_that_are_not_read_have_one_row(kind, tmp_path):
    """Neither do their integers vanish nor do their scales and codebooks stand as weights."""
    state = state_dict(blocks=1)
    name = "model.layers.0.mlp.up_proj"
    del state[f"{name}.weight"]
    state |= {f"{name}.{part}": tensor for part, tensor in FOREIGN[kind].items()}
    save_file(state, tmp_path / "model.safetensors")
    rows = {row.name: row for row in htsr.analyze(str(tmp_path), device="cpu")}
    assert len(rows) == 5
    bad = rows.pop(f"{name}.secret" if "secret" in FOREIGN[kind] else name)
    assert bad.status == "quantized"
    assert kind.partition(",")[0] in bad.warning or "secret" in bad.warning
    assert {row.status for row in rows.values()} == {"ok"}


@pytest.mark.parametrize("name", ["noise_scales", "x.scales", "x.weight_scale", "x_scale_inv"])
def test_what_only_has_the_name_of_a_scale_is_a_matrix(name):
    state = {name: torch.rand(64, 64), "x.weight": torch.rand(64, 64)}
    assert [row.status for row in htsr.analyze(state, device="cpu")] == ["ok", "ok"]


def test_indices_are_no_weights():
    names = ("position_ids", "attn.relative_position_index", "gate.tid2eid", "attn.bias", "token_ids", "code_counts")
    state = {name: torch.ones(8, 8, dtype=torch.int64) for name in names} | {"x.weight": torch.rand(64, 64)}
    assert [matrix.name for matrix in htsr.describe(state)] == ["x"]


def test_fp8_with_two_scales_gives_no_numbers():
    W = torch.randn(32, 32).to(torch.float8_e4m3fn)
    state = {"x.weight": W, "x.weight_scale": torch.rand(()), "x.weight_scale_2": torch.rand(())}
    (row,) = htsr.analyze(state, device="cpu")
    assert (row.status, "x.weight_scale_2" in row.warning) == ("quantized", True)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes_4bit_files(tmp_path, kind, nested):
    functional = pytest.importorskip("bitsandbytes.functional")
    W = heavy_matrix(np.random.default_rng(0), 64, 128)
    try:
        packed, state = functional.quantize_4bit(W, quant_type=kind, compress_statistics=nested)
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"bitsandbytes cannot quantize on this CPU: {error}")
    parts = {f"up_proj.weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    save_file({"up_proj.weight": packed} | parts, tmp_path / "model.safetensors")
    matrix, values = only(str(tmp_path))
    assert (matrix.shape, matrix.role) == ((64, 128), "mlp.up")
    np.testing.assert_array_equal(values, functional.dequantize_4bit(packed, state).float())
    assert 0 < np.abs(values - W.numpy()).max() < 0.2 * W.abs().max()


def test_4bit_files_without_bitsandbytes(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    name = "up_proj.weight"
    state = {
        name: torch.ones(64, 1, dtype=torch.uint8),
        f"{name}.quant_state.bitsandbytes__nf4": torch.ones(4, dtype=torch.uint8),
        f"{name}.absmax": torch.ones(2),
    }
    save_file(state, tmp_path / "model.safetensors")
    (row,) = htsr.analyze(str(tmp_path), device="cpu")
    assert row.status == "quantized"
    assert row.warning == "up_proj is stored in bitsandbytes 4-bit, which needs the bitsandbytes package"


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "F16", "F32", "BF16"])
def test_gguf(tmp_path, kind):
    gguf = pytest.importorskip("gguf")
    random = np.random.default_rng(0)
    qtype = gguf.GGMLQuantizationType[kind]
    tensors = {
        "token_embd.weight": random.standard_normal((40, 64)),
        "blk.0.attn_q.weight": random.standard_normal((32, 64)),
        "blk.0.ffn_gate.weight": random.standard_normal((96, 64)),
        "blk.0.ffn_up_exps.weight": random.standard_normal((3, 96, 64)),
    }
    stored = {name: gguf.quantize(values.astype(np.float32), qtype) for name, values in tensors.items()}
    file = tmp_path / f"model.{kind}.gguf"
    writer = gguf.GGUFWriter(file, "qwen2")
    for name, values in stored.items():
        writer.add_tensor(name, values, raw_dtype=qtype)
    writer.add_tensor("blk.0.attn_norm.weight", np.ones(64, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for source in (file, tmp_path):
        found = {m.name: m for m in htsr.describe(str(source))}
        assert {m.role for m in found.values()} == {"embed", "attn.q", "mlp.gate", "expert.up"}
        assert len(found) == 6
        for name, values in stored.items():
            expected = gguf.dequantize(values, qtype)
            if expected.ndim == 2:
                np.testing.assert_array_equal(found[name.removesuffix(".weight")].read(), expected)
            else:
                for i in range(3):
                    np.testing.assert_array_equal(found[f"blk.0.ffn_up_exps[{i}]"].read(), expected[i])
    plain = kind in ("F16", "F32", "BF16")
    assert {m.warning for m in found.values()} == {"" if plain else f"de-quantised from {kind}"}
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(htsr.SourceError, match="is not a readable GGUF file, truncated perhaps"):
        htsr.describe(str(file))


def test_several_gguf_files_are_several_models(tmp_path):
    for kind in ("Q4", "Q8"):
        (tmp_path / f"model.{kind}.gguf").write_bytes(b"GGUF")
    with pytest.raises(htsr.SourceError, match=r"holds several models \(model\.Q4\.gguf, model\.Q8\.gguf\); name one"):
        htsr.describe(str(tmp_path))


def test_gguf_without_its_package(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "gguf", None)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(htsr.MissingDependencyError, match=r"pip install 'htsr\[gguf\]'"):
        htsr.describe(str(tmp_path / "model.gguf"))


def spoiled(random, state):
    """One tensor of a quantised layer in another shape, dtype, or gone."""
    name = random.choice(sorted(state))
    tensor = state[name]
    change = random.choice([
        lambda t: t[:0], lambda t: t.flatten(), lambda t: t[None], lambda t: torch.zeros(()), lambda t: t.T,
        lambda t: torch.full_like(t, 127 if t.dtype in (torch.uint8, torch.int8) else -1), lambda t: t[:1],
        lambda t: t.to(torch.float32), lambda t: t.to(torch.int64), lambda t: torch.cat([t, t]), lambda t: None,
    ])  # fmt: skip
    try:
        new = change(tensor)
    except RuntimeError:
        new = None
    rest = {key: value for key, value in state.items() if key != name}
    return rest if new is None else rest | {name: new.contiguous()}


@pytest.mark.parametrize("kind", ["gptq", "awq", "compressed-tensors", "8-bit", "fp8", "mxfp4", "bitsandbytes"])
def test_spoiled_quantisation_costs_one_row(tmp_path, random, kind):
    import random as choices

    q, z, s, group, _ = quantised(random, 32, 64, 4, 2)
    layer = {
        "gptq": {
            "qweight": words_of(q, 4).T, "qzeros": words_of(z.T, 4), "scales": s.T, "g_idx": group.astype(np.int32),
        },
        "awq": {"qweight": words_of(q.T, 4), "qzeros": words_of(z.T, 4), "scales": s.T},
        "compressed-tensors": {
            "weight_packed": words_of(q, 4), "weight_scale": s, "weight_shape": np.array([32, 64]),
            "weight_zero_point": words_of(z.T, 4).T, "weight_g_idx": group.astype(np.int32),
        },
        "8-bit": {"weight": q.astype(np.int8), "SCB": np.ones(32, np.float32)},
        "fp8": {"weight": torch.ones(32, 64).to(torch.float8_e4m3fn), "weight_scale_inv": np.ones((1, 1), np.float32)},
        "mxfp4": {"x_blocks": np.ones((2, 8, 3, 16), np.uint8), "x_scales": np.ones((2, 8, 3), np.uint8)},
        "bitsandbytes": {
            "weight": np.ones((64, 1), np.uint8), "weight.absmax": np.ones(2, np.float32),
            "weight.quant_map": np.ones(16, np.float32),
            "weight.quant_state.bitsandbytes__nf4": np.frombuffer(b'{"shape": [8, 16]}', np.uint8).copy(),
        },
    }[kind]  # fmt: skip
    state = {
        f"up_proj.{key}": torch.as_tensor(np.ascontiguousarray(v) if isinstance(v, np.ndarray) else v)
        for key, v in layer.items()
    }
    choose = choices.Random(0)
    whole = random.standard_normal((16, 24)).astype(np.float32)
    for number in range(25):
        (tmp_path / str(number)).mkdir()
        source = write(
            tmp_path / str(number), spoiled(choose, state) | {"down_proj.weight": torch.from_numpy(whole)}, {"bits": 4}
        )
        rows = {row.name: row for row in htsr.analyze(source, device="cpu", null=False)}
        assert rows.pop("down_proj").status == "ok"
        assert all(row.status == "ok" or row.warning for row in rows.values())
