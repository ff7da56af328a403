"""From any source the same matrices; what is wrong with one of them is said in its row."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import htsr
from htsr.errors import MatrixError
from tests.models import heavy_matrix, save_folder, state_dict


def tiny(architecture: str, **changes) -> nn.Module:
    torch.manual_seed(0)
    options = {
        "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "num_local_experts": 2, "pad_token_id": 0,
    } | changes  # fmt: skip
    config = getattr(transformers, architecture.removesuffix("ForCausalLM").removesuffix("Model") + "Config")(**options)
    return getattr(transformers, architecture)(config).eval()


def facts(source, **kwargs):
    """Everything of every matrix, by name: files keep their tensors in another order than modules."""
    found = {
        m.name: (m.shape, m.pieces, m.role, m.block, m.dtype, np.array(m.read()))
        for m in htsr.describe(source, **kwargs)
    }
    return dict(sorted(found.items()))


def assert_same(a, b) -> None:
    assert list(a) == list(b)
    for name in a:
        assert a[name][:-1] == b[name][:-1], name
        np.testing.assert_array_equal(a[name][-1], b[name][-1])


@pytest.mark.parametrize(
    "architecture", ["LlamaForCausalLM", "GPT2Model", "GPTNeoXModel", "GptOssForCausalLM", "Phi3ForCausalLM"]
)
def test_module_and_folder_are_the_same_matrices(tmp_path, architecture):
    model = tiny(architecture)
    model.save_pretrained(tmp_path)
    found, stored = facts(model), facts(str(tmp_path))
    assert_same(found, stored)
    assert {m.kind for m in htsr.describe(model)} == {m.kind for m in htsr.describe(str(tmp_path))}


@pytest.mark.parametrize("architecture", ["MixtralForCausalLM", "Qwen3MoeForCausalLM", "ViTModel"])
def test_checkpoints_with_other_names_than_the_module(tmp_path, architecture):
    """transformers stores a mixture's experts singly, under the names of their first release, and fuses them in memory.

    That w1 or gate_proj there is the fused tensor's gate is transformers' own word on the layout.
    """
    model = tiny(architecture, moe_intermediate_size=8, num_experts=2, head_dim=8)
    model.save_pretrained(tmp_path)

    def by_place(source):
        found = {}
        for matrix in htsr.describe(source):
            found.setdefault((matrix.role, matrix.block), []).append(np.array(matrix.read()))
        return {place: sorted(values, key=lambda W: W.sum()) for place, values in found.items()}

    live, stored = by_place(model), by_place(str(tmp_path))
    assert {m.name for m in htsr.describe(model)} != {m.name for m in htsr.describe(str(tmp_path))}
    assert live.keys() == stored.keys()
    for place, values in live.items():
        np.testing.assert_array_equal(np.stack(values), np.stack(stored[place]), err_msg=str(place))


def test_tied_heads_are_one_matrix_in_every_source(tmp_path):
    model = tiny("LlamaForCausalLM", tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "tied")
    for copied in (False, True):  # some savers store the tied head a second time
        folder = tmp_path / "tied"
        if copied:
            state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
            save_file(state, folder / "model.safetensors")
        assert_same(facts(model), facts(str(folder)))
    assert "lm_head" not in facts(model)


def test_state_dict_file_and_folder_are_the_same_rows(tmp_path):
    state = state_dict()
    folder = save_folder(tmp_path / "model", state)
    torch.save(state, tmp_path / "model.pt")
    sources = [state, folder, f"{folder}/model.safetensors", str(tmp_path / "model.pt"), tmp_path / "model"]
    assert_same(facts(sources[0]), facts(sources[1]))
    rows = [
        sorted((replace(row, seconds=None) for row in htsr.analyze(source, device="cpu")), key=lambda row: row.name)
        for source in sources
    ]
    assert all(other == rows[0] for other in rows[1:])


def test_a_fingerprint_changes_with_the_files(tmp_path):
    folder = save_folder(tmp_path / "model", state_dict(blocks=1))
    first = htsr.describe(folder).fingerprint
    (tmp_path / "model" / "spectra.jsonl").write_text("{}")  # a journal or trajectory beside the weights
    assert first == htsr.describe(folder).fingerprint
    save_folder(tmp_path / "model", state_dict(blocks=2))
    assert htsr.describe(folder).fingerprint != first
    assert htsr.describe(state_dict(blocks=1)).fingerprint is None


def test_the_fingerprint_of_one_file_covers_the_configuration_that_is_read_beside_it(tmp_path):
    """Bloom's heads tell q, k and v apart: rows of another number of heads are of other matrices."""
    file, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    save_file({"h.0.self_attention.query_key_value.weight": torch.randn(48, 16)}, file)
    found = []
    for heads in (2, 4, None):
        config.write_text(json.dumps({"model_type": "bloom", "n_head": heads, "hidden_size": 16}))
        found.append(htsr.describe(file).fingerprint)
    config.unlink()
    found.append(htsr.describe(file).fingerprint)
    (tmp_path / "params.json").write_text("{}")
    found.append(htsr.describe(file).fingerprint)
    assert len(set(found)) == len(found)


