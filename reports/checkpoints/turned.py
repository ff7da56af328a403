"""Which numbers of directions tell full fine-tuning, LoRA and OwLore apart, and which go with forgetting.

The models are fine-tuned on questions at the rates of `reports.repair`, which forget, and at four times OwLore's rate
above; briefly, in float32. Forgetting is the rise of the loss on the Python language reference, which none was trained
on. It is also shared out: how much the loss falls when one block's change is undone.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from htsr.errors import MatrixError
from htsr.matrices.models import Model
from htsr.matrices.sources import open_model
from htsr.spectra.subspaces import directions
from reports import common
from reports.checkpoints.measuring import Matrix, Row, auc, cached, changed, column, generator, spearman
from reports.repair import training
from reports.repair.evaluating import Size, load, reference, text_losses

STEPS, BATCH, TOKENS = 20, 2, 64
OWLORE: dict[str, Any] = {
    "method": "owlore",
    "sampling": {"active": 6, "interval": 4},
    "low_rank": {"rank": 64, "scale": 1.0, "refresh_every": 20},
    "training": {"learning_rate": 1.6e-3},
}
OWN = training.ARMS | {"owlore": OWLORE}
ARMS = tuple(OWN)
BLOCKS = range(0, 30, 3)
TEXT = Size(windows=4, tokens=64, questions=0, asked=0)
K = 10

NUMBERS = {
    "relative": "‖Δ‖ / ‖W‖",
    "overlap_left": "1 - overlap, left",
    "overlap_right": "1 - overlap, right",
    "left_excess": "1 - overlap, left, over its null",
    "right_excess": "1 - overlap, right, over its null",
    "angle_left": "median angle, left",
    "largest_angle_left": "largest angle, left",
    "nearest": "1 - cosine of the newest direction",
    "intruders_50": "intruders, ε = .5",
    "intruders_90": "intruders, ε = .9",
    "share_left": "share in the left subspace, over its null",
    "share_right": "share in the right subspace, over its null",
    "share_both": "share in both, over its null",
    "share_scaling": "share that rescales, over its null",
    "effective_rank": "effective rank of Δ, over its null",
    "change_stable_rank": "stable rank of Δ, over its null",
}
SHAPE = ("left_excess", "right_excess", "share_left", "share_right", "share_both", "share_scaling", "effective_rank")


def study(work: Path, data: Path | None, seeds: range, only_finished: bool) -> dict[str, Any]:
    """Numbers by method, how well they tell the method, and what goes with forgetting."""
    work.mkdir(parents=True, exist_ok=True)
    if not only_finished:
        if data is None:
            raise SystemExit("this section fine-tunes on questions: --data FOLDER says where they are")
        training.questions(data, work)
    runs = []
    for seed in seeds:
        for arm in ARMS:
            if not only_finished and not training.is_there(arm, seed, work):
                tune(arm, seed, work)
            if training.is_there(arm, seed, work):
                runs.append(cached(work / f"turned-{arm}-{seed}.json", lambda a=arm, s=seed: run(a, s, work)))  # type: ignore[misc]
                print(f"{arm}, seed {seed}: turned", flush=True)
    return summary(runs)


def tune(arm: str, seed: int, work: Path) -> None:
    """Fine-tune briefly."""
    like = training.recipe("full", seed, work)
    brief = {
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "max_length": TOKENS,
        "warmup_steps": 2,
        "bf16": False,
    }
    output = work / f"{arm}-{seed}"
    shutil.rmtree(output, ignore_errors=True)
    whole = like | OWN[arm] | {"output": str(output), "training": like["training"] | OWN[arm]["training"] | brief}
    whole["data"] = {"train": whole["data"]["train"], "limit": 2 * STEPS * BATCH}
    common.finetune(whole)


def run(arm: str, seed: int, work: Path) -> dict[str, Any]:
    """Rows of the matrices of some blocks, the loss before and after, and with each of these blocks undone."""
    folder, base = work / f"{arm}-{seed}", common.smollm2(work)
    rows = list(compared(only(open_model(base)), only(open_model(folder))))
    return {"arm": arm, "seed": seed, "rows": rows, **forgetting(base, folder)}


def only(model: Model) -> Model:
    """The matrices of the blocks that are looked at."""
    return Model(model.label, tuple(m for m in model if m.block in BLOCKS))


def compared(base: Model, tuned: Model) -> Iterator[Row]:
    """Numbers of all pairs of matrices that differ."""
    of_base = {matrix.name: matrix for matrix in base}
    for matrix in tuned:
        A, B = of_base[matrix.name].read(), matrix.read()
        try:
            found = directions(A, B, K)
        except MatrixError:
            continue
        if found.overlap_left_null is not None:
            yield {"name": matrix.name, "role": matrix.role, "block": matrix.block} | numbers(found)


def numbers(found: Any) -> Row:
    """The numbers of `NUMBERS`."""

    def over(name: str) -> float:
        return float(getattr(found, name) / getattr(found, f"{name}_null"))

    def excess(side: str) -> float:
        lost = 1 - getattr(found, f"overlap_{side}_null")
        return float((1 - getattr(found, f"overlap_{side}")) / max(lost, 1e-12))

    ratios = ("share_left", "share_right", "share_both", "share_scaling", "effective_rank", "change_stable_rank")
    return {
        "relative": found.relative,
        "overlap_left": 1 - found.overlap_left,
        "overlap_right": 1 - found.overlap_right,
        "left_excess": excess("left"),
        "right_excess": excess("right"),
        "angle_left": found.angle_left,
        "largest_angle_left": found.largest_angle_left,
        "nearest": 1 - min(found.nearest),
        "intruders_50": found.intruder_counts[1],
        "intruders_90": found.intruder_counts[3],
        "intruders_90_null": found.intruder_counts_null[3],
        "overlap_left_null": 1 - found.overlap_left_null,
        **{name: over(name) for name in ratios},
    }


def forgetting(base: Path, folder: Path) -> dict[str, Any]:
    """Losses on the reference text in nats per token: of the base, of the tuned model, and with one block undone."""
    import torch
    from transformers import AutoTokenizer

    before, model = load(base), load(folder)
    text = reference(AutoTokenizer.from_pretrained(base), TEXT)

    def loss(of: Any) -> float:
        return float(np.mean(text_losses(of, text)))

    found: dict[str, Any] = {"before": loss(before), "after": loss(model), "undone": {}}
    olds = dict(before.named_parameters())
    for block in BLOCKS:
        mine = {name: p for name, p in model.named_parameters() if f"layers.{block}." in name}
        if all(torch.equal(p, olds[name]) for name, p in mine.items()):
            continue
        kept = {name: p.detach().clone() for name, p in mine.items()}
        with torch.no_grad():
            for name, p in mine.items():
                p.copy_(olds[name])
            found["undone"][str(block)] = loss(model)
            for name, p in mine.items():
                p.copy_(kept[name])
    return found


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What the page shows."""
    of = {arm: [row for r in runs if r["arm"] == arm for row in r["rows"]] for arm in ARMS}
    present = [arm for arm in ARMS if of[arm]]
    pairs = [(a, b) for i, a in enumerate(present) for b in present[i + 1 :]]
    return {
        "runs": [
            {"arm": r["arm"], "seed": r["seed"], "matrices": len(r["rows"]), "before": r["before"], "after": r["after"]}
            for r in runs
        ],
        "medians": {
            arm: {key: [float(q) for q in np.quantile(column(of[arm], key), [0.1, 0.5, 0.9])] for key in NUMBERS}
            for arm in present
        },
        "told": {f"{a} / {b}": {key: auc(column(of[a], key), column(of[b], key)) for key in NUMBERS} for a, b in pairs},
        "named": named(runs),
        "across": {key: across(runs, key) for key in NUMBERS} if len(runs) > 3 else {},
        "within": {key: within(runs, key) for key in NUMBERS},
    }


