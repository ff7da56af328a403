import json
import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import htsr
from htsr.analysis import execution
from htsr.analysis.analyze import analyze_model
from htsr.analysis.devices import pick_device
from htsr.analysis.execution import _batches, measure_all
from htsr.analysis.journal import Journal
from htsr.analysis.sharing import share
from tests.models import save_folder, state_dict


@pytest.fixture(scope="module")
def analysis():
    return htsr.analyze(state_dict(), device="cpu", permuted=True, bulk=True)


def comparable(analysis):
    """Rows without the time they took."""
    return [replace(row, seconds=None) for row in analysis]


def test_rows_come_in_the_models_order_with_their_numbers(analysis):
    names = [row.name for row in analysis]
    assert names == [m.name for m in htsr.describe(state_dict())]
    assert len(analysis) == 13
    assert all(row.status == "ok" and row.alpha > 1 for row in analysis)
    assert analysis["model.layers.1.mlp.up_proj"].role == "mlp.up"
    assert analysis[0].name == "model.embed_tokens"
    with pytest.raises(KeyError, match="no matrix lm_head"):
        analysis["lm_head"]


def test_threads_change_nothing(monkeypatch):
    runs = []
    for threads in ("1", "3"):
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        runs.append(comparable(htsr.analyze(state_dict(), device="cpu", permuted=True)))
    assert runs[0] == runs[1]


def test_large_matrices_run_alone_with_the_same_result(analysis, monkeypatch):
    monkeypatch.setattr("htsr.analysis.execution.SIDE_BY_SIDE", 0)
    alone = htsr.analyze(state_dict(), device="cpu", permuted=True, bulk=True)
    for a, b in zip(analysis, alone, strict=True):
        assert a.alpha == pytest.approx(b.alpha, rel=1e-9)
        assert a.num_traps == b.num_traps


def test_summaries_are_means(analysis):
    whole = analysis.summary()
    assert whole["alpha"] == pytest.approx(np.mean([row.alpha for row in analysis]))
    assert (whole["matrices"], whole["fitted"]) == (13, 13)
    by_role = analysis.summary_by("role")
    assert list(by_role) == ["embed", "attn.q", "attn.k", "mlp.up", "mlp.down"]
    q = [row.stable_rank for row in analysis if row.role == "attn.q"]
    assert by_role["attn.q"]["stable_rank"] == pytest.approx(np.mean(q))
    assert set(analysis.summary_by("block")) == {None, 0, 1, 2}
    with pytest.raises(htsr.UsageError, match="no 'layer'"):
        analysis.summary_by("layer")


def test_pandas_has_a_row_per_matrix(analysis):
    frame = analysis.to_pandas()
    assert list(frame["name"]) == [row.name for row in analysis]
    assert frame["alpha"].tolist() == [row.alpha for row in analysis]
    assert "tpl_alpha" not in frame  # not asked for


def test_saved_and_loaded_is_the_same(analysis, tmp_path):
    analysis.save(tmp_path / "a.npz")
    again = htsr.Analysis.load(tmp_path / "a.npz")
    assert again.rows == analysis.rows
    assert again.options == analysis.options
    assert (again.label, again.meta) == (analysis.label, analysis.meta)
    for spectra, loaded in ((analysis.eigenvalues, again.eigenvalues), (analysis.permuted, again.permuted)):
        assert spectra.keys() == loaded.keys()
        assert all(np.array_equal(spectra[name], loaded[name]) for name in spectra)


def test_windows_survive_saving(tmp_path):
    windowed = htsr.analyze(state_dict(blocks=1), device="cpu", windows=htsr.Windows(16, 2))
    windowed.save(tmp_path / "w.npz")
    assert htsr.Analysis.load(tmp_path / "w.npz").options.windows == htsr.Windows(16, 2)
    assert {row.Q for row in windowed} == {1.0}


def test_results_show_themselves_in_a_line(analysis):
    model = htsr.describe(state_dict())
    plan = htsr.layerwise_plan(state_dict())
    comparison = htsr.compare(analysis, analysis)
    spectrum = htsr.esd(np.eye(40))
    measured = measure_all(model.matrices[:1], htsr.Options())
    for thing in (analysis, comparison, comparison.pairs[0], model, plan, spectrum):
        assert len(repr(thing)) < 300
        assert "\n" not in repr(thing)
    assert "array" not in repr(measured)
    assert repr(analysis) == (
        f"<Analysis of 'state dict': 13 matrices, 13 fitted by ks, mean alpha {analysis.summary()['alpha']:.3f}>"
    )
    for thing in (analysis, comparison):
        page = thing._repr_html_()
        assert page.count("<table>") == 1
        assert len(page) < 5000
        assert f"{analysis.summary()['alpha']:.2f}" in page


