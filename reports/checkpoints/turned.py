"""Which numbers of directions tell full fine-tuning, LoRA and OwLore apart, and which go with forgetting.

The small model of `reports.repair` is fine-tuned on the Python language reference by each method, at rates that forget.
Forgetting is the rise of the loss on sources of the standard library, on which the base was trained. It is also shared
out: by how much the loss falls when the change of one matrix is undone.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import htsr
from htsr.errors import MatrixError
from htsr.matrices.models import Model
from htsr.matrices.sources import open_model
from htsr.spectra.subspaces import directions
from reports.checkpoints.measuring import Matrix, Row, auc, cached, changed, column, generator, spearman
from reports.repair import small
from reports.repair.evaluating import load, text_losses

STEPS = 60
RATES = small.RATES | {"owlore": 3e-3}
ARMS = tuple(RATES)
WINDOWS = 24  # of held-out text
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


def study(work: Path, seeds: range, only_finished: bool) -> dict[str, Any]:
    """Numbers by method, how well they tell the method, and what goes with forgetting."""
    work.mkdir(parents=True, exist_ok=True)
    base = base_of(work)
    runs = []
    for seed in seeds:
        for arm in ARMS:
            file = work / f"turned-{arm}-{seed}.json"
            if only_finished and not file.exists():
                continue
            runs.append(cached(file, lambda a=arm, s=seed: run(base, tuned(base, a, s), a, s)))  # type: ignore[misc]
            print(f"{arm}, seed {seed}: turned", flush=True)
    return summary(runs)


def base_of(work: Path) -> Path:
    """The base, made once: that of the study of repair."""
    folder = work / f"small-base-{small.FULL.base}"
    if not (folder / "model.safetensors").exists():
        model = small.model_of()
        small.train(model, small.sources()[0], small.FULL.base, 3e-3, seed=0)
        model.save_pretrained(folder)
    return folder


def tuned(base: Path, arm: str, seed: int, steps: int = STEPS) -> Any:
    """The base fine-tuned; LoRA merged into it."""
    learn = small.reference()[0]
    model = load(base)
    if arm != "owlore":
        return small.tune(model, arm, learn, steps, RATES[arm], seed)
    outliers = htsr.measure_outliers(
        model, _bytes, [bytes(w.tolist()).decode("latin-1") for w in small.windows(learn, 4)]
    )
    sampler = htsr.LayerSampler(model, "owlore", scores=outliers, active=2, interval=5, seed=seed)
    optimizer = htsr.LowRankAdamW(htsr.low_rank_groups(model, rank=16), lr=RATES[arm], weight_decay=0.01)
    sampler.attach(optimizer)
    small.train(model, learn, steps, RATES[arm], seed, optimizer=optimizer)
    return model


def _bytes(texts: list[str], **_: Any) -> Any:
    """A tokenizer of one token a byte."""
    import torch
    from transformers import BatchEncoding

    ids = torch.tensor([list(text.encode("latin-1")) for text in texts])
    return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def run(base: Path, model: Any, arm: str, seed: int) -> dict[str, Any]:
    """Rows of the matrices that changed, the loss on held-out sources before and after, and with each of them undone."""
    import torch

    before, after = load(base), model.eval()
    rows = list(compared(blocks(open_model(before)), blocks(open_model(after))))
    text = small.windows(small.sources()[1], WINDOWS)

    def loss(of: Any) -> float:
        return float(np.mean(text_losses(of, text)))

    found: dict[str, Any] = {"arm": arm, "seed": seed, "rows": rows, "before": loss(before), "after": loss(after)}
    olds = dict(before.named_parameters())
    for row in rows:
        name = f"{row['name']}.weight"
        mine = after.get_parameter(name)
        kept = mine.detach().clone()
        with torch.no_grad():
            mine.copy_(olds[name])
            row["gives_back"] = found["after"] - loss(after)
            mine.copy_(kept)
    return found


def blocks(model: Model) -> Model:
    """The matrices of the blocks."""
    return Model(model.label, tuple(m for m in model if m.block is not None))


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


def within(runs: list[dict[str, Any]], key: str) -> dict[str, float]:
    """Spearman over the matrices of a run of a number and of what undoing the matrix gives back; mean by method."""
    found: dict[str, list[float]] = {}
    for r in runs:
        values = column(r["rows"], key)
        rho = spearman(values, column(r["rows"], "gives_back")) if np.ptp(values) > 0 else 0.0
        found.setdefault(r["arm"], []).append(rho)
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
    arms = (("full", full), ("lora", lora), ("owlore", own))
    rows = {arm: [row | {"gives_back": 0.0} for row in compared(base, changed(base, how))] for arm, how in arms}
    return summary([{"arm": arm, "seed": 0, "rows": rows[arm], "before": 0.0, "after": 0.0} for arm in ARMS])


def _added(W: Matrix, noise: Matrix) -> Matrix:
    return (W + noise * (0.05 * np.linalg.norm(W) / np.linalg.norm(noise))).astype(np.float32)
