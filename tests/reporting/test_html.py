import json
import re
import shutil
import subprocess
from dataclasses import replace
from html import escape, unescape
from importlib.resources import files
from urllib.parse import quote, unquote

import numpy as np
import pytest
import torch

import htsr
from htsr.errors import HtsrError, MissingDependencyError
from htsr.reporting import html
from htsr.reporting.analysis_page import analysis_document
from htsr.spectra.notes import CAUTION
from tests.models import state_dict

HOSTILE = "</script><img src=x onerror=alert(1)>&amp;"
BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
WEIGHT = np.random.default_rng(0).standard_normal((20, 40))
NODE = shutil.which("node") or ""


@pytest.fixture(scope="module")
def analysis():
    state = state_dict()
    state["model.layers.0.mlp.gate_proj.weight"] = np.nan * state["model.layers.0.mlp.up_proj.weight"]
    state[f"model.{HOSTILE}.weight"] = state["model.layers.0.mlp.up_proj.weight"].clone()
    return htsr.analyze(state, device="cpu", bulk=True, permuted=True)


@pytest.fixture(scope="module")
def page(analysis, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    analysis.to_html(path)
    return path


def data_of(text):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])


def test_the_page_holds_every_number(analysis, page):
    data = data_of(page.read_text(encoding="utf-8"))
    assert len(data["table"]["rows"]) == len(analysis)
    for row, values in zip(analysis, data["table"]["rows"], strict=True):
        shown = dict(zip(data["table"]["fields"], values, strict=True))
        assert shown["name"] == row.name
        assert shown["alpha"] == (row.alpha and pytest.approx(row.alpha, rel=1e-5))
        assert shown["status"] == row.status
    heat = data["heat"]["values"]["alpha"]["values"]
    role, block = data["heat"]["roles"].index("mlp.up"), data["heat"]["blocks"].index("1")
    assert heat[role][block] == pytest.approx(analysis["model.layers.1.mlp.up_proj"].alpha, rel=1e-3)


def test_the_note_stands_where_it_is_seen(analysis, page):
    short = data_of(page.read_text(encoding="utf-8"))["table"]["short"]
    assert short["headers"][:3] == ["matrix", "note", "role"]
    assert short["cells"][0][1] == analysis[0].warning


def test_curves_belong_to_their_matrix(analysis, page):
    data = data_of(page.read_text(encoding="utf-8"))
    curves, ranks = data["spectra"]["curves"], data["spectra"]["ranks"]
    for i, row in enumerate(analysis):
        spectrum = curves[i]
        if row.status == "nan":
            assert spectrum is None
            continue
        assert spectrum["size"] == row.num_eigenvalues
        assert spectrum["values"][0] == pytest.approx(row.lambda_max, rel=1e-3)
        assert len(ranks[str(spectrum["positive"])]) == len(spectrum["values"])
        assert curves[len(analysis) + i]["values"][0] == pytest.approx(row.max_rand_eval, rel=1e-3)
        assert data["marks"][i]["lambda_min"] == pytest.approx(row.lambda_min, rel=1e-5)


def test_nothing_is_loaded_and_only_the_two_scripts_may_run(page):
    text = page.read_text(encoding="utf-8")
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)[1]
    assert policy.startswith("default-src 'none'")
    scripts = re.findall(r"<script>\n?(.*?)</script>", text, re.DOTALL)
    assert len(scripts) == 2
    outside = re.sub(r"<script.*?</script>|<style>.*?</style>", "", text, flags=re.DOTALL)
    assert not re.search(r"\bsrc\s*=", outside)
    assert set(re.findall(r"\bhref\s*=\s*(..)", outside)) <= {'"#'}  # links within the page alone


def test_names_are_text_and_never_markup(page):
    text = page.read_text(encoding="utf-8")
    assert "<img src=x" not in text
    assert any(HOSTILE in str(row[0]) for row in data_of(text)["table"]["rows"])


def test_what_stands_out_is_on_top_and_linked_to(analysis, page):
    [broken, *_] = analysis.standouts()
    assert broken.name == "model.layers.0.mlp.gate_proj"
    text = page.read_text(encoding="utf-8")
    position = [row.name for row in analysis].index(broken.name)
    assert f'<a href="#{broken.name}" data-index="{position}">{broken.name}</a>' in text
    assert text.index(broken.reason) < text.index('id="summary-title"') < text.index('id="data"')
    assert data_of(text)["standouts"][0] == position