class TestAgainst:
    def test_the_difference_is_that_of_the_values(self, tmp_path):
        a, b = state_dict(seed=1), state_dict(seed=2)
        other = save_folder(tmp_path / "b", b)
        found = htsr.describe(a, against=other)
        assert found.label == f"state dict - {other}"
        for matrix in found:
            expected = a[f"{matrix.name}.weight"] - b[f"{matrix.name}.weight"]
            np.testing.assert_array_equal(matrix.read(), expected)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn], ids=str)
    def test_low_precision_is_subtracted_in_float32(self, dtype):
        torch.manual_seed(0)
        a, b = torch.randn(8, 8).to(dtype), torch.randn(8, 8).to(dtype)
        (matrix,) = htsr.describe({"w.weight": a}, against={"w.weight": b})
        assert torch.equal(torch.as_tensor(matrix.read()), a.float() - b.float())

    def test_of_stacked_experts_and_fused_tensors(self):
        a, b = tiny("GptOssForCausalLM"), tiny("GptOssForCausalLM")
        for parameter in b.parameters():
            nn.init.normal_(parameter)
        whole, difference = (facts(a, **more) for more in ({}, {"against": b}))
        theirs = facts(b)
        assert list(whole) == list(difference)
        for name in whole:
            np.testing.assert_allclose(difference[name][-1], whole[name][-1] - theirs[name][-1], atol=1e-6)

    def test_with_itself_every_row_is_zero(self):
        rows = htsr.analyze(state_dict(blocks=1), against=state_dict(blocks=1), device="cpu")
        assert {row.status for row in rows} == {"zero"}

    def test_what_does_not_match_has_a_row_that_says_so(self):
        a, b = state_dict(blocks=1), state_dict(blocks=1, seed=1)
        b["model.embed_tokens.weight"] = torch.ones(3, 32)
        del b["model.layers.0.mlp.up_proj.weight"]
        rows = {row.name: (row.status, row.warning) for row in htsr.analyze(a, against=b, device="cpu")}
        name = "model.embed_tokens"
        assert rows.pop(name) == ("unmatched", f"{name}.weight is (160, 32) here and (3, 32) there")
        name = "model.layers.0.mlp.up_proj"
        assert rows.pop(name) == ("unmatched", f"{name}.weight is not in the model it is compared against")
        assert {status for status, _ in rows.values()} == {"ok"}

    def test_models_that_have_nothing_in_common(self):
        with pytest.raises(htsr.SourceError, match="the two models have no tensor name in common"):
            htsr.describe({"a.weight": torch.ones(2, 2)}, against={"b.weight": torch.ones(2, 2)})


