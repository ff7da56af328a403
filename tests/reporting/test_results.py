"""Every result through every format: nothing is lost, and all formats say the same."""

import csv
import io
import json
import sys
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from htsr_cli.main import main
from htsr_cli.output import FORMATS, SUFFIXES, Target

import htsr
from htsr.analysis.surgery import project
from htsr.finetuning.result import Result
from htsr.results import Column, Table, envelope, tabulate
from htsr.training.memory.plan import PROCESS, MemoryPlan, MemoryPlans
from htsr.training.sampling.coverage import Coverage
from tests.models import save_folder, state_dict
from tests.transformer import llama, word_tokenizer

pandas = pytest.importorskip("pandas")
pytest.importorskip("pyarrow")

METRICS = {"train_loss": 1.25, "steps": 3, "peak_mib": 12.5, "peak_of": "x"}
KINDS = ("analysis", "comparison", "model", "memory", "one memory plan", "plan", "outliers", "surgery", "repair", "run")


def memory_plan(method="lora"):
    return MemoryPlan(
        "tiny", method, "step", total=300, weights=100, gradients=100, optimizer=50, projectors=0, activations=50,
        logits=0, workspace=0, parameters=1234, trainable=34, merging=100,
    )  # fmt: skip


def outliers():
    rows = [
        htsr.OutlierRow(f"=layers.{i}.{part}", "mlp.up", i, 100 + i, 0.5, (7 * i, i), (5 * i, 0))
        for i in range(3)
        for part in "ab"
    ]
    rows.append(htsr.OutlierRow("head", "head", None, 9, 0.1, (1, 0)))
    return htsr.Outliers("tiny", (2.5, 13.0), tuple(rows), ("layers.0", "layers.1", "layers.2"), 4, 99, {"seed": 0})


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    state = state_dict()
    state["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    analysis = htsr.analyze(state, device="cpu", bulk=True, permuted=True)
    folder = tmp_path_factory.mktemp("results")
    model = save_folder(folder / "model", state_dict(2))
    found = (
        analysis,
        htsr.compare(state, state_dict(seed=1), device="cpu"),
        htsr.describe(state),
        MemoryPlans("tiny", (memory_plan("full"), memory_plan())),
        memory_plan(),
        htsr.layerwise_plan(state_dict(), "llr", min_size=20),
        outliers(),
        project(model, folder / "out", 3, traps=True),
        htsr.repair(save_folder(folder / "tuned", state_dict(2, seed=1)), model),
        Result("runs/tiny", METRICS, (Coverage("a", 0.5, 1, 1.0),)),
    )
    return dict(zip(KINDS, found, strict=True))


@pytest.fixture(params=KINDS)
def result(request, results):
    return results[request.param]


def written(result, path):
    Target(None, path, "command", {"asked": 1}).write(result)
    return path


def test_all_formats_hold_the_same_rows(result, tmp_path):
    records = result.records()
    assert records
    assert all(list(record) == list(records[0]) for record in records)
    assert json.loads(written(result, tmp_path / "r.json").read_text())["rows"] == records  # NaN is in no record
    (header, *lines) = csv.reader(io.StringIO(written(result, tmp_path / "r.csv").read_text()))
    assert header == list(records[0])
    for line, record in zip(lines, records, strict=True):
        assert [cell.removeprefix("'") for cell in line] == ["" if v is None else str(v) for v in record.values()]
    import pyarrow.parquet

    assert pyarrow.parquet.read_table(written(result, tmp_path / "r.parquet")).to_pylist() == records
    frame = result.to_pandas()
    kept = frame.astype(object).where(frame.notna(), None).to_dict("records")
    assert [{key: line.get(key) for key in records[0]} for line in kept] == records


def two_of_each(folder):
    """Pairs of results, of which one leaves columns empty that the other fills."""
    state, bare = state_dict(1), {"up.weight": torch.randn(40, 60, generator=torch.Generator().manual_seed(0))}
    zeros = {name: torch.zeros_like(W) for name, W in bare.items()}
    plain, full = (
        htsr.analyze(source, device="cpu", **options)
        for source, options in ((zeros, {}), (state, {"full": True, "gof": 10, "bootstrap": 10, "quality": True}))
    )
    model = save_folder(folder / "model", state)
    surgeries = (project(model, folder / f"out{i}", **asked) for i, asked in enumerate(({"keep": 3}, {"traps": True})))
    return {
        "analysis": (plain, full),
        "comparison": (htsr.compare(zeros, zeros, device="cpu"), htsr.compare(state, state_dict(1, seed=1), full=True)),
        "model": (htsr.describe(bare), htsr.describe(state)),
        "plan": (htsr.layerwise_plan(zeros, "llr", min_size=20), htsr.layerwise_plan(state, "llr", min_size=20)),
        "surgery": tuple(surgeries),
        "run": (Result("a", METRICS | {"train_loss": None}), Result("b", METRICS)),
    }


def test_parquet_files_of_one_kind_of_result_are_read_together(tmp_path):
    """Columns without a value have the type that they have with one."""
    import pyarrow.dataset

    for kind, pair in two_of_each(tmp_path).items():
        paths = [written(result, tmp_path / f"{kind}{i}.parquet") for i, result in enumerate(pair)]
        schemas = [{field.name: str(field.type) for field in pyarrow.parquet.read_schema(path)} for path in paths]
        shared = schemas[0].keys() & schemas[1].keys()
        assert {name: schemas[0][name] for name in shared} == {name: schemas[1][name] for name in shared}, kind
        for order in (paths, paths[::-1]):
            assert pyarrow.dataset.dataset(order).to_table().num_rows == sum(len(result.records()) for result in pair)


def test_types_of_columns_are_those_of_the_values(result):
    for name, kind in result.types().items():
        found = {type(record[name]) for record in result.records() if record.get(name) is not None}
        assert found <= ({kind, int} if kind is float else {kind}), name


def test_tables_for_documents_and_terminals_have_one_line_a_row(result, tmp_path):
    table = result.tables()[0]
    lines = written(result, tmp_path / "r.md").read_text().splitlines()
    assert len(lines) == 2 + len(table.rows)
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1
    text = written(result, tmp_path / "r.tex").read_text()
    rows = [line for line in text.splitlines() if line.endswith(r" \\")]
    assert len(rows) == 1 + len(table.rows)
    columns = text.partition(r"\begin{tabular}{")[2].partition("}")[0]
    assert {row.replace(r"\&", "").count("&") for row in rows} == {len(columns) - 1}
    for begin, end in ((r"\begin{tabular}", r"\end{tabular}"), (r"\toprule", r"\bottomrule")):
        assert text.count(begin) == text.count(end) == 1
    shown = written(result, tmp_path / "r.txt").read_text()
    notes = [column.title for column in table.in_print().columns].index("note") if "note" in shown else None
    for cells in table.in_print().cells():  # notes lose their end
        assert any(all(cell in line for cell in cells[:notes]) for line in shown.splitlines())


def test_the_envelope_is_the_same_for_all(result):
    content = envelope(result, "name", {"asked": 1, "seed": 3})
    assert list(content)[:3] == ["htsr", "command", "label"]
    assert list(content)[-2:] == ["options", "rows"]
    assert (content["htsr"], content["command"], content["label"]) == (htsr.__version__, "name", result.label)
    assert content["options"]["asked"] == 1
    assert content["rows"] == result.records()


def test_nothing_is_lost_of_what_json_held_before(results):
    content = {kind: envelope(result) for kind, result in results.items()}
    analysis, comparison = results["analysis"], results["comparison"]
    assert content["analysis"]["rows"] == [asdict(row) for row in analysis]
    assert content["analysis"]["options"] == asdict(analysis.options)
    assert content["analysis"]["meta"] == analysis.meta
    assert content["analysis"]["summary"] == analysis.summary()
    assert content["analysis"]["roles"] == analysis.summary_by("role")
    assert {"a", "b", "summary", "only_a", "only_b", "reshaped"} <= content["comparison"].keys()
    first = content["comparison"]["rows"][0]
    assert first["alpha_delta"] == comparison.pairs[0].b.alpha - comparison.pairs[0].a.alpha
    assert first["cosine"] == comparison.pairs[0].distance.cosine
    assert content["memory"]["rows"][1] == asdict(memory_plan()) | {"process": PROCESS}
    assert content["plan"]["policy"] == json.loads(results["plan"].policy.describe())
    assert content["surgery"]["rows"] == [asdict(operation) for operation in results["surgery"].operations]
    assert content["outliers"]["matrices"] == tuple(asdict(row) for row in results["outliers"].rows)
    assert content["run"]["coverage"][0]["intervals"] == 1


def test_options_of_a_comparison_are_those_of_its_analyses(capsys, tmp_path):
    """The fit of a saved analysis, not the command's default; by side where the two differ."""
    folder, saved, out = save_folder(tmp_path / "model", state_dict(1)), tmp_path / "a.npz", tmp_path / "c.json"
    assert main(["analyze", folder, "--fit", "hill", "--save", str(saved), "-q"]) == 0
    assert main(["compare", str(saved), folder, "--seed", "7", "-q", "-o", str(out)]) == 0
    options = json.loads(out.read_text())["options"]
    assert options["fit"] == "hill"
    assert options["seed"] == {"a": 0, "b": 7}


def test_rows_of_outliers_are_their_distribution(results):
    found = results["outliers"]
    frame = found.to_pandas()
    assert list(frame["D_2.5"]) == list(found.distribution(2.5))
    assert list(frame["p_2.5"]) == pytest.approx(found.distribution(2.5) / found.distribution(2.5).sum())
    assert list(frame["p_13"]) == [0, 0, 0]  # no block has an outlier there
    assert list(frame["parameters"]) == [200, 202, 204]
    near = htsr.Outliers("x", (3.0, 3.0000001), (), ("a",), 1, 1)
    assert list(near.records()[0])[3:] == ["D_3", "D_3.0000001", "p_3", "p_3.0000001"]


def test_outliers_are_read_from_either_file(results, tmp_path):
    found = results["outliers"]
    found.save(tmp_path / "saved.json")
    Target(None, tmp_path / "written.json", "outliers").write(found)
    assert htsr.Outliers.load(tmp_path / "saved.json") == htsr.Outliers.load(tmp_path / "written.json") == found


def test_columns_in_which_nothing_is_are_left_out_where_they_may():
    columns = [(Column(title, optional=title != "a"), lambda row, t=title: row.get(t)) for title in "abc"]
    table = tabulate([{"b": 0}, {"c": ""}], columns)
    assert [column.title for column in table.columns] == ["a", "b"]
    assert table.cells() == [["", "0"], ["", ""]]


def test_a_bar_is_for_terminals():
    table = Table((Column("a", text=True), Column("", bar=True)), (("x", 1.0),))
    assert table.in_print() == Table((Column("a", text=True),), (("x",),))


COMMANDS = {
    "analyze": ["analyze", "{model}"],
    "compare": ["compare", "{model}", "{model}"],
    "describe": ["describe", "{model}"],
    "memory": ["memory", "{model}"],
    "outliers": ["outliers", "{model}", "--data", "{data}"],
    "layerwise plan": ["layerwise", "plan", "{model}"],
    "project": ["project", "{model}", "--keep", "3", "--output", "{folder}"],
    "finetune": ["finetune", "--config", "one_cpu", "--output", "{folder}"],
}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    llama(1).save_pretrained(folder / "model")
    word_tokenizer().save_pretrained(folder / "model")
    (folder / "data.txt").write_text("w3 w4 w5\n\nw6 w7 w8\n")
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_takes_every_format(work, tmp_path, capsys, monkeypatch, command):
    """On standard output by --format, and in a file by its suffix, the same data; words are on stderr."""
    monkeypatch.setattr(
        "htsr.training.memory.prediction.predict_memory", lambda _name, method, **_options: memory_plan(method)
    )
    monkeypatch.setattr("htsr.finetuning.reading.check_options", lambda _recipe: None)
    module = SimpleNamespace(finetune=lambda *_args, **_more: Result("runs/tiny", METRICS))
    monkeypatch.setitem(sys.modules, "htsr.finetuning.run", module)  # slow to import, both
    count = 0

    def run(*more):
        nonlocal count
        count += 1
        names = {"model": work / "model", "data": work / "data.txt", "folder": tmp_path / f"out{count}"}
        code = main([*(word.format(**names) for word in COMMANDS[command]), *map(str, more)])
        out, err = capsys.readouterr()
        assert code == 0, err
        return out.replace(str(names["folder"]), "OUT"), err

    file_option = "--table" if command in ("project", "finetune") else "--output"
    rows = []
    for suffix, format in SUFFIXES.items():
        path = tmp_path / f"result{suffix}"
        assert run(file_option, path)[0] == ""
        if format == "parquet":
            rows.append(len(pandas.read_parquet(path)))
            continue
        out, _ = run("--format", format)
        if format == "json":
            assert [json.loads(text)["command"] for text in (out, path.read_text())] == [command] * 2
            rows += [len(json.loads(text)["rows"]) for text in (out, path.read_text())]
        if format == "csv":
            rows += [len(text.splitlines()) - 1 for text in (out, path.read_text())]
        if format == "table":
            assert "htsr:" not in out
        assert out.strip()
    assert len(set(rows)) == 1
    assert rows[0] >= 1


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--format", "xml"], "the format is one of table, json, csv, parquet, markdown, latex"),
        (["--format", "parquet"], "parquet goes to a file"),
        (["{file}", "x.xml"], "and x.xml does not tell which"),
    ],
)
def test_every_command_refuses_a_format_in_the_same_words_before_the_work(capsys, command, more, sentence):
    names = {"model": "no/model", "data": "no.txt", "folder": "no", "file": "--output"}
    if command in ("project", "finetune"):
        names["file"] = "--table"
    code = main([word.format(**names) for word in (*COMMANDS[command], *more)])
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert sentence in err
    assert len(err.splitlines()) == 1


def test_formats_are_named_once():
    assert len(FORMATS) == len(set(FORMATS)) == len(SUFFIXES)
