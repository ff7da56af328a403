import json

import pytest

from reports.analyze_speed.__main__ import HERE, PARTS
from reports.analyze_speed.page import write_up
from reports.analyze_speed.parts import Setting, beside

RUN = {"process": 2.0, "analysis": 1.0, "peak_mib": 100.0, "processor": 1.5}
PAIR = {"name": "default metrics", "htsr": RUN, "weightwatcher": RUN | {"process": 20.0}}
FOUND = {
    "causal": [PAIR | {"model": "causal"}],
    "encoder": [PAIR | {"model": "encoder"}],
    "erg": [PAIR | {"model": "encoder", "name": "`--full`"}],
    "null": [{"model": m, "none": RUN, "drawn": RUN, "file": RUN, "table": RUN} for m in ("causal", "encoder")],
    "precision": [{"model": "causal", "off": 1e-5, "float64": RUN, "float32": RUN | {"analysis": 0.5}}],
    "resampling": [{"name": "default metrics"} | RUN, {"name": "bootstrap 100"} | RUN | {"processor": 4.5}],
    "stages": {"causal": {"reading": 0.5, "total": 1.0}, "encoder": {"reading": 0.25, "total": 0.5}},
    "billion": {"htsr": RUN, "float32": RUN, "weightwatcher": RUN | {"process": 9.0}, "imports_mib": 40.0},
    "growth": [
        dict.fromkeys(("gram_float64", "float32", "lanczos", "fit", "lanczos_error", "lanczos_alpha_error"), 0.1)
        | {"n": n, "float64": 1.0}
        for n in (512, 1024)
    ],
}
MACHINE = json.loads((HERE / "results.json").read_text())["causal"]["machine"]


def page(names, folder):
    write_up({name: {"machine": MACHINE, "found": FOUND[name]} for name in names}, folder)
    return (folder / "README.md").read_text()


def test_the_page_shows_every_part(tmp_path):
    assert FOUND.keys() == PARTS.keys()
    text = page(PARTS, tmp_path)
    assert text.count("\n## ") == 7
    for row in (
        "| default metrics | causal | analysis | 1 | 1 | **1.0×** |",
        "|  |  | whole process | 20 | 2 | **10.0×** |",
        "| htsr, float32 | 2 | 100 | **4.5×** | 1.0× |",
        "| causal | 1 | 0.5 | 1.5 | 1.5 | **2.0×** | 1.0e-05 |",
        "| bootstrap 100 | 1 | 4.5 | 3 |",
        "| reading | 0.5 | 0.25 |",
    ):
        assert row in text
    assert (tmp_path / "growth.png").exists()


@pytest.mark.parametrize("name", [name for name in PARTS if name != "growth"])
def test_a_part_alone_makes_a_page(name, tmp_path):
    assert page([name], tmp_path).count("\n## ") == 1


def test_parts_of_several_machines_say_so(tmp_path):
    parts = {"causal": {"machine": MACHINE, "found": FOUND["causal"]}}
    parts["null"] = {"machine": MACHINE | {"cores": 99}, "found": FOUND["null"]}
    write_up(parts, tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "not all run at once" in text
    assert "- null: " in text
    assert "99 cores" in text


def test_arms_alternate_and_medians_are_kept(monkeypatch, tmp_path):
    order = []

    def run(folder, options, *_):
        order.append(sorted(options))
        return {"analysis": float(len(order)), "process": 1.0, "peak_mib": 1.0}

    monkeypatch.setattr("reports.analyze_speed.parts.ours", run)
    monkeypatch.setattr("reports.analyze_speed.parts.theirs", run)
    monkeypatch.setattr(Setting, "folder", lambda self, model: model)
    first, second = beside(Setting(tmp_path), "causal", {"a": {"x": 1}, "b": {"y": 1}}, {"z": 1})
    assert order == [["x"], ["y"], ["z"]] * 3
    assert (first["htsr"]["analysis"], second["htsr"]["analysis"], first["weightwatcher"]["analysis"]) == (4, 5, 6)