class TestFilter:
    @pytest.mark.parametrize(
        ("wanted", "left"),
        [
            ({"include": ("*.q_proj", "*.up_proj")}, {"attn.q", "mlp.up"}),
            ({"include": ("*.layers.*",), "exclude": ("*.mlp.*",)}, {"attn.q", "attn.k"}),
            ({"roles": ("mlp.*", "embed")}, {"mlp.up", "mlp.down", "embed"}),
            ({"min_size": 17}, {"attn.q", "mlp.up", "mlp.down", "embed"}),
            ({"max_size": 16}, {"attn.k"}),
            ({"blocks": frozenset({0, 2}), "roles": ("attn.q",)}, {"attn.q"}),
        ],
    )
    def test_what_is_left(self, wanted, left):
        model = htsr.describe(state_dict(), where=htsr.Filter(**wanted))
        assert {m.role for m in model} == left
        if blocks := wanted.get("blocks"):
            assert {m.block for m in model} == blocks

    @settings(max_examples=30)
    @given(
        roles=st.sets(st.sampled_from(["attn.*", "mlp.*", "embed", "*.q"])),
        blocks=st.none() | st.frozensets(st.integers(0, 2), min_size=1),
        least=st.integers(1, 40),
    )
    def test_filters_together_are_filters_one_after_the_other(self, roles, blocks, least):
        everything = htsr.describe(state_dict()).matrices
        filters = [htsr.Filter(roles=tuple(roles)), htsr.Filter(blocks=blocks), htsr.Filter(min_size=least)]
        together = htsr.Filter(roles=tuple(roles), blocks=blocks, min_size=least)
        assert [m for m in everything if together(m)] == [m for m in everything if all(f(m) for f in filters)]

    def test_a_filter_that_leaves_nothing_names_the_roles(self):
        with pytest.raises(htsr.UsageError, match="no matrix of state dict passes the filter; its roles are attn"):
            htsr.describe(state_dict(), where=htsr.Filter(min_size=999))

    def test_names_as_printed_are_patterns(self):
        state = {f"h.{i}.attn.c_attn.weight": torch.randn(8, 24) for i in range(2)}
        names = [m.name for m in htsr.describe(state)]
        assert names[0] == "h.0.attn.c_attn[q]"
        for name in names:
            assert [m.name for m in htsr.describe(state, where=htsr.Filter(include=(name,)))] == [name]
            left = [m.name for m in htsr.describe(state, where=htsr.Filter(exclude=(name,)))]
            assert left == [other for other in names if other != name]
        assert {m.role for m in htsr.describe(state, where=htsr.Filter(exclude_roles=("*.q", "*.k")))} == {"attn.v"}

    @pytest.mark.parametrize(
        ("wanted", "sentence"),
        [
            (
                {"include": ("*.q_proj", "*.q_porj")},
                r"no name of state dict matches '\*.q_porj'; the nearest is \*.q_proj",
            ),
            ({"exclude": ("*.up_prj",)}, r"the nearest is \*.up_proj"),
            ({"roles": ("atn.q",)}, "no role of state dict matches 'atn.q'; the nearest is attn.q"),
            ({"roles": ("conv",)}, "there are attn.k, attn.q, embed, mlp.down, mlp.up"),
            ({"exclude_roles": ("emebd",)}, "the nearest is embed"),
            ({"blocks": frozenset({1, 3, 5, 6, 7})}, "state dict has no block 3, 5-7; its blocks are 0-2"),
        ],
    )
    def test_what_matches_nothing_is_a_mistake(self, wanted, sentence):
        with pytest.raises(htsr.UsageError, match=sentence):
            htsr.describe(state_dict(), where=htsr.Filter(**wanted))

    @pytest.mark.parametrize(
        ("loose", "exact"),
        [
            ({"blocks": (0,)}, {"blocks": frozenset({0})}),
            ({"blocks": [0, np.int64(1)]}, {"blocks": frozenset({0, 1})}),
            ({"blocks": range(2)}, {"blocks": frozenset({0, 1})}),
            ({"include": "*.q_proj"}, {"include": ("*.q_proj",)}),
            ({"roles": ["attn.q"], "exclude_roles": "embed*"}, {"roles": ("attn.q",), "exclude_roles": ("embed*",)}),
        ],
    )
    def test_any_collection_is_taken(self, loose, exact):
        assert htsr.Filter(**loose) == htsr.Filter(**exact)
        assert hash(htsr.Filter(**loose)) == hash(htsr.Filter(**exact))
        assert len(htsr.describe(state_dict(), where=htsr.Filter(**loose)).matrices) > 0

    @pytest.mark.parametrize(
        "wrong",
        [
            {"blocks": 3}, {"blocks": "3"}, {"blocks": (0.5,)}, {"blocks": [None]}, {"min_size": "3"},
            {"min_size": True}, {"min_size": None}, {"max_size": 4.5}, {"include": 3}, {"exclude": (3,)},
            {"roles": None},
        ],
    )  # fmt: skip
    def test_other_kinds_are_refused_in_one_sentence(self, wrong):
        with pytest.raises(htsr.UsageError, match=f"^{next(iter(wrong))} of a Filter takes [^\n]+$"):
            htsr.Filter(**wrong)

    @pytest.mark.parametrize("where", ["*.q_proj", ("*.q_proj",), {"roles": "attn.q"}, len])
    def test_where_is_a_filter(self, where):
        for call in (htsr.analyze, htsr.describe):
            with pytest.raises(htsr.UsageError, match=r"^where takes a Filter"):
                call(state_dict(), where=where)


