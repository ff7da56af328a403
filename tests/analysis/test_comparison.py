from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers

import htsr
from htsr.analysis.distance import cka, distance, squared_norm
from tests.models import heavy_matrix, save_folder, state_dict


def test_a_model_compared_with_itself():
    comparison = htsr.compare(state_dict(), state_dict(), device="cpu")
    assert len(comparison) == 13
    assert (comparison.only_a, comparison.only_b) == ((), ())
    for pair in comparison:
        assert pair.distance.frobenius == 0.0
        assert pair.distance.cosine == pytest.approx(1.0)
        assert pair.distance.cka == pytest.approx(1.0)
        assert pair.esd_distance == 0.0
    assert all(delta == 0 for a, b, delta in comparison.summary().values())


def test_distances_are_their_definitions(random):
    A, B = (heavy_matrix(random, 20, 50).double() for _ in range(2))
    found = distance(A, B)
    assert found.frobenius == pytest.approx(torch.linalg.norm(A - B).item(), rel=1e-5)
    assert found.relative == pytest.approx((torch.linalg.norm(A - B) / torch.linalg.norm(A)).item(), rel=1e-5)
    assert found.cosine == pytest.approx(torch.cosine_similarity(A.ravel(), B.ravel(), dim=0).item(), abs=1e-6)
    # CKA through the Gram matrices of the long side, HSIC(K, L) / √(HSIC(K, K) HSIC(L, L))
    centre = torch.eye(50).double() - 1 / 50
    K, L = (centre @ X.T @ X @ centre for X in (A, B))
    expected = (K * L).sum() / ((K * K).sum() * (L * L).sum()).sqrt()
    assert found.cka == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("shape", [(60, 25), (25, 60), (3, 20, 35)])
def test_distances_do_not_depend_on_how_many_rows_are_read_at_a_time(random, monkeypatch, shape):
    A, B = random.standard_normal((2, *shape)) + 0.5
    whole = distance(A, B)
    assert whole.cka == pytest.approx(cka(*np.reshape([A, B], (2, -1, *shape[-2:]))))
    monkeypatch.setattr("htsr.analysis.distance._AT_ONCE", 100)
    assert vars(distance(A, B)) == pytest.approx(vars(whole), rel=1e-12)
    assert vars(distance(A.astype("float32"), B.astype("float32"))) == pytest.approx(vars(whole), rel=1e-5)
    assert squared_norm(A, B) == pytest.approx(whole.frobenius**2)


def test_a_small_difference_of_float64_matrices_keeps_its_size(random):
    A, noise = random.standard_normal((2, 60, 60))
    found = distance(A, A + 1e-10 * noise)
    assert found.relative == pytest.approx(1e-10 * np.linalg.norm(noise) / np.linalg.norm(A), rel=1e-4)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (np.float32, 1e20),
        (np.float32, 1e37),
        (np.float32, 1e-25),
        (np.float64, 1e-50),
        (np.float64, 1e-200),
        (np.float64, 1e200),
    ],
)
def test_distances_are_those_of_any_scale(random, dtype, scale):
    A, B = random.standard_normal((2, 1, 60, 40))
    plain, found = distance(A, B), distance(*((scale * x).astype(dtype) for x in (A, B)))
    for name in ("relative", "cosine", "cka"):
        assert getattr(found, name) == pytest.approx(getattr(plain, name), rel=1e-4)
    assert found.frobenius == pytest.approx(scale * plain.frobenius, rel=1e-4)
    itself = distance((scale * A).astype(dtype), (scale * A).astype(dtype))
    assert 1 - 1e-6 < itself.cka <= 1
    assert itself.relative == 0


def test_cka_is_blind_to_rotation_and_scale(random):
    A = random.standard_normal((60, 25))
    rotation, _ = np.linalg.qr(random.standard_normal((25, 25)))
    assert cka(A[None], 3.0 * (A @ rotation)[None]) == pytest.approx(1.0)
    assert cka(A[None], random.standard_normal((1, 60, 25))) < 0.6


def test_zero_and_stacked_matrices(random):
    assert distance(np.zeros((4, 5)), np.ones((4, 5))) is None
    A, B = random.standard_normal((2, 3, 8, 9))
    assert distance(A, B).frobenius == pytest.approx(np.linalg.norm(A - B), rel=1e-5)


def test_what_is_in_one_only_is_named():
    a, b = state_dict(blocks=3), state_dict(blocks=2)
    b["extra.weight"] = torch.randn(40, 40)
    comparison = htsr.compare(a, b, device="cpu")
    assert len(comparison) == 9
    assert {name.split(".")[2] for name in comparison.only_a} == {"2"}
    assert comparison.only_b == ("extra",)


