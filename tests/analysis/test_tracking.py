import json
import shutil
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import htsr
from htsr import MatrixError, WeightMatrix
from htsr.analysis import analyze as analyze_module
from htsr.analysis.distance import distance, squared_norm
from htsr.analysis.reference import Reference
from htsr.analysis.trajectory import Trajectory
from tests.models import save_folder, state_dict
from tests.processes import in_two_processes, leave_with, one_thread

PLAIN = {"null": False, "device": "cpu"}
HILL = PLAIN | {"fit": "hill"}  # the fit of steps of a run


def states(count=3, **options):
    """Models of a run that goes straight on."""
    start, end = state_dict(**options), state_dict(**options, seed=1)
    return [{name: torch.lerp(start[name], end[name], i / 4) for name in start} for i in range(count)]


def made(run, count=3, *, by_trainer=True, **options):
    for i, state in enumerate(states(count, **options), 1):
        save_folder(run / f"checkpoint-{100 * i}", state)
        if by_trainer:
            (run / f"checkpoint-{100 * i}" / "trainer_state.json").write_text("{}")
    return run


def small_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, **sizes))


def train(model, folder):
    """Two steps of the Trainer, with a checkpoint after each."""
    from transformers import Trainer, TrainingArguments

    data = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 2
    arguments = TrainingArguments(
        str(folder), max_steps=2, save_steps=1, per_device_train_batch_size=1, learning_rate=0.1,
        use_cpu=True, report_to=[], disable_tqdm=True, lr_scheduler_type="constant",
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=data).train()


def numbers(rows):
    return [replace(row, seconds=None) for row in rows]


@pytest.fixture
def measured(monkeypatch):
    """Names of the matrices that are measured, in their order."""
    names = []
    measure_all = analyze_module.measure_all

    def spied(matrices, *arguments):
        names.extend(matrix.name for matrix in matrices)
        return measure_all(matrices, *arguments)

    monkeypatch.setattr(analyze_module, "measure_all", spied)
    return names


def test_rows_are_those_of_analyze_and_lengths_those_of_compare(tmp_path):
    run = made(tmp_path)
    found = htsr.track(run, **PLAIN)
    assert (found.label, found.steps, found.reference, found.against) == (
        str(run),
        (100, 200, 300),
        "checkpoint-100",
        None,
    )
    first = htsr.describe(run / "checkpoint-100")
    for source in found.sources:
        assert numbers(found.at(source)) == numbers(htsr.analyze(run / source, **HILL))
        for old, new, point in zip(
            first, htsr.describe(run / source), (p for p in found if p.source == source), strict=True
        ):
            assert point.relative == pytest.approx(distance(old.read(), new.read()).relative, rel=1e-6, abs=1e-12)


def test_changes_against_a_base(tmp_path):
    run, base = made(tmp_path / "run"), save_folder(tmp_path / "base", state_dict(seed=2))
    found = htsr.track(run, against=base, **PLAIN)
    assert (found.against, found.reference) == (base, base)
    for source in found.sources:
        assert numbers(found.at(source)) == numbers(htsr.analyze(run / source, against=base, **HILL))
    pairs = htsr.compare(base, run / "checkpoint-300", **PLAIN)
    lengths = [point.relative for point in found if point.source == "checkpoint-300"]
    # compare divides by the norm of its first model, too
    assert lengths == pytest.approx([pair.distance.relative for pair in pairs], rel=1e-6)


def test_what_was_measured_is_not_measured_again(tmp_path, measured, caplog):
    run, save = made(tmp_path / "run", blocks=1), tmp_path / "spectra.jsonl"
    last = run / "checkpoint-300"
    last.rename(tmp_path / "later")
    first = htsr.track(run, save=save, **PLAIN)
    each = len(measured) // 2
    assert htsr.track(run, save=save, **PLAIN) == first == Trajectory.load(save)
    assert len(measured) == 2 * each
    shutil.rmtree(run / "checkpoint-200")  # save_total_limit
    (tmp_path / "later").rename(last)
    more = htsr.track(run, save=save, **PLAIN)
    assert len(measured) == 3 * each
    assert more.points[: len(first)] == first.points
    assert more.steps == (100, 200, 300)
    save_folder(last, states(blocks=1)[1])
    again = htsr.track(run, save=save, **PLAIN)
    assert len(measured) == 4 * each
    assert numbers(again.at("checkpoint-300")) == numbers(again.at("checkpoint-200"))
    shutil.rmtree(run / "checkpoint-100")
    save_folder(last, states(blocks=1)[2])
    assert not caplog.records
    final = htsr.track(run, save=save, **PLAIN)
    assert numbers(final.at("checkpoint-300")) == numbers(more.at("checkpoint-300"))
    assert [point.relative for point in final if point.source == "checkpoint-300"] == [None] * each
    assert "checkpoint-100 is not among the checkpoints any more" in caplog.text


