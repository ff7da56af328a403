import io
from dataclasses import replace

import pytest
import torch
from htsr_cli.output import Target, Words
from rich.console import Console

import htsr
from htsr.analysis import tables
from htsr.finetuning.result import Moved, Result
from htsr.reporting.formats import as_csv
from htsr.reporting.terminal import STYLES, _first_kinds, terminal_table
from htsr.results import Column, Table
from htsr.spectra.notes import CAUTION
from htsr.training.memory.plan import METHODS, MemoryPlan, MemoryPlans
from tests.models import state_dict


@pytest.fixture(scope="module")
def analysis():
    return htsr.analyze(state_dict(), device="cpu", bulk=True, permuted=True)


def lines(table, width):
    out = io.StringIO()
    Console(file=out, width=width).print(table)
    return [line.rstrip() for line in out.getvalue().splitlines() if line.strip()]


@pytest.mark.parametrize("width", [60, 80, 100, 140, 220])
def test_numbers_are_never_cut(analysis, width):
    table = terminal_table(tables.metrics_table(analysis.rows), width)
    assert bool(table.caption) == (width < 220)  # columns are never left out in silence
    table.caption = None
    shown = lines(table, width)
    assert len(shown) == len(analysis) + 2
    assert all(len(line) <= width for line in shown)
    for row, line in zip(analysis, shown[2:], strict=True):
        assert f" {row.alpha:.2f} " in line + " "
        assert f" {row.trace_log:.2f} " in line + " " or width == 60  # rather than α's null
        assert "…" not in line.partition(f" {row.alpha:.2f} ")[2].removesuffix("…")  # of a note


@pytest.mark.parametrize("width", [60, 80, 100, 120])
def test_a_narrow_terminal_keeps_what_qualifies_alpha(width):
    warning = "de-quantised by bitsandbytes; random-like; light tail α>6; tail of 22"
    rows = [
        replace(row, name=f"encoder.{row.name}", warning=warning) for row in htsr.analyze(state_dict(), device="cpu")
    ]
    table = terminal_table(tables.metrics_table(rows), width)
    headers = [str(column.header) for column in table.columns]
    assert headers[-1] == "note"
    assert ("tail" in headers) == (width >= 80)
    assert all(line.endswith(("random-like…", "de-quantised…")) for line in lines(table, width)[2 : 2 + len(rows)])
    missing = [c.header for c in tables.metrics_table(rows).columns if c.header not in headers]
    assert str(table.caption).startswith("left out for width: D, log ‖W‖²")
    assert all(header in str(table.caption) for header in missing)


@pytest.mark.parametrize(
    ("room", "shown"),
    [
        (60, "de-quantised; random-like; tail of 22"),
        (30, "random-like; de-quantised…"),
        (12, "random-like…"),
        (6, "rando…"),
    ],
)
def test_a_note_loses_its_end(room, shown):
    assert _first_kinds("de-quantised; random-like; tail of 22", room) == shown


@pytest.mark.parametrize(
    ("note", "room", "shown"),
    [
        ("light tail α>6; tail of 9", 12, "tail of 9"),
        ("heavy tail α<2", 12, ""),
        ("light tail α>6; tail of 9", 30, "light tail α>6; tail of 9"),
        ("random-like; light tail α>6; tail of 9", 12, "random-like"),
        ("random-like; light tail α>6; tail of 9", 24, "random-like; tail of 9"),
        ("light tail α>6; rank-deficient; tail of 9", 12, "rank-defici…"),
    ],
)
def test_a_note_goes_without_what_numbers_beside_it_say(note, room, shown):
    assert _first_kinds(note, room, ("light tail", "heavy tail", "tail of ")) == shown


def test_long_names_lose_their_middle(analysis):
    row = replace(analysis[0], name="model." + 20 * "very." + "long.name.of_a_projection")
    line = lines(terminal_table(tables.metrics_table([row]), 100), 100)[2]
    assert line.split()[0].startswith("model.")
    assert "of_a_projection" in line


@pytest.mark.parametrize("width", [70, 90, 200])
def test_other_tables_fit_too(analysis, width):
    model = htsr.describe(state_dict())
    comparison = htsr.compare(analysis, analysis)
    for result in (model, comparison):
        table = terminal_table(result.tables()[0], width)
        assert bool(table.caption) == (width < 200)
        table.caption = None
        shown = lines(table, width)
        assert len(shown) == 13 + 2
        assert all(len(line) <= width for line in shown)


def test_colours_tell_the_status(analysis):
    row = analysis[0]
    cases = {
        "red": replace(row, status="nan", alpha=None),
        "bright_black": replace(row, warning="random-like; light tail α>6"),
        "magenta": replace(row, alpha=1.5, warning=""),
        "green": replace(row, alpha=3.0, warning=""),
        "yellow": replace(row, alpha=9.0, warning=""),
    }
    assert {style: STYLES[tables.tone_of(case)] for style, case in cases.items()} == {style: style for style in cases}


@pytest.mark.parametrize("width", [60, 80, 100])
def test_the_summary_cuts_no_number(analysis, width):
    table = terminal_table(analysis.tables()[1], width)
    assert str(table.caption).startswith("left out for width: log ‖W‖²")
    shown = lines(table, width)
    assert all(len(line) <= width and "…" not in line for line in shown)
    assert f" {analysis.summary()['alpha']:.2f} " in shown[1 + len(analysis.summary_by("role")) + 1]