def test_differences_of_a_changed_matrix():
    a, b = state_dict(), state_dict()
    name = "model.layers.1.mlp.up_proj"
    b[f"{name}.weight"] = 2 * b[f"{name}.weight"]
    comparison = htsr.compare(a, b, device="cpu")
    (changed,) = [pair for pair in comparison if pair.distance.frobenius > 0]
    assert changed.name == name
    assert changed.distance.relative == pytest.approx(1.0)
    frame = comparison.to_pandas().set_index("name")
    assert frame.loc[name, "log_norm_delta"] == pytest.approx(np.log10(4))
    assert frame.loc[name, "alpha_delta"] == pytest.approx(0.0, abs=1e-6)
    mean = comparison.summary()["log_norm"]
    assert mean[2] == pytest.approx(np.log10(4) / 13)
    assert mean[1] - mean[0] == pytest.approx(mean[2])


def test_models_that_name_things_differently_are_matched():
    """By names alone; llama.cpp's files, whose rows are permuted, are in tests/matrices/test_layouts.py."""
    state = state_dict(blocks=2)
    prefixed = {f"wrapper.{name}": tensor for name, tensor in state.items()}
    assert len(htsr.compare(state, prefixed, device="cpu")) == 9
    short = {
        "q_proj": "attn_q",
        "k_proj": "attn_k",
        "up_proj": "ffn_up",
        "down_proj": "ffn_down",
    }
    gguf = {"token_embd.weight": state["model.embed_tokens.weight"]}
    for i in range(2):
        for theirs, ours in short.items():
            part = "self_attn" if "attn" in ours else "mlp"
            gguf[f"blk.{i}.{ours}.weight"] = state[f"model.layers.{i}.{part}.{theirs}.weight"]
    comparison = htsr.compare(state, gguf, device="cpu")
    assert len(comparison) == 9
    assert all(pair.distance.frobenius == 0 for pair in comparison)


def test_a_filter_names_what_is_in_one_of_the_two():
    a, b = state_dict(blocks=2), state_dict(blocks=1)
    b["extra.weight"] = torch.randn(40, 40)
    wanted = htsr.Filter(exclude=("extra", "*.1.*"))
    assert len(htsr.compare(a, b, where=wanted, device="cpu")) == 5
    with pytest.raises(htsr.UsageError, match="no name of state dict and state dict matches 'extar'"):
        htsr.compare(a, b, where=htsr.Filter(exclude=("extar",)), device="cpu")


@pytest.mark.parametrize("side", ["file first", "module first"])
def test_experts_one_by_one_in_a_file_are_those_stacked_in_a_module(tmp_path, side):
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=3,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config)
    model.save_pretrained(tmp_path)
    assert any(".experts.1." in m.name for m in htsr.describe(str(tmp_path)))
    pair = (str(tmp_path), model) if side == "file first" else (model, str(tmp_path))
    comparison = htsr.compare(*pair, device="cpu", null=False)
    assert (comparison.only_a, comparison.only_b) == ((), ())
    assert {pair.distance.frobenius for pair in comparison} == {0.0}
    assert all(pair.a.role == pair.b.role for pair in comparison)


def test_matrices_without_a_role_are_not_paired_by_it():
    a, b = state_dict(blocks=1), state_dict(blocks=1)
    a["some.thing.weight"], b["any.matter.weight"] = torch.randn(20, 30), torch.randn(20, 30)
    comparison = htsr.compare(a, b, device="cpu")
    assert (comparison.only_a, comparison.only_b) == (("some.thing",), ("any.matter",))


def test_nothing_in_common_is_an_error():
    with pytest.raises(htsr.SourceError, match="no matrix in common"):
        htsr.compare(state_dict(), {"other.thing.weight": torch.randn(30, 40)}, device="cpu")


def test_saved_analyses_compare_without_weights(tmp_path):
    a, b = (htsr.analyze(state_dict(seed=seed), device="cpu") for seed in (0, 1))
    comparison = htsr.compare(a, b)
    assert all(pair.distance is None and pair.esd_distance > 0 for pair in comparison)


def test_a_saved_analysis_brings_its_options(tmp_path):
    """What 0.1.0 compared: a saved Hill fit with a fresh Kolmogorov-Smirnov fit of the same weights."""
    state = state_dict()
    htsr.analyze(state, device="cpu", fit="hill", seed=3, bulk=True).save(tmp_path / "a.npz")
    saved = htsr.Analysis.load(tmp_path / "a.npz")
    comparison = htsr.compare(saved, state, device="cpu")
    assert (comparison.b.options.fit, comparison.b.options.seed, comparison.b.options.bulk) == ("hill", 3, True)
    assert comparison.summary()["alpha"][2] == 0.0
    assert htsr.compare(state, saved, full=True, device="cpu").a.options.permuted


