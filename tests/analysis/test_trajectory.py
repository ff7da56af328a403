import json

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
    with TrajectoryFile(path, HEADER) as file:
        file.append_problem("checkpoint-3", "it is cut short", 3)
    read = Trajectory.load(path)
    assert read.points == (points[0], points[2])  # of checkpoint-1 what was measured since its files changed
    assert (read.label, read.options, read.reference, read.problems) == (
        *("run", HEADER.options, "checkpoint-1"),
        {"checkpoint-3": "it is cut short"},
    )
    assert (read.sources, read.steps) == (("checkpoint-1", "checkpoint-2"), (1, 2))
    read.save(tmp_path / "again.jsonl")
    assert Trajectory.load(tmp_path / "again.jsonl") == read
    assert [record["source"] for record in read.records()] == ["checkpoint-1", "checkpoint-2"]
    assert read.records()[1]["relative"] == 0.5 == read.summary()["checkpoint-2"]["relative"]


def test_the_later_line_counts_and_a_source_that_is_read_at_last_has_no_problem(tmp_path):
    with TrajectoryFile(tmp_path / "run.jsonl", HEADER) as file:
        file.append_problem("checkpoint-1", "it is cut short", 1)
        file.append([point(1), point(1, "other"), point(1, alpha=2.5)])
    read = Trajectory.load(tmp_path / "run.jsonl")
    assert [p.row.alpha for p in read] == [2.5, 3.0]
    assert not read.problems


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
        ('{"source": 1, "problem": "p"}', "nor a problem"),
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
