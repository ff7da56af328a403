import numpy as np
import pytest

from reports.repair.writing import Beside, Point, beside, compared, first_line, wins


def line(*points):
    return {t: Point(f, np.full(4, loss)) for t, f, loss in points}


def test_a_repair_stands_beside_the_point_of_the_line_that_forgets_as_much():
    along = line((0.0, 0.0, 2.0), (0.5, 1.0, 1.0), (1.0, 3.0, 0.8))
    found = beside(Point(2.0, np.array([0.7, 0.9, 0.7, 0.9])), along)
    assert found.factor == pytest.approx(0.75)
    assert (found.line, found.loss) == pytest.approx((0.9, 0.8))
    assert found.undone == pytest.approx(1 / 3)
    assert found.advantage == pytest.approx(0.1)
    assert found.error == pytest.approx(np.std([0.2, 0, 0.2, 0], ddof=1) / 2)
    for t, there in along.items():  # the line is no better than itself
        itself = beside(there, along)
        assert (itself.factor, itself.advantage) == pytest.approx((t, 0))


def test_what_wins_is_beyond_the_spread_and_the_error():
    def gains(*values, error=0.01):
        return [Beside(0.5, 1.0, 0.5, 1.0 + value, error) for value in values]

    assert wins(gains(0.1, 0.12, 0.08))
    assert not wins(gains(0.1, -0.12, 0.08))
    assert not wins(gains(-0.1, -0.12, -0.08))
    assert wins(gains(0.1))
    assert not wins(gains(0.1, error=0.06))


def test_the_first_line_says_what_won():
    def run(arm, setting, text, question):
        return {"arm": arm, "seed": 0, "setting": setting, "reference": [text] * 2, "own": [text] * 2,
                "questions": [question, question + 0.2]}  # fmt: skip

    runs = [
        run("base", "base", 3.0, 2.0), run("full", "ΔW", 4.0, 1.0), run("full", "0.5·ΔW", 3.4, 1.3),
        run("full", "ecs", 3.4, 1.4), {"arm": "full", "seed": 0, "setting": "intruders × 0"},
    ]  # fmt: skip
    assert first_line(compared(runs)).startswith("**Nothing beat")
    runs.append(run("full", "denoise", 3.4, 1.1))
    assert "denoise (full)" in first_line(compared(runs))
