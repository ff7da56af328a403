"""Fine-tune SmolLM2-135M-Instruct by every method, each at its own best learning rate.

    python -m reports.owlore_small --data FOLDER --work FOLDER     hours on two cores; taken up where it was stopped
    python -m reports.owlore_small --data FOLDER --quick           two methods, two steps, about two minutes

FOLDER of the data holds arc_easy_train.jsonl, arc_easy_test.jsonl and openbookqa_train.jsonl: question, choices, answer.
Every run is a recipe of `htsr finetune` in a process of its own. The learning rate of each arm is searched on the same
grid by the evaluation loss of seed 0, downhill until the best has both neighbours; accuracy is measured at the best
only, on questions that no choice depended on.
"""

from __future__ import annotations

import json
import math
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from reports import common
from reports.owlore_small.write_up import write_up

HERE = Path(__file__).parent
GRID = tuple(2.5e-5 * 2**k for k in range(8))  # 2.5e-5 … 3.2e-3
START = 3
_BLOCKS = {"active": 4, "interval": 10}
_PROJECTION = {"rank": 64, "scale": 1.0, "refresh_every": 20}
ARMS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "lora": {"method": "lora", "lora": {"rank": 8}},
    "galore": {"method": "galore", "low_rank": _PROJECTION},
    "lisa": {"method": "lisa", "sampling": _BLOCKS},
    "owlore": {"method": "owlore", "sampling": _BLOCKS, "low_rank": _PROJECTION},
    "alpha": {
        "method": "owlore",
        "sampling": _BLOCKS | {"strategy": "alpha"},
        "low_rank": _PROJECTION,
        "spectra": True,
    },
    "owlore, ends trained": {
        "method": "owlore",
        "sampling": _BLOCKS | {"embedding": "train"},
        "low_rank": _PROJECTION,
    },
}


@dataclass(frozen=True)
class Size:
    """What all runs share: optimizer steps, sequences a step, questions of the test."""

    steps: int
    batch: int
    questions: int


@dataclass(frozen=True)
class Job:
    """One run; `ask` measures accuracy, too."""

    arm: str
    lr: float
    seed: int
    ask: bool


def main() -> None:
    """Run what is not done yet, then write the page."""
    args = common.arguments(
        str(__doc__),
        ("--data", {"type": Path, "required": True, "help": "folder of the questions"}),
        ("--work", {"type": Path, "help": "where runs are kept"}),
        ("--seeds", {"type": int, "default": 3}),
        ("--steps", {"type": int, "default": 100}),
        ("--questions", {"type": int, "default": 500}),
        ("--arms", {"help": "only these, with commas"}),
    )
    arms = args.arms.split(",") if args.arms else list(ARMS)
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        if args.quick:
            size = Size(2, 4, 8)
            prepare(args.data, work, size)
            for arm in ("lora", "owlore"):
                print(json.dumps(run(Job(arm, 2e-4, 0, True), size, work)), flush=True)
            return
        size = Size(args.steps, 8, args.questions)
        prepare(args.data, work, size)
        runs = read(work / "runs.jsonl")
        while job := next(todo(runs, arms, args.seeds), None):
            runs.append(run(job, size, work))
            print(json.dumps(runs[-1]), flush=True)
            with (work / "runs.jsonl").open("a") as file:
                file.write(json.dumps(runs[-1]) + "\n")
        common.keep(HERE, {"size": vars(size), "grid": GRID, "arms": ARMS, "runs": runs})
    write_up(json.loads((HERE / "results.json").read_text()), HERE)


def prepare(data: Path, work: Path, size: Size) -> None:
    """The model, training questions of both sets with some held out, and test questions of ARC-Easy, into `work`."""
    common.smollm2(work)
    draw = random.Random(0)
    train = [
        line
        for name in ("arc_easy_train", "openbookqa_train")
        for line in (data / f"{name}.jsonl").open()
        if line.strip()
    ]
    draw.shuffle(train)
    (work / "evaluation.jsonl").write_text("".join(train[:200]))
    (work / "train.jsonl").write_text("".join(train[200:]))
    test = (data / "arc_easy_test.jsonl").read_text().splitlines(keepends=True)
    (work / "test.jsonl").write_text("".join(draw.sample(test, min(size.questions, len(test)))))


def read(file: Path) -> list[dict[str, Any]]:
    """The runs that are done."""
    return [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")] if file.exists() else []


def losses(runs: list[dict[str, Any]], arm: str) -> dict[int, float]:
    """Evaluation loss of seed 0 by index into GRID."""
    mine = (r for r in runs if r["arm"] == arm and r["seed"] == 0)
    return {GRID.index(r["lr"]): r["eval_loss"] if math.isfinite(r["eval_loss"]) else math.inf for r in mine}


def todo(runs: list[dict[str, Any]], arms: list[str], seeds: int) -> Iterator[Job]:
    """The next run of each arm that is not finished: first its grid, then accuracy at the best of it, seed by seed."""
    for arm in arms:
        tried = losses(runs, arm)
        best = min(tried, key=lambda k: (tried[k], k)) if tried else START
        untried = [k for k in (best, best + 1, best - 1) if 0 <= k < len(GRID) and k not in tried]
        if untried:
            yield Job(arm, GRID[untried[0]], 0, False)
            continue
        asked = {r["seed"] for r in runs if r["arm"] == arm and "accuracy" in r}
        yield from (Job(arm, GRID[best], seed, True) for seed in range(seeds) if seed not in asked)


def run(job: Job, size: Size, work: Path) -> dict[str, Any]:
    """One recipe in a process of its own; its folder is removed, its numbers are returned."""
    output = work / "run"
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    before = work / "accuracy_before.json"
    if job.ask and before.exists():
        shutil.copy(before, output)  # the same for every arm: asked once
    recipe = {
        "model": str(work / "smollm2"),
        "output": str(output),
        "seed": job.seed,
        "spectra": False,
        "data": {"train": str(work / "train.jsonl"), "evaluation": str(work / "evaluation.jsonl")},
        "training": {
            "max_steps": size.steps,
            "per_device_train_batch_size": size.batch,
            "max_length": 128,
            "learning_rate": job.lr,
            "lr_scheduler_type": "linear",
            "warmup_steps": max(1, size.steps // 10),
            "logging_steps": 10,
            "save_strategy": "no",
        },
        **ARMS[job.arm],
    }
    if job.ask:
        recipe["data"]["multiple_choice"] = str(work / "test.jsonl")
    (work / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-W", "ignore", "-m", "htsr.finetune", "--config", str(work / "recipe.yaml"), "--resume"]
    done = subprocess.run([*command, "--quiet"], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{job} failed:\n{done.stderr[-2000:]}")
    metrics = json.loads((output / "results.json").read_text())["metrics"]
    if job.ask:
        shutil.copy(output / "accuracy_before.json", before)
    shutil.rmtree(output)
    return {"arm": job.arm, "lr": job.lr, "seed": job.seed, **metrics}


if __name__ == "__main__":
    sys.exit(main())
