"""The plan says what the first step does."""

import csv
import io
import json

import pytest
import torch
from htsr_cli.main import main

import htsr
from htsr.errors import UsageError
from tests.models import save_folder
from tests.training.models import SpyingSGD, TinyLM, train


@pytest.fixture
def folder(tmp_path):
    return save_folder(tmp_path / "model", TinyLM().state_dict())


def run(capsys, *args):
    code = main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize(
    ("policy", "changes"),
    [
        ("llr", {}),
        ("llr", {"embeddings": "measured", "head": 2.0, "unit": "block"}),
        ("llr", {"score": "alpha_null", "map": "rank", "reverse": True}),
        ("tempbalance", {"interval": 5}),
        ({"mlp.*": 6, "embed": 10}, {}),
    ],
)
def test_plan_is_the_first_step(folder, policy, changes):
    plan = htsr.layerwise_plan(folder, policy, **changes)
    model = TinyLM()
    optimizer = htsr.layerwise(SpyingSGD(model.parameters(), lr=1.0), model, policy, **changes)
    train(model, optimizer, [0])
    seen = {name: lr for name, (lr, _) in optimizer.seen[0].items()}
    expected = {row.name: seen.get(row.name, 1.0) for row in plan}
    assert {row.name: row.multiplier for row in plan} == pytest.approx(expected, rel=1e-12)  # files have another order
    assert len(plan.rows) == 8


def test_command(capsys, folder, tmp_path):
    code, out, err = run(capsys, "layerwise", "plan", folder, "--policy", "llr", "--bounds", "1,3")
    assert code == 0
    assert "multipliers of the learning rate at step 1" in err
    assert "layers.1.mlp.down_proj" in out
    assert "embedding" in out
    code, out, _ = run(capsys, "layerwise", "plan", folder, "--format", "json", "--pin", "mlp.*=2", "--reverse")
    content = json.loads(out)
    assert content["policy"]["reverse"] is True
    assert {row["multiplier"] for row in content["rows"] if row["role"].startswith("mlp")} == {2.0}
    picture = tmp_path / "plan.png"
    code, out, _ = run(capsys, "layerwise", "plan", folder, "--format", "csv", "--picture", picture)
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [float(row["multiplier"]) for row in rows] == [row.multiplier for row in htsr.layerwise_plan(folder)]
    assert picture.read_bytes().startswith(b"\x89PNG")
    markdown = tmp_path / "plan.md"
    assert run(capsys, "layerwise", "plan", folder, "-o", markdown, "--score", "none", "--embeddings", "4")[0] == 0
    assert markdown.read_text().count("4.000") == 2


@pytest.mark.parametrize(
    "wrong",
    [
        ["--policy", "best"],
        ["--bounds", "5"],
        ["--pin", "mlp"],
        ["--format", "parquet"],
        ["--windows", "big"],
        ["--score", "beta"],
    ],
)
def test_wrong_usage(capsys, folder, wrong):
    code, out, err = run(capsys, "layerwise", "plan", folder, *wrong)
    assert code == 2
    assert out == ""
    assert err.startswith("htsr: ")


def test_broken_matrices_are_told(tmp_path):
    state = TinyLM().state_dict()
    state["layers.0.mlp.up_proj.weight"][3, 3] = float("nan")
    plan = htsr.layerwise_plan(save_folder(tmp_path / "broken", state))
    row = next(row for row in plan if row.name == "layers.0.mlp.up_proj")
    assert (row.score, row.multiplier, row.why) == (None, 1.0, "no score")
    with pytest.raises(UsageError, match="not in a checkpoint"):
        htsr.layerwise_plan(torch.nn.Linear(60, 60), spectrum="gradients")