def test_what_is_no_analysis_is_refused(tmp_path):
    (tmp_path / "x.npz").write_bytes(b"PK not a zip")
    with pytest.raises(htsr.SourceError, match=r"x\.npz is not an analysis"):
        htsr.Analysis.load(tmp_path / "x.npz")


def test_a_failed_write_leaves_nothing(analysis, tmp_path, monkeypatch):
    with pytest.raises(htsr.HtsrError, match="cannot be written"):
        analysis.save(tmp_path / "nowhere" / "a.npz")

    def full_disk(*_args, **_kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "savez", full_disk)
    (tmp_path / "old.npz").write_text("before")
    with pytest.raises(htsr.HtsrError, match=r"old\.npz cannot be written: No space left on device"):
        analysis.save(tmp_path / "old.npz")
    assert [f.name for f in tmp_path.iterdir() if f.name != "cache"] == ["old.npz"]
    assert (tmp_path / "old.npz").read_text() == "before"


def test_an_interrupted_analysis_goes_on_where_it_stopped(tmp_path, monkeypatch):
    state, journal = state_dict(), tmp_path / "journal.jsonl"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    seen = []

    def stop_after_five(progress):
        seen.append(progress.row.name)
        if len(seen) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        htsr.analyze(state, device="cpu", permuted=True, journal=journal, progress=stop_after_five)
    with journal.open("a") as file:
        file.write('{"row": {"name": "cut in the mid')  # killed while writing

    later = []
    resumed = htsr.analyze(
        state, device="cpu", permuted=True, journal=journal, progress=lambda p: later.append((p.done, p.total))
    )
    assert later == [(k, 13) for k in range(6, 14)]
    whole = htsr.analyze(state, device="cpu", permuted=True)
    assert comparable(resumed) == comparable(whole)
    assert all(np.array_equal(resumed.eigenvalues[n], whole.eigenvalues[n]) for n in whole.eigenvalues)
    assert all(np.array_equal(resumed.permuted[n], whole.permuted[n]) for n in whole.permuted)
    assert not journal.exists()


def test_rows_of_other_weights_are_not_taken_up(tmp_path):
    """Interrupted, trained on, run again with the same journal: what 0.1.0 took for the same model."""
    module = torch.nn.Sequential(torch.nn.Linear(40, 30), torch.nn.Linear(30, 20))
    journal = tmp_path / "journal.jsonl"

    def stop(progress):
        if progress.done == 2:
            raise KeyboardInterrupt

    def interrupted():
        with pytest.raises(KeyboardInterrupt):
            htsr.analyze(module, device="cpu", journal=journal, progress=stop)

    interrupted()
    with torch.no_grad():
        module[0].weight[7, 5] += 1.0  # one entry of one of the two
    measured = []
    analysis = htsr.analyze(module, device="cpu", journal=journal, progress=lambda p: measured.append(p.row.name))
    assert measured == ["0"]
    assert [row.norm for row in analysis] == pytest.approx(
        [float(layer.weight.detach().square().sum()) for layer in module]
    )
    interrupted()
    with torch.no_grad():
        module[1].weight *= 50
    assert htsr.analyze(module, device="cpu", journal=journal)["1"].norm == pytest.approx(
        float(module[1].weight.detach().square().sum())
    )


@pytest.mark.parametrize(
    "place", ["under a file", "read-only", "a folder", "no home", "no such user", "too long a name", "a full disk"]
)
def test_a_journal_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch, caplog, place):
    path = tmp_path / "journal.jsonl"
    if place == "under a file":
        (tmp_path / "file").write_text("")
        path = tmp_path / "file" / "journal.jsonl"
    elif place == "read-only":
        path = Path("/proc/journal.jsonl")
    elif place == "a folder":
        path.mkdir()
    elif place == "a full disk":
        path = Path("/dev/full")
    if place in ("no such user", "too long a name"):
        monkeypatch.setenv(
            "HTSR_CACHE", "~nobody-of-that-name/x" if place == "no such user" else f"{tmp_path}/{'x' * 5000}"
        )
        path = None
    if place == "no home":
        monkeypatch.delenv("HTSR_CACHE")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
        path = None
    model, options = htsr.describe(state_dict(blocks=1)), htsr.Options()
    with caplog.at_level("WARNING", logger="htsr"):
        assert len(analyze_model(model, options, Journal(model, options, path))) == 5
    assert "the journal cannot be written" in caplog.text


