"""Which run comes next: every arm's best learning rate on the same grid, then more seeds there. Runs are kept as lines."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reports.llr_small.training import Job, Size

GRID = tuple(2.5e-4 * 2**k for k in range(8))  # 2.5e-4 … 3.2e-2
START = 3  # 2e-3

Runs = list[dict[str, Any]]


def read(file: Path) -> Runs:
    """The runs that are done."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")]


def losses(runs: Runs, arm: str, size: Size, seed: int) -> dict[int, float]:
    """Final validation loss by index into GRID; infinity where a run diverged."""
    return {
        GRID.index(run["lr"]): math.inf if run["loss"] is None else run["loss"]
        for run in runs
        if run["arm"] == arm and run["name"] == size.name and run["seed"] == seed
    }


def best(tried: dict[int, float]) -> int | None:
    """Index of the smallest loss, once both of its neighbours on the grid have been tried."""
    if not tried:
        return None
    index = min(tried, key=lambda k: (tried[k], k))
    return index if all(k in tried for k in (index - 1, index + 1) if 0 <= k < len(GRID)) else None


def next_index(tried: dict[int, float]) -> int | None:
    """The grid point to try next: downhill from START, until the best has both neighbours; None when done."""
    if not tried:
        return START
    index = min(tried, key=lambda k: (tried[k], k))
    missing = [k for k in (index + 1, index - 1) if 0 <= k < len(GRID) and k not in tried]
    return missing[0] if missing else None


def todo(runs: Runs, arms: list[str], seeds: int, size: Size, tuned: Size | None = None) -> Iterator[Job]:
    """The next run of each arm that is not finished: the grid with seed 0, then the other seeds at its best.

    With `tuned` there is no grid: all seeds run at the best learning rate of that size.
    """
    for arm in arms:
        tried = losses(runs, arm, tuned or size, 0)
        index = next_index(tried)
        if index is not None and tuned is None:
            yield Job(arm, GRID[index], 0, size)
            continue
        index = best(tried)
        for seed in range(seeds):
            if index is not None and index not in losses(runs, arm, size, seed):
                yield Job(arm, GRID[index], seed, size)
                break
