"""The weights of two models laid over each other: however the two store them, the numbers are the same."""

from __future__ import annotations

import re
import weakref
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
import transformers

import htsr
from htsr.analysis import execution
from htsr.analysis.analyze import analyze_model, make_options
from htsr.analysis.comparing import compare_analyses
from htsr.analysis.reference import Reference
from htsr.matrices.sources import open_model
from htsr.spectra.subspaces import Directions, by_head, directions
from tests.models import save_folder, state_dict
from tests.processes import in_two_processes, leave_with, one_thread

OPTIONS = {"device": "cpu", "null": False, "distributed": False}
TINY = {"vocab_size": 40, "num_hidden_layers": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def numbers(found: Directions) -> dict[str, float]:
    """What is a number in it, and does not depend on the draws of a null."""
    plain = {f.name: getattr(found, f.name) for f in fields(found) if not f.name.endswith("_null")}
    return {name: value for name, value in plain.items() if isinstance(value, (int, float))}


def by_role(comparison: htsr.Comparison) -> dict[str, object]:
    assert (comparison.only_a, comparison.only_b, comparison.reshaped) == ((), (), ())
    return {pair.a.role: pair for pair in comparison}


def trained(model: torch.nn.Module, seed: int = 1) -> torch.nn.Module:
    """A model as if it had been trained: something of low rank and some noise are added to each matrix."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for W in model.parameters():
            if W.ndim == 2:
                left, right = (torch.randn(size, 2, generator=random) for size in W.shape)
                W += W.std() * (0.3 * torch.randn(W.shape, generator=random) + 0.5 * left @ right.T / W.shape[0] ** 0.5)
    return model


def made(architecture: str, **sizes) -> torch.nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{architecture}Config")(**TINY | sizes)
    name = f"{architecture}LMHeadModel" if architecture == "GPT2" else f"{architecture}ForCausalLM"
    return getattr(transformers, name)(config)


def gpt2() -> torch.nn.Module:
    return made("GPT2", n_positions=8, n_embd=32, n_layer=1, n_head=4)


def phi3() -> torch.nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    return made("Phi3", **sizes)


def llama(**changes) -> torch.nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    return made("Llama", **sizes | changes)


def as_nanogpt(model):
    """Linear layers under GPT-2's names."""
    leaves = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    return {k: W.T.contiguous() if k.endswith(leaves) else W.clone() for k, W in model.state_dict().items()}


def as_llama(model):
    """Phi-3 with q, k, v and gate, up apart, as conversions to LLaMA have them."""
    state = {}
    for name, W in model.state_dict().items():
        for fused, parts in (("qkv_proj", {"q_proj": 32, "k_proj": 16, "v_proj": 16}), ("gate_up_proj", {})):
            if fused in name:
                parts = parts or {"gate_proj": 48, "up_proj": 48}
                pieces = zip(parts, W.split(list(parts.values())), strict=True)
                state |= {name.replace(fused, part): piece.clone() for part, piece in pieces}
                break
        else:
            state[name] = W.clone()
    return state


def prefixed(prefix):
    return lambda model: {f"{prefix}{name}": W.clone() for name, W in model.state_dict().items()}


LAYOUTS = {
    "GPT-2's Conv1D and nanoGPT's Linear": (gpt2, as_nanogpt),
    "fused, of which one knows the layout": (phi3, lambda model: dict(model.state_dict())),
    "fused and split": (phi3, as_llama),
    "the prefix of PEFT": (llama, prefixed("base_model.model.")),
    "the prefix of torch.compile": (llama, prefixed("_orig_mod.")),
    "the prefix of DDP": (llama, prefixed("module.")),
    "no prefix": (llama, lambda model: {k.removeprefix("model."): W for k, W in model.state_dict().items()}),
    "a tied head that is stored twice": (lambda: llama(tie_word_embeddings=True), lambda m: dict(m.state_dict())),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_does_not_matter(layout):
    make, stored = LAYOUTS[layout]
    base, tuned = make(), trained(make())
    plain = by_role(htsr.compare(base, tuned, directions=3, **OPTIONS))
    for pair in (by_role(htsr.compare(base, stored(tuned), directions=3, **OPTIONS)),
                 by_role(htsr.compare(stored(base), tuned, directions=3, **OPTIONS))):  # fmt: skip
        assert pair.keys() == plain.keys()
        for role, found in pair.items():
            assert found.distance.relative == pytest.approx(plain[role].distance.relative)
            assert found.distance.cka == pytest.approx(plain[role].distance.cka, rel=1e-4)
            assert numbers(found.directions) == pytest.approx(numbers(plain[role].directions), rel=1e-6, abs=1e-6)
            for head, expected in zip(found.heads, plain[role].heads, strict=True):
                assert numbers(head) == pytest.approx(numbers(expected), rel=1e-6, abs=1e-6)
    assert {role: len(pair.heads) for role, pair in plain.items() if pair.heads}.keys() == {f"attn.{x}" for x in "qkvo"}


def test_a_transposed_matrix_is_noted_and_a_square_one_without_evidence_is_not_turned():
    pairs = by_role(htsr.compare(gpt2(), as_nanogpt(gpt2()), directions=2, **OPTIONS))
    assert {pair.notes for role, pair in pairs.items() if role.startswith(("attn", "mlp"))} == {
        ("unchanged", "stored transposed in one of the two")
    }
    assert pairs["embed"].notes == ("unchanged",)
    square = {"layers.0.mlp.up_proj.weight": torch.randn(16, 16, generator=torch.Generator().manual_seed(0))}
    turned = {name: W.T.contiguous() for name, W in square.items()}
    (pair,) = htsr.compare(square, turned, **OPTIONS)
    assert pair.distance.relative > 1


def test_square_experts_of_which_one_side_has_no_configuration_are_not_turned():
    """gpt-oss stores its experts (in, out) and all square: a state dict does not tell, and is stored alike."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
             "head_dim": 8, "num_local_experts": 2, "layer_types": ["full_attention"]}  # fmt: skip
    base, tuned = made("GptOss", **sizes), trained(made("GptOss", **sizes))
    for other in (tuned, dict(tuned.state_dict())):
        pairs = [pair for pair in htsr.compare(base, other, directions=2, **OPTIONS) if "expert.down" in pair.a.role]
        assert len(pairs) == 2
        for e, pair in enumerate(pairs):
            A, B = (model.model.layers[0].mlp.experts.down_proj[e].detach().T for model in (base, tuned))
            assert numbers(pair.directions) == pytest.approx(numbers(directions(A, B, 2)))
            assert pair.notes == ("unchanged",)  # and not stored transposed


def test_the_length_of_a_change_does_not_feel_the_layout_either():
    """What `htsr track` divides by the base: of GPT-2's Conv1D and nanoGPT's Linear, and not where rows may differ."""
    base, tuned = open_model(gpt2()), open_model(as_nanogpt(trained(gpt2())))
    expected = {pair.b.name: pair.distance.relative for pair in htsr.compare(gpt2(), trained(gpt2()), **OPTIONS)}
    found = Reference(base).relative(tuned, tuned)
    assert len(found) == len(expected)
    for name, relative in found.items():
        assert relative == pytest.approx(expected[name], rel=1e-5)
    unknown = [replace(m, axes=replace(m.axes, order="not known")) if m.role == "attn.q" else m for m in tuned]
    missing = replace(tuned, matrices=tuple(unknown))
    assert found.keys() - Reference(base).relative(missing, missing).keys() == {
        matrix.name for matrix in tuned if matrix.role == "attn.q"
    }


def test_numbers_are_those_of_the_functions():
    """Left vectors are those of the outputs, of heads the grouped ones."""
    base, tuned = gpt2(), trained(gpt2())
    (pair,) = [p for p in htsr.compare(base, tuned, directions=3, **OPTIONS) if p.a.role == "attn.k"]
    A, B = (model.transformer.h[0].attn.c_attn.weight.detach()[:, 32:64].T for model in (base, tuned))
    assert numbers(pair.directions) == pytest.approx(numbers(directions(A, B, 3)))
    for head, expected in zip(pair.heads, by_head(A, B, 4, 0, 3), strict=True):
        assert numbers(head) == pytest.approx(numbers(expected))
    base, tuned = llama(), trained(llama())
    pairs = by_role(htsr.compare(base, tuned, directions=3, **OPTIONS))
    attention = [model.model.layers[0].self_attn for model in (base, tuned)]
    for part, count, axis in (("q", 4, 0), ("k", 2, 0), ("v", 2, 0), ("o", 4, 1)):
        A, B = (getattr(x, f"{part}_proj").weight.detach() for x in attention)
        for head, expected in zip(pairs[f"attn.{part}"].heads, by_head(A, B, count, axis, 3), strict=True):
            assert numbers(head) == pytest.approx(numbers(expected))
    assert pairs["mlp.up"].heads == ()


def test_adapters_are_compared_on_their_base(tmp_path):
    peft = pytest.importorskip("peft")
    base = llama()
    base.save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "adapter")
    sources = [str(tmp_path / name) for name in ("base", "adapter")]
    expected = by_role(htsr.compare(base, adapted.merge_and_unload(), directions=2, **OPTIONS))
    for more in ({}, {"base": sources[0]}):
        found = by_role(htsr.compare(*sources, directions=2, **OPTIONS, **more))
        assert found["attn.q"].distance.relative == pytest.approx(expected["attn.q"].distance.relative, rel=1e-4)
        assert numbers(found["attn.q"].directions) == pytest.approx(numbers(expected["attn.q"].directions), abs=1e-3)
        assert found["attn.q"].directions.intruders == expected["attn.q"].directions.intruders
        assert found["mlp.up"].distance.frobenius == 0.0
    both = htsr.compare(sources[1], sources[1], **OPTIONS)
    assert [pair.a.kind for pair in both] == ["adapter"]  # ΔW beside ΔW
    beside = htsr.compare(htsr.analyze(sources[1], device="cpu", null=False), sources[1], **OPTIONS)
    assert [pair.b.kind for pair in beside] == ["adapter"]
    with pytest.raises(htsr.UsageError, match="neither of the two is one"):
        htsr.compare(sources[0], sources[0], base=sources[0], **OPTIONS)


def test_zeros_and_saved_analyses_have_no_directions(tmp_path, caplog):
    random = torch.Generator().manual_seed(0)
    state = {"conv.weight": torch.randn(8, 6, 3, 3, generator=random), "up_proj.weight": torch.zeros(8, 6),
             "down_proj.weight": torch.randn(6, 8, generator=random)}  # fmt: skip
    pairs = {pair.name: pair for pair in htsr.compare(state, state, directions=2, **OPTIONS)}
    assert pairs["conv"].distance.frobenius == 0.0
    assert pairs["conv"].directions.overlap_right == 1.0  # of all pieces
    assert "no directions: A is zero" in pairs["up_proj"].notes[0]
    assert pairs["up_proj"].directions is None
    assert pairs["down_proj"].directions.overlap_left == 1.0
    saved = htsr.analyze(state, device="cpu", null=False)
    comparison = htsr.compare(saved, state, directions=2, **OPTIONS)
    assert [r.getMessage() for r in caplog.records if r.name.startswith("htsr")] == [
        "a saved analysis has no weights: there are no directions"
    ]
    assert {pair.directions for pair in comparison} == {None}
    for wrong in (0, True, 2.0, "all"):
        with pytest.raises(htsr.UsageError, match="directions is erg, tail or a number"):
            htsr.compare(state, state, directions=wrong)


@pytest.mark.parametrize("k", ["erg", "tail"])
def test_directions_of_a_spectrum(k):
    state = state_dict(blocks=1)
    random = torch.Generator().manual_seed(0)
    tuned = {name: W + 0.1 * W.std(correction=0) * torch.randn(W.shape, generator=random) for name, W in state.items()}
    for pair in htsr.compare(state, tuned, directions=k, fit="ks", **OPTIONS):
        expected = pair.a.erg_num if k == "erg" else pair.a.num_pl_tail
        assert pair.directions.k == expected
        assert 0 < pair.directions.overlap_left <= 1


def test_results_of_directions():
    """Columns, facts, and the rows of heads, of a model in which an intruder dimension was planted."""
    base, tuned = llama(), trained(llama())
    with torch.no_grad():
        W = tuned.model.layers[0].mlp.down_proj.weight
        U, S, V = torch.linalg.svd(base.model.layers[0].mlp.down_proj.weight)
        W += 2 * S[0] * torch.outer(U.mean(1) * 32**0.5, V[-1])
    comparison = htsr.compare(base, tuned, directions=4, **OPTIONS)
    plain = htsr.compare(base, tuned, **OPTIONS)
    added = [name for name in comparison.records()[0] if name not in plain.records()[0]]
    assert added[:3] == ["directions", "overlap_left", "overlap_left_null"]
    assert {"intruders", "intruders_0.9_null", "directions_gap", "change_stable_rank_null"} <= {*added}
    assert {*added} <= comparison.types().keys()
    for row, pair in zip(comparison.records(), comparison, strict=True):
        assert row["intruders_0.9"] == pair.directions.intruder_counts[-1]
        assert row["relative"] == pair.distance.relative == pytest.approx(pair.directions.relative, rel=1e-5)
    facts = comparison.facts()
    mean = np.mean([pair.directions.overlap_right for pair in comparison])
    assert facts["directions"]["k"] == 4
    assert facts["directions"]["means"]["overlap_right"] == pytest.approx(mean)
    assert len(facts["intruders"]) == sum(pair.directions.intruders for pair in comparison) > 0
    assert ("model.layers.0.mlp.down_proj", 1) in {(row["name"], row["rank"]) for row in facts["intruders"]}
    for row in facts["intruders"]:
        (pair,) = [pair for pair in comparison if pair.name == row["name"]]
        assert pair.directions.values[row["rank"] - 1] == row["value"]
        assert row["nearest"] < 0.5
    heads = comparison.heads.to_pandas()
    assert heads.groupby("role")["head"].count().to_dict() == {"attn.q": 4, "attn.k": 2, "attn.v": 2, "attn.o": 4}
    assert heads["overlap_left"].between(0, 1).all()
    assert facts["heads"] == comparison.heads.records()
    assert comparison.heads.tables()[0].columns[2].title == "head"
    assert "U overlap" in [column.title for column in comparison.tables()[0].columns]
    assert any(re.search("[0-9]+ intruder dimensions? in", remark) for remark in comparison.remarks())
    assert not {"directions", "heads", "intruders"} & plain.facts().keys()
    unknown = htsr.compare(dict(base.state_dict()), dict(tuned.state_dict()), directions=4, **OPTIONS)
    assert len(unknown.heads) == 0
    assert "the number of attention heads is not known" in unknown.remarks()[-1]


def test_pairs_go_by_name_and_position():
    base, tuned = gpt2(), gpt2()
    with torch.no_grad():
        tuned.transformer.h[0].mlp.c_fc.weight += 0.01
    comparison = htsr.compare(base, tuned, **OPTIONS)
    name = next(pair.name for pair in comparison if "c_fc" in pair.name)
    assert comparison[0] is comparison.pairs[0]
    assert comparison[-2:] == comparison.pairs[-2:]
    assert comparison[name].name == name
    with pytest.raises(KeyError, match=f"has no matrix {name}x; the nearest is {name}"):
        comparison[f"{name}x"]
    with pytest.raises(TypeError, match="by name, position or slice"):
        comparison[1.0]
    assert {pair.name for pair in comparison if "unchanged" not in pair.notes} == {name}
    alone = htsr.compare(base, tuned, where=htsr.Filter(include=("*c_fc*",)), **OPTIONS)
    assert "1 matrix in both" in repr(alone)
    assert alone.remarks()[0].endswith("over 1 matrix")


def test_each_pair_is_read_once_and_alone(monkeypatch):
    """For distance, directions and heads together; what is held is one pair."""
    monkeypatch.setattr(execution, "SIDE_BY_SIDE", 0)
    read: list[str] = []
    alive: list[weakref.ref] = []
    most = 0

    def spied(side, matrix):
        def load():
            nonlocal most
            found = np.array(matrix.load(), dtype=np.float32)
            read.append(f"{side} {matrix.name}")
            alive.append(weakref.ref(found))
            most = max(most, sum(one() is not None for one in alive))
            return found

        return replace(matrix, load=load)

    models = [open_model(model) for model in (llama(), trained(llama()))]
    analyses = [analyze_model(model, make_options(device="cpu", null=False)) for model in models]
    models = [replace(m, matrices=tuple(spied(i, one) for one in m)) for i, m in enumerate(models)]
    comparison = compare_analyses(*analyses, *models, directions=3)
    assert all(pair.distance and pair.directions for pair in comparison)
    assert sorted(read) == sorted(f"{i} {matrix.name}" for i, model in enumerate(models) for matrix in model)
    assert most == 2


def _rows(folder):
    comparison = htsr.compare(str(folder / "a"), str(folder / "b"), directions=3, device="cpu", null=False)
    return comparison.records(), comparison.heads.records(), comparison.facts()["intruders"]


def _compared(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    read: list[str] = []
    original = htsr.WeightMatrix.read

    def spy(matrix):
        read.append(matrix.name)
        return original(matrix)

    htsr.WeightMatrix.read = spy
    rows = _rows(folder)
    refused = ""
    try:
        htsr.compare(str(folder / "a"), str(folder / "b"), directions=2 + rank, device="cpu", null=False)
    except htsr.UsageError as error:
        refused = str(error)
    leave_with({"rows": rows, "read": read, "refused": refused}, rank, folder)


def test_ranks_share_the_pairs(tmp_path):
    llama().save_pretrained(tmp_path / "a")
    trained(llama()).save_pretrained(tmp_path / "b")
    first, second = in_two_processes(_compared, tmp_path)
    with one_thread():
        alone = _rows(tmp_path)
    assert first["rows"] == second["rows"] == [*alone]
    names = [row["name"] for row in alone[0]]
    assert sorted(first["read"] + second["read"]) == sorted(2 * names)
    assert first["read"]
    assert second["read"]
    assert first["refused"] == second["refused"]
    assert "the processes do not compare alike: directions 2 on rank 0 and directions 3 on rank 1" in first["refused"]


def test_a_rank_deficient_pair_says_how_many_directions_it_has(tmp_path):
    random = torch.Generator().manual_seed(0)
    low = torch.randn(16, 2, generator=random) @ torch.randn(2, 12, generator=random)
    state = {"up_proj.weight": low, "down_proj.weight": torch.randn(12, 16, generator=random)}
    pairs = {pair.name: pair for pair in htsr.compare(state, save_folder(tmp_path, state), directions=5, **OPTIONS)}
    assert (pairs["up_proj"].directions.k, pairs["down_proj"].directions.k) == (2, 5)
    assert "2 singular values above the rounding" in pairs["up_proj"].notes[1]


def test_the_page_and_plots_of_a_comparison(tmp_path):
    """Every number is explained; spectra of both, directions and heads are there under the names of the first."""
    pytest.importorskip("plotly")
    base, tuned = gpt2(), as_nanogpt(trained(gpt2()))
    renamed = {name.replace("h.0.", "layers.0."): W for name, W in tuned.items()}
    comparison = htsr.compare(base, renamed, directions=3, **OPTIONS)
    pages = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("htsr.reporting.comparison_page.write_comparison", lambda page, path: pages.append(page))
        comparison.to_html(tmp_path / "page.html")
    (page,) = pages
    names = [pair.name for pair in comparison]
    assert any(pair.name != pair.b.name for pair in comparison)
    assert [*page.eigenvalues_a] == [*page.eigenvalues_b] == [*page.cosines] == names
    assert {len(page.heads[name]) for name in page.heads} == {4}
    explained = {name for name in page.numeric if name in page.about}
    assert {name.rpartition("_")[0] for name in {*page.numeric} - explained} <= page.about.keys()
    assert page.facts["leading directions"] == "3"
    pair = comparison.pairs[3]
    assert (page.cosines[pair.name].values_a, page.cosines[pair.name].values_b) == (
        pair.directions.base_values,
        pair.directions.values,
    )
    comparison.to_html(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text().startswith("<!DOCTYPE html>")
    pytest.importorskip("matplotlib").use("agg")
    assert pair.name in comparison.plot(pair.name).get_title()
    assert comparison.plot(metric="overlap_left") is not None