@pytest.mark.parametrize("content", ['{"model_type": "llama"}', '{\n "htsr": 1\n}', "[]", "some text", "\x00\n"])
def test_a_file_that_is_no_journal_is_refused_and_stays(tmp_path, content):
    file = tmp_path / "config.json"
    file.write_text(content)
    with pytest.raises(htsr.UsageError, match=r"config\.json is a file, and no journal"):
        htsr.analyze(state_dict(blocks=1), device="cpu", journal=file)
    assert file.read_text() == content
    file.write_text("")
    assert len(htsr.analyze(state_dict(blocks=1), device="cpu", journal=file)) == 5


def test_a_row_is_shown_on_one_line():
    analysis = htsr.analyze(state_dict(blocks=1), device="cpu")
    assert f"alpha {analysis[0].alpha:.3f}" in repr(analysis[0])
    assert len(repr(analysis[0])) < 200


def test_a_journal_is_the_same_for_every_device_of_a_kind(tmp_path):
    """0.1.0's key held the rank's own device, and every second analysis on two GPUs ended in KeyError."""
    model = htsr.describe(save_folder(tmp_path / "model", state_dict(blocks=1)))
    first, second = (Journal(model, htsr.Options(device=f"cuda:{i}"), tmp_path / "j.jsonl") for i in (0, 1))
    second.open(rank=1)
    second.add(measure_all(model.matrices[:1], htsr.Options())[0])
    second.close()
    assert list(first.load()) == [model.matrices[0].name]
    first.discard()
    assert [file.name for file in tmp_path.glob("*.jsonl")] == []


@pytest.mark.parametrize(
    "line", ['{"row": {"name": 3}}', '{"row": {"name": "x", "alpha": "2"}}', "[]", "3", '{"row": 1}']
)
def test_lines_that_are_no_rows_are_left_out(tmp_path, line):
    model, options = htsr.describe(state_dict(blocks=1)), htsr.Options()
    journal = Journal(model, options, tmp_path / "j[1].jsonl")
    journal.open()
    journal.add(measure_all(model.matrices[:1], options)[0])
    journal.close()
    with (tmp_path / "j[1].jsonl").open("a") as file:
        file.write(line + "\n")
    assert len(journal.load()) == 1


@pytest.mark.parametrize(
    ("number", "value"),
    [
        *(("gof_p", value) for value in ("NaN", "5", "-1", "1e400")),
        *(("alpha", value) for value in ("0.5", "77.0")),
        *(("norm", "-1.0"), ("status", '"Fine!"'), ("num_eigenvalues", "3")),
    ],
)
def test_rows_that_no_matrix_has_are_measured_again(tmp_path, number, value):
    """Rows of a journal are held against the same as those of a saved analysis."""
    model, options = htsr.describe(state_dict(blocks=1)), htsr.Options(gof=10)
    journal = Journal(model, options, tmp_path / "j.jsonl")
    journal.open()
    journal.add(measure_all(model.matrices[:1], options)[0])
    journal.close()
    assert len(journal.load()) == 1
    header, line = journal.path.read_text().splitlines()
    changed = re.sub(rf'"{number}": [^,]+', f'"{number}": {value}', line)
    assert changed != line
    journal.path.write_text(f"{header}\n{changed}\n")
    assert not journal.load()


def test_a_line_cut_by_a_kill_does_not_spoil_the_next(tmp_path):
    model, options = htsr.describe(state_dict(blocks=1)), htsr.Options()
    journal = Journal(model, options, tmp_path / "j.jsonl")
    results = measure_all(model.matrices[:2], options)
    journal.open()
    journal.add(results[0])
    journal.close()
    with journal.path.open("a") as file:
        file.write('{"row"')
    journal.open()
    journal.add(results[1])
    journal.close()
    assert list(journal.load()) == [r.row.name for r in results]


