import numpy as np
import pytest
import torch

from htsr.matrices.sources import open_model
from reports import common
from reports.checkpoints import finetuned, turned, turned_text
from reports.checkpoints.measuring import auc, changed, gaussian, measured
from reports.checkpoints.quantizing import NF4, affine, int8, nf4


@pytest.fixture
def W():
    return np.random.default_rng(0).standard_normal((48, 96), dtype=np.float32)


def test_rounding_errs_by_half_a_step_at_most(W):
    step = np.abs(W).max(axis=1, keepdims=True) / 127
    assert (np.abs(int8(W) - W) <= 0.5001 * step).all()
    for bits in (2, 3, 4):
        groups, rounded = W.reshape(-1, 32), affine(W, bits).reshape(-1, 32)
        step = (groups.max(axis=1) - groups.min(axis=1)) / (2**bits - 1)
        assert (np.abs(rounded - groups).max(axis=1) <= 0.51 * step + 0.004).all()  # 0.004: minimum and step in float16
        assert max(np.unique(line).size for line in rounded) == 2**bits


def test_groups_may_end_within_a_row():
    W = np.random.default_rng(1).standard_normal((5, 7), dtype=np.float32)
    for quantised in (affine(W, 4), nf4(W)):
        assert quantised.shape == W.shape
        assert 0 < np.linalg.norm(quantised - W) / np.linalg.norm(W) < 0.2


def test_nf4_is_that_of_bitsandbytes():
    W = np.random.default_rng(2).standard_normal((48, 128), dtype=np.float32)
    functional = pytest.importorskip("bitsandbytes.functional")
    assert functional.get_4bit_type("nf4", device="cpu").numpy() == pytest.approx(NF4, abs=1e-6)
    codes, state = functional.quantize_4bit(torch.from_numpy(W), blocksize=64, quant_type="nf4")
    theirs = functional.dequantize_4bit(codes, state).numpy()
    assert nf4(W) == pytest.approx(theirs, abs=1e-5)


def test_a_changed_model_keeps_its_names_and_an_unchanged_one_its_numbers(W):
    model = open_model({"a.weight": torch.from_numpy(W), "b.weight": torch.from_numpy(W[:, :48].copy())})
    assert measured(changed(model, lambda name, matrix: matrix)) == measured(model)
    noise = measured(changed(model, gaussian))
    assert [row["name"] for row in noise] == ["a", "b"]
    assert noise[0]["norm"] == pytest.approx((W**2).sum(), rel=0.1)
    assert noise[0]["norm"] != pytest.approx((W**2).sum(), rel=1e-6)


def test_auc_is_the_share_of_ordered_pairs():
    assert auc(np.array([0.0, 1.0]), np.array([2.0, 3.0])) == 1
    assert auc(np.array([0.0, 2.0]), np.array([1.0, 2.0])) == pytest.approx((1 + 1 + 0 + 0.5) / 4)


def test_the_method_is_not_asked_of_one_seed():
    assert finetuned.told([{"arm": "full", "seed": 0}], {}) == {}


@pytest.fixture
def tuned(tmp_path, monkeypatch):
    """A base and, for each method and seed, the base with a change of a rank that belongs to the method; `b` stays."""
    from safetensors.torch import save_file

    ranks = {"full": 32, "lora": 8, "owlore": 16}  # 8 eigenvalues are the fewest that are fitted
    random = torch.Generator().manual_seed(0)
    base = {f"layers.{i}.a.weight": torch.randn(32, 64, generator=random) for i in range(8)}
    base["layers.0.b.weight"] = torch.randn(32, 32, generator=random)
    save_file(base, tmp_path / "base.safetensors")
    for arm, rank in ranks.items():
        for seed in (0, 1):
            folder = tmp_path / f"{arm}-{seed}"
            folder.mkdir()
            change = {
                name: 0.02 * torch.randn(32, rank, generator=random) @ torch.randn(rank, 64, generator=random)
                for name in base
                if ".a." in name
            }
            save_file({k: W + change[k] if k in change else W for k, W in base.items()}, folder / "model.safetensors")
    monkeypatch.setattr(common, "smollm2", lambda work: tmp_path / "base.safetensors")
    monkeypatch.setattr(finetuned, "tuned", lambda arm, seed, work: (work / f"{arm}-{seed}" / "model.safetensors", {}))
    return tmp_path