@pytest.mark.parametrize("with_base", [False, True])
def test_lengths_are_all_against_one_reference(tmp_path, measured, caplog, with_base):
    run, save = made(tmp_path / "run", blocks=1), tmp_path / "spectra.jsonl"
    base = tmp_path / "base" if with_base else run / "checkpoint-100"
    save_folder(base, states(blocks=1)[0])
    options = {"against": base, **PLAIN} if with_base else PLAIN
    before = htsr.track(run, save=save, **options)
    gone = {point.row.name: point for point in before if point.source == "checkpoint-300"}
    shutil.rmtree(run / "checkpoint-300")
    save_folder(base, {name: 2 * W for name, W in states(blocks=1)[0].items()})
    measured.clear()
    found = htsr.track(run, save=save, **options)
    assert len(measured) == (10 if with_base else 5)  # spectra of weights are what they were
    assert "may have changed since" in caplog.text
    alone = {(p.source, p.row.name): p for p in htsr.track(run, **options)}
    assert found == Trajectory.load(save)
    for point in found:
        if point.source == "checkpoint-300":
            assert point == replace(gone[point.row.name], relative=None)
        else:
            there = alone[point.source, point.row.name]
            assert (numbers([point.row]), point.relative) == (numbers([there.row]), there.relative)
    caplog.clear()
    measured.clear()
    assert htsr.track(run, save=save, **options) == found
    assert not measured
    assert not caplog.records


def test_only_matrices_that_are_missing_are_measured(tmp_path, measured):
    run, save = made(tmp_path / "run", 1), tmp_path / "spectra.jsonl"
    htsr.track(run, save=save, where=htsr.Filter("*.q_proj"), **PLAIN)
    found = htsr.track(run, save=save, where=htsr.Filter(exclude="*.k_proj"), **PLAIN)
    assert sorted(measured) == sorted(point.row.name for point in found)
    assert len(set(measured)) == len(measured)


def test_other_options_do_not_go_into_one_file(tmp_path):
    run, save = made(tmp_path / "run", 1, blocks=1), tmp_path / "spectra.jsonl"
    htsr.track(run, save=save, **PLAIN)
    for changes in ({"fit": "ks"}, {"null": True}, {"against": run / "checkpoint-100"}):
        with pytest.raises(htsr.UsageError, match="was measured with"):
            htsr.track(run, save=save, **{**PLAIN, **changes})
    with pytest.raises(htsr.UsageError, match=r"saved as \.jsonl"):
        htsr.track(run, save=tmp_path / "spectra.json")
    with pytest.raises(htsr.UsageError, match="read as it is"):
        htsr.track(save, fit="hill")
    assert htsr.track(save) == Trajectory.load(save)


def test_steps_are_fitted_by_hill_models_by_ks_and_a_file_goes_on_with_its_own_fit(tmp_path):
    run, save = made(tmp_path / "run", 2, blocks=1), tmp_path / "spectra.jsonl"
    models = [run / "checkpoint-100", save_folder(tmp_path / "other", state_dict(blocks=1))]
    for sources, fit in ((run, "hill"), (run / "checkpoint-100", "hill"), (models, "ks")):
        found = htsr.track(sources, **PLAIN)
        assert found.options.fit == fit
        assert f"({fit})" in "".join(found.remarks())
        assert {point.row.fit for point in found} == {fit}
        assert htsr.track(sources, fit="clip_xmax", **PLAIN).options.fit == "clip_xmax"
    htsr.track([run / "checkpoint-100"], save=save, fit="ks", **PLAIN)
    assert {point.row.fit for point in htsr.track(run, save=save, **PLAIN)} == {"ks"}


