"""Which run comes next: each arm's best learning rate on one grid, then more seeds there."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reports.arena.arms import ARMS
from reports.arena.running import Job
from reports.arena.sizes import Size

GRID = tuple(2.5e-5 * 2**k for k in range(14))  # 2.5e-5 … 0.2

Runs = list[dict[str, Any]]


def read(file: Path) -> Runs:
    """The runs that are done."""
    return [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")] if file.exists() else []


def validation(run: dict[str, Any]) -> float:
    """Loss on the records that the rate is chosen by, the even ones; infinite where training diverged."""
    value = sum(run["losses"][::2]) / len(run["losses"][::2])
    return value if math.isfinite(value) else math.inf


def compared(run: dict[str, Any]) -> list[float]:
    """Losses of the records that no choice depended on, the odd ones."""
    return list(run["losses"][1::2])


def tried(runs: Runs, arm: str) -> dict[int, float]:
    """Validation loss of seed 0 by index into GRID."""
    mine = (run for run in runs if run["arm"] == arm and run["seed"] == 0 and run["kind"] == "loss")
    return {GRID.index(run["lr"]): validation(run) for run in mine}


def best(runs: Runs, arm: str) -> int | None:
    """Index of the best rate so far."""
    found = tried(runs, arm)
    return min(found, key=lambda k: (found[k], k)) if found else None


def start(arm: str, size: Size) -> int:
    """Index of the rate at which the search of an arm begins."""
    return min(range(len(GRID)), key=lambda k: abs(math.log(GRID[k] / ARMS[arm].start / size.rate)))


def missing(runs: Runs, arm: str, size: Size) -> int | None:
    """Index of the rate to try next: downhill until the best has both its neighbours; None when it has."""
    index = best(runs, arm)
    if index is None:
        return start(arm, size)
    found = tried(runs, arm)
    return next((k for k in (index + 1, index - 1) if 0 <= k < len(GRID) and k not in found), None)


def todo(runs: Runs, arms: list[str], size: Size, seeds: int, costs: bool) -> Iterator[Job]:
    """The runs that are wanted next: the search of every arm, then seed by seed all arms at their best, then costs."""
    searching = [(arm, index) for arm in arms if (index := missing(runs, arm, size)) is not None]
    yield from (Job("loss", arm, GRID[index]) for arm, index in searching)
    rates = {arm: GRID[index] for arm in arms if (index := best(runs, arm)) is not None}
    done = {(run["kind"], run["arm"], run["lr"], run["seed"]) for run in runs}
    for seed in range(1, seeds):
        yield from (Job("loss", arm, lr, seed) for arm, lr in rates.items() if ("loss", arm, lr, seed) not in done)
    if costs:
        weighed = {run["arm"] for run in runs if run["kind"] == "cost"}
        yield from (Job("cost", arm, lr) for arm, lr in rates.items() if arm not in weighed)