def test_the_summary_ends_with_the_whole_model(analysis):
    shown = lines(terminal_table(analysis.tables()[1], 200), 200)
    assert shown[-1].split()[:2] == ["all", "13"]
    assert f"{analysis.summary()['alpha']:.2f}" in shown[-1]


def test_names_are_shown_as_they_are(capsys):
    """Rich's markup, emoji codes, escape sequences and what Markdown reads as markup."""
    names = ["a.[/red]", "b.:smile:", "c.\x1b[31mx\n", "d.|`<b>*_e_", "f.\ud800", "g.[bold](h)"]
    analysis = htsr.analyze({f"{name}.weight": torch.randn(20, 20) for name in names}, device="cpu")
    out = {}
    for format in ("table", "csv", "markdown"):
        Target(format, None).write(analysis)
        out[format] = capsys.readouterr().out
    for shown in ("a.[/red]", "b.:smile:", "c.\\x1b[31mx\\n", "d.|`<b>*_e_", "f.\\ud800", "g.[bold](h)"):
        assert shown in out["table"]
    for shown in (r"d.\|\`\<b>\*\_e\_", r"g.[bold]\(h)"):
        assert shown in out["markdown"]
    assert {line.replace("\\|", "").count("|") for line in out["markdown"].splitlines()} == {13}
    assert "a.[/red]" in out["csv"]
    assert "c.\\x1b[31mx\\n" in out["csv"]


@pytest.mark.parametrize("name", ["=HYPERLINK(1)", "+a", "-a", "@a"])
def test_no_name_is_a_formula_in_a_csv(name):
    analysis = htsr.analyze({f"{name}.weight": torch.randn(20, 20)}, device="cpu")
    assert as_csv(analysis.records()).splitlines()[1].startswith(f"'{name},")


@pytest.mark.parametrize(("scale", "unit"), [(1 << 10, "KiB"), (1 << 20, "MiB"), (1 << 30, "GiB")])
def test_the_unit_of_memory_fits_its_size(scale, unit):
    plan = MemoryPlan(
        "tiny", "full", "step", total=2 * scale, weights=scale, gradients=scale, optimizer=0, projectors=0,
        activations=0, logits=0, workspace=0, parameters=1234, trainable=1234,
    )  # fmt: skip
    shown = [line.split() for line in lines(terminal_table(MemoryPlans("tiny", (plan,)).tables()[0], 100), 100)]
    assert shown[0] == [unit, "at", "the", "peak", "full"]
    assert ["weights", "1.00"] in shown
    assert ["total", "2.00"] in shown
    assert ["trained", "1,234"] in shown


def test_all_methods_fit_a_terminal_without_a_number_cut():
    sizes = dict.fromkeys(("weights", "gradients", "optimizer", "projectors", "activations"), 13 << 30)
    plans = tuple(
        MemoryPlan("7b", method, "backward", total=65 << 30, **sizes, logits=0, workspace=0, parameters=7 * 10**9,
                   trainable=7 * 10**9)
        for method in METHODS
    )  # fmt: skip
    shown = lines(terminal_table(MemoryPlans("7b", plans).tables()[0], 80), 80)
    assert all(len(line) <= 80 for line in shown)
    assert "left out for width: lisa, qlora; --method names those to show" in " ".join(shown)
    assert ["activations", *["13.00"] * (len(METHODS) - 2)] in [line.split() for line in shown]
    assert ["trained", *["7,000", "M"] * (len(METHODS) - 2)] in [line.split() for line in shown]
    assert ["peak", "in", *["backward"] * (len(METHODS) - 2)] in [line.split() for line in shown]


def test_the_caution_stands_where_a_tail_is_noted(capsys):
    state, words = state_dict(), Words(quiet=False, verbose=False)
    Target(None, None).write(htsr.analyze(state, device="cpu"), words)
    assert CAUTION in capsys.readouterr().err
    Target(None, None).write(htsr.analyze(state, device="cpu", where=htsr.Filter(roles=("mlp.*",), blocks={0})), words)
    assert CAUTION not in capsys.readouterr().err


def test_without_room_for_bars_the_numbers_stay():
    names = [f"model.layers.{i}" for i in range(3)]
    columns = (
        Column("block", text=True),
        Column("D 3", ".4f", "%"),
        Column("p", ".4f"),
        Column("", text=True, bar=True),
    )
    table = Table(columns, tuple((name, 0.01, 1 / 3, 1.0) for name in names), spare=("", "D 3"))
    rows = {width: [line.split() for line in lines(terminal_table(table, width), width)] for width in (40, 80)}
    assert rows[40][2] == ["model.layers.0", "0.0100", "0.3333"]
    assert rows[80][2] == [*rows[40][2], "█" * 24]


def test_facts_are_folded_where_a_terminal_is_narrow():
    folder = "/data/" + "a long name/" * 8 + "run"
    moved = tuple(Moved(f"model.layers.{i}.self_attn.q_proj", 0.01 * i or None, 3.25, 3.5) for i in range(4))
    told, most = Result(folder, {"peak_mib": 1009.0, "peak_of": "resident, whole process"}, moved=moved).tables()
    shown = lines(terminal_table(told, 60), 60)
    assert all(len(line) <= 60 and "…" not in line for line in shown)
    words = " ".join(" ".join(shown).split())
    assert folder in words
    assert "1009 MiB (resident, whole process)" in words
    rows = [line.split() for line in lines(terminal_table(most, 80), 80)]
    assert rows[2:4] == [[moved[0].name, "3.250", "3.500", "α"], [moved[1].name, "1.00", "3.250", "3.500", "‖ΔW‖/‖W‖"]]