@pytest.mark.parametrize("change", ["options", "model"])
def test_rows_of_another_analysis_are_not_taken_up(tmp_path, change):
    model, options = htsr.describe(state_dict(blocks=1)), htsr.Options()
    first = Journal(model, options, tmp_path / "j.jsonl")
    first.open()
    first.add(measure_all(model.matrices[:1], options)[0])
    first.close()
    if change == "options":
        options = htsr.Options(fit="hill")
    else:
        model = htsr.describe(state_dict(blocks=2))
    assert Journal(model, options, tmp_path / "j.jsonl").load() == {}


def test_progress_ends_at_one(tmp_path):
    fractions = []
    htsr.analyze(state_dict(), device="cpu", progress=lambda p: fractions.append(p.fraction))
    assert fractions == sorted(fractions)
    assert fractions[-1] == pytest.approx(1.0)


def test_one_bad_matrix_does_not_stop_the_others():
    state = state_dict()
    state["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    state["model.layers.0.self_attn.q_proj.weight"].zero_()
    analysis = htsr.analyze(state, device="cpu")
    statuses = {row.name: row.status for row in analysis if row.status != "ok"}
    assert statuses == {"model.layers.1.mlp.up_proj": "nan", "model.layers.0.self_attn.q_proj": "zero"}
    assert analysis.summary()["fitted"] == 11


@pytest.mark.parametrize(("costs", "ranks"), [([5, 4, 3, 3, 3], 2), ([1.0] * 7, 3), ([9, 1, 1], 4), ([], 2)])
def test_shares_are_a_balanced_partition(costs, ranks):
    shares = share(costs, ranks)
    assert len(shares) == ranks
    assert sorted(i for part in shares for i in part) == list(range(len(costs)))
    loads = [sum(costs[i] for i in part) for part in shares]
    assert max(loads) <= max(max(costs, default=0), 4 / 3 * sum(costs) / ranks + max(costs, default=0) / 3)


def test_unknown_options_are_named():
    for wrong, hint in (
        ({"bulk": True, "gofs": 3}, "option gofs; the nearest is gof$"),
        ({"agianst": "a"}, "option agianst; the nearest is against$"),
        ({"qqq": 1}, "option qqq; there are fit, xmin"),
    ):
        with pytest.raises(htsr.UsageError, match=hint):
            htsr.analyze(state_dict(), **wrong)
    with pytest.raises(htsr.UsageError, match="option against; there are"):
        htsr.compare(state_dict(), state_dict(), against="a")


@pytest.mark.parametrize("device", ["cuda:63", "gpu", "mps:7"])
def test_a_device_that_is_not_here_is_said(device):
    with pytest.raises(htsr.UsageError, match=f"device '{device}'"):
        pick_device(device)
    if not device.startswith("mps"):  # the CPU computes in its place
        with pytest.raises(htsr.UsageError, match=f"device '{device}'"):
            htsr.esd(torch.eye(3), device=device)


@pytest.mark.parametrize("device", ["gpu", "CPU", "AUTO", "", None, 0])
def test_what_names_no_device_is_refused_with_the_names_there_are(device):
    """torch named 19 kinds of devices, and `esd` blamed the matrix, which its row would have said."""
    W = torch.ones(4, 5)
    for call in (lambda: htsr.analyze({"layers.0.up.weight": W}, device=device), lambda: htsr.esd(W, device=device)):
        with pytest.raises(htsr.UsageError, match=f"^unknown device '{device}': auto, cpu, cuda, cuda:1, mps, xpu$"):
            call()


def test_a_device_may_be_given_as_torch_has_it():
    state = state_dict()
    (first, *_), (second, *_) = (htsr.analyze(state, device=device) for device in ("cpu", torch.device("cpu")))
    assert first.alpha == second.alpha
    assert htsr.analyze(state, device=torch.device("cpu", 0)).options.device == "cpu"
    assert htsr.compare(state, state, device=torch.device("cpu")).a.options.device == "cpu"
    assert htsr.esd(torch.eye(3), device=torch.device("cpu")).eigenvalues.tolist() == [1, 1, 1]
    with pytest.raises(htsr.UsageError, match="device is a name"):
        htsr.Options(device=torch.device("cpu"))
    assert pick_device("cpu:0") == "cpu"  # which went the way of an accelerator, one matrix at a time


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("dtype", "entry", "options"),
    [
        ("float64", 1e200, {}),
        ("float64", 1e200, {"route": "svd"}),
        ("float32", 1e25, {"dtype": "float32"}),
        ("float64", 1e200, {"dtype": "float32"}),
        ("float64", 1e200, {"dtype": "float32", "route": "svd"}),
    ],
)
@pytest.mark.parametrize("shape", [(30, 40), (600, 40)])
def test_what_overflows_is_said_in_its_row_alone(dtype, entry, options, shape):
    W = torch.full(shape, entry, dtype=getattr(torch, dtype))
    state = {"layers.0.up.weight": W, "layers.1.up.weight": W.clone()}
    found = htsr.analyze(state, device="cpu", **options)
    assert [row.status for row in found] == ["nan", "nan"]
    with pytest.raises(htsr.MatrixError, match="overflowing"):
        htsr.esd(W, device="cpu:0", **options)