def named(runs: list[dict[str, Any]]) -> Row:
    """Share of matrices whose method the nearest centroid of the other seeds' names, from numbers without size."""
    seeds = sorted({r["seed"] for r in runs})
    whole = [s for s in seeds if {r["arm"] for r in runs if r["seed"] == s} == set(ARMS)]
    if len(whole) < 2:
        return {}

    def features(rows: list[Row]) -> Matrix:
        return np.log(np.maximum(np.stack([column(rows, key) for key in SHAPE], axis=1), 1e-6))

    right: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for test in whole:
        taught = {
            arm: features([row for r in runs if r["arm"] == arm and r["seed"] in whole and r["seed"] != test for row in r["rows"]])
            for arm in ARMS
        }  # fmt: skip
        scale = np.concatenate(list(taught.values())).std(axis=0) + 1e-12
        centres = np.stack([x.mean(axis=0) / scale for x in taught.values()])
        for number, arm in enumerate(ARMS):
            asked = features(next(r for r in runs if r["arm"] == arm and r["seed"] == test)["rows"]) / scale
            nearest = np.linalg.norm(asked[:, None] - centres[None], axis=2).argmin(axis=1)
            right[arm].append(float((nearest == number).mean()))
    return {arm: float(np.mean(shares)) for arm, shares in right.items()}


def across(runs: list[dict[str, Any]], key: str) -> float:
    """Spearman over the runs of the mean number and forgetting."""
    means = np.array([column(r["rows"], key).mean() for r in runs])
    return spearman(means, np.array([r["after"] - r["before"] for r in runs]))


def within(runs: list[dict[str, Any]], key: str) -> Row:
    """Spearman over the blocks of a run of the mean number and of what undoing the block gives back; by method."""
    found: dict[str, list[float]] = {}
    for r in runs:
        blocks = [int(block) for block in r["undone"]]
        rows = {block: [row for row in r["rows"] if row["block"] == block] for block in blocks}
        blocks = [block for block in blocks if rows[block]]
        if len(blocks) > 4:
            gives_back = np.array([r["after"] - r["undone"][str(block)] for block in blocks])
            means = np.array([column(rows[block], key).mean() for block in blocks])
            found.setdefault(r["arm"], []).append(spearman(means, gives_back) if np.ptp(means) > 0 else 0.0)
    return {arm: float(np.mean(values)) for arm, values in found.items()}


def quick(model: Model) -> dict[str, Any]:
    """The section on an encoder's first block, changed at random in three ways of one norm."""

    def full(name: str, W: Matrix) -> Matrix:
        return _added(W, generator(name, 1).standard_normal(W.shape))

    def lora(name: str, W: Matrix) -> Matrix:
        draw = generator(name, 2)
        return _added(W, draw.standard_normal((W.shape[0], 4)) @ draw.standard_normal((4, W.shape[1])))

    def own(name: str, W: Matrix) -> Matrix:
        return W * np.float32(1.05)

    base = Model(model.label, tuple(m for m in model if m.block == 0))
    losses = {"before": 0.0, "after": 0.0, "undone": {}}
    return summary(
        [
            {"arm": arm, "seed": 0, "rows": list(compared(base, changed(base, how))), **losses}
            for arm, how in (("full", full), ("lora", lora), ("owlore", own))
        ]
    )


def _added(W: Matrix, noise: Matrix) -> Matrix:
    return (W + noise * (0.05 * np.linalg.norm(W) / np.linalg.norm(noise))).astype(np.float32)
