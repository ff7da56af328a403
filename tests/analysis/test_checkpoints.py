import json

import pytest
import torch

from htsr import UsageError
from htsr.analysis.checkpoints import checkpoints_of, find_checkpoints, label_of
from tests.models import save_folder

WEIGHTS = {"up.weight": torch.ones(2, 2)}


def made(run, *names, state=False):
    for name in names:
        save_folder(run / name, WEIGHTS)
        if state:
            (run / name / "trainer_state.json").write_text('{"global_step": 1}')
    return run


def found(sources):
    return [(checkpoint.label, checkpoint.step) for checkpoint in checkpoints_of(sources)]


def test_checkpoints_of_a_run_go_by_their_numbers(tmp_path):
    run = made(tmp_path / "run", "checkpoint-1000", "checkpoint-500", "adapter", "runs")
    (run / "step").mkdir()
    (run / "epoch=1-step=0750.ckpt").write_bytes(b"")
    (run / "checkpoint-7.txt").write_text("")
    expected = [("checkpoint-500", 500), ("epoch=1-step=0750.ckpt", 750), ("checkpoint-1000", 1000)]
    assert found(run) == found(str(run)) == found([run]) == expected
    assert label_of(checkpoints_of(run)) == str(run)
    assert found([run / "checkpoint-1000", run / "checkpoint-500"]) == [expected[0], expected[2]]


@pytest.mark.parametrize(
    ("says", "final"),
    [
        ({"trainer_state.json": {"global_step": 600}}, 600),
        ({"results.json": {"metrics": {"steps": 600}}}, 600),
        ({"trainer_state.json": {"global_step": 500}}, None),  # of that step there is a checkpoint
        ({"results.json": {"metrics": {"steps": 600, "best_step": 500}}}, None),  # it is that checkpoint
        (
            {"results.json": {"metrics": {"steps": 600, "best_step": 550}}, "trainer_state.json": {"global_step": 600}},
            550,
        ),
        ({"results.json": [600]}, None),
        ({}, None),  # nothing says after how many steps it was saved
    ],
)
def test_the_final_model_counts_where_it_is_a_later_one(tmp_path, says, final):
    run = made(tmp_path, "", "checkpoint-500")
    for name, content in says.items():
        (run / name).write_text(json.dumps(content))
    assert found(run) == [("checkpoint-500", 500)] + ([("final", final)] if final else [])


def test_of_adapters_the_final_one_is_an_adapter_and_not_the_merged_model(tmp_path):
    run = made(tmp_path, "", "checkpoint-500", "adapter")
    (run / "results.json").write_text('{"metrics": {"steps": 600}}')
    for folder in (run / "checkpoint-500", run / "adapter"):
        (folder / "adapter_config.json").write_text("{}")
    assert find_checkpoints(run)[-1].source == run / "adapter"
    (run / "adapter" / "adapter_config.json").unlink()
    assert find_checkpoints(run)[-1].label == "checkpoint-500"


def test_several_runs_or_models_have_no_steps(tmp_path):
    a, b = (made(tmp_path / name, "checkpoint-1", "checkpoint-2") for name in "ab")
    assert found([a, b]) == [(f"{run}/checkpoint-{step}", None) for run in (a, b) for step in (1, 2)]
    assert found([a / "checkpoint-1", b / "checkpoint-1"]) == [(f"{run}/checkpoint-1", None) for run in (a, b)]
    assert found(["me/a", "me/b@main"]) == [("me/a", None), ("me/b@main", None)]
    assert found(["me/a@step2", "me/a"]) == [("me/a@step2", None), ("me/a", None)]
    assert found({"base": a / "checkpoint-1", "tuned": "me/a@main"}) == [("base", None), ("tuned", None)]
    layers = [torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), WEIGHTS]
    assert found(layers) == [("Linear 1", None), ("Linear 2", None), ("state dict", None)]
    assert found(WEIGHTS) == [("state dict", None)]


def test_whole_numbers_are_steps():
    assert found({20: WEIGHTS, 3: WEIGHTS}) == [("3", 3), ("20", 20)]
    assert found({20: WEIGHTS, "last": WEIGHTS}) == [("20", None), ("last", None)]
    assert found(["me/a@step20", "me/a@step3"]) == [("step3", 3), ("step20", 20)]


def test_a_path_with_an_at_sign_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(made(tmp_path, "me@2"))
    assert found("me@2") == [("me@2", None)]


@pytest.mark.parametrize("sources", [[], {}, ["me/a", "me/a"]])
def test_nothing_and_the_same_twice_are_refused(sources):
    with pytest.raises(UsageError, match=r"nothing to track|two of the models are called me/a"):
        checkpoints_of(sources)


def test_what_is_being_written_is_known_by_what_the_trainer_writes_last(tmp_path):
    run = made(tmp_path, "checkpoint-1", state=True)
    made(run, "checkpoint-2")
    assert [checkpoint.is_unfinished for checkpoint in find_checkpoints(run)] == [False, True]
    (run / "checkpoint-1" / "trainer_state.json").unlink()
    assert not any(checkpoint.is_unfinished for checkpoint in find_checkpoints(run))  # not by the Trainer


def test_epochs_are_no_steps(tmp_path, caplog):
    run = made(tmp_path, "epoch_1", "epoch_0", "step_500")
    assert found(run) == [("step_500", 500)]
    assert "left out, since epochs are no steps: epoch_0, epoch_1" in caplog.text
    (run / "step_500").rename(run / "other")
    assert found(run) == [("epoch_0", 0), ("epoch_1", 1)]


def test_models_of_the_hub_whose_names_have_numbers_are_no_run():
    assert found(["me/small-step-1", "me/large-step-2"]) == [("me/small-step-1", None), ("me/large-step-2", None)]
