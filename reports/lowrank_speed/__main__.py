"""Time per step of `LowRankAdamW` beside galore-torch's AdamW at equal rank, and what a refresh costs by route and rank.

    python -m reports.lowrank_speed            the whole study, about 15 minutes on one core
    python -m reports.lowrank_speed --quick    one small shape and rank, once

One thread, float32, processor time of the process (which other work on the machine does not change much). Both
optimizers get the same weights and gradients and take turns. A step with and a step without a refresh are timed apart;
"per step" is their mean at the given number of steps between refreshes.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from reports import common

HERE = Path(__file__).parent
EVERY = (50, 200)

# name: matrices of one block (rows, columns), repetitions of the block, further full-rank parameters
SHAPES: dict[str, tuple[list[tuple[int, int]], int, list[tuple[int, ...]]]] = {
    "SmolLM2-135M, one block": (
        [(576, 576), (192, 576), (192, 576), (576, 576), *[(1536, 576)] * 2, (576, 1536)],
        1,
        [],
    ),
    "SmolLM2-135M, whole model": (
        [(576, 576), (192, 576), (192, 576), (576, 576), *[(1536, 576)] * 2, (576, 1536)],
        30,
        [(49152, 576), *[(576,)] * 61],
    ),
    "LLaMA-1B, one block": ([*[(2048, 2048)] * 4, *[(5461, 2048)] * 2, (2048, 5461)], 1, []),
}
FULL: list[tuple[str, int]] = [
    ("SmolLM2-135M, one block", 32),
    ("SmolLM2-135M, one block", 128),
    ("SmolLM2-135M, whole model", 128),
    ("LLaMA-1B, one block", 64),
    ("LLaMA-1B, one block", 128),
    ("LLaMA-1B, one block", 256),
]


def main() -> None:
    """Run the study."""
    import torch

    args = common.arguments(str(__doc__))
    torch.set_num_threads(1)
    if args.quick:
        print(json.dumps(steps("SmolLM2-135M, one block", 32, rounds=2), indent=1))
        print(json.dumps(refresh(576, 576, 32, rounds=1), indent=1))
        return
    results: dict[str, Any] = {"steps": [], "refresh": []}
    for name, rank in FULL:
        results["steps"].append(steps(name, rank, rounds=4 if name.startswith("SmolLM2-135M, one") else 1))
        print(results["steps"][-1], flush=True)
    for rows, columns in ((576, 576), (1536, 576), (2048, 2048), (5461, 2048)):
        for rank in (32, 128, 256):
            results["refresh"].append(refresh(rows, columns, rank, rounds=2))
            print(results["refresh"][-1], flush=True)
    common.keep(HERE, results)
    write_up(json.loads((HERE / "results.json").read_text()))


def gradient(rows: int, columns: int, seed: int) -> Any:
    """A gradient-like matrix: singular values that fall as a power, on a floor of noise."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    inner = min(rows, columns, 256)
    U = torch.randn(rows, inner, generator=generator)
    V = torch.randn(inner, columns, generator=generator)
    fall = torch.arange(1, inner + 1) ** -0.7
    return (U * fall) @ V / columns**0.5 + 0.1 * torch.randn(rows, columns, generator=generator)


def steps(name: str, rank: int, rounds: int) -> dict[str, Any]:
    """Seconds of a step with and without a refresh, for both tools and our routes, in turns."""
    import galore_torch
    import torch

    from htsr import LowRankAdamW

    block, repeats, full = SHAPES[name]
    low = [gradient(*shape, seed=i) for i, shape in enumerate(block)] * repeats
    rest = [torch.randn(shape) for shape in full]

    def parameters() -> tuple[list[Any], list[Any]]:
        made = [torch.nn.Parameter(torch.zeros_like(G)) for G in (*low, *rest)]
        for parameter, G in zip(made, (*low, *rest), strict=True):
            parameter.grad = G
        return made[: len(low)], made[len(low) :]

    def ours(method: str) -> Any:
        matrices, others = parameters()
        groups = [{"params": matrices, "rank": rank, "refresh_every": 10**9}, {"params": others}]
        return LowRankAdamW([g for g in groups if g["params"]], method=method)

    def theirs() -> Any:
        matrices, others = parameters()
        groups = [
            {"params": matrices, "rank": rank, "update_proj_gap": 10**9, "scale": 0.25, "proj_type": "std"},
            {"params": others},
        ]
        return galore_torch.GaLoreAdamW([g for g in groups if g["params"]], no_deprecation_warning=True)

    def refreshing(optimizer: Any, on: bool) -> None:
        """Let the next step compute projectors anew, warm where the tool starts warm; or not."""
        key = "refresh_every" if isinstance(optimizer, LowRankAdamW) else "update_proj_gap"
        optimizer.param_groups[0][key] = 1 if on else 10**9
        for state in optimizer.state.values():
            if "projector" in state and not torch.is_tensor(state["projector"]):
                state["projector"].update_proj_gap = 1 if on else 10**9

    arms = {"galore-torch": theirs(), "svd": ours("svd"), "randomized": ours("randomized")}
    taken: dict[str, dict[str, list[float]]] = {arm: {"plain": [], "refresh": []} for arm in arms}
    for optimizer in arms.values():
        optimizer.step()
    for _ in range(rounds):
        for kind, repetitions in (("plain", 5), ("refresh", 1)):
            for arm, optimizer in arms.items():
                if arm == "svd" and kind == "plain":
                    continue  # the same as the randomised arm's
                refreshing(optimizer, kind == "refresh")
                taken[arm][kind].append(seconds(optimizer.step, repetitions))
    taken["svd"]["plain"] = taken["randomized"]["plain"]
    result: dict[str, Any] = {"name": name, "rank": rank}
    for arm, kinds in taken.items():
        plain, fresh = (common.median(kinds[kind]) for kind in ("plain", "refresh"))
        per_step = {str(T): ((T - 1) * plain + fresh) / T for T in EVERY}
        result[arm] = {"plain": plain, "refresh": fresh - plain, "per_step": per_step}
    return result


