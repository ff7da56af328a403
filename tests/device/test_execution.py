"""How an analysis works on a device: where the model is, one matrix at a time, in one thread, whatever befalls one."""

import json
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

import htsr
from htsr.analysis import execution
from htsr.analysis.analyze import make_options
from htsr.analysis.devices import own_accelerator
from htsr.analysis.execution import measure_all
from htsr.analysis.journal import Journal
from htsr.spectra import device as solver
from htsr.spectra import measure


def weights(count=3, shape=(96, 160), dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    scales = (1 - torch.rand(shape[0], 1, generator=generator)) ** -0.4
    tensors = (torch.randn(shape, generator=generator) * scales for _ in range(count))
    return {f"layers.{i}.mlp.up_proj.weight": W.to(dtype).to(device) for i, W in enumerate(tensors)}


def needs_metering(device):
    if device.type != "pretended":
        pytest.skip("the workspaces of CUDA's libraries are larger than these matrices")


def test_auto_is_where_the_model_lies(device, tmp_path):
    here, there = weights(), weights(device=device)
    mixed = here | dict(list(there.items())[-1:])  # as device_map leaves it
    module = torch.nn.Linear(20, 30)
    assert htsr.analyze(module.to(device)).options.device == str(module.weight.device)
    assert htsr.analyze(there).options.device == str(device)
    assert htsr.compare(here, there).a.options.device == str(device)
    for source in (mixed, here):  # which has no place of its own on a device: this process's accelerator
        found = htsr.analyze(source)
        assert found.options.device == str(device)
        assert [row.alpha for row in found] == pytest.approx([row.alpha for row in htsr.analyze(here, device="cpu")])
    assert htsr.esd(there["layers.0.mlp.up_proj.weight"]).route == "gram/float64"


def test_the_own_accelerator_is_that_of_the_rank_and_no_journal_depends_on_which(device, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    model, options, journals = htsr.describe(weights()), [], []
    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        options.append(make_options())
        journals.append(Journal(model, options[-1], tmp_path / "journal.jsonl"))
    assert [found.device for found in options] == [f"{device.type}:0", f"{device.type}:1"]
    journals[1].open(rank=1)
    journals[1].add(measure_all(model.matrices[:1], replace(options[1], device="cpu"))[0])
    journals[1].close()
    assert list(journals[0].load()) == [model.matrices[0].name]
    on_cpu = Journal(model, replace(options[0], device="cpu"), tmp_path / "journal.jsonl")
    assert list(on_cpu.load()) == [model.matrices[0].name]
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)  # each process sees its own only
    assert own_accelerator() == f"{device.type}:0"


@pytest.mark.parametrize("where", ["host", "device"])
@pytest.mark.parametrize("options", [{}, {"windows": htsr.Windows(80, 2)}, {"dtype": "float32"}], ids=str)
def test_the_device_holds_one_matrix_and_its_gram_matrix(device, memory, monkeypatch, where, options):
    needs_metering(device)
    monkeypatch.setattr(solver, "_CHUNK", 1 << 12)  # entries: of a model of that size, as 32 MiB of one of 7B
    state = weights(6, (128, 400), device="cpu" if where == "host" else device)
    with memory() as used:
        rows = htsr.analyze(state, device=str(device), **options)
    assert all(row.status == "ok" for row in rows)
    matrix, gram, chunk = 4 * 128 * 400, 8 * 128 * 128, 8 * (1 << 12)
    assert used.peak <= (matrix if where == "host" else 0) + 2 * gram + 2 * chunk + 4096  # the solver works on a copy


def test_one_thread_computes_and_another_reads_ahead(device, monkeypatch):
    solving, reading, alive = set(), set(), []
    solve, lock = torch.linalg.eigvalsh, threading.Lock()
    matrices = htsr.describe(weights(5)).matrices

    def read(matrix):
        with lock:
            reading.add(threading.get_ident())
            alive.append(matrix.name)
            assert len(alive) <= 2
        return matrix.opened()

    def work(batch):
        htsr.esd(batch[0].opened(), device=str(device))
        with lock:
            alive.remove(batch[0].name)
        return [batch[0].name]

    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda A: solving.add(threading.get_ident()) or solve(A))
    found = dict(execution.for_each(matrices, work, str(device), read))
    assert [found[i] for i in range(5)] == [matrix.name for matrix in matrices]
    assert solving == {threading.get_ident()}
    assert len(reading) == 1
    assert reading.isdisjoint(solving)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_what_is_read_lies_in_pinned_memory(device, monkeypatch, tmp_path, stored):
    from safetensors.torch import save_file

    monkeypatch.setattr(execution, "_PINNED_FROM", 1)
    save_file(weights(3, dtype=stored), tmp_path / "model.safetensors")
    model, pinned = htsr.describe(tmp_path), []

    def work(batch):
        pinned.append(batch[0].opened().is_pinned())
        return [None]

    list(execution.for_each(model.matrices, work, str(device)))
    assert pinned == [True] * 3


