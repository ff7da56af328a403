"""The pages of two models and of many: what is in them, and that a browser draws it."""

import json
import re
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest

from htsr.reporting import comparison_page, html, trajectory_page
from htsr.reporting.comparison_page import ComparisonPage, Cosines, comparison_document, write_comparison
from htsr.reporting.trajectories import pivot
from htsr.reporting.trajectory_page import TrajectoryPage, trajectory_document, write_trajectory_page
from htsr.results import Column, Table
from tests.reporting.test_html import BROWSER, data_of

HOSTILE = "</script><img src=x onerror=alert(1)>"
NODE = shutil.which("node") or ""
ROLES = ("attn.q", "mlp.up")
NAMES = [f"{block}.{role}" for block in range(3) for role in ROLES]
SPECTRUM = np.geomspace(0.01, 9.0, 40)


def pair(i, name):
    block, _, role = name.partition(".")
    record = {
        "name": name,
        "name_b": name,
        "role": role,
        "block": int(block),
        "relative": 0.1 * i,
        "alpha_delta": -0.2 * i,
    }
    record |= {"alpha_a": 3.0 + i, "alpha_b": 3.0 + 0.8 * i, "lambda_min_a": 1.0, "lambda_min_b": 2.0}
    record |= {"num_pl_tail_a": 12, "num_pl_tail_b": 12, "overlap_left": 1.0 - 0.1 * (i % 4), "overlap_left_null": 0.9}
    return record


@pytest.fixture
def comparison():
    records = [pair(i, name) for i, name in enumerate(NAMES)]
    records[1] |= {"name": HOSTILE, "overlap_left": None}
    fields = [name for name in records[0] if name not in ("name", "name_b", "role", "block")]
    cosines = Cosines(np.array([[0.9, 0.1], [0.2, 0.3]]), [3.0, 2.0], [3.5, 2.5], [0.95, 0.31])
    head = {"name": NAMES[0], "head": 0, "overlap_left": 0.5, "overlap_right": None}
    return ComparisonPage(
        title=f"base and {HOSTILE}",
        labels=("base", HOSTILE),
        facts={"fit": "ks", "none": ""},
        remarks=("mean α 3 → 2",),
        records=records,
        about={"alpha": "exponent of the tail.", "relative": "size of the change"},
        numeric=fields,
        table=Table(
            (Column("matrix", text=True), Column("α a", ".2f")), tuple((r["name"], r["alpha_a"]) for r in records)
        ),
        means=Table((Column("mean", text=True), Column("a", ".2f")), (("α", 3.0),)),
        eigenvalues_a=dict.fromkeys(NAMES, SPECTRUM),
        eigenvalues_b={NAMES[0]: 2 * SPECTRUM},
        cosines={NAMES[0]: cosines},
        heads={NAMES[0]: [head, head | {"head": 1}]},
    )


def test_both_sides_of_a_pair_keep_their_curves(comparison):
    data = comparison_page.content(comparison)
    curves, lines = data["spectra"]["curves"], data["lines"]
    assert curves[0]["values"][0] == pytest.approx(9.0)
    assert curves[len(NAMES)]["values"][0] == pytest.approx(18.0)
    assert curves[len(NAMES) + 1] is None
    assert lines[0]["x"][0] == 1.0
    assert lines[len(NAMES)]["x"][0] == 2.0
    assert data["cosines"][0]["nearest"] == [0.95, 0.31]
    assert data["cosines"][1] is None
    assert data["heads"][0] == {"fields": ["head", "overlap_left"], "values": [[0, 0.5], [1, 0.5]]}


def test_the_pairs_that_moved_most_come_first_and_those_that_did_not_not_at_all(comparison):
    moved = comparison_page.content(comparison)["moved"]
    assert moved["relative"] == [5, 4, 3, 2, 1]
    assert moved["alpha_delta"] == [5, 4, 3, 2, 1]
    assert moved["overlap_left"] == [3, 2, 5]  # the less the more