@settings(max_examples=40)
@given(shape=st.lists(st.integers(1, 6), min_size=3, max_size=5), seed=st.integers(0, 99))
def test_a_kernel_is_one_matrix_per_position(shape, seed):
    torch.manual_seed(seed)
    kernel = torch.randn(shape)
    layer = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[len(shape)](shape[1], shape[0], tuple(shape[2:]), bias=False)
    layer.weight = nn.Parameter(kernel)
    (matrix,) = htsr.describe(nn.ModuleDict({"layer": layer})).matrices
    assert (matrix.shape, matrix.pieces, matrix.role) == (tuple(shape[:2]), int(np.prod(shape[2:])), "conv")
    pieces = np.asarray(matrix.read())
    for piece, where in zip(pieces, np.ndindex(*shape[2:]), strict=True):
        np.testing.assert_array_equal(piece, kernel[(..., *where)])


@settings(max_examples=20)
@given(experts=st.integers(2, 5), rows=st.integers(2, 9), columns=st.integers(2, 9), seed=st.integers(0, 99))
def test_a_stack_is_its_experts(experts, rows, columns, seed):
    torch.manual_seed(seed)
    stack = torch.randn(experts, rows, columns)
    stacked = htsr.describe({"layers.0.mlp.experts.down_proj": stack}).matrices
    singly = htsr.describe({f"layers.0.mlp.experts.{i}.down_proj.weight": stack[i] for i in range(experts)}).matrices
    for one, other in zip(stacked, singly, strict=True):
        assert (one.shape, one.role, one.block) == (other.shape, other.role, other.block)
        np.testing.assert_array_equal(one.read(), other.read())


def test_a_layer_of_experts_has_the_spectra_of_its_slices():
    random = np.random.default_rng(0)
    stack = torch.stack([heavy_matrix(random, 40, 24) for _ in range(3)])
    stacked = htsr.analyze({"layers.0.mlp.experts.down_proj": stack}, device="cpu")
    singly = htsr.analyze({f"layers.0.mlp.experts.{i}.down_proj.weight": stack[i] for i in range(3)}, device="cpu")
    for one, other in zip(stacked, singly, strict=True):
        assert one.alpha == pytest.approx(other.alpha, rel=1e-9)
        assert one.stable_rank == pytest.approx(other.stable_rank, rel=1e-9)


BAD = {
    "nan": (lambda W: W.index_fill_(0, torch.tensor([3]), float("nan")), "nan"),
    "infinite": (lambda W: W.index_fill_(0, torch.tensor([3]), float("inf")), "nan"),
    "zero": (lambda W: W.zero_(), "zero"),
    "tiny": (lambda W: W[:2, :1], "tiny"),
    "empty": (lambda W: W[:0], "empty"),
    "meta": (lambda W: W.to("meta"), "meta"),
    "integers": (lambda W: W.to(torch.int8), "quantized"),
    "bool": (lambda W: W > 0, "quantized"),
    "complex": (lambda W: W.to(torch.complex64), "quantized"),
}