# accelerate starts processes of one machine through torchrun and the path it names after GPUs; gloo runs on the CPU
LAUNCHER = "accelerate.commands.launch --multi_gpu --num_processes=2 --num_machines=1 --mixed_precision=no "
LAUNCHER += "--dynamo_backend=no --main_process_port=0"


def test_two_processes_give_the_rows_of_one(tmp_path):
    folder = save_folder(tmp_path / "model", state_dict(blocks=4))
    out = tmp_path / "out.json"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [
        sys.executable,
        "-m",
        *LAUNCHER.split(),
        "-m",
        "htsr.analysis",
        folder,
        "--permuted",
        "-o",
        str(out),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    shared = json.loads(out.read_text())
    assert shared["meta"]["ranks"] == 2
    assert "Traceback" not in done.stderr
    alone = htsr.analyze(folder, device="cpu", permuted=True)
    assert [row["name"] for row in shared["rows"]] == [row.name for row in alone]
    for row, other in zip(shared["rows"], alone, strict=True):
        for field, value in row.items():
            if field != "seconds":
                assert value == getattr(other, field), field


def test_threads_share_one_budget_of_memory(monkeypatch):
    """0.1.0 had a budget for each thread: 1,235 MiB with 24 of them."""
    model = htsr.describe(state_dict(blocks=10, width=200))
    sizes = [execution._footprint(matrix) for matrix in model]
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    monkeypatch.setattr(execution, "AT_ONCE", 3 * max(sizes))
    monkeypatch.setattr(execution, "BATCH_UP_TO", 0)
    held, most, lock = [0], [0], threading.Lock()

    def work(matrices):
        size = sum(map(execution._footprint, matrices))
        with lock:
            held[0] += size
            most[0] = max(most[0], held[0])
        time.sleep(0.002)
        with lock:
            held[0] -= size
        return [matrix.name for matrix in matrices]

    found = dict(execution.for_each(model.matrices, work))
    assert [found[i] for i in range(len(sizes))] == [matrix.name for matrix in model]
    assert max(sizes) < most[0] <= 3 * max(sizes)


@pytest.mark.parametrize("seed", [-1, 1.5, 2**64, "1"])
def test_seeds_that_are_none(seed):
    with pytest.raises(htsr.UsageError, match="seed is a whole number from 0"):
        htsr.analyze(state_dict(blocks=1), device="cpu", seed=seed, permuted=True)


def test_batches_hold_matrices_of_one_shape_only():
    model = htsr.describe(state_dict(blocks=30, width=200))
    batches = _batches(model.matrices, range(len(model.matrices)), 500)
    assert sorted(i for batch in batches for i in batch) == list(range(len(model.matrices)))
    for batch in batches:
        shapes = {model.matrices[i].shape for i in batch}
        assert len(shapes) == 1
        assert (len(batch) - 1) * min(*shapes) <= 500
    assert max(len(batch) for batch in batches) == 500 // 100 + 1


def test_rows_go_by_name_position_and_slice():
    analysis = htsr.analyze(state_dict(blocks=1), device="cpu")
    assert analysis[:2] == analysis.rows[:2]
    assert analysis[np.int64(1)] == analysis.rows[1]
    with pytest.raises(TypeError, match="by name, position or slice, not by float"):
        analysis[1.5]
    with pytest.raises(KeyError, match=r"no matrix model\.layers\.0\.mlp\.upproj; the nearest is .*mlp\.up_proj"):
        analysis.plot("model.layers.0.mlp.upproj")
    assert "&lt;" not in analysis._repr_html_()
    assert analysis._repr_html_().startswith("<p>Analysis of ")