def refresh(rows: int, columns: int, rank: int, rounds: int) -> dict[str, Any]:
    """Seconds of one projector by route, and the part of the best possible ‖R‖² that it keeps."""
    import torch

    from htsr.training.lowrank.subspace import project, projector

    before, now = gradient(rows, columns, 0), gradient(rows, columns, 0) + 0.05 * gradient(rows, columns, 1)
    exact = projector(now, rank)
    previous = projector(before, rank, "randomized", None, torch.Generator().manual_seed(0))
    best = project(now, exact).square().sum()
    result: dict[str, Any] = {"rows": rows, "columns": columns, "rank": rank}
    routes: dict[str, Callable[[], Any]] = {
        "svd": lambda: projector(now, rank),
        "cold": lambda: projector(now, rank, "randomized", None, torch.Generator().manual_seed(1)),
        "warm": lambda: projector(now, rank, "randomized", previous, torch.Generator().manual_seed(1)),
    }
    for name, route in routes.items():
        result[name] = {
            "seconds": common.median([seconds(route, 1) for _ in range(rounds)]),
            "kept": float(project(now, route()).square().sum() / best),
        }
    return result


def seconds(run: Callable[[], Any], repetitions: int) -> float:
    """Processor seconds of one call, mean of a few."""
    start = time.process_time()
    for _ in range(repetitions):
        run()
    return (time.process_time() - start) / repetitions


def write_up(results: dict[str, Any]) -> None:
    """README.md from results.json."""
    rows = []
    for r in results["steps"]:
        for T in EVERY:
            theirs = r["galore-torch"]["per_step"][str(T)]
            mine = {route: r[route]["per_step"][str(T)] for route in ("svd", "randomized")}
            rows.append(
                [r["name"], r["rank"], T, 1e3 * theirs, 1e3 * mine["svd"], f"{theirs / mine['svd']:.2f}×",
                 1e3 * mine["randomized"], f"**{theirs / mine['randomized']:.2f}×**"]
            )  # fmt: skip
    parts = [
        [r["name"], r["rank"], *(1e3 * r[arm]["plain"] for arm in ("galore-torch", "randomized")),
         *(1e3 * r[arm]["refresh"] for arm in ("galore-torch", "svd", "randomized"))]
        for r in results["steps"]
    ]  # fmt: skip
    routes = [
        [f"{r['rows']}×{r['columns']}", r["rank"], *(1e3 * r[route]["seconds"] for route in ("svd", "cold", "warm")),
         f"{r['svd']['seconds'] / r['warm']['seconds']:.0f}×", *(f"{r[route]['kept']:.4f}" for route in ("cold", "warm"))]
        for r in results["refresh"]
    ]  # fmt: skip
    ratios = [
        r["galore-torch"]["per_step"][str(T)] / r["randomized"]["per_step"][str(T)]
        for r in results["steps"]
        for T in EVERY
    ]
    text = f"""# Speed of the low-rank optimizer

`python -m reports.lowrank_speed` makes this page. {common.facts(results["machine"])} One thread, float32, milliseconds
of processor time, so that other work on the machine changes little; the tools take turns on the same gradients.

## Per step, refreshes included

`LowRankAdamW` beside galore-torch 1.0's AdamW at equal rank; T steps between refreshes. "svd" is our optimizer with the
exact route, "randomized" is its default, warm-started from the last projector. Least ratio {min(ratios):.2f}, largest {max(ratios):.2f}
(target 1.3; {sum(ratio < 1.295 for ratio in ratios)} of {len(ratios)} lines are below: where the two products with the projector are nearly all the work and the
exact SVD of a small matrix is cheap, there is little to win).

{common.table(["matrices", "rank", "T", "galore-torch", "svd", "ratio", "randomized", "ratio"], rows)}
## Where it comes from

Milliseconds of a step without a refresh, and what a refresh adds.

{common.table(["matrices", "rank", "step, galore-torch", "step, htsr", "refresh, galore-torch", "refresh, svd", "refresh, randomized"], parts)}
Without a refresh the two do the same products; htsr adds the projected-back update to the weights in the product itself
(no m×n matrix in between, no separate scaling) and updates large full-rank parameters in pieces that stay in the cache.

## One projector by route and rank

"Kept" is ‖R‖² as a part of that with the exact projector, on a matrix whose singular values fall as i^-0.7 over a floor of
noise and which has changed by 5 % since the last projector.

{common.table(["matrix", "rank", "svd", "randomized, cold", "randomized, warm", "svd / warm", "kept, cold", "kept, warm"], routes)}
"""
    (HERE / "README.md").write_text(text)


if __name__ == "__main__":
    sys.exit(main())