@pytest.mark.parametrize("what", BAD)
def test_one_bad_tensor_is_a_sentence_and_the_rest_is_analyzed(what):
    spoil, status = BAD[what]
    state = state_dict(blocks=1)
    name = "model.layers.0.mlp.up_proj"
    state[f"{name}.weight"] = spoil(state[f"{name}.weight"].clone())
    rows = {row.name: row for row in htsr.analyze(state, device="cpu")}
    assert len(rows) == 5
    bad = rows.pop(name)
    assert bad.status == status
    assert bad.warning
    assert "\n" not in bad.warning
    assert bad.alpha is None
    assert {row.status for row in rows.values()} == {"ok"}


def test_a_matrix_whose_reading_fails_says_which():
    def broken(*_index):
        raise OSError("the disk is gone")

    (matrix,) = htsr.describe({"up_proj.weight": torch.ones(4, 4)}).matrices
    with pytest.raises(MatrixError, match="up_proj could not be read: the disk is gone") as caught:
        replace(matrix, load=broken).read()
    assert caught.value.status == "unreadable"
    with pytest.raises(MatrixError, match="not today") as caught:
        replace(matrix, problem=("odd", "not today")).read()
    assert caught.value.status == "odd"


def test_what_is_no_weight_is_no_row():
    state = {
        "layers.0.up_proj.weight": torch.ones(4, 6),
        "layers.0.up_proj.bias": torch.ones(4),
        "layers.0.norm.weight": torch.ones(6),
        "rotary_emb.inv_freq": torch.ones(4, 2),
        "attn.mask": torch.ones(8, 8),
        "attn.bias": torch.ones(1, 1, 8, 8),
        "encoder.layers.0.self_attn.bias_u": torch.ones(4, 8),
        "cls_token": torch.ones(1, 1, 6),
        "position_ids": torch.arange(6)[None],
        "bn.num_batches_tracked": torch.tensor(3),
        "model.experts.gate_up_proj_bias": torch.ones(4, 6),
        "head.logit_bias": torch.ones(1, 6),
    }
    assert [m.name for m in htsr.describe(state)] == ["layers.0.up_proj"]


class Biased(nn.Module):
    """Layers whose names say bias and mask, as pair representations and T5 have, beside real ones."""

    def __init__(self) -> None:
        super().__init__()
        self.pair_bias = nn.Linear(6, 8)
        self.to_attn_bias = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 4))
        self.mask, self.bias = nn.Linear(8, 6), nn.Linear(5, 7)
        self.relative_attention_bias = nn.Embedding(9, 4)
        self.inv_freq = nn.Conv1d(3, 4, 2)
        self.spatial_mask, self.attn_mask = nn.LSTM(4, 5, proj_size=2), nn.MultiheadAttention(4, 2, bias=False)
        self.logit_bias, self.a_bias = nn.Parameter(torch.ones(1, 7)), nn.Parameter(torch.ones(3, 7))


def test_a_layer_is_a_matrix_whatever_it_is_called(tmp_path):
    model = Biased()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    found = facts(model)
    assert list(found) == [
        "attn_mask.in_proj_weight[k]", "attn_mask.in_proj_weight[q]", "attn_mask.in_proj_weight[v]",
        "attn_mask.out_proj", "bias", "inv_freq", "mask", "pair_bias", "relative_attention_bias",
        "spatial_mask.weight_hh_l0", "spatial_mask.weight_hr_l0", "spatial_mask.weight_ih_l0", "to_attn_bias.1",
    ]  # fmt: skip
    assert_same(found, facts(tmp_path / "model.pt"))


