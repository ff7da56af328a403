import json
import re
from dataclasses import replace
from itertools import pairwise

import matplotlib
import pytest

from htsr import Options, SourceError, UsageError
from htsr.analysis.trajectory import Trajectory
from htsr.analysis.trajectory_file import Header, Point, TrajectoryFile, read_trajectory
from htsr.spectra.metrics import LayerMetrics
from tests.reporting.test_html import data_of

matplotlib.use("Agg")

HEADER = Header("run", Options(fit="hill"), reference="checkpoint-1")


def point(step, name="layers.0.up_proj", alpha=3.0, fingerprint=None, relative=None):
    row = LayerMetrics(name=name, role="mlp.up", block=0, alpha=alpha, sigma=0.1)
    return Point(f"checkpoint-{step}", row, step, relative, fingerprint)


def test_what_is_appended_is_read_and_what_is_saved_is_loaded_again(tmp_path):
    path = tmp_path / "run.jsonl"
    points = [point(2, relative=0.5), point(1, "☃\u2028 \ud800"), point(1, fingerprint="a")]
    for one in points:  # each by a writer of its own
        with TrajectoryFile(path, HEADER) as file:
            file.append([one])
    read = Trajectory.load(path)
    assert read.points == (points[0], points[2])  # of checkpoint-1 what was measured since its files changed
    assert (read.label, read.options, read.reference) == ("run", HEADER.options, "checkpoint-1")
    assert (read.sources, read.steps) == (("checkpoint-1", "checkpoint-2"), (1, 2))
    read.save(tmp_path / "again.jsonl")
    assert Trajectory.load(tmp_path / "again.jsonl") == read
    assert [record["source"] for record in read.records()] == ["checkpoint-1", "checkpoint-2"]
    assert read.records()[1]["relative"] == 0.5 == read.summary()["checkpoint-2"]["relative"]


def test_the_later_line_counts(tmp_path):
    with TrajectoryFile(tmp_path / "run.jsonl", HEADER) as file:
        file.append([point(1), point(1, "other"), point(1, alpha=2.5)])
    read = Trajectory.load(tmp_path / "run.jsonl")
    assert [p.row.alpha for p in read] == [2.5, 3.0]


@pytest.mark.parametrize(
    "half", ['{"source": "checkpoint-2", "st', '{"source": "checkpoint-2", "step": 2, "name": "w"}']
)
def test_a_line_whose_writer_was_killed_is_not_read_and_goes_when_the_next_writer_comes(tmp_path, half):
    path = tmp_path / "run.jsonl"
    with TrajectoryFile(path, HEADER) as file:
        file.append([point(1)])
    with path.open("a") as raw:
        raw.write(half)
    assert Trajectory.load(path).sources == ("checkpoint-1",)
    with TrajectoryFile(path, HEADER) as file:
        file.append([point(3)])
    assert Trajectory.load(path).sources == ("checkpoint-1", "checkpoint-3")


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('{"source": "s", "step": 1, "name": "w", "alpha": "3"}', "alpha: '3' is no number"),
        ('{"source": "s", "step": 1, "name": "w", "alpha": 0.5}', "alpha is 0.5, not 1 or more"),
        ('{"source": "s", "step": 1, "name": "w", "alpha": NaN}', "no finite number"),
        ('{"source": "s", "step": 1, "name": "w", "relative": -1}', "relative is -1.0"),
        ('{"source": "s", "step": 1.5, "name": "w"}', "step: 1.5"),
        ('{"step": 1, "name": "w"}', "source: None"),
        ('{"source": "s", "step": 1}', "without 'name'"),
        ('{"source": "s", "step": 1, "name": "w", "beta": 3}', "has no 'beta'"),
        ("[]", "line 2"),
        ("{", "line 2"),
    ],
)
def test_a_damaged_line_is_named(tmp_path, line, why):
    path = tmp_path / "run.jsonl"
    TrajectoryFile(path, HEADER).close()
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(SourceError, match="line 2") as error:
        read_trajectory(path)
    assert why in str(error.value)


