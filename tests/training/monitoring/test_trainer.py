"""The monitor under the Trainer of transformers and under Lightning."""

import gc
import importlib.util
import json
import weakref

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

import htsr
from htsr.analysis.trajectory import Trajectory
from tests.transformer import llama

ALL = float("inf")


class Tracker(TrainerCallback):
    """Stands where those of `report_to` stand: before the callbacks of the user."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append((state.global_step, dict(logs)))


class CountingTrainer(Trainer):
    """Like TRL's trainers, adds means of what it has counted since its last log."""

    counted = 0

    def training_step(self, *args, **kwargs):
        self.counted += 1
        return super().training_step(*args, **kwargs)

    def log(self, logs, *args):
        logs["counted"], self.counted = self.counted, 0
        super().log(logs, *args)


def trainer(folder, steps, monitor, kind=Trainer, **more):
    arguments = TrainingArguments(
        str(folder), max_steps=steps, learning_rate=1e-2, per_device_train_batch_size=4, save_steps=4,
        logging_steps=4, report_to="none", use_cpu=True, disable_tqdm=True, gradient_accumulation_steps=2, **more,
    )  # fmt: skip
    rows = torch.randint(3, 64, (64, 12), generator=torch.Generator().manual_seed(0))
    dataset = [{"input_ids": row, "labels": row} for row in rows]
    model = llama(1, width=64)
    return kind(model, arguments, train_dataset=dataset, eval_dataset=dataset[:8], callbacks=[Tracker(), monitor])


def seen(made):
    return next(c for c in made.callback_handler.callbacks if isinstance(c, Tracker)).seen


def test_trackers_get_the_values_at_their_steps_and_the_loss_as_before(tmp_path):
    made = trainer(tmp_path, 8, htsr.SpectralMonitor(every=2, share=ALL), CountingTrainer)
    made.train()
    steps = [step for step, logs in seen(made) if "spectrum/alpha/attn.q" in logs]
    assert steps == [2, 4, 6, 8]
    assert [(step, logs["counted"]) for step, logs in seen(made) if "loss" in logs] == [(4, 8), (8, 8)]
    kept = [entry for entry in made.state.log_history if "spectrum/alpha/attn.q" in entry]
    assert [entry["step"] for entry in kept] == steps
    assert json.loads(json.dumps(kept)) == kept
    trajectory = Trajectory.load(tmp_path / "trajectory.jsonl")
    assert trajectory.steps == (2, 4, 6, 8)
    there = {row.name: row.alpha for row in htsr.analyze(made.model, where=htsr.Filter(min_size=50), bulk=True)}
    assert {row.name: row.alpha for row in trajectory.at("step-8")} == there


def test_a_resumed_training_goes_on_with_its_file(tmp_path):
    trainer(tmp_path / "whole", 8, htsr.SpectralMonitor(every=2, share=ALL)).train()
    trainer(tmp_path / "parts", 6, htsr.SpectralMonitor(every=2, share=ALL), lr_scheduler_type="constant").train()
    again = trainer(tmp_path / "parts", 8, htsr.SpectralMonitor(every=2, share=ALL))
    again.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-4"))
    whole, parts = (Trajectory.load(tmp_path / name / "trajectory.jsonl") for name in ("whole", "parts"))
    assert parts.steps == whole.steps == (2, 4, 6, 8)
    assert len(parts) == len(whole)
    expected = {row.name: row.alpha for row in htsr.analyze(again.model, where=htsr.Filter(min_size=50), bulk=True)}
    assert {row.name: row.alpha for row in parts.at("step-8")} == expected
    assert parts.reference == "step-0"


def test_evaluations_reach_the_warnings_also_after_resuming(tmp_path, monkeypatch):
    losses = []
    monitor = htsr.SpectralMonitor(every=4, share=ALL)
    monkeypatch.setattr(monitor, "evaluated", losses.append)
    made = trainer(tmp_path, 4, monitor, eval_strategy="steps", eval_steps=2)
    made.train()
    assert losses == [entry["eval_loss"] for entry in made.state.log_history if "eval_loss" in entry]
    assert len(losses) == 2
    again = trainer(tmp_path, 6, monitor, eval_strategy="steps", eval_steps=2)
    again.train(resume_from_checkpoint=True)
    assert losses[2:4] == losses[:2]
    assert len(losses) == 5


@pytest.mark.parametrize(("best", "followed"), [(None, "eval_a_loss"), ("b_loss", "eval_b_loss")])
def test_of_several_data_sets_one_loss_is_followed(tmp_path, monkeypatch, best, followed):
    monitor, losses = htsr.SpectralMonitor(every=4), []
    monkeypatch.setattr(monitor, "evaluated", losses.append)
    made = trainer(tmp_path, 2, monitor, eval_strategy="steps", eval_steps=1, metric_for_best_model=best)
    made.eval_dataset = {"a": made.eval_dataset, "b": made.train_dataset[:4]}
    made.train()
    assert losses == [entry[followed] for entry in made.state.log_history if followed in entry]
    assert len(losses) == 2


def test_a_monitor_keeps_no_trainer(tmp_path):
    monitor = htsr.SpectralMonitor(every=1, share=ALL)
    made = trainer(tmp_path, 1, monitor)
    made.train()
    kept = weakref.ref(made)
    del made
    gc.collect()
    assert kept() is None


