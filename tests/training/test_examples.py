"""The examples run, fit on a screen, and do what they say."""

import importlib.util
import math
import runpy
from pathlib import Path

import pytest
import torch

import htsr

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def run(tmp_path, monkeypatch):
    def run(name):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        torch.manual_seed(0)
        path = EXAMPLES / f"{name}.py"
        assert len(path.read_text().splitlines()) < 30
        return runpy.run_path(str(path))

    return run


def check(optimizer, steps):
    """Every step counted, the last event at 4 of 20, and the lr that the scheduler ended with in every group."""
    assert {g["htsr_step"] for g in optimizer.param_groups} == {steps}
    assert {g["htsr_event"] for g in optimizer.param_groups} == {4}
    found = htsr.multipliers(optimizer)
    assert max(found.values()) == 5.0
    assert min(found.values()) == 1.0
    assert len(set(found.values())) > 5
    assert {g["lr"] for g in optimizer.param_groups} == {0.0}


def test_trainer(run):
    trainer = run("layerwise_trainer")["trainer"]
    check(trainer.optimizer.optimizer, 20)
    logged = [entry for entry in trainer.state.log_history if "layerwise/multiplier_max" in entry]
    assert [entry["step"] for entry in logged] == [5, 10, 15, 20]
    losses = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 4
    assert logged[0]["layerwise/multiplier/embed"] == logged[0]["layerwise/multiplier_max"] == 5.0
    assert 1.5 < logged[0]["layerwise/score/attn.q"] < logged[0]["layerwise/score/mlp.up"] < 4.0
    assert all(math.isfinite(value) for entry in logged for value in entry.values())


def test_accelerate(run):
    check(run("layerwise_accelerate")["optimizer"].optimizer, 20)


@pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="lightning is not installed")
def test_lightning(run):
    trainer = run("layerwise_lightning")["trainer"]
    check(trainer.optimizers[0], 20)
