"""From runs to numbers: loss, forgetting and cost of every arm at its best rate, and what differs from what."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from reports.arena import search
from reports.arena.arms import ARMS
from reports.arena.running import Job, recipe_of
from reports.arena.sizes import Size, Task

REFERENCES = ("lora-32", "full")
LEVEL = 0.05


def summarise(runs: search.Runs, size: Size, memory: dict[str, list[float]]) -> dict[str, Any]:
    """Every arm that has a run, with its differences to the references.

    Args:
        runs: runs of the size, of the base model among them.
        size: size of the study.
        memory: what `predicted` returns.
    """
    base = next(run for run in runs if run["kind"] == "base")
    arms = [arm for arm in ARMS if search.best(runs, arm) is not None]
    at_best = {arm: _at_best(runs, arm) for arm in arms}
    found = {arm: _arm(runs, arm, size, at_best[arm], base) | memory_of(memory[arm]) for arm in arms}
    for arm in arms:
        others = [other for other in REFERENCES if other in arms and other != arm]
        found[arm]["against"] = {other: difference(at_best[arm], at_best[other]) for other in others}
    return {
        "base": {"loss": float(np.mean(search.compared(base))), "ordinary": base["ordinary"]},
        "runs": len([run for run in runs if run["kind"] == "loss"]),
        "device": next((run["device"] for run in runs if run["kind"] == "loss"), "cpu"),
        "arms": found,
    }


def memory_of(found: list[float]) -> dict[str, float]:
    """The two predictions of an arm by name."""
    return {"predicted_mib": found[0], "without_checkpointing_mib": found[1]}


def _at_best(runs: search.Runs, arm: str) -> dict[int, dict[str, Any]]:
    lr = search.GRID[search.best(runs, arm) or 0]
    return {run["seed"]: run for run in runs if (run["kind"], run["arm"], run["lr"]) == ("loss", arm, lr)}


def _arm(
    runs: search.Runs, arm: str, size: Size, mine: dict[int, dict[str, Any]], base: dict[str, Any]
) -> dict[str, Any]:
    tried = search.tried(runs, arm)
    cost = next((run for run in runs if run["kind"] == "cost" and run["arm"] == arm), None)
    losses = [float(np.mean(search.compared(run))) for run in mine.values()]
    forgotten = [run["ordinary"] - base["ordinary"] for run in mine.values()]
    return {
        "title": ARMS[arm].title,
        "ours": ARMS[arm].ours,
        "lr": next(iter(mine.values()))["lr"],
        "bracketed": search.missing(runs, arm, size) is None,
        "grid": {f"{search.GRID[k]:g}": loss if math.isfinite(loss) else None for k, loss in sorted(tried.items())},
        "losses": losses,
        "forgotten": forgotten,
        "trainable": next(iter(mine.values()))["trainable_parameters"],
        "measured_mib": cost["peak_mib"] if cost else None,
        "seconds_per_step": cost["seconds_per_step"] if cost else None,
    }


def difference(mine: dict[int, dict[str, Any]], other: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Mean difference of the losses, paired by seed and record, with its p-values over seeds and over records.

    Each is that of Student's t, two-sided: of the seeds' means, and of the records' means over the seeds. Both have to
    be small for a difference that neither another seed nor other records would turn.
    """
    seeds = sorted(set(mine) & set(other))
    d = np.array([np.subtract(search.compared(mine[s]), search.compared(other[s])) for s in seeds])
    if not len(d):
        return {"mean": None, "seeds": 0, "p_seeds": None, "p_records": None}
    return {
        "mean": float(d.mean()),
        "seeds": len(seeds),
        "p_seeds": _p(d.mean(axis=1)),
        "p_records": _p(d.mean(axis=0)),
    }


def _p(values: Any) -> float | None:
    return float(stats.ttest_1samp(values, 0.0).pvalue) if len(values) > 1 else None


def is_real(found: dict[str, Any]) -> bool:
    """Whether a difference is beyond the spread of seeds and of records."""
    return all(found[key] is not None and found[key] < LEVEL for key in ("p_seeds", "p_records"))


def predicted(size: Size, task: Task, arms: list[str], work: Path) -> dict[str, list[float]]:
    """Peak memory of each arm in MiB, as `htsr memory` predicts it at full sequences; kept in `work`.

    Two numbers each: with checkpointed activations, which is TRL's default and changes no loss, and without.
    """
    import yaml

    from htsr.finetune import read_recipe
    from htsr.finetuning.arguments import training_arguments
    from htsr.finetuning.memory import predicted_memory

    kept = work / f"{size.name}-plans.json"
    known: dict[str, list[float]] = json.loads(kept.read_text()) if kept.exists() else {}
    found = {}
    for arm in arms:
        key = json.dumps(ARMS[arm].recipe(size), sort_keys=True)
        if key not in known:
            plans = []
            for checkpointing in (True, False):
                recipe = recipe_of(Job("loss", arm, 1e-4), size, task, work, "cpu")
                recipe["training"]["gradient_checkpointing"] = checkpointing
                file = work / "predicted.yaml"
                file.write_text(yaml.safe_dump(recipe))
                read = read_recipe(str(file))
                plan = predicted_memory(read, training_arguments(read))
                assert plan is not None
                plans.append(round(plan.total / 2**20, 1))
            known[key] = plans
            kept.write_text(json.dumps(known))
        found[arm] = known[key]
    return found