def test_one_monitor_in_two_trainings_at_once_is_refused(tmp_path):
    monitor = htsr.SpectralMonitor(every=1)

    class Probe(TrainerCallback):
        def on_step_end(self, *_, **__):
            trainer(tmp_path / "probe", 1, monitor).train()

    made = trainer(tmp_path / "outer", 1, monitor)
    made.add_callback(Probe())
    with pytest.raises(htsr.UsageError, match="give each Trainer a monitor of its own"):
        made.train()
    trainer(tmp_path / "after", 1, monitor).train()  # a training that has failed stands in no one's way


def test_a_foreign_file_is_refused_before_the_first_step(tmp_path):
    (tmp_path / "trajectory.jsonl").write_text("{}\n")
    made = trainer(tmp_path, 1, htsr.SpectralMonitor())
    with pytest.raises(htsr.UsageError, match="no trajectory of htsr"):
        made.train()
    assert made.state.global_step == 0


def test_one_callback_serves_two_trainings(tmp_path):
    monitor = htsr.SpectralMonitor(every=2, share=ALL)
    for name in ("a", "b"):
        trainer(tmp_path / name, 2, monitor).train()
        assert Trajectory.load(tmp_path / name / "trajectory.jsonl").steps == (2,)


def test_a_sampler_tells_trackers_its_lowest_block(tmp_path):
    """Trackers have logged before a callback of the user could add to what is logged."""
    made = trainer(tmp_path, 8, htsr.SpectralMonitor())
    made.add_callback(htsr.LayerSamplerCallback(htsr.LayerSampler(made.model, active=1)))
    made.train()
    assert [(step, logs["lowest_active_block"]) for step, logs in seen(made) if "lowest_active_block" in logs] == [
        (4, 0),
        (8, 0),
    ]


def test_a_callback_that_is_kept_keeps_no_trainer(tmp_path):
    monitor = htsr.SpectralMonitor(every=2, share=ALL)
    made = trainer(tmp_path, 2, monitor)
    sampling = htsr.LayerSamplerCallback(htsr.LayerSampler(made.model, active=1))
    made.add_callback(sampling)
    made.train()
    alive = weakref.ref(made)
    del made
    gc.collect()
    assert alive() is None
    assert monitor is not sampling  # both are kept


class FakeLightning:
    """Calls callbacks as Lightning's Trainer does: hooks by name, with the trainer and the module first."""

    def __init__(self, model, callbacks, folder, accumulate=2):
        self.model, self.callbacks, self.log_dir, self.accumulate = model, callbacks, str(folder), accumulate
        self.logged, self.loggers = [], [self]
        self.global_step, self.sanity_checking, self.callback_metrics = 0, False, {}

    def log_metrics(self, values, step):
        self.logged.append((step, values))

    def call(self, hook, *args):
        for callback in self.callbacks:
            assert isinstance(callback.state_key, str)
            getattr(callback, hook)(self, self.model, *args)

    def fit(self, batches):
        optimizer = torch.optim.SGD(self.model.parameters(), lr=1.0)
        self.call("setup", "fit")
        self.call("on_fit_start")
        self.call("on_train_start")
        for index in range(batches):
            self.call("on_train_batch_start", None, index)
            self.model(torch.ones(2, 64)).square().sum().backward()
            if (index + 1) % self.accumulate == 0:
                optimizer.step()
                self.global_step += 1
            self.call("on_train_batch_end", None, None, index)
        self.callback_metrics["val_loss"] = torch.tensor(1.0)
        self.call("on_validation_end")
        self.call("on_train_end")
        self.call("teardown", "fit")


def test_lightning_calls_it_by_its_hooks(tmp_path, monkeypatch):
    torch.manual_seed(0)
    monitor, losses = htsr.SpectralMonitor(every=2, share=ALL), []
    monkeypatch.setattr(monitor, "evaluated", losses.append)
    made = FakeLightning(torch.nn.Linear(64, 64), [monitor], tmp_path / "version_0")
    made.fit(12)
    assert [step for step, _ in made.logged] == [2, 4, 6]
    assert made.logged[0][1]["spectrum/relative/other"] > 0
    assert Trajectory.load(tmp_path / "version_0" / "trajectory.jsonl").steps == (2, 4, 6)
    assert losses == [1.0]
    assert monitor.state_dict() == {"steps": 6}


def test_what_is_no_hook_is_no_attribute():
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        htsr.SpectralMonitor().nothing  # noqa: B018


@pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="lightning is not installed")
def test_lightning_itself(tmp_path):
    import lightning
    from lightning.pytorch.loggers import CSVLogger

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(64, 64)

        def training_step(self, batch, _):
            return self.layer(batch).square().mean()

        def validation_step(self, batch, _):
            self.log("val_loss", self.layer(batch).square().mean())

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def fit(steps, checkpoint=None):
        monitor = htsr.SpectralMonitor(every=2, share=ALL)
        made = lightning.Trainer(
            max_steps=steps, callbacks=[monitor], logger=CSVLogger(tmp_path, version=0), accelerator="cpu",
            accumulate_grad_batches=2, enable_progress_bar=False, log_every_n_steps=1,
        )  # fmt: skip
        data = torch.utils.data.DataLoader(torch.randn(16, 64), batch_size=2)
        made.fit(Module(), data, data, ckpt_path=checkpoint)
        made.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return made

    fit(4)
    made = fit(8, tmp_path / "4.ckpt")
    trajectory = Trajectory.load(f"{made.log_dir}/trajectory.jsonl")
    assert trajectory.steps == (2, 4, 6, 8)
    assert trajectory.reference == "step-0"
    header = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().partition("\n")[0]
    assert "spectrum/alpha/other" in header