def test_one_scale_serves_both_models_and_differences_lie_about_zero(comparison):
    heat = comparison_page.content(comparison)["heat"]["values"]
    limits = [(heat[name]["low"], heat[name]["high"]) for name in ("num_pl_tail_a", "num_pl_tail_b")]
    assert limits[0] == limits[1]
    assert heat["alpha_a"]["centre"] == heat["alpha_b"]["centre"] == 4.0
    assert heat["alpha_delta"]["low"] == -heat["alpha_delta"]["high"]
    assert heat["alpha_delta"]["centre"] == 0.0


def test_what_is_known_of_a_metric_is_said_of_both_sides(comparison):
    about = comparison_page.content(comparison)["about"]
    assert about["alpha_b"] == "exponent of the tail; in the second model"
    assert about["relative"] == "size of the change"


def point(source, step, name, **numbers):
    block, _, role = name.partition(".")
    return {"source": source, "step": step, "name": name, "role": role, "block": int(block), "rows": 40.0, **numbers}


@pytest.fixture(params=["checkpoints", "models"])
def trajectory(request):
    """Of which matrix 0.attn.q is measured in the first and last source only, and 1.mlp.up never has a fit."""
    rng = np.random.default_rng(0)
    records = []
    for s in (2, 0, 1):  # in no order
        for name in NAMES:
            if s == 1 and name == NAMES[0]:
                continue
            alpha = None if name == "1.mlp.up" else float(rng.uniform(2, 6))
            step = 100 * s if request.param == "checkpoints" else None
            records.append(point(f"{HOSTILE}-{s}", step, name, alpha=alpha, sigma=0.1, entropy=float(rng.uniform())))
    sources = pivot(records).sources
    return TrajectoryPage(
        title=HOSTILE,
        facts={"fit": "ks"},
        remarks=(),
        records=records,
        about={},
        numeric=("rows", "alpha", "sigma", "entropy"),
        table=Table((Column("source", text=True), Column("α", ".2f")), tuple((source, 3.0) for source in sources)),
    )


def test_a_run_goes_by_its_steps_and_models_as_they_were_given(trajectory):
    data = data_of(html.render(trajectory_document(trajectory), "plotly"))
    order = [source[-1] for source in data["sources"]]
    if data["kind"] == "checkpoint":
        assert (order, data["steps"]) == (["0", "1", "2"], [0, 100, 200])
        assert "rows" not in data["values"]  # they never change
    else:
        assert (order, data["steps"]) == (["2", "0", "1"], None)
    shown = pivot(trajectory.records)
    for at, (source, matrix) in enumerate(zip(*data["places"], strict=True)):
        record = trajectory.records[at]
        assert shown.sources[source] == record["source"]
        assert data["matrices"][matrix]["name"] == record["name"]
        assert data["values"]["alpha"][at] == (record["alpha"] and pytest.approx(record["alpha"], rel=1e-5))


def test_of_too_many_points_the_page_says_what_it_leaves_out(trajectory, monkeypatch):
    monkeypatch.setattr(trajectory_page, "_MOST", 3 * len(trajectory.records))
    records = [record | {"odd": float(i)} for i, record in enumerate(trajectory.records)]
    document = trajectory_document(replace(trajectory, records=records, numeric=(*trajectory.numeric, "odd")))
    assert list(document.data["values"]) == ["alpha", "sigma", "entropy"]
    assert "this page has 3 of" in document.header


def test_only_steps_pass_a_number_on(trajectory):
    """Models have nothing from each other, and a number that is not there is none."""
    values = pivot(trajectory.records).latest("alpha")
    assert np.isnan(values[:, NAMES.index("1.mlp.up")]).all()
    if pivot(trajectory.records).steps is None:
        assert np.isnan(values[2, 0])
    else:
        assert values[1, 0] == values[0, 0]