def test_a_standout_says_by_how_much():
    alike = htsr.analyze({f"layers.{i}.up_proj.weight": (1 + 9 * (i == 3)) * WEIGHT for i in range(12)}, device="cpu")
    [found] = alike.standouts()
    assert alike._page().standouts == [[("layers.3.up_proj", f"{found.reason} ({found.score:.2g} σ)")]]
    assert found.score > 10


def test_links_to_matrices_are_text_and_never_markup(analysis):
    name = f"model.{HOSTILE}"
    many = [[(row.name, "other")] for row in analysis if row.name != name]
    standouts = [[(name, f'"{HOSTILE}'), (name, "like it")], *many]
    page = html.render(analysis_document(replace(analysis._page(), standouts=standouts)), "plotly")
    [address, like] = re.findall(r'<a href="#([^"]*)"[^>]*>model\.&lt;', page)
    assert unquote(address) == unquote(like) == name
    assert "<img src=x" not in page
    assert page.count("</details>") == 2  # the first few are seen; others, and those like the first, behind a click
    assert page.index("1 more like it</summary>") < page.index(">other<") < page.rindex("<details>")


def test_nothing_may_stand_out(analysis):
    page = html.render(analysis_document(replace(analysis._page(), standouts=[])), "plotly")
    assert "No matrix stands out" in page


@pytest.mark.skipif(not NODE, reason="no node to run the filters in")
def test_filters_let_through_what_they_say():
    cases = {  # what is let through of -1, 2, 3.94, 6, 7e3 and no number
        "": [-1, 2, 3.94, 6, 7000, None],
        ">2": [3.94, 6, 7000],
        ">= 2": [2, 3.94, 6, 7000],
        "≤2": [-1, 2],
        "< −.5": [-1],
        "2..6": [2, 3.94, 6],
        "..2": [-1, 2],
        "6 ..": [6, 7000],
        "3.9": [3.94],
        "=4": [3.94],
        "3.90": [],
        "7e3": [7000],
        ">": None,
        "..": None,
        "2..x": None,
        "α > 2": None,
        "1 2e": None,
    }
    program = """
      const found = Object.keys(cases).map((wanted) => numberFilter(wanted));
      const values = [-1, 2, 3.94, 6, 7e3, null];
      const words = ["Light", "tail", ""].map((wanted) => ["light tail", "no ERG", null].map(wordFilter(wanted)));
      console.log(JSON.stringify([found.map((test) => test && values.filter(test)), words]));
    """
    source = files("htsr.reporting").joinpath("filters.js").read_text(encoding="utf-8")
    command = [NODE, "--eval", f"{source}\nconst cases = {json.dumps(cases)};{program}"]
    found, words = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout)
    assert dict(zip(cases, found, strict=True)) == cases
    assert words == [[True, False, False], [True, False, False], [True, True, True]]


def test_the_page_says_what_notes_are_not(analysis, page):
    text = page.read_text(encoding="utf-8")
    assert escape(CAUTION) in text
    assert "trained models too" in text
    tails = sum("tail of " in row.warning for row in analysis)
    assert f'data-filter="tail of">tail of <b>{tails}</b>' in text


def test_a_label_turns_no_text_around(analysis):
    page = html.render(analysis_document(replace(analysis, label="a\u202eb\x1b[31m</title>")._page()), "plotly")
    assert "<h1>a\\u202eb\\x1b[31m&lt;/title&gt;</h1>" in page