def test_the_fit_that_tells_two_models_apart_is_the_default():
    """The studies' answer, beside what was measured before with another fit."""
    state = state_dict(blocks=1)
    comparison = htsr.compare(state, state, device="cpu")
    assert (comparison.a.options.fit, comparison.b.options.fit) == ("hill", "hill")
    assert comparison.remarks()[0].startswith("mean α (hill) ")
    assert htsr.compare(state, state, device="cpu", fit="ks").a.options.fit == "ks"
    assert htsr.compare(htsr.analyze(state, device="cpu"), state, device="cpu").b.options.fit == "ks"


@pytest.mark.parametrize(
    "options", [{"fit": "ks"}, {"xmin": 1.0}, {"xmax": 9.0}, {"windows": htsr.Windows(16, 2)}], ids=str
)
def test_numbers_of_two_fits_do_not_compare(options):
    state = state_dict(blocks=1)
    hill, other = htsr.analyze(state, device="cpu", fit="hill"), htsr.analyze(state, device="cpu", **options)
    name = next(iter(options))
    with pytest.raises(htsr.UsageError, match=f"with {name if name == 'fit' else 'fit'} hill"):
        htsr.compare(hill, other)
    with pytest.raises(htsr.UsageError, match=f"with {name} .* this comparison with {name} "):
        htsr.compare(hill, state, device="cpu", **options)


@pytest.mark.parametrize("other", [{"gof": 20, "bootstrap": 20}, {"seed": 3}])
def test_what_was_drawn_otherwise_is_left_out_and_named(caplog, other):
    """Differences of Monte Carlo numbers of other draws are noise: identical weights had other gof_p."""
    state, options = state_dict(1), {"device": "cpu", "gof": 10, "bootstrap": 10, "null": False}
    a, b = (htsr.analyze(state, **options | changed) for changed in ({}, other))
    comparison = htsr.compare(a, b)
    assert not {"gof_p_delta", "alpha_low_delta", "alpha_high_delta"} & comparison.records()[0].keys()
    assert {name: value[2] for name, value in comparison.summary().items() if value[2]} == {}
    assert [r.getMessage().partition(" left out")[0] for r in caplog.records] == ["gof_p", "alpha_low and alpha_high"]
    caplog.clear()
    assert "gof_p_delta" in htsr.compare(a, htsr.analyze(state, **options)).records()[0]
    assert not caplog.records


def test_matrices_of_different_shapes_are_no_pair():
    a, b = state_dict(blocks=2), state_dict(blocks=2)
    b["model.embed_tokens.weight"] = torch.cat([b["model.embed_tokens.weight"], torch.randn(3, 32)])
    b["model.layers.0.mlp.up_proj.weight"] = b["model.layers.0.mlp.up_proj.weight"].T.contiguous()
    comparison = htsr.compare(a, b, device="cpu")
    assert comparison.reshaped == ("model.embed_tokens",)
    assert (comparison.only_a, comparison.only_b) == ((), ())
    assert len(comparison) == 8
    transposed = next(pair for pair in comparison if pair.name == "model.layers.0.mlp.up_proj")
    assert transposed.b.alpha == pytest.approx(transposed.a.alpha)
    with pytest.raises(htsr.SourceError, match=r"no matrix of one shape in common: model\.embed_tokens is 160×32 and"):
        htsr.compare(state_dict(), state_dict(width=24), device="cpu")


def test_analyses_of_two_versions_are_told(caplog):
    a = htsr.analyze(state_dict(blocks=1), device="cpu")
    with caplog.at_level("WARNING", logger="htsr"):
        htsr.compare(a, replace(a, meta=a.meta | {"htsr": "0.0.1"}))
    assert "and 0.0.1, and numbers may have been mended" in caplog.text


def test_the_difference_of_two_checkpoints_is_a_model(tmp_path):
    a, b = state_dict(seed=0), state_dict(seed=1)
    delta = htsr.analyze(save_folder(tmp_path / "a", a), against=save_folder(tmp_path / "b", b), device="cpu")
    expected = htsr.analyze({name: a[name] - b[name] for name in a}, device="cpu")
    for row in expected:
        assert delta[row.name].alpha == pytest.approx(row.alpha, rel=1e-6)


def test_matrices_of_zeros_have_no_distance(tmp_path):
    weights = state_dict(blocks=1)
    name = next(name for name in weights if name.endswith("q_proj.weight"))
    a = save_folder(tmp_path / "a", weights)
    b = save_folder(tmp_path / "b", weights | {name: torch.zeros_like(weights[name])})
    pairs = {pair.name: pair for pair in htsr.compare(a, b, null=False)}
    zero = pairs.pop(name.removesuffix(".weight"))
    assert (zero.distance, zero.esd_distance) == (None, None)
    assert all(pair.distance.frobenius == 0 for pair in pairs.values())
