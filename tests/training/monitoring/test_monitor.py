"""A monitor of a plain loop: what it finds, logs, keeps and leaves alone; whose turn it is when time is short."""

import logging

import numpy as np
import pytest
import torch
from torch import nn

import htsr
from htsr.analysis.trajectory import Trajectory
from htsr.spectra.sketch import STANDARD_ERROR
from htsr.training.monitoring import measuring
from htsr.training.monitoring import monitor as module
from htsr.training.monitoring.budget import Budget
from tests.training.models import MATRICES, TinyLM, loss, train

ALL = float("inf")


def trained(model, steps, monitor=None, lr=1e-2):
    """Train `model` with AdamW over `steps`, and its `monitor` after each."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    train(model, optimizer, steps, after=lambda _: monitor and monitor.step())


def logger_to(logged):
    return lambda values, step: logged.append((step, values))


class TestOneRun:
    @pytest.fixture(scope="class")
    def run(self, tmp_path_factory):
        """Six steps, measured at each second, and the weights at every step."""
        path, logged, weights = tmp_path_factory.mktemp("run") / "deep" / "run.jsonl", [], []
        model = TinyLM()
        weights.append({name: p.detach().clone() for name, p in model.named_parameters()})
        monitor = htsr.SpectralMonitor(model, every=2, share=ALL, path=path, log=logger_to(logged))

        def after(_):
            monitor.step()
            weights.append({name: p.detach().clone() for name, p in model.named_parameters()})

        train(model, torch.optim.AdamW(model.parameters(), lr=1e-2), range(6), after=after)
        monitor.close()
        return path, logged, weights

    def test_points_are_the_analyses_of_their_steps(self, run):
        path, _, weights = run
        trajectory = Trajectory.load(path)
        assert trajectory.steps == (2, 4, 6)
        assert trajectory.reference == "step-0"
        for step, source in zip(trajectory.steps, trajectory.sources, strict=True):
            there = htsr.analyze(weights[step], where=htsr.Filter(min_size=50), bulk=True).to_pandas()
            here = {row.name: row for row in trajectory.at(source)}
            assert sorted(here) == sorted(there.name)
            for name in ("alpha", "sigma", "trace_log", "stable_rank", "entropy", "num_spikes"):
                assert [getattr(here[matrix], name) for matrix in there.name] == there[name].tolist()

    def test_the_change_is_that_of_the_weights(self, run):
        path, _, weights = run
        for point in Trajectory.load(path):
            W, start = (weights[step][f"{point.row.name}.weight"] for step in (point.step, 0))
            exact = float((W - start).norm() / start.norm())
            assert point.relative == pytest.approx(exact, rel=4 * STANDARD_ERROR)

    def test_what_is_logged_are_means_by_role(self, run):
        path, logged, _ = run
        assert [step for step, _ in logged] == [2, 4, 6]
        values = logged[-1][1]
        rows = [row for row in Trajectory.load(path).at("step-6") if row.role == "mlp.up"]
        assert len(rows) == 2
        for name in ("alpha", "sigma", "trace_log", "stable_rank", "entropy"):
            assert values[f"spectrum/{name}/mlp.up"] == pytest.approx(sum(getattr(row, name) for row in rows) / 2)
        assert values["spectrum/age/mlp.up"] == 0
        assert values["spectrum/measured"] == 1
        assert values["spectrum/share_of_time"] > 0
        assert all(type(value) is float or type(value) is int for value in values.values())


def test_training_is_not_touched():
    """Weights, gradients and random numbers are those without a monitor, bit for bit."""
    plain, watched = TinyLM(), TinyLM()
    torch.manual_seed(7)
    state = torch.get_rng_state()
    trained(watched, range(4), htsr.SpectralMonitor(watched, every=1, share=ALL))
    assert torch.equal(torch.get_rng_state(), state)
    trained(plain, range(4))
    for ours, theirs in zip(watched.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert torch.equal(ours.grad, theirs.grad)


class TestWhenTimeIsShort:
    """A clock by which a step takes a second, and any matrix half of one."""

    @pytest.fixture
    def clock(self, monkeypatch):
        now = [0.0]
        monkeypatch.setattr(module, "Budget", lambda share: Budget(share, clock=lambda: now[0]))
        inner = measuring.measure_all

        def slow(matrices, *rest):
            now[0] += 0.5 * len(matrices)
            return inner(matrices, *rest)

        monkeypatch.setattr(measuring, "measure_all", slow)
        return now

    def test_matrices_take_turns_and_say_how_old_they_are(self, clock, tmp_path):
        logged, model = [], TinyLM()
        monitor = htsr.SpectralMonitor(
            model, every=10, share=0.1, path=tmp_path / "run.jsonl", log=logger_to(logged), null=False
        )
        for _ in range(120):
            clock[0] += 1.0
            with torch.no_grad():
                model.embed_tokens.weight.mul_(1.01)
                for name in [*MATRICES, "lm_head"]:
                    model.get_submodule(name).weight.mul_(1.01)
            monitor.step()
        trajectory = Trajectory.load(tmp_path / "run.jsonl")
        assert clock[0] - 120 <= 0.1 * 120 + 0.5  # the first matrix is a guess
        assert len(trajectory) > 16
        order = [point.row.name for point in trajectory]
        assert len(set(order[:8])) == 8  # each once, before any is measured again
        for first in range(8, len(order) - 8, 8):
            assert order[first : first + 8] == order[:8]
        assert [name.split(".")[-1] for name in order[:5]].count("q_proj") == 1  # one of each role, then the next
        step, values = logged[-1]
        latest = {point.row.name: point for point in trajectory}
        ages = [step - latest[f"layers.{i}.mlp.up_proj"].step for i in range(2)]
        assert values["spectrum/age/mlp.up"] == sum(ages) / 2
        assert values["spectrum/share_of_time"] <= 0.11

    def test_what_was_never_measured_is_said_at_the_end(self, clock, caplog, tmp_path):
        model = TinyLM()
        monitor = htsr.SpectralMonitor(model, every=1, share=0.1, path=tmp_path / "run.jsonl")
        for _ in range(12):
            clock[0] += 1.0
            monitor.step()
        monitor.close()
        assert "of 8 matrices were not measured once" in caplog.text
        assert "larger share= measures more" in caplog.text
        assert "of 8 matrices were never measured" in htsr.track(tmp_path / "run.jsonl").remarks()[1]


def test_frozen_weights_are_measured_once(monkeypatch):
    model = TinyLM()
    model.embed_tokens.weight.requires_grad = False
    model.layers[0].requires_grad_(False)
    decomposed, inner = [], measuring.measure_all

    def noted(matrices, *rest):
        decomposed.extend(matrix.name for matrix in matrices)
        return inner(matrices, *rest)

    monkeypatch.setattr(measuring, "measure_all", noted)
    logged = []
    trained(model, range(3), htsr.SpectralMonitor(model, every=1, share=ALL, log=logger_to(logged)))
    assert decomposed.count("layers.0.mlp.up_proj") == decomposed.count("embed_tokens") == 1
    assert decomposed.count("layers.1.mlp.up_proj") == 3
    assert logged[-1][1]["spectrum/age/embed"] == 0
    assert logged[-1][1]["spectrum/relative/embed"] == 0


def test_the_change_of_an_adapted_model_is_that_of_its_adapters():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(TinyLM(), LoraConfig(r=4, target_modules=["q_proj"]))
    logged = []
    monitor = htsr.SpectralMonitor(model, every=3, share=ALL, log=logger_to(logged))
    for step in range(3):
        loss(model, step).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= parameter.grad
        monitor.step()
    layers = [model.get_submodule(f"base_model.model.layers.{i}.self_attn.q_proj") for i in range(2)]
    exact = [float((layer.get_delta_weight("default").norm() / layer.weight.norm()).detach()) for layer in layers]
    values = logged[0][1]
    assert values["spectrum/relative/attn.q"] == pytest.approx(sum(exact) / 2, rel=0.1)
    assert values["spectrum/relative/mlp.up"] == 0


class TestResuming:
    def run(self, path, steps, start=0, state=None):
        model = TinyLM()
        if state is not None:
            model.load_state_dict(state["model"])
        monitor = htsr.SpectralMonitor(model, every=2, share=ALL, path=path)
        if state is not None:
            monitor.load_state_dict(state["monitor"])
        train(model, torch.optim.SGD(model.parameters(), lr=0.5), range(start, steps), after=lambda _: monitor.step())
        monitor.close()
        return {"model": model.state_dict(), "monitor": monitor.state_dict()}

    def test_a_resumed_run_is_the_uninterrupted_one(self, tmp_path, caplog):
        """Also where it had gone on past its checkpoint, which is then forgotten."""
        whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
        self.run(whole, 8)
        state = self.run(parts, 4)
        lines = parts.read_text()
        self.run(tmp_path / "lost.jsonl", 4)
        self.run(parts, 8, 4, state)
        assert parts.read_text().startswith(lines)
        assert "dropped" not in caplog.text
        self.run(parts, 8, 4, state)
        assert "16 measurements after step 4, where this run is resumed, are dropped" in caplog.text
        found, expected = (Trajectory.load(path).to_pandas() for path in (parts, whole))
        assert found.drop(columns="seconds").equals(expected.drop(columns="seconds"))
        assert len(parts.read_text().splitlines()) == 1 + 4 * 8

    def test_without_the_weights_of_the_start_no_change_is_told(self, tmp_path, caplog):
        path = tmp_path / "run.jsonl"
        state = self.run(path, 4)
        path.with_suffix(".start").write_bytes(b"broken")
        self.run(path, 6, 4, state)
        by_step = {point.step: point.relative for point in Trajectory.load(path)}
        assert by_step[4] is not None
        assert by_step[6] is None
        assert "the change since the start of this run is not known any more" in caplog.text

    def test_a_run_that_is_resumed_without_a_file_says_since_when(self, tmp_path):
        state = self.run(None, 4)
        self.run(tmp_path / "run.jsonl", 6, 4, state)
        trajectory = Trajectory.load(tmp_path / "run.jsonl")
        assert (trajectory.steps, trajectory.reference) == ((6,), "step-5")  # before it the weights may not be loaded

    @pytest.mark.parametrize("kept", [False, True])
    def test_weights_that_never_trained_are_no_reference(self, tmp_path, caplog, kept):
        """The monitor is made before the checkpoint is loaded, and looks again where nothing else tells the start."""
        path = tmp_path / "run.jsonl" if kept else None
        state, logged, model = self.run(None, 4), [], TinyLM(seed=1)
        monitor = htsr.SpectralMonitor(model, every=1, share=ALL, path=path, log=logger_to(logged))
        model.load_state_dict(state["model"])
        monitor.load_state_dict(state["monitor"])
        monitor.step()
        monitor.step()
        assert [values["spectrum/relative/mlp.up"] for _, values in logged] == [0, 0]
        assert caplog.text.count("resumed at step 4 without a trajectory file") == 1
        if path is not None:
            assert Trajectory.load(path).reference == "step-5"

    def test_a_new_run_takes_no_file_of_somebody_else(self, tmp_path):
        path, text = tmp_path / "data.jsonl", '{"text": "mine"}\n'
        path.write_text(text)
        with pytest.raises(htsr.UsageError, match=r"no trajectory of htsr.*take another path"):
            htsr.SpectralMonitor(TinyLM(), path=path)
        assert [file.name for file in tmp_path.iterdir()] == ["data.jsonl"]
        assert path.read_text() == text
        path.unlink()
        path.with_suffix(".start").write_text(text)
        with pytest.raises(htsr.UsageError, match=r"data\.start is not of htsr"):
            htsr.SpectralMonitor(TinyLM(), path=path)

    def test_where_nothing_can_be_written_is_said_before_the_first_step(self, tmp_path):
        (tmp_path / "run.jsonl").mkdir()
        with pytest.raises(htsr.HtsrError, match="it is a folder"):
            htsr.SpectralMonitor(TinyLM(), path=tmp_path / "run.jsonl")

    def test_a_new_run_puts_the_file_of_the_old_one_aside(self, tmp_path, caplog):
        path = tmp_path / "run.jsonl"
        for steps in (2, 4, 6):
            self.run(path, steps)
        names = {file.name: Trajectory.load(file).steps for file in tmp_path.glob("*.jsonl")}
        assert names == {"run.jsonl": (2, 4, 6), "run-1.jsonl": (2,), "run-2.jsonl": (2, 4)}
        assert "is now called run-2.jsonl" in caplog.text
        starts = [path.with_name(f"{name}.start") for name in ("run-1", "run-2", "run")]
        assert all(start.exists() for start in starts)

    def test_other_options_are_refused(self, tmp_path):
        path = tmp_path / "run.jsonl"
        state = self.run(path, 2)
        model = TinyLM()
        monitor = htsr.SpectralMonitor(model, path=path, fit="hill")
        monitor.load_state_dict(state["monitor"])
        with pytest.raises(htsr.UsageError, match="measured with fit ks, not hill"):
            monitor.step()


def test_a_matrix_of_another_shape_has_no_change():
    model, logged = nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 64)), []
    monitor = htsr.SpectralMonitor(model, every=1, share=ALL, log=logger_to(logged))
    model[0] = nn.Linear(96, 128)
    monitor.step()
    assert logged[0][1]["spectrum/relative/other"] == 0  # that of the other one


def test_a_collapse_before_the_first_measurement_is_told(caplog):
    model = nn.Sequential(nn.Linear(96, 96), nn.Linear(96, 64))
    small = torch.outer(torch.ones(64), torch.ones(96))  # a stable rank that was small from the start is none
    with torch.no_grad():
        model[1].weight.copy_(small + 0.1 * torch.randn(64, 96))
    monitor = htsr.SpectralMonitor(model, every=5, share=ALL)
    with torch.no_grad():
        model[0].weight += 5
    for _ in range(5):
        monitor.step()
    assert "less than half of what it was, in 0: one direction" in caplog.text


@pytest.mark.parametrize("shape", [(80, 200), (200, 80), (3, 60, 60)])
def test_the_stable_rank_at_the_start_is_about_right(shape, monkeypatch):
    torch.manual_seed(0)
    state = {"w.weight": torch.randn(shape)} if len(shape) == 2 else {"experts.down_proj": torch.randn(shape)}
    monkeypatch.setattr(measuring, "_CHUNK", 999)
    for matrix in htsr.describe(state).matrices:
        exact = next(row.stable_rank for row in htsr.analyze(state) if row.name == matrix.name)
        assert 1 <= measuring._start(matrix).stable_rank / exact < 1.2


def test_a_disk_that_is_full_does_not_end_the_training(tmp_path, caplog, monkeypatch):
    from htsr.analysis.trajectory_file import TrajectoryFile

    def full(*_):
        raise htsr.HtsrError("run.jsonl cannot be written: no space left")

    logged, model = [], TinyLM()
    monitor = htsr.SpectralMonitor(model, every=1, share=ALL, path=tmp_path / "run.jsonl", log=logger_to(logged))
    monkeypatch.setattr(TrajectoryFile, "append", full)
    trained(model, range(2), monitor)
    assert len(logged) == 2
    assert caplog.text.count("the monitor goes on without its file") == 1


def test_a_file_that_is_removed_is_told(tmp_path, caplog):
    model, path = nn.Linear(64, 64), tmp_path / "run.jsonl"
    monitor = htsr.SpectralMonitor(model, every=1, share=ALL, path=path)
    monitor.step()
    path.unlink()
    monitor.step()
    monitor.step()
    assert caplog.text.count("run.jsonl has been removed") == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"every": 0}, "every is a number of steps"),
        ({"share": 0}, "share is a part of the time"),
        ({"share": "1 %"}, "share is a part of the time"),
        ({"metrics": "alpha"}, "metrics are fields of LayerMetrics"),
        ({"metrics": ["alpha", ["x"]]}, "metrics are fields of LayerMetrics"),
        ({"metrics": ["alpha", "alhpa"]}, "metrics are fields of LayerMetrics"),
        ({"path": "run.json"}, "kept as .jsonl"),
        ({"fit": "hil"}, "unknown fit"),
        ({"where": "*.q_proj"}, "where takes a Filter"),
        ({"model": "gpt2"}, "takes the model of a plain loop"),
        ({"model": nn.Linear(4, 4)}, "no matrix of Linear passes the filter"),
        ({"model": nn.Sequential(nn.LayerNorm(3))}, "Sequential has no weight matrix to monitor"),
    ],
)
def test_what_has_no_meaning_is_refused_at_once(arguments, sentence):
    with pytest.raises(htsr.UsageError, match=sentence):
        htsr.SpectralMonitor(**arguments)


def test_a_step_without_a_model_is_refused():
    with pytest.raises(htsr.UsageError, match="needs its model"):
        htsr.SpectralMonitor().step()
    monitor = htsr.SpectralMonitor(TinyLM())
    monitor.close()
    with pytest.raises(htsr.UsageError, match="is closed"):
        monitor.step()


def test_metrics_that_nothing_computes_are_named_once(caplog):
    model, logged = nn.Linear(64, 64), []
    names = (name for name in ("alpha", "gof_p"))
    monitor = htsr.SpectralMonitor(
        model, every=np.int64(1), share=np.float32("inf"), metrics=names, log=logger_to(logged)
    )
    monitor.step()
    monitor.step()
    assert "spectrum/alpha/other" in logged[0][1]
    assert caplog.text.count("no matrix has a number for gof_p") == 1


def test_a_tracker_that_fails_does_not_end_the_training(caplog):
    def fails(values, step):
        raise ConnectionError("no network")

    monitor = htsr.SpectralMonitor(nn.Linear(64, 64), every=1, share=ALL, log=fails)
    monitor.step()
    monitor.step()
    assert caplog.text.count("step 1: log failed, and the training goes on: no network") == 1


def test_matrices_that_come_and_go_are_followed(caplog):
    model, logged = nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Linear(64, 64)}), []
    monitor = htsr.SpectralMonitor(model, every=1, share=ALL, log=logger_to(logged), metrics=("stable_rank",))
    monitor.step()
    del model["b"]
    model["c"] = nn.Linear(64, 64)
    monitor.step()
    monitor.step()
    assert caplog.text.count("matrices c are new, b are gone") == 1
    mean = sum(row.stable_rank for row in htsr.analyze(model)) / 2
    assert logged[-1][1]["spectrum/stable_rank/other"] == pytest.approx(mean)
    assert logged[-1][1]["spectrum/measured"] == 1


def test_entries_that_are_no_numbers_are_told(caplog):
    model = nn.Linear(64, 64)
    monitor = htsr.SpectralMonitor(model, every=1, share=ALL)
    with torch.no_grad():
        model.weight[0, 0] = float("nan")
    monitor.step()
    monitor.step()
    assert caplog.text.count("NaN, infinite or overflowing entries in") == 1


def test_warnings_are_logged_with_their_step(caplog):
    model = TinyLM()
    monitor = htsr.SpectralMonitor(model, every=1, share=ALL)
    monitor.step()
    with torch.no_grad():
        model.lm_head.weight.add_(10 * torch.ones(120, 1) @ torch.ones(1, 52))
    with caplog.at_level(logging.WARNING):
        monitor.step()
        monitor.step()
    said = [record.getMessage() for record in caplog.records if "stable rank" in record.getMessage()]
    assert len(said) == 1
    assert said[0].startswith("step 2: the stable rank has fallen below 2")
    assert "lm_head" in said[0]