@pytest.mark.skipif(not NODE, reason="no node to run the script in")
def test_the_script_computes_the_same_series(trajectory):
    points = pivot(trajectory.records)
    data = trajectory_page.content(trajectory, points, ["alpha"])
    program = (
        html._asset("series.js")
        + """
    const data = JSON.parse(require("fs").readFileSync(0));
    const shape = { sources: data.sources.length, matrices: data.matrices.length };
    const measured = seriesOf(data.places, data.values.alpha, shape);
    const series = measured.map((line) => data.steps ? latest(line) : line);
    const plain = (lines) => lines.map((line) => line.map((value) => value ?? null));
    console.log(JSON.stringify([plain(series), plain(series.map(changeOf)), meansOf(series)]));
    """
    )
    ran = subprocess.run([NODE, "-e", program], input=json.dumps(data), capture_output=True, text=True, check=True)
    series, changes, means = json.loads(ran.stdout)
    np.testing.assert_allclose(np.array(series, float).T, points.latest("alpha"), rtol=1e-5)
    np.testing.assert_allclose(np.array(changes, float).T, points.changes("alpha"), atol=1e-4)
    everything = np.nanmean(points.latest("alpha"), axis=1)
    np.testing.assert_allclose([step["mean"] for step in means], everything, rtol=1e-5)
    assert [step["count"] for step in means] == np.isfinite(points.latest("alpha")).sum(axis=1).tolist()


@pytest.mark.parametrize("kind", ["comparison", "trajectory"])
def test_names_are_text_and_only_the_two_scripts_may_run(kind, comparison, trajectory):
    document = comparison_document(comparison) if kind == "comparison" else trajectory_document(trajectory)
    text = html.render(document, "plotly")
    assert "<img src=x" not in text
    assert HOSTILE in json.dumps(data_of(text))
    assert len(re.findall(r"<script>\n?(.*?)</script>", text, re.DOTALL)) == 2
    outside = re.sub(r"<script.*?</script>|<style>.*?</style>", "", text, flags=re.DOTALL)
    assert not re.search(r"<[^>]*\b(src|href)\s*=", outside)


def drawn(path, profile):
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += [f"--user-data-dir={profile}", "--virtual-time-budget=8000", "--dump-dom", path.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


# Seconds, for a browser starts: nothing else runs the scripts.
@pytest.mark.skipif(not BROWSER, reason="no chromium to show the page in")
def test_a_browser_draws_the_page_of_two_models(comparison, tmp_path):
    write_comparison(comparison, tmp_path / "page.html")
    dom = drawn(tmp_path / "page.html", tmp_path)
    assert dom.count('class="main-svg"') >= 4  # two each of heat map and spectra
    assert re.search(r'<tr data-index="5"[^>]*aria-current="true"', dom)  # what moved most is open
    assert "<img src=" not in dom


@pytest.mark.skipif(not BROWSER, reason="no chromium to show the page in")
def test_a_browser_draws_the_page_of_a_trajectory(trajectory, tmp_path):
    write_trajectory_page(trajectory, tmp_path / "page.html")
    dom = drawn(tmp_path / "page.html", tmp_path)
    assert dom.count('class="main-svg"') >= 8  # lines, heat map, matrix, small multiples
    assert dom.count('class="path"') == len(NAMES)
    assert re.search(r'<tr [^>]*aria-current="true"', dom)
    assert "<img src=" not in dom
    assert not re.search(r'<g class="xtick"><text[^>]*display: none', dom)  # plotly hides what leaves the plot


@pytest.mark.skipif(not NODE, reason="no node to run the script in")
def test_long_names_below_an_axis_show_where_they_differ():
    names = [f"runs/of/a/long/path/model-{i}/checkpoint-1000" for i in range(3)]
    script = re.search(r"const ROOM.*?\n}\n", html._asset("lines.js"), re.DOTALL)[0]
    program = script + 'console.log(JSON.stringify(JSON.parse(require("fs").readFileSync(0)).map(shortened)))'
    groups = [names, ["a", "☃" * 30], ["one" * 10], [names[0] + str(i) for i in range(2)]]
    ran = subprocess.run([NODE, "-e", program], input=json.dumps(groups), capture_output=True, text=True, check=True)
    run, short, alone, ends = json.loads(ran.stdout)
    assert run == [f"…h/model-{i}/checkpoint-100…" for i in range(3)]
    assert short == ["a", f"{'☃' * 24}…"]
    assert alone == [("one" * 10)[:24] + "…"]
    assert [label[-2:] for label in ends] == ["00", "01"]
