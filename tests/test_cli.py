import csv
import io
import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from htsr_cli.conditions import KNOWN, NEEDS
from htsr_cli.main import app, main
from htsr_cli.order import Order
from htsr_cli.output import _is_unsaid

import htsr
from htsr.analysis.execution import measure_all
from htsr.analysis.journal import Journal
from htsr.ranks import Ranks
from htsr.reporting.terminal import as_text
from htsr.spectra.notes import CAUTION
from tests.models import save_folder, state_dict


@pytest.fixture
def folder(tmp_path):
    return save_folder(tmp_path / "model", state_dict())


def run(capsys, *args):
    code = main([str(a) for a in args])
    out, err = capsys.readouterr()
    return code, out, err


def test_table_goes_to_stdout_and_nothing_else(capsys, folder):
    code, out, err = run(capsys, "analyze", folder, "-q")
    assert code == 0
    assert "model.layers.2.mlp.down_proj" in out
    assert "stable rank" in out
    assert "matrices in" not in out
    assert CAUTION not in " ".join(out.split())
    assert err == ""
    code, spoken, err = run(capsys, "analyze", folder)
    assert (code, spoken) == (0, out)
    assert "13 matrices in" in err
    assert CAUTION in err
    code, out, err = run(capsys, "compare", folder, folder)
    assert "mean α" in err
    assert run(capsys, "compare", folder, folder, "-q") == (code, out, "")


def test_the_report_is_spoken_of_last(capsys, folder, tmp_path):
    pytest.importorskip("plotly")
    _, _, err = run(capsys, "analyze", folder, "--html", tmp_path / "report.html")
    assert err.splitlines()[-1] == f"htsr: the report is in {tmp_path / 'report.html'}"


def test_json_is_strict_and_complete(capsys, folder):
    code, out, _ = run(capsys, "analyze", folder, "--format", "json", "--full")
    content = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert code == 0
    assert len(content["rows"]) == 13
    assert content["rows"][1]["num_traps"] is not None
    assert content["summary"]["alpha"] == pytest.approx(htsr.analyze(folder).summary()["alpha"])
    assert content["options"]["bulk"] is True


def test_csv_and_markdown(capsys, folder):
    rows = list(csv.DictReader(io.StringIO(run(capsys, "analyze", folder, "--format", "csv")[1])))
    assert len(rows) == 13
    assert float(rows[0]["alpha"]) > 1
    lines = run(capsys, "analyze", folder, "--format", "markdown")[1].splitlines()
    assert len(lines) == 15
    assert len({line.count("|") for line in lines}) == 1


def test_output_file_and_its_suffix(capsys, folder, tmp_path):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    for suffix in ("json", "csv", "md", "parquet", "txt"):
        code, out, _ = run(capsys, "analyze", folder, "-o", tmp_path / f"out.{suffix}")
        assert (code, out) == (0, "")
        assert (tmp_path / f"out.{suffix}").stat().st_size > 100
    assert len(pandas.read_parquet(tmp_path / "out.parquet")) == 13


def test_filters(capsys, folder):
    def names(*args):
        return [
            row["name"] for row in json.loads(run(capsys, "describe", folder, "--format", "json", *args)[1])["rows"]
        ]

    assert names("--role", "mlp.*", "--block", "0,2") == [
        f"model.layers.{i}.mlp.{part}_proj" for i in (0, 2) for part in ("down", "up")
    ]
    assert names("--include", "*.q_proj", "--exclude", "*.1.*") == [
        f"model.layers.{i}.self_attn.q_proj" for i in (0, 2)
    ]
    assert names("--exclude-role", "mlp.*", "--exclude-role", "*.k", "--block", "1") == [
        "model.layers.1.self_attn.q_proj"
    ]
    assert names("--max-size", "16") == [f"model.layers.{i}.self_attn.k_proj" for i in range(3)]
    assert names("--block", "1-2", "--role", "attn.q")[-1] == "model.layers.2.self_attn.q_proj"