VISIT = """
<iframe id="page" src="ADDRESS" width="1400" height="1000"></iframe><textarea id="dom"></textarea><pre id="seen"></pre>
<script>
const frame = document.getElementById("page").contentWindow;
const found = (selector) => frame.document.querySelector(selector);
const read = (id) => found(`#${id}`).textContent;
const press = (key) => found("#heat").dispatchEvent(new frame.KeyboardEvent("keydown", { key, bubbles: true }));
const pause = () => new Promise((resolve) => setTimeout(resolve, 300));
function put(selector, value, type) {
  found(selector).value = value;
  found(selector).dispatchEvent(new frame.Event(type));
}
async function visit() {
  const seen = { errors: [] };
  frame.addEventListener("error", ({ message }) => seen.errors.push(message));
  document.getElementById("dom").textContent = frame.document.documentElement.outerHTML;
  seen.addressed = read("matrix-name");
  found(".standouts a").click();
  seen.broken = read("plot");
  seen.standout = [read("matrix-name"), decodeURIComponent(frame.location.hash.slice(1))];
  frame.history.back();
  await pause();
  seen.back = read("matrix-name");
  seen.hints = frame.document.querySelectorAll("#plot .hint").length;
  frame.location.hash = "nothing";
  await pause();
  seen.missing = read("matrix-missing");
  found("#table tbody a").click();
  ["ArrowDown", "ArrowRight"].forEach(press);
  seen.cell = read("cell");
  press("Enter");
  seen.entered = read("matrix-name");
  put("#table input[aria-label='Filter by α']", "> 3", "input");
  seen.filtered = [...frame.document.querySelectorAll("#table tbody th")].map((cell) => cell.textContent);
  found("#clear").click();
  seen.cleared = read("count");
  put("#beside", [...found("#beside").options].at(-1).value, "change");
  await pause();
  seen.legend = [...frame.document.querySelectorAll("#plot .legendtext")].map((entry) => entry.textContent);
  document.getElementById("seen").textContent = JSON.stringify(seen);
}
document.getElementById("page").addEventListener("load", visit);
</script>
"""


# Seconds, for a browser starts: nothing else runs the scripts.
@pytest.mark.skipif(not BROWSER, reason="no chromium to show the page in")
def test_a_visit_to_the_page(analysis, page, tmp_path):
    hostile = f"model.{HOSTILE}"
    visitor = page.with_name("visitor.html")
    visitor.write_text(VISIT.replace("ADDRESS", f"{page.name}#{quote(hostile, safe='')}"), encoding="utf-8")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += ["--allow-file-access-from-files", f"--user-data-dir={tmp_path}", "--virtual-time-budget=8000"]
    ran = subprocess.run(
        [*command, "--dump-dom", visitor.as_uri()], capture_output=True, text=True, check=True, timeout=120
    )
    seen = json.loads(unescape(re.search('<pre id="seen">(.*?)</pre>', ran.stdout)[1]))
    dom = unescape(re.search('<textarea id="dom">(.*?)</textarea>', ran.stdout, re.DOTALL)[1])

    assert seen["errors"] == []
    assert seen["addressed"] == seen["back"] == hostile
    assert seen["standout"] == [analysis.standouts()[0].name] * 2
    assert seen["broken"] == "This matrix has no eigenvalues to show."
    assert seen["hints"] == 0  # its sentence has made room for the next plot
    assert seen["missing"] == "There is no matrix nothing here."
    assert (analysis[0].role, analysis[0].block) == ("embed", None)
    below = analysis[1]
    assert below.block == 0
    assert seen["cell"] == f"{below.role}, block 0. {below.name}: {below.alpha:.4g}"
    assert seen["entered"] == below.name
    assert seen["filtered"] == [row.name for row in analysis if row.alpha and round(row.alpha, 2) > 3]
    assert seen["cleared"] == str(len(analysis))
    assert seen["legend"][0] == below.name
    assert len([entry for entry in seen["legend"] if entry.startswith("power law")]) == 2

    body = re.search(r'<table id="table".*?<tbody>(.*?)</tbody>', dom, re.DOTALL)[1]
    assert body.count("data-index=") == body.count("<a href=") == len(analysis)
    assert dom.count('class="main-svg"') >= 2
    assert "<img src=" not in dom


def test_without_plotly_the_extra_is_named(analysis, tmp_path, monkeypatch):
    monkeypatch.setattr(html, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"htsr\[report\]"):
        analysis.to_html(tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_named(analysis, tmp_path):
    with pytest.raises(HtsrError, match="nowhere"):
        analysis.to_html(tmp_path / "nowhere" / "report.html")


def test_an_analysis_without_a_single_fit_has_a_page(tmp_path):
    analysis = htsr.analyze({"a.weight": torch.zeros(12, 12)}, device="cpu")
    analysis.to_html(tmp_path / "report.html")
    data = data_of((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert data["spectra"]["curves"] == [None, None]
    assert data["lines"] == [None]
