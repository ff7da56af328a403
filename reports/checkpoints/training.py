"""Brief fine-tunings of SmolLM2-135M-Instruct by `htsr finetune`, each a folder that is made once and kept."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from reports import common

STEPS = 60
BATCH = 8
ARMS: dict[str, dict[str, Any]] = {
    "full": {"method": "full", "training": {"learning_rate": 1e-4}},
    "lora": {"method": "lora", "lora": {"rank": 8}, "training": {"learning_rate": 2e-3}},
    "owlore": {
        "method": "owlore",
        "sampling": {"active": 4, "interval": 10},
        "low_rank": {"rank": 64, "scale": 1.0, "refresh_every": 20},
        "training": {"learning_rate": 4e-4},
    },
}


def topics(work: Path) -> Path:
    """The language reference that comes with Python, one record per topic."""
    import pydoc_data.topics

    file = work / "topics.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in pydoc_data.topics.topics.values()))
    return file


def recipe(arm: str, seed: int, work: Path, output: Path) -> dict[str, Any]:
    """The recipe of an arm."""
    own = dict(ARMS[arm])
    training = {
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "max_length": 128,
        "packing": True,
        "packing_strategy": "wrapped",
        "lr_scheduler_type": "linear",
        "warmup_steps": 6,
        "logging_steps": 10,
        "save_strategy": "no",
        "bf16": True,
        "per_device_eval_batch_size": 8,
        "eval_on_start": True,
    } | own.pop("training")
    return {
        "model": str(common.smollm2(work)),
        "output": str(output),
        "seed": seed,
        "spectra": False,
        "data": {"train": str(topics(work)), "evaluation_share": 0.02},
        "training": training,
        **own,
    }


def tuned(arm: str, seed: int, work: Path) -> tuple[Path, dict[str, Any]]:
    """Folder of the fine-tuned model, and the metrics of its run."""
    folder = work / f"{arm}-{seed}"
    if not (folder / "results.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        common.finetune(recipe(arm, seed, work, folder))
    return folder, json.loads((folder / "results.json").read_text())["metrics"]