def test_a_matrix_waits_for_the_device_three_times(device, synchronisations):
    """For the size of its squares, in the solver, and for the eigenvalues."""
    state = weights(4, device=device)
    with synchronisations() as counted:
        htsr.analyze(state, null=False)
    assert counted.count is None or counted.count <= 3 * len(state), counted.names


def test_statistics_are_computed_on_the_host_meanwhile(device, monkeypatch):
    """Eight fits for the error of α of each Lanczos spectrum took ten times as long as its products on the device."""
    threads, fit = set(), measure.statistics
    monkeypatch.setattr(measure, "statistics", lambda *given: threads.add(threading.get_ident()) or fit(*given))
    for options in ({"full": True}, {"route": "lanczos"}):
        there = htsr.analyze(weights(4), device=str(device), **options)
        assert threads
        assert threading.get_ident() not in threads
        threads.clear()
        here = htsr.analyze(weights(4), device="cpu", **options)
        assert [row.name for row in there] == [row.name for row in here]
        assert [row.alpha for row in there] == pytest.approx([row.alpha for row in here], rel=1e-4)
        threads.clear()


@pytest.mark.parametrize("problem", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), None])
def test_what_befalls_a_matrix_is_its_row(device, monkeypatch, problem):
    solve, emptied = torch.linalg.eigvalsh, []
    error = problem or torch.linalg.LinAlgError("The algorithm failed to converge")

    def failing(A):
        if A.diagonal().sum() > 1e7:
            raise error
        return solve(A)

    monkeypatch.setattr(torch.linalg, "eigvalsh", failing)
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: emptied.append(True))
    state = weights(3, device=device)
    state["layers.1.mlp.up_proj.weight"] *= 1e3
    good, bad, after = htsr.analyze(state)
    assert (good.status, bad.status, after.status) == ("ok", "failed", "ok")
    assert ("not enough memory" if problem else "failed to converge") in bad.warning
    assert emptied == ([True] if problem else [])  # what the device keeps is free for the next


def test_memory_of_a_matrix_that_has_failed_is_free_when_blocks_are_given_back(device, memory, monkeypatch):
    needs_metering(device)
    state, left = weights(1), []

    def failing(A):
        raise torch.OutOfMemoryError("out of memory")

    with memory() as used:
        monkeypatch.setattr(torch.linalg, "eigvalsh", failing)
        monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: left.append(used.now))
        assert htsr.analyze(state, device=str(device))[0].status == "failed"
    assert left == [4 * 96 * 160] or left == [0]  # the matrix itself at most, not what was made of it


def test_files_and_factors_are_read_ahead_too(device, tmp_path):
    from safetensors.torch import save_file

    save_file(weights(3, dtype=torch.bfloat16), tmp_path / "model.safetensors")
    rows = htsr.analyze(tmp_path, device=str(device))
    assert [r.alpha for r in rows] == pytest.approx([r.alpha for r in htsr.analyze(tmp_path, device="cpu")], rel=1e-6)
    random = np.random.default_rng(0)
    adapter = tmp_path / "adapter"
    factors = {
        f"base_model.model.layers.{i}.mlp.up_proj.{factor}.weight": torch.from_numpy(
            random.standard_normal(shape)
        ).float()
        for i in range(2)
        for factor, shape in (("lora_A", (8, 60)), ("lora_B", (80, 8)))
    }
    adapter.mkdir()
    save_file(factors, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["up_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    found = [htsr.analyze(adapter, device=place) for place in ("cpu", str(device))]
    assert [[row.route for row in rows] for rows in found] == [["factors/float64"] * 2] * 2
    assert found[0].rows[0].alpha == found[1].rows[0].alpha


def test_small_matrices_are_solved_in_one_call(device, monkeypatch):
    calls, solve = [], torch.linalg.eigvalsh
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda A: calls.append(A.shape) or solve(A))
    state = weights(40, (16, 24))
    there = htsr.analyze(state, device=str(device), null=False)
    assert len(calls) == 2  # of 32 and 8
    here = htsr.analyze(state, device="cpu", null=False)
    assert [row.alpha for row in there] == pytest.approx([row.alpha for row in here], rel=1e-9)


def test_rounding_of_coarse_numbers_is_told_on_the_device(device, memory, synchronisations, monkeypatch):
    """On the host the second eigenvalue problem would take longer than all else together."""
    random, calls, solve = torch.Generator().manual_seed(0), [], np.linalg.eigvalsh
    W = torch.randn(400, 60, generator=random) @ torch.randn(60, 200, generator=random)  # rank 60
    W = W.bfloat16()
    W[7] = W[:, 3] = 0
    here, there = htsr.esd(W), W.to(device)
    monkeypatch.setattr(np.linalg, "eigvalsh", lambda A: calls.append(A.shape) or solve(A))
    with synchronisations() as counted, memory() as used:
        found = htsr.esd(there)
    assert np.count_nonzero(found.eigenvalues) == np.count_nonzero(here.eigenvalues) == 60
    assert not calls
    assert counted.count is None or counted.count <= 10, counted.names
    gram, entries = 8 * 200 * 200, 400 * 200
    if device.type == "pretended":
        assert used.peak <= 4 * gram + 30 * entries  # chunks are larger than this matrix