@pytest.mark.parametrize("content", ["notes\n", "{}\n", "[1]\n", '{"htsr": "0", "trajectory": 9}\n', "half a line"])
def test_another_file_is_neither_read_nor_written_to(tmp_path, content):
    path = tmp_path / "notes.jsonl"
    path.write_text(content)
    for use in (Trajectory.load, lambda path: TrajectoryFile(path, HEADER)):
        with pytest.raises(SourceError, match="trajectory"):
            use(path)
    assert path.read_text() == content


def test_numbers_of_two_ways_to_measure_are_not_mixed(tmp_path):
    path = tmp_path / "run.jsonl"
    TrajectoryFile(path, HEADER).close()
    TrajectoryFile(path, Header("elsewhere", Options(fit="hill", device="cuda"), reference="checkpoint-1")).close()
    with pytest.raises(UsageError, match="fit hill, not ks"):
        TrajectoryFile(path, Header("run", Options(), reference="checkpoint-1"))
    with pytest.raises(UsageError, match="against None, not base"):
        TrajectoryFile(path, Header("run", HEADER.options, against="base", reference="checkpoint-1"))
    with pytest.raises(UsageError, match=r"saved as \.jsonl"):
        TrajectoryFile(tmp_path / "run.json", HEADER)


def test_a_file_of_another_version_is_read_with_a_warning(tmp_path, caplog):
    path = tmp_path / "run.jsonl"
    TrajectoryFile(path, HEADER).close()
    header = json.loads(path.read_text())
    path.write_text(json.dumps(header | {"htsr": "0.0.1"}) + "\n")
    assert Trajectory.load(path).points == ()
    assert "htsr 0.0.1" in caplog.text


def test_models_have_no_steps_and_keep_their_order():
    rows = [LayerMetrics(name="w", alpha=alpha) for alpha in (3.0, 2.0)]
    trajectory = Trajectory("models", (Point("b", rows[0]), Point("a", rows[1], 5)), Options())
    assert (trajectory.sources, trajectory.steps) == (("b", "a"), ())
    with pytest.raises(UsageError, match="has no 'c'; there are b, a"):
        trajectory.at("c")


def test_a_trajectory_is_drawn_and_written_as_a_page(tmp_path):
    trajectory = Trajectory(
        "run", (point(2, relative=0.5), point(1, alpha=4.0)), HEADER.options, problems={"x": "is cut"}
    )
    (line,) = trajectory.plot().lines
    assert [list(pair) for pair in line.get_xydata()] == [[1.0, 4.0], [2.0, 3.0]]
    with pytest.raises(UsageError, match="no number 'colour'"):
        trajectory.plot("colour")
    trajectory.to_html(tmp_path / "run.html")
    data = data_of((tmp_path / "run.html").read_text(encoding="utf-8"))
    assert data["sources"] == ["checkpoint-1", "checkpoint-2"]
    assert data["values"]["relative"] == [None, 0.5]
    assert "x: is cut" in (tmp_path / "run.html").read_text(encoding="utf-8")


def test_means_of_a_step_are_of_what_was_measured_last_by_then():
    points = [point(1, "a", 2.0), point(1, "b", 4.0), point(2, "b", 5.0, relative=0.5), point(3, "c", 9.0)]
    found = Trajectory("run", tuple(points), Options()).summary()
    assert [(means["matrices"], means["alpha"]) for means in found.values()] == [(2, 3.0), (2, 3.5), (3, 16 / 3)]
    assert [means.get("relative") for means in found.values()] == [None, 0.5, 0.5]
    models = Trajectory("models", tuple(replace(p, step=None) for p in points), Options())
    assert [(means["matrices"], means["alpha"]) for means in models.summary().values()] == [
        (2, 3.0),
        (1, 5.0),
        (1, 9.0),
    ]