@pytest.mark.parametrize(
    ("condition", "code"),
    [
        ("alpha>1", 3),
        ("alpha>1e9", 0),
        ("status!=ok", 0),
        ("role==attn.q", 3),
        ("status~unread", 0),
        ("note~tail of", 3),
        ("note~no such note", 0),
        ("erg_crossing==false", 0),
        ("num_spikes>=0", 3),  # each is computed because it is asked about
        ("num_traps>=0", 3),
        ("num_traps>1000", 0),
        ("best_law~power", 3),
        ("rand_distance<0", 0),
        ("quality_log>1e99", 0),
        ("block>99", 0),
        ("num_fingers>0", 2),  # of another fit
        ("alpha_error>1", 2),  # of another route
    ],
)
def test_fail_on(capsys, folder, condition, code):
    found, out, err = run(capsys, "analyze", folder, "--fail-on", condition, "--format", "json")
    assert found == code
    assert json.loads(out)["rows"]  # the result is written all the same
    assert ("holds for" in err) == (code == 3)
    assert ("cannot be judged: no matrix has" in err) == (code == 2)


def test_what_conditions_need_is_all_that_options_add(folder):
    options = {"bulk": True, "permuted": True, "alternatives": True, "quality": True, "null": True}

    def filled(**options):
        rows = htsr.analyze(folder, device="cpu", **options)
        return {name for row in rows for name, value in vars(row).items() if value is not None}

    plain = filled(null=False)
    assert filled(**options) > plain
    for option, names in NEEDS.items():
        added = filled(**({"null": False} | {option: True})) - plain
        assert added
        assert all(re.fullmatch(names, name) for name in added)
        assert not any(re.fullmatch(names, name) for name in plain)


def test_a_role_that_no_matrix_has_is_no_pass(capsys, folder):
    code, _, err = run(capsys, "analyze", folder, "--fail-on", "role==attn.qq", "-q")
    assert code == 2
    assert "role==attn.qq cannot be judged: there are attn.k, attn.q, embed" in err


def test_conditions_know_every_status():
    said = r'(?:MatrixError\(|problem=?(?: = )?(?:problem or )?\(|"(?:problem|status)": \(?|status: str = )\s*"(\w+)"'
    texts = [path.read_text(encoding="utf-8") for path in Path(htsr.__file__).parent.rglob("*.py")]
    found = {status for text in texts for status in re.findall(said, text)}
    assert {"meta", "sparse", "unreadable", "ok", "needs_base", "quantized"} <= found
    of_no_analysis = {"no_bulk", "no_ecs", "no_tail", "no_way", "too_small", "whole"}
    assert found - of_no_analysis <= set(KNOWN["status"])


def test_an_analysis_without_a_spectrum_is_no_success(capsys, tmp_path):
    state = {name: tensor * float("nan") for name, tensor in state_dict(blocks=1).items()}
    folder = save_folder(tmp_path / "model", state)
    code, out, err = run(capsys, "analyze", folder, "-q")
    assert code == 1
    assert "model.embed_tokens" in out
    assert f"no matrix of {folder} could be analyzed; model.embed_tokens is nan: " in err
    assert run(capsys, "analyze", folder, "--fail-on", "status==nan", "-q")[0] == 3


