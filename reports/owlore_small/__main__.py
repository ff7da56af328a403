"""Fine-tune SmolLM2-135M-Instruct by every method, each at its own best learning rate.

    python -m reports.owlore_small --data FOLDER --work FOLDER     hours on two cores; taken up where it was stopped
    python -m reports.owlore_small --quick                         one method, one step, sums in place of the data

FOLDER of the data holds arc_easy_train.jsonl, arc_easy_test.jsonl and openbookqa_train.jsonl: question, choices, answer.
Every run is a recipe of `htsr finetune` in a process of its own. The learning rate of each arm is searched on the same
grid by the evaluation loss of seed 0, downhill until the best has both neighbours; accuracy is measured at the best
only, on questions that no choice depended on. Memory and time are measured at the very end, in runs of 20 steps: keep
the machine quiet for these, the others may be disturbed.
"""

from __future__ import annotations

import json
import math
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from reports import common
from reports.owlore_small.write_up import write_up

HERE = Path(__file__).parent
GRID = tuple(2.5e-5 * 2**k for k in range(10))  # 2.5e-5 … 1.28e-2
START = 6
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


COST_STEPS = 20
# glibc gives large blocks back to the system at once and faults them in again; keeping them is a third of the time.
_KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "8589934592"}


@dataclass(frozen=True)
class Size:
    """What all runs share: optimizer steps, sequences a step, questions of the test, bfloat16 autocast or none, blocks."""

    steps: int
    batch: int
    questions: int
    bf16: bool = True
    blocks: int = common.SMOLLM2["num_hidden_layers"]


@dataclass(frozen=True)
class Job:
    """One run of the search for the learning rate, of the test at the best of them, or of the cost."""

    kind: Literal["search", "test", "cost"]
    arm: str
    lr: float
    seed: int = 0


def main() -> None:
    """Run what is not done yet, then write the page."""
    args = common.arguments(
        str(__doc__),
        ("--data", {"type": Path, "help": "folder of the questions; the quick pass makes sums if there is none"}),
        ("--work", {"type": Path, "help": "where runs are kept"}),
        ("--seeds", {"type": int, "default": 3}),
        ("--steps", {"type": int, "default": 60}),
        ("--questions", {"type": int, "default": 300}),
        ("--arms", {"help": "only these, with commas"}),
    )
    if not (args.data or args.quick):
        sys.exit("this study needs its questions: --data FOLDER")
    arms = args.arms.split(",") if args.arms else list(ARMS)
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        if args.quick:
            size = Size(1, 2, 4, bf16=False, blocks=5)  # processors without bfloat16's instructions take minutes
            prepare(args.data or sums(work / "sums"), work, size)
            print(json.dumps(run(Job("test", "owlore", 2e-4), size, work)), flush=True)
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
    common.smollm2(work, size.blocks)
    draw = random.Random(0)
    train = [
        line
        for name in ("arc_easy_train", "openbookqa_train")
        for line in (data / f"{name}.jsonl").open()
        if line.strip()
    ]
    draw.shuffle(train)
    held_out = min(200, len(train) // 4)
    (work / "evaluation.jsonl").write_text("".join(train[:held_out]))
    (work / "train.jsonl").write_text("".join(train[held_out:]))
    test = (data / "arc_easy_test.jsonl").read_text().splitlines(keepends=True)
    (work / "test.jsonl").write_text("".join(draw.sample(test, min(size.questions, len(test)))))


def sums(folder: Path) -> Path:
    """A few dozen questions of arithmetic in the form of the data, for a pass that only shows that all runs."""
    draw = random.Random(0)
    folder.mkdir(exist_ok=True)
    for name in ("arc_easy_train", "openbookqa_train", "arc_easy_test"):
        with (folder / f"{name}.jsonl").open("w") as file:
            for a, b in ((draw.randrange(50), draw.randrange(50)) for _ in range(16)):
                choices = [str(a + b + k) for k in draw.sample(range(4), 4)]
                question = {
                    "question": f"What is {a} plus {b}?",
                    "choices": choices,
                    "answer": choices.index(str(a + b)),
                }
                file.write(json.dumps(question) + "\n")
    return folder


def read(file: Path) -> list[dict[str, Any]]:
    """The runs that are done."""
    return [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")] if file.exists() else []


def losses(runs: list[dict[str, Any]], arm: str) -> dict[int, float]:
    """Evaluation loss of seed 0 by index into GRID."""
    mine = (r for r in runs if r["arm"] == arm and r["seed"] == 0 and r["kind"] != "cost")
    return {GRID.index(r["lr"]): r["eval_loss"] if math.isfinite(r["eval_loss"]) else math.inf for r in mine}


def todo(runs: list[dict[str, Any]], arms: list[str], seeds: int) -> Iterator[Job]:
    """The next run of each arm that is not finished: its grid, the test seed by seed; when all are done, the cost."""
    tuned = {}
    for arm in arms:
        tried = losses(runs, arm)
        best = min(tried, key=lambda k: (tried[k], k)) if tried else START
        untried = [k for k in (best, best + 1, best - 1) if 0 <= k < len(GRID) and k not in tried]
        if untried:
            yield Job("search", arm, GRID[untried[0]])
            continue
        tuned[arm] = GRID[best]
        tested = {r["seed"] for r in runs if r["arm"] == arm and r["kind"] == "test" and r["lr"] == tuned[arm]}
        yield from (Job("test", arm, GRID[best], seed) for seed in range(seeds) if seed not in tested)
    weighed = {r["arm"] for r in runs if r["kind"] == "cost"}
    yield from (Job("cost", arm, tuned[arm]) for arm in arms if arm not in weighed)


def run(job: Job, size: Size, work: Path) -> dict[str, Any]:
    """One recipe in a process of its own; its folder is removed, its numbers are returned."""
    output = work / "run"
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    before = work / "accuracy_before.json"
    if job.kind == "test" and before.exists():
        shutil.copy(before, output)  # the same for every arm: asked once
    recipe = {
        "model": str(work / "smollm2"),
        "output": str(output),
        "seed": job.seed,
        "spectra": False,
        "data": {"train": str(work / "train.jsonl"), "evaluation": str(work / "evaluation.jsonl")},
        "training": {
            "max_steps": COST_STEPS if job.kind == "cost" else size.steps,
            "per_device_train_batch_size": size.batch,
            "max_length": 128,
            "learning_rate": job.lr,
            "lr_scheduler_type": "linear",
            "warmup_steps": max(1, size.steps // 10),
            "logging_steps": 10,
            "save_strategy": "no",
            "bf16": size.bf16,
        },
        **ARMS[job.arm],
    }
    if job.kind == "test":
        recipe["data"]["multiple_choice"] = str(work / "test.jsonl")
    metrics = common.finetune(recipe, "--resume", environment={} if job.kind == "cost" else _KEEP_MEMORY)
    if job.kind == "test":
        shutil.copy(output / "accuracy_before.json", before)
    shutil.rmtree(output)
    return {**vars(job), **metrics}


if __name__ == "__main__":
    sys.exit(main())
