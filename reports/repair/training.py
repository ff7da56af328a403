"""Brief fine-tunings of SmolLM2-135M-Instruct on questions, at a rate that forgets; each a folder, made once and kept."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from reports import common
from reports.owlore_small.__main__ import Size, prepare

STEPS = 40
BATCH = 4
SEEDS = range(3)
ARMS: dict[str, dict[str, Any]] = {
    "full": {"method": "full", "training": {"learning_rate": 4e-4}},
    "lora": {"method": "lora", "lora": {"rank": 8}, "training": {"learning_rate": 6.4e-3}},
}


def questions(data: Path, work: Path) -> None:
    """The base model, and the questions to train on and to be asked, into `work`."""
    if not all((work / name).exists() for name in ("train.jsonl", "evaluation.jsonl", "test.jsonl")):
        prepare(data, work, Size(STEPS, BATCH, 300))


def recipe(arm: str, seed: int, work: Path) -> dict[str, Any]:
    """The recipe of an arm."""
    own = dict(ARMS[arm])
    training = {
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "max_length": 128,
        "lr_scheduler_type": "linear",
        "warmup_steps": 4,
        "logging_steps": 20,
        "save_strategy": "no",
        "bf16": False,  # five times as slow on a CPU without units for it
    } | own.pop("training")
    return {
        "model": str(common.smollm2(work)),
        "output": str(work / f"{arm}-{seed}"),
        "seed": seed,
        "spectra": False,
        "data": {"train": str(work / "train.jsonl"), "evaluation": str(work / "evaluation.jsonl")},
        "training": training,
        **own,
    }


def is_there(arm: str, seed: int, work: Path) -> bool:
    """Whether a run has come to its end."""
    return (work / f"{arm}-{seed}" / "results.json").exists()


def tuned(arm: str, seed: int, work: Path) -> Path:
    """Folder of the fine-tuned model; a LoRA adapter is merged into it."""
    folder = work / f"{arm}-{seed}"
    if not is_there(arm, seed, work):
        shutil.rmtree(folder, ignore_errors=True)
        common.finetune(recipe(arm, seed, work))
    return folder


def losses(folder: Path) -> dict[str, Any]:
    """What the run itself measured."""
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())["metrics"]
    return found