def test_two_runs_do_not_go_into_one_file(tmp_path, monkeypatch):
    run, other = (made(tmp_path / name, 2, blocks=1) for name in ("run", "other"))
    save = tmp_path / "spectra.jsonl"
    htsr.track(run, save=save, **PLAIN)
    for wrong in (other, {"a": other / "checkpoint-100"}, {1: state_dict()}):
        with pytest.raises(htsr.UsageError, match=r"spectra.jsonl is of .*run, and not of"):
            htsr.track(wrong, save=save, **PLAIN)
    monkeypatch.chdir(tmp_path)
    assert len(htsr.track("run", save=save, **PLAIN)) == 2 * 5
    assert len(htsr.track([run / "checkpoint-100"], save=save, **PLAIN)) == 2 * 5
    models = tmp_path / "models.jsonl"
    htsr.track({"a": run / "checkpoint-100"}, save=models, **PLAIN)
    assert htsr.track({"b": other / "checkpoint-200"}, save=models, **PLAIN).sources == ("a", "b")


def test_a_run_is_the_same_by_any_path_and_two_are_not_by_one(tmp_path, monkeypatch):
    for name, seed in (("a", 0), ("b", 5)):
        save_folder(tmp_path / name / "checkpoint-1", state_dict(blocks=1, seed=seed))
    save, copy = tmp_path / "spectra.jsonl", tmp_path / "copy.jsonl"
    monkeypatch.chdir(tmp_path / "a")
    htsr.track(".", save=save, **PLAIN).save(copy)
    monkeypatch.chdir(tmp_path / "b")
    for file in (save, copy):
        with pytest.raises(htsr.UsageError, match=r"is of .*a, and not of .*b"):
            htsr.track(".", save=file, **PLAIN)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    for path in ("a", tmp_path / "a", "link"):
        assert len(htsr.track(path, save=save, **PLAIN)) == 5


def test_a_file_that_does_not_say_where_its_run_is_goes_on_by_its_label(tmp_path):
    run, save = made(tmp_path / "run", 1, blocks=1), tmp_path / "spectra.jsonl"
    replace(htsr.track(run, **PLAIN), run=None).save(save)
    assert len(htsr.track(run, save=save, **PLAIN)) == 5
    with pytest.raises(htsr.UsageError, match="is of"):
        htsr.track(made(tmp_path / "other", 1, blocks=1), save=save, **PLAIN)


def test_a_checkpoint_that_was_interrupted_goes_on_where_it_stopped(tmp_path, measured, monkeypatch):
    monkeypatch.setenv("HTSR_CACHE", str(tmp_path / "cache"))
    run, save = made(tmp_path / "run", 2, blocks=1, width=16), tmp_path / "spectra.jsonl"
    expected = htsr.track(run, **PLAIN)
    seen = []

    def interrupt(now):
        seen.append(now)
        if len(seen) == 7:  # two into the second checkpoint
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        htsr.track(run, save=save, progress=interrupt, **PLAIN)
    assert Trajectory.load(save).sources == ("checkpoint-100",)
    fractions = [now.fraction for now in seen]
    assert fractions == sorted(fractions)
    assert fractions[4] == pytest.approx(0.5)
    measured.clear()
    found = htsr.track(run, save=save, **PLAIN)
    assert 0 < len(measured) < 5
    assert [(p.source, p.step, p.relative) for p in found] == [(p.source, p.step, p.relative) for p in expected]
    assert numbers(p.row for p in found) == numbers(p.row for p in expected)
    assert not any((tmp_path / "cache").iterdir())


def test_a_broken_checkpoint_is_named_and_the_others_go_on(tmp_path, caplog):
    run, save = made(tmp_path / "run", 4, blocks=1), tmp_path / "spectra.jsonl"
    weights = run / "checkpoint-200" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-5])
    (run / "checkpoint-400" / "model.safetensors").unlink()
    (run / "checkpoint-400" / "trainer_state.json").unlink()
    found = htsr.track(run, save=save, **PLAIN)
    assert found.steps == (100, 300)
    assert list(found.problems) == ["checkpoint-200"]
    assert "model.safetensors" in found.problems["checkpoint-200"]
    assert "checkpoint-200 is left out: " in caplog.text
    assert "checkpoint-400 is not complete, and is left out for now: " in caplog.text
    weights.write_bytes(whole)
    found = htsr.track(run, save=save, **PLAIN)
    assert (found.steps, found.problems) == ((100, 200, 300), {})
    assert Trajectory.load(save).records() == found.records()
    shutil.rmtree(run / "checkpoint-100")
    weights.write_bytes(b"")
    caplog.clear()
    assert htsr.track(run, save=save, **PLAIN).steps == (100, 200, 300)
    assert "checkpoint-200 is not measured again, and stays as it was" in caplog.text


