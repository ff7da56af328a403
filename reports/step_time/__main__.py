"""Time of a whole training step by method: OwLore beside LISA.

    python -m reports.step_time            the whole study, about 30 minutes on one core
    python -m reports.step_time --hosts    only the host's time of the optimizers, a minute
    python -m reports.step_time --quick    two blocks, one round

One thread, float32, processor time of the process (which other work on the machine does not change much): forward,
backward, optimizer. LISA is `LayerSampler` with torch's fused AdamW, OwLore the same sampler, with the same draws, and
`LowRankAdamW`, which updates during backward. The first step of an interval, when the drawn blocks have no state and
their projectors are computed, is timed apart; "per step" is the mean over an interval of K steps. Weights and tokens
are random, which changes no time.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from reports import common

HERE = Path(__file__).parent
INTERVALS = (10, 50)  # of the recipes for a CPU and for a GPU
REFRESH_EVERY = 200
SHORT = 4  # steps of an interval here: the first, and three more
MODELS = {
    "SmolLM2-135M": common.SMOLLM2,
    "six blocks of TinyLlama-1.1B": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 6,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
    },
}
SETTINGS: list[tuple[str, int, int, int, int]] = [  # model, γ, r, batch, sequence
    ("SmolLM2-135M", 4, 128, 1, 512),
    ("six blocks of TinyLlama-1.1B", 2, 128, 1, 512),
]
ARMS = ("LISA", "OwLore", "LISA, embeddings trained", "OwLore, embeddings trained")


def main() -> None:
    """Run the study."""
    import torch

    from reports.step_time.host import host_times

    args = common.arguments(
        str(__doc__), ("--hosts", {"action": "store_true", "help": "only the optimizers' host time"})
    )
    torch.set_num_threads(1)
    if args.quick:
        small = common.SMOLLM2 | {"num_hidden_layers": 2, "vocab_size": 2000}
        print(json.dumps(compare(small, ARMS[:2], 1, 32, 2, 64, rounds=1), indent=1))
        print(json.dumps(list(host_times(torch.device("cpu"), blocks=4, rounds=3)), indent=1))
        return
    hosts = {"machine": common.machine(), "rows": list(host_times(torch.device("cpu")))}
    if args.hosts:
        kept = json.loads((HERE / "results.json").read_text()) | {"hosts": hosts}
        (HERE / "results.json").write_text(json.dumps(kept, indent=1) + "\n")
        write_up(kept)
        return
    results = []
    for name, active, rank, batch, sequence in SETTINGS:
        row = {"model": name, "active": active, "rank": rank, "batch": batch, "sequence": sequence}
        row["arms"] = compare(MODELS[name], ARMS, active, rank, batch, sequence, rounds=3)
        results.append(row)
        print(json.dumps(row), flush=True)
    common.keep(HERE, {"settings": results, "hosts": hosts})
    write_up(json.loads((HERE / "results.json").read_text()))


def compare(
    config: dict[str, Any], arms: tuple[str, ...], active: int, rank: int, batch: int, sequence: int, rounds: int
) -> dict[str, dict[str, float]]:
    """Seconds of the first and of a later step of an interval, and by length of the interval; arms take turns."""
    loops = {arm: loop(config, arm, active, rank, batch, sequence) for arm in arms}
    taken: dict[str, list[list[float]]] = {arm: [] for arm in arms}
    for number in range(rounds + 1):
        for arm, step in loops.items():
            seconds = [step() for _ in range(SHORT)]
            if number:  # the first round warms up
                taken[arm].append(seconds)
    result = {}
    for arm, intervals in taken.items():
        first = sum(seconds[0] for seconds in intervals) / rounds
        later = sum(common.median(seconds[1:]) for seconds in intervals) / rounds
        result[arm] = {"first": first, "later": later} | {f"K{K}": ((K - 1) * later + first) / K for K in INTERVALS}
    return result


def loop(config: dict[str, Any], arm: str, active: int, rank: int, batch: int, sequence: int) -> Any:
    """A function that takes one training step and returns its processor seconds."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from htsr import LayerSampler, LowRankAdamW, low_rank_groups

    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(LlamaConfig(**config), dtype=torch.float32)
    model.config.use_cache = False
    model.train()
    tokens = torch.randint(0, config["vocab_size"], (batch, sequence))
    embedding: Any = "train" if arm.endswith("trained") else "freeze"
    sampler = LayerSampler(model, "uniform", active=active, interval=SHORT, embedding=embedding)
    if arm.startswith("OwLore"):
        groups = low_rank_groups(model, rank, refresh_every=REFRESH_EVERY)
        optimizer: Any = LowRankAdamW(groups, gradients="update")
    else:
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    sampler.attach(optimizer)

    def step() -> float:
        start = time.process_time()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.process_time() - start

    return step


def write_up(results: dict[str, Any]) -> None:
    """README.md from results.json."""
    rows, ratios = [], {}
    for setting in results["settings"]:
        arms = setting["arms"]
        what = f"{setting['model']}, γ={setting['active']}, r={setting['rank']}, {setting['batch']} × {setting['sequence']}"
        for arm, seconds in arms.items():
            cells = [what, arm, _milliseconds(seconds.get("first")), _milliseconds(seconds["later"])]
            for K in INTERVALS:
                cells.append(_milliseconds(seconds[f"K{K}"]))
                if arm.startswith("OwLore"):
                    ratio = seconds[f"K{K}"] / arms[arm.replace("OwLore", "LISA")][f"K{K}"]
                    ratios[what, arm, K] = ratio
                    cells.append(f"**{ratio:.2f}×**")
                else:
                    cells.append("")
            rows.append(cells)
    heads = [part for K in INTERVALS for part in (f"per step, K={K}", "of LISA's")]
    over = sum(ratio > 1.1 for ratio in ratios.values())
    (HERE / "README.md").write_text(f"""# Time of a training step by method

`python -m reports.step_time` makes this page. {common.facts(results["machine"])} One thread, float32, milliseconds of
processor time of forward, backward and optimizer; arms take turns. Refreshes every {REFRESH_EVERY} steps, of which the first is
in "first" and others fall outside of these intervals; LISA and OwLore draw the same blocks, embedding and head are
frozen unless said otherwise.

OwLore's step against LISA's: {min(ratios.values()):.2f} to {max(ratios.values()):.2f} (target 1.1; {over} of {len(ratios)} lines above).

{common.table(["model", "method", "first of an interval", "later", *heads], rows)}{host_page(results["hosts"])}""")


def host_page(hosts: dict[str, Any]) -> str:
    """The section on the host's time."""
    bases = ("AdamW foreach", "AdamW fused")
    rows = [
        [r["arm"], r["ms"], *(f"{r[f'of {base}']:.2f}×" for base in bases), r["groups"]]
        for r in hosts["rows"]
        if "ms" in r
    ]
    return f"""
## What a step costs the host

{common.facts(hosts["machine"])} One thread, float32 unless said. {hosts["rows"][-1]["parameters"]} parameters as SmolLM2-135M has, sides a 24th of the model's,
so that Python and the calls of operations are what is timed; least milliseconds of processor time of `step`, arms take turns; no
refresh of projectors, no event. Stochastic rounding is `LowRankAdamW`'s default for bfloat16; torch's AdamW rounds to nearest.

{common.table(["optimizer", "ms", *(f"of {base}" for base in bases), "groups"], rows)}"""


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:.0f}"


if __name__ == "__main__":
    sys.exit(main())
