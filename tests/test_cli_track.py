import json

import pytest
from htsr_cli.main import main

import htsr
from tests.models import save_folder, state_dict


@pytest.fixture
def run_folder(tmp_path):
    for step in (100, 200, 300):
        state = state_dict(blocks=1, seed=step)
        tails = {name: W**5 if step == 300 else W for name, W in state.items()}  # so that α moves
        save_folder(tmp_path / "run" / f"checkpoint-{step}", tails)
    return tmp_path / "run"


def run(capsys, *args):
    code = main(["track", *map(str, args), "--no-null", "--device", "cpu"])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_run_is_a_table_of_checkpoints_and_of_what_moved_most(capsys, run_folder, tmp_path):
    save = tmp_path / "spectra.jsonl"
    code, out, err = run(capsys, run_folder, "--save", save)
    assert code == 0
    assert out.index("checkpoint-100") < out.index("checkpoint-300") < out.index("moved most")
    assert f"htsr: {run_folder}: 5 matrices, 3 checkpoints" in err
    assert main(["track", str(save), "-q"]) == 0
    assert capsys.readouterr() == (out, "")
    assert run(capsys, run_folder, "--save", save, "--format", "json", "-q")[0] == 0
    code, out, _ = run(capsys, run_folder, "--save", save, "--format", "json")
    content = json.loads(out)
    assert content["rows"] == htsr.Trajectory.load(save).records()
    assert (content["command"], content["reference"]) == ("track", "checkpoint-100")
    assert list(content["summary"]) == ["checkpoint-100", "checkpoint-200", "checkpoint-300"]


def test_a_broken_checkpoint_ends_with_one_and_the_others_are_there(capsys, caplog, run_folder):
    (run_folder / "checkpoint-200" / "model.safetensors").write_bytes(b"")
    code, out, err = run(capsys, run_folder)
    assert code == 1
    assert "checkpoint-300" in out
    assert "checkpoint-200" not in out
    assert "checkpoint-200 is left out: " in caplog.text
    assert err.splitlines()[-1] == "htsr: could not be read: checkpoint-200"


@pytest.mark.parametrize("quiet", [(), ("-q",)])
def test_a_base_that_no_matrix_fits_ends_with_one_and_is_said(capsys, run_folder, tmp_path, quiet):
    base = save_folder(tmp_path / "base", state_dict(blocks=1, width=24))
    code, _, err = run(capsys, run_folder, "--against", base, *quiet)
    assert code == 1
    assert f"htsr: no matrix of {run_folder} could be analyzed; " in err.splitlines()[-1]
    assert "is unmatched: " in err.splitlines()[-1]
    assert run(capsys, run_folder, "--against", run_folder / "checkpoint-100")[0] == 0


@pytest.mark.parametrize(
    ("args", "code", "sentence"),
    [
        (["me/a", "me/b", "--revision", "step1"], 2, "--revision belongs to one hub id"),
        (["me/a@step1", "--revision", "step1"], 2, "--revision belongs to one hub id"),
        (["run", "--save", "spectra.json"], 2, "saved as .jsonl"),
        (["run", "--include", "nothing"], 2, "matches 'nothing'"),
        (["run", "other.jsonl"], 2, "other.jsonl is a trajectory and no model"),
        (["nowhere"], 1, "nowhere is no file or folder here"),
        (["run.jsonl"], 2, "is a trajectory: it is read as it is, and takes no options"),
    ],
)
def test_bad_input_is_one_sentence(capsys, run_folder, monkeypatch, args, code, sentence):
    monkeypatch.chdir(run_folder.parent)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found, _, err = run(capsys, *args)
    assert found == code
    assert sentence in err


def test_revisions_of_a_hub_id_are_steps(capsys, monkeypatch, run_folder):
    opened = []

    def locate(name, revision=None):
        opened.append((name, revision))
        return run_folder / f"checkpoint-{revision.removeprefix('step')}"

    monkeypatch.setattr("htsr.matrices.sources.locate", locate)
    code, out, _ = run(capsys, "me/small", "--revision", "step300", "--revision", "step100", "--format", "csv")
    assert code == 0
    assert set(opened) == {("me/small", "step100"), ("me/small", "step300")}
    assert [line.split(",")[:2] for line in out.splitlines()[1::5]] == [["step100", "100"], ["step300", "300"]]


def test_the_page_is_written_and_spoken_of_last(capsys, run_folder, tmp_path):
    pytest.importorskip("plotly")
    page = tmp_path / "track.html"
    code, _, err = run(capsys, run_folder, "--html", page)
    assert code == 0
    assert err.splitlines()[-1] == f"htsr: the page is in {page}"
    assert "checkpoint-300" in page.read_text(encoding="utf-8")


def test_an_interruption_says_how_to_go_on(capsys, run_folder, tmp_path, monkeypatch):
    def interrupt(*_arguments, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr("htsr.analysis.tracking.track", interrupt)
    save = tmp_path / "spectra.jsonl"
    assert run(capsys, run_folder, "--save", save) == (
        130,
        "",
        f"htsr: interrupted; the same command goes on from {save}\n",
    )
