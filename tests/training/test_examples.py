"""The examples run, fit on a screen, and do what they say."""

import importlib.util
import json
import math
import runpy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import htsr
from htsr.errors import UsageError
from tests.transformer import llama, word_tokenizer

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
    groups = trainer.optimizer.param_groups
    assert {(g["initial_lr"], g["weight_decay"]) for g in groups} == {(1e-3, 0.1), (1e-3, 0.0)}
    assert {g["weight_decay"] for g in groups if g["role"] == "rest"} == {0.0}  # norms, in the Trainer's second group


class TestTrainer:
    """The optimizer of the Trainer's own arguments."""

    def make(self, folder, steps, policy="llr", own=None, **changes):
        from transformers import Trainer, TrainingArguments

        torch.manual_seed(0)
        arguments = TrainingArguments(
            str(folder), max_steps=steps, learning_rate=2e-3, weight_decay=0.2, adam_beta2=0.9, max_grad_norm=0.5,
            per_device_train_batch_size=4, gradient_accumulation_steps=2, save_steps=5, logging_steps=3,
            lr_scheduler_type="cosine", warmup_steps=2, report_to="none", use_cpu=True,
        )  # fmt: skip
        dataset = [{"input_ids": row, "labels": row} for row in torch.randint(3, 64, (64, 12))]
        model = llama(2)
        trainer = Trainer(model, arguments, train_dataset=dataset, optimizers=(own(model) if own else None, None))
        trainer.add_callback(htsr.LayerwiseCallback(trainer, policy, **changes))
        return trainer

    def test_resumes(self, tmp_path):
        policy = {"interval": 2, "ramp": 3, "active_fraction": 0.8, "min_size": 8}
        whole = self.make(tmp_path / "whole", 10, **policy)
        whole.train()
        again = self.make(tmp_path / "whole", 10, **policy)
        again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
        for p, q in zip(whole.model.parameters(), again.model.parameters(), strict=True):
            assert torch.equal(p, q)
        assert htsr.multipliers(whole.optimizer) == htsr.multipliers(again.optimizer)
        groups = again.optimizer.param_groups
        assert {(g["betas"], g["initial_lr"]) for g in groups} == {((0.9, 0.9), 2e-3)}
        assert {g["htsr_event"] for g in groups} == {8}  # the last within 80 % of 10 steps

    def test_fixed_ratios_of_ones_are_the_plain_trainer(self, tmp_path):
        from transformers import Trainer

        ours = self.make(tmp_path, 4, {"*": 1.0})
        plain = Trainer(llama(2), ours.args, train_dataset=ours.train_dataset)
        ours.train()
        plain.train()
        for p, q in zip(ours.model.parameters(), plain.model.parameters(), strict=True):
            assert torch.equal(p, q)

    def test_an_optimizer_that_was_given(self, tmp_path):
        trainer = self.make(
            tmp_path, 2, own=lambda m: torch.optim.SGD(m.parameters(), lr=0.1), score=None, embeddings=3
        )
        trainer.train()
        assert isinstance(trainer.optimizer.optimizer, torch.optim.SGD)
        assert htsr.multipliers(trainer.optimizer)["lm_head"] == 3.0

    def test_policies_are_checked_at_once(self, tmp_path):
        with pytest.raises(UsageError, match="once an epoch"):
            self.make(tmp_path, 2, "tempbalance")


def test_accelerate(run):
    check(run("layerwise_accelerate")["optimizer"].optimizer, 20)


@pytest.fixture
def preferences(tmp_path):
    pytest.importorskip("trl")
    llama(2, width=64).save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"w{i}", "chosen": f" w{i + 1} w7", "rejected": f" w{i + 2} w9"} for i in range(4, 28)]
    (tmp_path / "preferences.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_file(tmp_path / "model" / "model.safetensors")


def test_dpo(run, preferences):
    trainer = run("dpo")["trainer"]
    losses = [entry["train_loss"] for entry in trainer.state.log_history if "train_loss" in entry]
    assert len(losses) == 1
    assert math.isfinite(losses[0])
    assert isinstance(trainer.optimizer.optimizer, htsr.LowRankAdamW)
    sampler = next(c for c in trainer.callback_handler.callbacks if isinstance(c, htsr.LayerSamplerCallback)).sampler
    trained = {block.name for block in sampler.coverage() if block.intervals}
    now = trainer.model.state_dict()
    moved = {".".join(name.split(".")[:3]) for name, old in preferences.items() if not torch.equal(old, now[name])}
    assert {name for name in moved if ".layers." in name} == trained != set()
    assert not {name for name in moved if "embed" in name or "head" in name}
    assert htsr.Trajectory.load("dpo/trajectory.jsonl").steps


def test_grpo(run, preferences):
    trainer = run("grpo")["trainer"]
    found = htsr.multipliers(trainer.optimizer)
    assert found["model.embed_tokens"] == found["lm_head"] == 5.0
    assert set(found.values()) == {1.0, 5.0}
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert 0 < min(rewards) < max(rewards)
    now = trainer.model.state_dict()
    assert any(not torch.equal(old, now[name]) for name, old in preferences.items())


def test_a_monitor_with_accelerate(run, tmp_path):
    accelerator = run("monitor_accelerate")["accelerator"]
    steps = htsr.Trajectory.load(tmp_path / "run" / "trajectory.jsonl").steps
    assert {*steps} <= {5, 10, 15, 20}
    monitor = htsr.SpectralMonitor(torch.nn.Linear(64, 64))
    accelerator._custom_objects[:] = [monitor]
    accelerator.load_state("run/checkpoint-20")
    assert monitor.state_dict() == {"steps": 20}


@pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="lightning is not installed")
def test_lightning(run):
    trainer = run("layerwise_lightning")["trainer"]
    check(trainer.optimizers[0], 20)
