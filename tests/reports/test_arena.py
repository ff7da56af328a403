"""The arena's search of each arm's rate, and what it calls a real difference."""

import numpy as np
import pytest

from reports.arena import search
from reports.arena.arms import ARMS
from reports.arena.sizes import SMALL, SMOLLM2
from reports.arena.summary import difference, is_real


def run(arm, lr, seed, losses, kind="loss"):
    return {"kind": kind, "arm": arm, "lr": lr, "seed": seed, "losses": losses}


def test_the_search_goes_downhill_until_the_best_has_both_neighbours_then_come_seeds_and_costs():
    def loss(lr):  # of a valley at the third rate above the start
        return [abs(search.GRID.index(lr) - search.start("full", SMALL) - 3), 0.0]

    runs = []
    while job := next(search.todo(runs, ["full"], SMALL, 3, costs=True), None):
        runs.append(run(job.arm, job.lr, job.seed, loss(job.lr), job.kind))
    first = search.start("full", SMALL)
    rates = [search.GRID.index(r["lr"]) - first for r in runs]
    assert rates == [0, 1, 2, 3, 4, 3, 3, 3]
    assert [(r["kind"], r["seed"]) for r in runs[5:]] == [("loss", 1), ("loss", 2), ("cost", 0)]
    assert search.validation(run("full", 1e-4, 0, [1.0, 9.0, 3.0, 9.0])) == 2.0
    assert search.compared(run("full", 1e-4, 0, [1.0, 9.0, 3.0, 8.0])) == [9.0, 8.0]


def test_a_difference_is_real_where_neither_seeds_nor_records_would_turn_it():
    draw = np.random.default_rng(0)
    records = draw.normal(4, 1, 40)  # what records share

    def arm(shift, of_seeds, of_records):
        noise = of_records * draw.normal(size=40)
        return {s: run("a", 1, s, np.repeat(records + noise + shift + of_seeds * s, 2).tolist()) for s in range(3)}

    other = arm(0, 0, 0)
    clear = difference(arm(-0.1, 0.01, 0.05), other)
    assert clear["mean"] == pytest.approx(-0.09, abs=0.03)
    assert is_real(clear)
    assert not is_real(difference(arm(-0.1, 0.2, 0.05), other))
    assert not is_real(difference(arm(-0.1, 0.01, 2.0), other))
    assert not is_real(difference({0: other[0]}, other))


@pytest.mark.parametrize("size", [SMALL, SMOLLM2])
def test_every_arm_is_a_recipe(size):
    pytest.importorskip("trl")
    from htsr.finetuning.recipe import Recipe
    from htsr.finetuning.recipe_values import made

    for arm in ARMS.values():
        recipe = {"model": "m", "output": "o", "data": {"train": "t"}} | arm.recipe(size)
        assert made(Recipe, recipe, "arm").method in arm.recipe(size)["method"]