def test_relative_positions_of_t5_are_a_matrix(tmp_path):
    config = transformers.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    model = transformers.T5Model(config)
    model.save_pretrained(tmp_path)
    found = facts(model)
    roles = [row[2] for name, row in found.items() if name.endswith("relative_attention_bias")]
    assert roles == ["decoder.embed.position", "encoder.embed.position"]
    assert_same(found, facts(str(tmp_path)))


def test_costs_grow_with_the_smaller_side():
    thin, wide, square = htsr.describe(
        {"a.weight": torch.ones(4, 64), "b.weight": torch.ones(64, 4), "c.weight": torch.ones(16, 16)}
    ).matrices
    assert thin.cost == wide.cost < square.cost
    assert thin.parameters == square.parameters == 256


@pytest.mark.parametrize("heads", [None, -1, 0, "7", [1], 1.5, 10**18, float("nan")], ids=repr)
@pytest.mark.parametrize("architecture", ["GPTNeoXModel", "Phi3ForCausalLM"])
def test_impossible_head_counts_cost_no_model(tmp_path, architecture, heads):
    """What the configuration takes apart is one row, split or not; every other row is what it was."""
    tiny(architecture).save_pretrained(tmp_path)
    sound = facts(str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    changed = {"num_attention_heads": heads, "num_key_value_heads": heads, "num_hidden_layers": 10**6}
    (tmp_path / "config.json").write_text(json.dumps(config | changed))
    rows = {row.name: row for row in htsr.analyze(str(tmp_path), device="cpu")}
    assert {name for name in sound if not name.endswith("]")} <= rows.keys()
    assert {name.partition("[")[0] for name in sound} == {name.partition("[")[0] for name in rows}


def test_a_stack_of_nothing_is_one_row():
    state = {"layers.0.mlp.experts.down_proj": torch.empty(10**12, 0, 4), "up_proj.weight": torch.randn(8, 6)}
    assert [row.status for row in htsr.analyze(state, device="cpu") if "experts" in row.name] in ([], ["empty"])
    state["layers.0.mlp.experts.down_proj.weight"] = state.pop("layers.0.mlp.experts.down_proj")
    assert [row.status for row in htsr.analyze(state, device="cpu") if "experts" in row.name] == ["empty"]


def test_the_names_of_paths_that_cannot_be():
    for name in ("/" + "x" * 5000, "~nosuchuser/model", "a\0b"):
        with pytest.raises(htsr.SourceError, match="does not exist"):
            htsr.describe(name)


def test_arrays_of_numpy_are_a_state_dict_as_tensors_are():
    state = state_dict(1)
    arrays = {name: tensor.numpy() for name, tensor in state.items()}
    assert_same(facts(state), facts(arrays))
    assert_same(facts({n: t.half() for n, t in state.items()}), facts({n: a.astype("f2") for n, a in arrays.items()}))
    swapped = {name: np.asfortranarray(array)[::-1][::-1].astype(">f4") for name, array in arrays.items()}
    for array in swapped.values():
        array.flags.writeable = False
    assert_same(facts(state), facts({"state_dict": swapped, "epoch": 3}))
    tied = {"model.embed_tokens.weight": (W := np.ones((9, 4), np.float32)), "lm_head.weight": W}
    assert len(htsr.describe(tied).matrices) == 1


def test_kernels_of_flax_in_memory_are_not_guessed_at_either():
    kernels = {"conv.kernel": np.ones((3, 3, 8, 9), np.float32), "dense.kernel": np.ones((8, 9), np.float32)}
    assert [m.problem and m.problem[0] for m in htsr.describe(kernels).matrices] == ["unsupported", None]


def test_a_dictionary_without_arrays_is_refused_in_words():
    with pytest.raises(htsr.SourceError, match="tensors of torch or arrays of NumPy, not list"):
        htsr.describe({"up.weight": [[1.0, 2.0], [3.0, 4.0]]})
    if np.dtype(np.longdouble).itemsize > 8:
        with pytest.raises(htsr.SourceError, match=r"up\.weight is an array of float128, which torch does not have"):
            htsr.describe({"up.weight": np.ones((3, 4), np.longdouble)})
