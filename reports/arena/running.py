"""One run: a recipe of `htsr finetune`, then the loss of its model on every record, and on ordinary text."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from reports import common
from reports.arena.arms import ARMS
from reports.arena.sizes import Size, Task
from reports.owlore_small.__main__ import _KEEP_MEMORY
from reports.repair import evaluating

COST_STEPS = 10


@dataclass(frozen=True)
class Job:
    """One run of an arm: to search its learning rate or at the best, or to measure its memory and time."""

    kind: Literal["loss", "cost"]
    arm: str
    lr: float
    seed: int = 0


def recipe_of(job: Job, size: Size, task: Task, work: Path, device: str) -> dict[str, Any]:
    """The recipe of a run."""
    own = ARMS[job.arm].recipe(size)
    steps = COST_STEPS if job.kind == "cost" else size.steps
    training = {
        "max_steps": steps,
        "per_device_train_batch_size": size.batch,
        "max_length": size.tokens,
        "learning_rate": job.lr,
        "lr_scheduler_type": "linear",
        "warmup_steps": max(1, steps // 10),
        "logging_steps": 100,
        "save_strategy": "no",
        "disable_tqdm": True,
        "bf16": device != "cpu" and "dtype" not in own,
        "use_cpu": device == "cpu",
    } | own.pop("training", {})
    for section in ("sampling", "gum"):
        if section in own and own[section].get("strategy", own["method"]) == "owlore":
            if (kept := work / f"outliers-{size.name}.json").exists():  # the base's own: measured once for all
                own[section] = own[section] | {"outliers": str(kept)}
    return {
        "model": str(task.base),
        "output": str(work / f"run-{size.name}-{os.getpid()}"),  # several processes may share the arms
        "seed": job.seed,
        "spectra": False,
        "data": {"train": str(task.train), "evaluation_share": 0},
        "training": training,
        **own,
    }


def run(job: Job, size: Size, task: Task, work: Path, device: str) -> dict[str, Any]:
    """The numbers of a run; its folder is removed."""
    recipe = recipe_of(job, size, task, work, device)
    output = Path(recipe["output"])
    shutil.rmtree(output, ignore_errors=True)
    clock, process = time.perf_counter(), time.process_time()
    if size.isolated:
        metrics = common.finetune(recipe, environment={} if job.kind == "cost" else _KEEP_MEMORY)
    else:
        metrics = _here(recipe)
    found = vars(job) | {"size": size.name, "steps": recipe["training"]["max_steps"], "device": device}
    found |= {"training_seconds": time.perf_counter() - clock, "process_seconds": time.process_time() - process}
    found |= {key: metrics[key] for key in ("train_loss", "seconds_per_step", "peak_mib", "trainable_parameters")}
    if job.kind == "loss":
        found |= asked(output, size, task, device)
    if (measured := output / "outliers.json").exists():
        shutil.copy(measured, work / f"outliers-{size.name}.json")
    shutil.rmtree(output)
    return found | {"seconds": time.perf_counter() - clock}


def asked(folder: Path, size: Size, task: Task, device: str) -> dict[str, Any]:
    """Loss of each record in nats per token, and the mean loss on ordinary text."""
    model = evaluating.load(folder).to(device)
    losses = [round(loss, 4) for loss in record_losses(model, task.records, device)]
    ordinary = evaluating.text_losses(model, task.ordinary.to(device))
    return {"losses": losses, "ordinary": sum(ordinary) / len(ordinary)}


def record_losses(model: Any, records: list[tuple[list[int], int]], device: str, batch: int = 16) -> list[float]:
    """Mean loss over the last tokens of each record, in nats; records of about one length are asked together."""
    order = sorted(range(len(records)), key=lambda i: len(records[i][0]))
    found = [0.0] * len(records)
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        longest = len(records[part[-1]][0])
        ids, labels = torch.zeros(2, len(part), longest, dtype=torch.long)
        for row, i in enumerate(part):
            tokens, counted = records[i]
            ids[row, : len(tokens)] = torch.tensor(tokens)
            labels[row] = -100
            labels[row, len(tokens) - counted : len(tokens)] = torch.tensor(tokens[-counted:])
        with torch.no_grad():
            logits = model(input_ids=ids.to(device), use_cache=False).logits[:, :-1].float()
        each = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), labels[:, 1:].to(device), ignore_index=-100, reduction="none"
        )
        for row, i in enumerate(part):
            found[i] = float(each[row].sum()) / records[i][1]
    return found


def _here(recipe: dict[str, Any]) -> dict[str, Any]:
    """Metrics of a recipe that runs in this process."""
    import yaml

    from htsr.finetune import finetune, read_recipe

    file = Path(recipe["output"]).with_suffix(".yaml")
    file.write_text(yaml.safe_dump(recipe))
    return dict(finetune(read_recipe(str(file))).metrics)