def test_rows_that_a_condition_was_not_asked_of_are_named(capsys, tmp_path):
    state = state_dict()
    state["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    folder = save_folder(tmp_path / "model", state)
    code, _, err = run(capsys, "analyze", folder, "--fail-on", "alpha>1e9", "--fail-on", "status==nan")
    assert code == 3
    assert "alpha>1e+09 was not asked of model.layers.1.mlp.up_proj, without alpha" in err
    assert "status==nan holds for model.layers.1.mlp.up_proj: nan" in err


@pytest.mark.parametrize(
    ("args", "code", "sentence"),
    [
        (["analyze", "./nowhere"], 1, "./nowhere does not exist"),
        (["analyze", ""], 2, "the name of the model is empty"),
        (["analyze", "{folder}", "--against", ""], 2, "the name of the model is empty"),
        (["analyze", "{folder}", "--role", "attn.[qv]"], 2, "brackets are no wildcards, give one pattern per role"),
        (["analyze", "{folder}", "--fit", "median"], 2, "unknown fit 'median'"),
        (["analyze", "{folder}", "--format", "xml"], 2, "the format is one of table, json"),
        (["analyze", "{folder}", "-o", "x.xml"], 2, "does not tell which"),
        (["analyze", "{folder}", "--format", "parquet"], 2, "parquet goes to a file"),
        (["analyze", "{folder}", "--format", "csv", "-o", "x.json"], 2, "csv does not go into x.json: by its suffix"),
        (["project", "{folder}", "-o", "x", "--format", "csv", "--table", "x.TEX"], 2, "does not go into x.TEX"),
        (["describe", "{folder}", "--format", "xml", "-o", "x.json"], 2, "the format is one of table, json"),
        (["analyze", "{folder}", "--save", "x.txt"], 2, "an analysis is saved as .npz, not as x.txt: x.npz"),
        (["analyze", "missing.npz"], 1, "missing.npz does not exist"),
        (["analyze", "{folder}", "-o", "no/such/folder/x.json"], 1, "the folder no/such/folder does not exist"),
        (["analyze", "{folder}", "--fail-on", "alpha"], 2, "conditions such as 'alpha>6'"),
        (["analyze", "{folder}", "--fail-on", "alhpa>6"], 2, "rows have no 'alhpa'"),
        (["analyze", "{folder}", "--fail-on", "alpha>six"], 2, "'six' is no number"),
        (["analyze", "{folder}", "--fail-on", "alpha>nan"], 2, "'nan' is no number"),
        (["analyze", "{folder}", "--fail-on", "status>5"], 2, "status is text, which has no order"),
        (["analyze", "{folder}", "--fail-on", "warning==random-like"], 2, "note~random-like"),
        (["analyze", "{folder}", "--fail-on", "status==OK"], 2, "no status is 'OK': ok, absent"),
        (["analyze", "{folder}", "--fail-on", "status!=nann"], 2, "no status is 'nann'"),
        (["analyze", "{folder}", "--fail-on", "status~nann"], 2, "no status contains 'nann'"),
        (["analyze", "{folder}", "--fail-on", "kind==Conv"], 2, "no kind is 'Conv'"),
        (["analyze", "{folder}", "--fail-on", "best_law==powerlaw"], 2, "no best_law is 'powerlaw': power_law"),
        (["analyze", "{folder}", "--device", "meta"], 2, "device 'meta' computes nothing"),
        (["analyze", "{folder}", "--windows", "10x999999999"], 2, "at most 200 × 200 windows of a matrix are pooled"),
        (["analyze", "{folder}", "--fail-on", "alpha~5"], 2, "alpha is a number"),
        (["analyze", "{folder}", "--fail-on", "alpha_low<2"], 2, "--bootstrap 200"),
        (["analyze", "{folder}", "--fail-on", "gof_p<=0.1"], 2, "--gof 200"),
        (["analyze", "{folder}", "--fail-on", "alpha_null>9", "--xmin", "1"], 2, "no α of pure noise"),
        (["analyze", "{folder}", "--windows", "big"], 2, "ROWSxCOUNT such as 2000x10"),
        (["analyze", "{folder}", "--block", "a"], 2, "numbers and ranges such as 0-3,7"),
        (["analyze", "{folder}", "--role", "conv"], 2, "matches 'conv'; there are attn.k"),
        (["analyze", "{folder}", "--exclude", "*.q_porj"], 2, "the nearest is *.q_proj"),
        (["analyze", "{folder}", "--min-size", "9999"], 2, "no matrix of"),
        (["analyze", "{folder}", "--block", "0-3000000000"], 2, "is no range of blocks"),
        (["analyze", "{folder}", "--block", "3-1"], 2, "is no range of blocks"),
        (["analyze", "{folder}", "--block", "7"], 2, "no block 7; its blocks are 0-2"),
        (["analyze", "{folder}", "--revision", "main"], 2, "a revision belongs to a hub id"),
        (["analyze", "{folder}", "--base", "auto"], 2, "a base belongs to an adapter folder"),
        (["analyze", "{folder}", "--route", "qr"], 2, "unknown route 'qr'"),
        (["analyze", "{folder}", "--xmin", "-1"], 2, "xmin is an eigenvalue"),
        (["compare", "{folder}", "missing.npz"], 1, "missing.npz is not an analysis"),
    ],
)
def test_bad_input_is_one_sentence(capsys, folder, args, code, sentence):
    found, out, err = run(capsys, *[arg.format(folder=folder) for arg in args])
    assert found == code
    assert out == ""
    assert sentence in err
    assert len(err.strip().splitlines()) == 1
    assert "Traceback" not in err


def test_an_xmin_that_leaves_no_tail_is_told_and_rows_are_written(capsys, folder):
    code, out, err = run(capsys, "analyze", folder, "--xmin", "1e30", "--format", "json", "-q")
    assert code == 1
    assert {row["status"] for row in json.loads(out)["rows"]} == {"degenerate"}
    assert "has a tail from --xmin 1e+30 on: the largest eigenvalue is" in err


def test_wrong_options_of_the_command_line_exit_with_two(capsys, folder):
    assert run(capsys, "analyze", folder, "--bootstrap", "-3")[0] == 2
    assert run(capsys, "analyze")[0] == 2
    assert run(capsys, "analyse", folder)[0] == 2


def test_compare_and_saved_analyses(capsys, folder, tmp_path):
    other = save_folder(tmp_path / "other", state_dict(seed=1))
    assert run(capsys, "analyze", folder, "--save", tmp_path / "a.npz", "-q")[0] == 0
    code, out, _ = run(capsys, "compare", tmp_path / "a.npz", other, "--format", "json")
    content = json.loads(out)
    assert code == 0
    assert len(content["rows"]) == 13
    assert content["summary"]["alpha"]["delta"] == pytest.approx(
        content["summary"]["alpha"]["b"] - content["summary"]["alpha"]["a"]
    )
    code, out, _ = run(capsys, "compare", folder, other)
    assert "‖A-B‖/‖A‖" in out
    code, _, err = run(capsys, "compare", folder, other, "--role", "attn.*", "-q")
    assert (code, err) == (0, "")


def test_directions_of_two_models(capsys, folder, tmp_path):
    other = save_folder(tmp_path / "other", state_dict(seed=1))
    code, out, err = run(capsys, "compare", folder, other, "--directions", "3", "--format", "json",
                         "--html", tmp_path / "page.html")  # fmt: skip
    content = json.loads(out)
    assert (code, content["directions"]["k"], content["heads"]) == (0, 3, [])
    assert {row["directions"] for row in content["rows"]} == {3}
    assert len(content["intruders"]) == sum(row["intruders"] for row in content["rows"])
    assert f"the page is in {tmp_path / 'page.html'}" in err
    assert run(capsys, "compare", folder, other, "--html", tmp_path / "no" / "page.html")[0] == 1
    code, _, err = run(capsys, "compare", folder, other, "--directions", "all")
    assert (code, err) == (2, "htsr: --directions takes erg, tail or a number of directions, not 'all'\n")
    code, _, err = run(capsys, "compare", folder, other, "--base", folder)
    assert (code, err) == (2, "htsr: a base belongs to an adapter, and neither of the two is one\n")


def test_every_command_that_writes_a_result_can_be_quiet():
    import typer

    def commands(group):
        for command in group.commands.values():
            yield from commands(command) if hasattr(command, "commands") else (command,)

    writing = [c for c in commands(typer.main.get_command(app)) if "format" in {p.name for p in c.params}]
    assert len(writing) >= 8
    assert all({"quiet", "verbose"} <= {p.name for p in c.params} for c in writing)


def test_saved_analyses_are_compared_by_path(folder, tmp_path):
    analysis = htsr.analyze(folder)
    for name in ("a.npz", "b.NPZ"):
        analysis.save(tmp_path / name)
        pairs = htsr.compare(tmp_path / name, str(folder))
        assert [(pair.a.alpha, pair.distance, pair.esd_distance) for pair in pairs] == [
            (row.alpha, None, 0.0) for row in analysis
        ]
    with pytest.raises(htsr.UsageError, match=r"saved as \.npz"):
        analysis.save(tmp_path / "a.txt")
    with pytest.raises(htsr.SourceError, match=r"a\.npz is no checkpoint; .* htsr\.Analysis\.load"):
        htsr.analyze(tmp_path / "a.npz")
    (tmp_path / "a.npz").write_text("text")
    with pytest.raises(htsr.SourceError, match=r"is no \.npz file"):
        htsr.compare(tmp_path / "a.npz", folder)


def test_a_table_in_a_file_or_pipe_is_whole(capsys, tmp_path):
    long = {f"{'encoder.' * 20}{name}": weight for name, weight in state_dict().items()}
    folder = save_folder(tmp_path / "long", long)
    args = ["analyze", folder, "--full", "-q"]
    code, out, _ = run(capsys, *args)
    assert code == 0
    assert run(capsys, *args, "-o", tmp_path / "t.txt") == (0, "", "")
    assert (tmp_path / "t.txt").read_text() == out
    assert all(row.name in out for row in htsr.analyze(folder))
    assert "…" not in out
    assert "left out" not in out


def test_a_filter_applies_to_a_saved_analysis(capsys, folder, tmp_path):
    saved = tmp_path / "a.npz"
    assert run(capsys, "analyze", folder, "--save", saved, "-q")[0] == 0
    code, out, err = run(capsys, "compare", saved, folder, "--block", "0-0")
    assert code == 0
    assert "only" not in err
    assert "a saved analysis has no weights: the distances of weights are left out" in err
    assert "model.layers.0.mlp.up_proj" in out
    assert "cosine" not in out
    assert "‖A-B‖/‖A‖" not in out
    assert "CKA" not in out
    code, _, err = run(capsys, "compare", saved, saved, "--role", "nothing")
    assert (code, len(err.splitlines())) == (2, 1)


def test_resume_takes_up_what_was_done(capsys, folder, monkeypatch):
    model = htsr.describe(folder)
    options = htsr.analyze(folder).options
    journal = Journal(model, options)
    journal.open()
    for result in measure_all(model.matrices[:4], options):
        journal.add(result)
    journal.close()
    code, out, err = run(capsys, "analyze", folder, "--resume", "--format", "json")
    assert code == 0
    assert "4 of 13 matrices done before" in err
    assert len(json.loads(out)["rows"]) == 13
    assert not journal.path.exists()


def test_interruption_keeps_what_is_done_and_says_so(capsys, folder, monkeypatch):
    import htsr_cli.run as commands

    real = commands.analyze_model

    def interrupted(model, options, journal, progress):
        def stop(_progress):
            raise KeyboardInterrupt

        return real(model, options, journal, stop)

    monkeypatch.setattr(commands, "analyze_model", interrupted)
    code, _, err = run(capsys, "analyze", folder)
    assert code == 130
    assert "of 13 matrices kept, --resume goes on from there" in err
    monkeypatch.undo()


def test_version_and_help(capsys):
    assert run(capsys, "--version") == (0, f"htsr {htsr.__version__}\n", "")
    code, out, _ = run(capsys, "analyze", "--help")
    assert code == 0
    assert "--fail-on" in out


def test_help_loads_nothing_heavy_and_bars_of_libraries_are_for_what_takes_long():
    script = (
        "import sys; sys.argv = ['htsr', '--help']\nfrom htsr_cli.main import main\nmain()\n"
        "print(sorted(sys.modules))\nfrom tqdm import tqdm; print(tqdm([]).delay)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    *_, loaded, delay = done.stdout.splitlines()
    assert float(delay) == 3
    for module in ("'numpy'", "'torch'", "'pandas'", "'transformers'", "'scipy'"):
        assert module not in loaded


def test_safetensors_on_a_cpu_need_no_torch(folder):
    script = (
        f"import sys, htsr; htsr.analyze({folder!r}, device='cpu', bulk=True, permuted=True); "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("command", ["describe", "compare", "analyze", "track", "layerwise plan", "project", "memory"])
def test_processes_but_the_first_say_nothing(capsys, folder, tmp_path, monkeypatch, command):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(Ranks, "launched", classmethod(lambda *_, **__: Ranks(0, 1)))  # the other one does not come
    more = {"compare": [folder], "project": ["--keep", "3", "-o", tmp_path / "out"]}.get(command, [])
    assert run(capsys, *command.split(), folder, *more) == (0, "", "")
    assert not (tmp_path / "out").exists()


def test_a_saved_analysis_brings_its_fit_to_the_comparison(capsys, folder, tmp_path):
    assert run(capsys, "analyze", folder, "--fit", "hill", "--save", tmp_path / "a.npz", "-q")[0] == 0
    code, out, _ = run(capsys, "compare", tmp_path / "a.npz", folder, "--format", "json")
    assert code == 0
    assert json.loads(out)["summary"]["alpha"]["delta"] == 0.0
    code, out, err = run(capsys, "compare", tmp_path / "a.npz", folder, "--fit", "ks")
    assert (code, out) == (2, "")
    assert "was analyzed with fit hill, this comparison with fit ks" in err


def test_what_a_package_says_itself_is_not_said_again():
    speaker = logging.getLogger("some_package")
    record = speaker.makeRecord("some_package.part", logging.WARNING, "", 0, "x", (), None)
    assert _is_unsaid(record)
    handler = logging.StreamHandler()
    speaker.addHandler(handler)
    try:
        assert not _is_unsaid(record)
    finally:
        speaker.removeHandler(handler)


def test_a_typo_like_a_hub_id_is_one_question_offline(capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("htsr.matrices.hub.answers", lambda *_: False)
    code, out, err = run(capsys, "analyze", "runs/typo")
    assert (code, out, len(err.splitlines())) == (1, "", 1)
    assert "runs/typo is no file or folder here, nor in the local cache" in err


@pytest.mark.parametrize("windows", ["10x10x.", "2x2x..", "0x10", "10x0", "2x2x0", "x", "99999999999x2", ""])
def test_windows_that_are_none(capsys, folder, windows):
    code, out, err = run(capsys, "analyze", folder, "--windows", windows)
    assert (code, out, len(err.splitlines())) == (2, "", 1)


@pytest.mark.parametrize("option", ["--output", "--html", "--save"])
@pytest.mark.parametrize("place", ["{}.npz", "folder.json", "no/x.json"])
def test_what_cannot_be_written_is_known_before_the_work(capsys, folder, tmp_path, monkeypatch, option, place):
    (tmp_path / "folder.json").mkdir()
    monkeypatch.setattr("htsr_cli.run.analyze_model", lambda *_args, **_more: pytest.fail("work was begun"))
    name = "n" * 300 + ".json" if place == "{}.npz" else place
    code, out, err = run(capsys, "analyze", folder, option, tmp_path / name)
    assert (code, out, len(err.splitlines())) == (1, "", 1)
    assert "cannot be written" in err


def test_rows_are_sorted_by_any_column_and_the_first_are_shown(capsys, folder):
    everything = json.loads(run(capsys, "analyze", folder, "--format", "json", "-q")[1])
    code, out, _ = run(capsys, "analyze", folder, "--sort", "stable_rank", "--top", "3", "--format", "json", "-q")
    found = json.loads(out)
    ranks = sorted((row["stable_rank"] for row in everything["rows"]), reverse=True)
    assert (code, [row["stable_rank"] for row in found["rows"]]) == (0, ranks[:3])
    assert found["summary"] == everything["summary"]  # of all
    out = run(capsys, "analyze", folder, "--sort", "role:up", "--format", "csv", "-q")[1]
    roles = [line.split(",")[1] for line in out.splitlines()[1:]]
    assert roles == sorted(roles)
    _, out, err = run(capsys, "analyze", folder, "--top", "2")
    assert out.index("embed_tokens") < out.index("layers.0.mlp.down_proj")
    assert "layers.2" not in out
    assert f"2 of {len(everything['rows'])} rows are shown" in err
    pairs = [
        json.loads(run(capsys, "compare", folder, folder, *more, "--format", "json", "-q")[1])["rows"]
        for more in ((), ("--sort", "alpha_a", "--top", "1"))
    ]
    assert pairs[1] == [max(pairs[0], key=lambda row: row["alpha_a"])]


def test_rows_without_a_number_come_last_and_a_column_that_is_none_is_known_before_the_work(capsys, folder):
    for sort in ("gof_p", "alpha", "alpha:up"):
        out = run(
            capsys, "analyze", folder, "--sort", sort, "--gof", "10", "--role", "mlp.*", "--format", "json", "-q"
        )[1]
        values = [row[sort.removesuffix(":up")] for row in json.loads(out)["rows"]]
        known = [value for value in values if value is not None]
        assert values[: len(known)] == sorted(known, reverse=not sort.endswith(":up"))
    code, out, err = run(capsys, "analyze", folder, "--sort", "alfa")
    assert (code, out) == (2, "")
    assert "--sort: rows have no 'alfa'; the nearest is alpha" in err


@pytest.mark.parametrize("width", [60, 80, 220])
def test_the_column_of_the_order_is_in_every_width(width):
    """Also where the table has none of it; a null goes only with the number that it belongs to."""
    base = state_dict(blocks=2)
    tuned = {
        name: W + 0.01 * torch.randn(W.shape, generator=torch.Generator().manual_seed(0)) for name, W in base.items()
    }
    tuned["model.embed_tokens.weight"] = base["model.embed_tokens.weight"]  # which has a note
    analysis = htsr.analyze(base, device="cpu", permuted=True)
    comparison = htsr.compare(base, tuned, directions=3, device="cpu", null=False)
    asked = {"stable_rank": analysis, "D": analysis, "entropy": analysis, "warning": analysis, "cka": comparison,
             "overlap_right_null": comparison, "directions_gap": comparison, "note": comparison}  # fmt: skip
    for field, result in asked.items():
        table = Order(field, up=False, top=3).of(result).tables()[0]
        (column,) = [column for column in table.columns if column.field == field]
        heads = as_text([table], width).splitlines()[1]
        assert f" {column.title} " in f"{heads} "
        assert "…" not in heads
        assert sum(map(len, table.rows)) == 3 * len(table.columns)
    for table in (*analysis.tables()[:2], comparison.tables()[0], comparison.heads.tables()[0]):
        for column in [column for column in table.columns if column.title.endswith(" null")]:
            heads = as_text([table], width).splitlines()[1]
            assert column.beside in [other.title for other in table.columns]
            assert (f" {column.title} " in heads) == (f" {column.beside} " in heads)


def test_where_to_look_first_is_the_last_table(capsys, tmp_path):
    state = state_dict(blocks=8)
    state["model.layers.5.mlp.up_proj.weight"] *= 100
    folder = save_folder(tmp_path / "model", state)
    _, out, _ = run(capsys, "analyze", folder)
    lines = out.partition("look here first")[2].splitlines()
    assert "model.layers.5.mlp.up_proj" in lines[2]
    assert "times that of mlp.up" in lines[2]
    found = json.loads(run(capsys, "analyze", folder, "--format", "json", "-q")[1])["standouts"]
    assert found[0]["name"] == "model.layers.5.mlp.up_proj"