def test_where_nothing_can_be_read_the_first_reason_is_the_error(tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    with pytest.raises(htsr.SourceError, match="checkpoint-1 holds no weights"):
        htsr.track(tmp_path, **PLAIN)
    with pytest.raises(htsr.UsageError, match="matches 'nothing'"):
        htsr.track(made(tmp_path, 1), where=htsr.Filter("nothing"), **PLAIN)


def test_an_unreadable_matrix_is_tried_again(tmp_path, monkeypatch):
    run, save = made(tmp_path / "run", 1, blocks=1), tmp_path / "spectra.jsonl"
    opened = WeightMatrix.opened
    name = "model.layers.0.mlp.up_proj"

    def failing(matrix):
        if matrix.name == name:
            raise MatrixError("unreadable", "the disk is away")
        return opened(matrix)

    monkeypatch.setattr(WeightMatrix, "opened", failing)
    rows = {row.name: row.status for row in htsr.track(run, save=save, **PLAIN).at("checkpoint-100")}
    assert [key for key, status in rows.items() if status != "ok"] == [name]
    monkeypatch.undo()
    assert {row.status for row in htsr.track(run, save=save, **PLAIN).at("checkpoint-100")} == {"ok"}


def test_lengths_take_no_copies_of_the_pair():
    random = torch.Generator().manual_seed(0)
    a, b = (
        {"up.weight": torch.randn(800, 1000, generator=random, dtype=dtype)} for dtype in (torch.float32, torch.float64)
    )
    pair = [np.asarray(W["up.weight"]) for W in (a, b)]
    before, after = (htsr.describe({"up.weight": W}) for W in pair)
    reference = Reference(before)
    tracemalloc.start()
    found = reference.relative(after, after)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < pair[0].nbytes / 2
    assert found["up"] == pytest.approx(np.linalg.norm(pair[1] - pair[0]) / np.linalg.norm(pair[0]), rel=1e-6)
    assert Reference(htsr.describe({"up.weight": 0 * pair[0]})).relative(after, after) == {}
    assert Reference(htsr.describe({"up.weight": pair[0][1:]})).relative(after, after) == {}
    assert Reference(htsr.describe({"up.weight": np.inf * pair[0]})).relative(after, after) == {}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """A base, and for LoRA and DoRA the checkpoints that the Trainer has left."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("runs")
    model = small_llama()
    model.save_pretrained(folder / "base")
    for name, dora in (("lora", False), ("dora", True)):
        base = type(model).from_pretrained(folder / "base")
        config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"], use_dora=dora)
        train(get_peft_model(base, config), folder / name)
    return folder


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_checkpoints_of_adapters(adapters, method):
    run, base = adapters / method, adapters / "base"
    found = htsr.track(run, against=base, **PLAIN)
    assert found.steps == (1, 2)
    assert not found.problems
    for checkpoint in found.sources:
        merged = {m.name: m for m in htsr.describe(run / checkpoint, base=base)}
        before = {m.name: m for m in htsr.describe(base)}
        changed = {p.row.name.removeprefix("model."): p for p in found if p.source == checkpoint and p.relative}
        assert len([name for name in changed if "q_proj" in name or "v_proj" in name]) == 4
        for point in changed.values():
            name = next(name for name in merged if name.endswith(point.row.name.removeprefix("base_model.model.")))
            expected = distance(before[name].read(), merged[name].read()).relative
            assert point.relative == pytest.approx(expected, rel=1e-4)
            if "_proj" in name:
                assert point.row.norm == pytest.approx(expected**2 * squared_norm(before[name].read()), rel=1e-3)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_what_an_adapter_saves_whole_is_a_change_of_the_base_that_is_given(adapters, tmp_path, method):
    """It was W among rows of ΔW with LoRA; with `against` in memory nothing knows whether it is still the same."""
    base, run = adapters / "base", tmp_path / "run" / "checkpoint-2"
    shutil.copytree(adapters / method / "checkpoint-2", run)
    file = run / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": None}))
    stored = load_file(run / "adapter_model.safetensors")
    head = load_file(base / "model.safetensors")["lm_head.weight"]
    name = next(name for name in stored if "lm_head" in name)
    save_file(stored | {name: 1.5 * head}, run / "adapter_model.safetensors", {"format": "pt"})
    found = {p.row.name: p for p in htsr.track([run], against=base, **PLAIN)}
    assert found["lm_head"].row.norm == pytest.approx(squared_norm(head.numpy()) / 4, rel=1e-4)
    assert found["lm_head"].relative == pytest.approx(0.5, rel=1e-4)
    assert len(found) == 5
    mixed = htsr.track([base, adapters / method / "checkpoint-2"], **PLAIN)
    assert {p.row.kind for p in mixed}.isdisjoint({"adapter"})
    assert len(mixed.at(mixed.sources[0])) == len(mixed.at(mixed.sources[1]))


def test_the_length_of_an_adapter_is_against_the_base_as_it_is_now(adapters, tmp_path, measured):
    base, run, save = tmp_path / "base", tmp_path / "run", tmp_path / "spectra.jsonl"
    shutil.copytree(adapters / "base", base)
    shutil.copytree(adapters / "lora", run)
    for file in run.glob("*/adapter_model.safetensors"):
        save_file({name: W for name, W in load_file(file).items() if "lora_" in name}, file, {"format": "pt"})
    before = htsr.track(run, against=base, save=save, **PLAIN)
    weights = load_file(base / "model.safetensors")
    save_file({name: 2 * W for name, W in weights.items()}, base / "model.safetensors", {"format": "pt"})
    measured.clear()
    found = htsr.track(run, against=base, save=save, **PLAIN)
    assert not measured  # ΔW is the adapter's own
    old, new = ([p.relative for p in each if p.relative and "_proj" in p.row.name] for each in (before, found))
    assert new == pytest.approx([length / 2 for length in old], rel=1e-4)


def test_of_adapters_alone_the_lengths_are_not_known(adapters):
    found = htsr.track(adapters / "lora", **PLAIN)
    assert len(found) == 2 * 5
    assert {point.relative for point in found} == {None}


def test_models_in_memory_have_the_labels_or_steps_that_they_are_given(tmp_path):
    model = small_llama()
    model.save_pretrained(tmp_path / "base")
    rows = numbers(htsr.analyze(model, **HILL))
    for sources in ({"a": model, "b": model}, {0: tmp_path / "base", 1: model}):
        found = htsr.track(sources, **HILL)
        assert found.sources == tuple(map(str, sources))
        assert numbers(found.at(found.sources[1])) == rows


def test_a_run_of_the_trainer(tmp_path):
    model = small_llama()
    train(model, tmp_path)
    found = htsr.track(tmp_path, **PLAIN)
    assert found.steps == (1, 2)
    weight = dict(model.named_modules())
    for row in found.at("checkpoint-2"):
        assert row.norm == pytest.approx(float(weight[row.name].weight.detach().square().sum()), rel=1e-5)


def _worker(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = htsr.track(folder / "run", save=folder / "two.jsonl", **PLAIN)
    points = [(point.source, repr(replace(point.row, seconds=None)), point.relative) for point in found]
    leave_with({"points": points, "problems": dict(found.problems)}, rank, folder)


def test_two_processes_find_what_one_finds_and_the_first_writes_it(tmp_path):
    run = made(tmp_path / "run", 2, blocks=1)
    save_folder(run / "checkpoint-150", {"up.weight": torch.ones(4, 4)})
    (run / "checkpoint-150" / "model.safetensors").write_bytes(b"")
    first, second = in_two_processes(_worker, tmp_path)
    assert first == second
    with one_thread():
        alone = htsr.track(run, **PLAIN)
    assert first["points"] == [[p.source, repr(replace(p.row, seconds=None)), p.relative] for p in alone]
    assert first["problems"] == alone.problems
    written = Trajectory.load(tmp_path / "two.jsonl")
    assert [(p.source, numbers([p.row]), p.relative) for p in written] == [
        (p.source, numbers([p.row]), p.relative) for p in alone
    ]