def test_the_change_of_a_fine_tuning_is_found_with_its_rank(tuned):
    before = measured(open_model(tuned / "base.safetensors"))
    found = finetuned.study(tuned, before, range(2), only_finished=False)
    by_arm = {run["arm"]: run for run in found["runs"]}
    assert [run["moved"] for run in found["runs"]] == [8] * 6
    assert {arm: run["change"]["rank"] for arm, run in by_arm.items()} == {
        "full": [32.0, 32.0, 32.0],
        "lora": [8.0, 8.0, 8.0],
        "owlore": [16.0, 16.0, 16.0],
    }
    assert by_arm["lora"]["change"]["energy_999"][1] <= 8 < by_arm["owlore"]["change"]["energy_999"][1] <= 16
    assert found["told"]["spectrum of the change"] > 0.9
    assert {line["matrices"] for line in found["agreement"]} == {8}


def test_the_random_change_has_the_size_of_the_real_one(tuned):
    rows = finetuned.run("lora", 0, tuned)
    norms = {row["name"]: row["norm"] for row in measured(open_model(tuned / "base.safetensors"))}
    assert len(rows["random"]) == 8
    for row in rows["random"]:  # ‖W + D‖² = ‖W‖² + ‖D‖² + 2⟨W, D⟩, whose last term has a spread of 2‖W‖‖D‖/√n
        W, D = norms[row["name"]] ** 0.5, rows["sizes"][row["name"]]
        assert row["norm"] == pytest.approx(W**2 + D**2, abs=4 * 2 * W * D / 2048**0.5)
        assert row["norm"] != pytest.approx(W**2, rel=1e-9)


def test_directions_are_summed_up_by_method_and_set_beside_forgetting():
    """The section of directions on made-up runs: one number that is the forgetting itself, one that is noise."""
    random = np.random.default_rng(0)

    def made(arm, seed, size):
        rows = [
            {"name": str(i), "role": "mlp.up", "block": 0, "gives_back": i / 100}
            | {key: float(random.random()) for key in turned.NUMBERS}
            | {"relative": size * (1 + i / 30)}
            for i in range(30)
        ]
        return {"arm": arm, "seed": seed, "rows": rows, "before": 3.0 - size, "after": 3.0}

    sizes = {"full": 0.1, "lora": 10.0, "owlore": 1000.0}
    runs = [made(arm, seed, size * (1 + seed)) for arm, size in sizes.items() for seed in range(2)]
    found = turned.summary(runs)
    assert found["told"]["full / lora"]["relative"] > 0.9
    assert abs(found["told"]["full / lora"]["overlap_left"] - 0.5) < 0.3
    assert found["across"]["relative"] == pytest.approx(1)
    assert found["within"]["relative"] == pytest.approx({"full": 1, "lora": 1, "owlore": 1})
    assert set(found["named"]) == set(turned.ARMS)
    page = turned_text.section(found)
    assert page.count("| full, seed") == 2
    assert "within" not in page


def test_the_quick_section_knows_a_change_of_low_rank_and_one_that_rescales():
    W = torch.from_numpy(np.random.default_rng(3).standard_normal((40, 30), dtype=np.float32))
    found = turned.quick(open_model({"model.layers.0.mlp.up_proj.weight": W}))
    medians = found["medians"]
    assert medians["lora"]["effective_rank"][1] < 0.2 < 0.8 < medians["full"]["effective_rank"][1]
    assert medians["owlore"]["share_scaling"][1] > 20
    assert medians["owlore"]["overlap_left"][1] == pytest.approx(0, abs=1e-6)