def test_what_has_moved_most_goes_by_the_error_of_alpha():
    start = [point(1, "a", 2.0), point(1, "b", 4.0), point(1, "alone")]
    end = [point(9, "a", 2.4), point(5, "b", 3.0), point(9, "b", 4.1, relative=0.5)]
    trajectory = Trajectory("run", (*end, *start), Options())
    first, second = trajectory.moved()
    assert (first.name, first.first, first.last, first.change) == ("a", 2.0, 2.4, pytest.approx(0.4))
    assert first.beyond == pytest.approx(0.4 / (0.1 * 2**0.5))
    assert (second.name, second.last, second.relative) == ("b", 4.1, 0.5)
    (means, far) = trajectory.tables()
    assert [cells[0] for cells in means.cells()] == ["checkpoint-1", "checkpoint-5", "checkpoint-9"]
    assert [cells[0] for cells in far.cells()] == ["a"]  # b: less than its error
    assert "the α of 1 of 2 matrices" in trajectory.remarks()[2]
    with pytest.raises(UsageError, match="no number 'name'"):
        trajectory.moved("name")


def test_two_standard_errors_are_a_move_and_the_fit_is_named(tmp_path):
    points = [
        Point(f"checkpoint-{step}", LayerMetrics(name=name, alpha=alpha, sigma=sigma), step, relative)
        for step, alpha, relative in ((1, 3.0, None), (2, 2.0, 0.25))
        for name, sigma in (("two", 0.5 / 2**0.5), ("less", 0.36))
    ]
    trajectory = Trajectory("run", tuple(points), HEADER.options, reference="checkpoint-1")
    assert [cells[0] for cells in trajectory.tables()[1].cells()] == ["two"]
    said = trajectory.remarks()
    assert said == (
        "run: 2 matrices, 2 checkpoints",
        "mean α (hill) 3.000 → 2.000 over 2 matrices, from the first number to the last",
        "the α of 1 of 2 matrices has moved by two standard errors or more",
        "‖ΔW‖/‖W‖ is against checkpoint-1",
    )
    trajectory.to_html(tmp_path / "run.html")
    page = (tmp_path / "run.html").read_text(encoding="utf-8")
    assert all(sentence in page for sentence in said[1:])


def test_what_a_monitor_never_measured_is_said_by_its_file(tmp_path):
    with TrajectoryFile(tmp_path / "run.jsonl", replace(HEADER, reference="step-0", wanted=17)) as file:
        file.append([point(30, relative=0.5)])
    trajectory = Trajectory.load(tmp_path / "run.jsonl")
    trajectory.save(tmp_path / "again.jsonl")
    assert repr(trajectory) == "<Trajectory of 'run': 1 matrix, 1 step>"
    assert Trajectory.load(tmp_path / "again.jsonl").remarks() == (
        "run: 1 matrix, 1 checkpoint",
        "16 of 17 matrices were never measured, and means are without them: a monitor measures more with a larger "
        "share=",
        "mean α (hill) 3.000 over 1 matrix",
        "‖ΔW‖/‖W‖ is against step-0",
    )


def test_of_models_the_smallest_alpha_comes_first(tmp_path):
    points = [replace(point(1, alpha=alpha), source=name, step=None) for name, alpha in (("x", 5.0), ("y", 3.0))]
    models = Trajectory("models", (*points, replace(points[0], source="z", row=LayerMetrics(name="w"))), Options())
    (table,) = models.tables()
    assert [cells[0] for cells in table.cells()] == ["y", "x", "z"]
    assert "of one architecture" in models.remarks()[1]
    with pytest.raises(UsageError, match=r"htsr\.compare"):
        models.moved()
    models.to_html(tmp_path / "models.html")  # whose scripts know a line by its place among the sources
    page = (tmp_path / "models.html").read_text(encoding="utf-8")
    assert re.findall(r"<th scope=\"row\">(\w)</th>", page) == data_of(page)["sources"] == ["x", "y", "z"]


def test_of_very_many_steps_the_table_has_some():
    points = [point(step) for step in range(100)]
    trajectory = Trajectory("run", tuple(points), Options())
    lines = [int(cells[1]) for cells in trajectory.tables()[0].cells()]
    assert (len(lines), lines[0], lines[-1]) == (40, 0, 99)
    assert {b - a for a, b in pairwise(lines)} == {2, 3}
    assert "shows 40 of the 100 checkpoints" in trajectory.remarks()[-1]
