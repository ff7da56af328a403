"""Time of a whole training step by method: OwLore beside LISA, with full AdamW and GaLore for reference.

    python -m reports.step_time            the whole study, about 20 minutes on one core
    python -m reports.step_time --quick    one small model, one setting

Forward, backward and optimizer, one thread, float32, processor time of the process. Each method trains a copy of the
same random model on the same tokens, and they take turns, an interval each. LISA and OwLore draw the same blocks. The
first step of an interval, which computes OwLore's and GaLore's projectors, is timed apart from the others; "per step"
is their mean over an interval of the default length.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from reports import common

HERE = Path(__file__).parent
STEPS = 3  # of an interval here; the first computes projectors
BLOCKS, REFRESH = 50, 200  # default steps between draws, and between GaLore's projectors
ACTIVE, RANK = 2, 128
GOAL = 1.1

SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
WIDE = {
    "hidden_size": 2048,
    "intermediate_size": 5504,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "vocab_size": 4096,
}
SETTINGS: list[tuple[str, dict[str, Any], int, int, str]] = [
    ("SmolLM2-135M", SMOLLM2, 8, 128, "freeze"),
    ("SmolLM2-135M", SMOLLM2, 1, 1024, "freeze"),
    ("SmolLM2-135M", SMOLLM2, 8, 128, "train"),
    ("two blocks of 2048", WIDE, 8, 128, "freeze"),
    ("two blocks of 2048", WIDE, 1, 1024, "freeze"),
]


def main() -> None:
    """Run the study."""
    import torch

    args = common.arguments(str(__doc__))
    torch.set_num_threads(1)
    if args.quick:
        small = SMOLLM2 | {"num_hidden_layers": 3, "vocab_size": 2000}
        print(common.table(HEAD, [line(compare("SmolLM2-135M, 3 blocks", small, 1, 64, "freeze", rounds=2))]))
        return
    results = []
    for setting in SETTINGS:
        results.append(compare(*setting, rounds=4))
        print(results[-1], flush=True)
        common.keep(HERE, {"steps": results})
    write_up(json.loads((HERE / "results.json").read_text()))


def compare(
    name: str, config: dict[str, Any], batch: int, sequence: int, embedding: str, rounds: int
) -> dict[str, Any]:
    """Seconds of the first and of a further step of an interval, by method; of `rounds` intervals the first is left."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from htsr import LayerSampler, LowRankAdamW, low_rank_groups

    def made() -> Any:
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(LlamaConfig(**config))
        model.config.use_cache = False
        return model.train()

    def low_rank(model: Any) -> Any:
        return LowRankAdamW(low_rank_groups(model, RANK, refresh_every=STEPS), lr=1e-5, gradients="update")

    def full(model: Any) -> Any:
        return torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def sampled(make: Any) -> Any:
        def attached(model: Any) -> Any:
            sampler = LayerSampler(model, "uniform", active=ACTIVE, interval=STEPS, embedding=embedding)  # type: ignore[arg-type]
            optimizer = make(model)
            sampler.attach(optimizer)
            return optimizer

        return attached

    arms: dict[str, tuple[Any, Any]] = {}
    makers = {"full": full, "GaLore": low_rank, "LISA": sampled(full), "OwLore": sampled(low_rank)}
    for arm, make in makers.items():
        model = made()
        arms[arm] = model, make(model)
    taken: dict[str, dict[str, list[float]]] = {arm: {"first": [], "further": []} for arm in arms}
    for number in range(rounds):
        tokens = torch.randint(
            0, config["vocab_size"], (batch, sequence), generator=torch.Generator().manual_seed(number)
        )
        for arm, (model, optimizer) in arms.items():
            for step in range(STEPS):
                start = time.process_time()
                model(input_ids=tokens, labels=tokens).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                if number:
                    taken[arm]["further" if step else "first"].append(time.process_time() - start)
    result: dict[str, Any] = {"name": name, "batch": batch, "sequence": sequence, "embedding": embedding, "arms": {}}
    for arm, kinds in taken.items():
        first, further = (common.median(kinds[kind]) for kind in ("first", "further"))
        every = REFRESH if arm in ("full", "GaLore") else BLOCKS
        per_step = further + (first - further) / every
        result["arms"][arm] = {"first": first, "further": further, "per_step": per_step}
    pairs = zip(taken["OwLore"]["further"], taken["LISA"]["further"], strict=True)
    ratios = sorted(ours / theirs for ours, theirs in pairs)
    return result | {"spread": [ratios[0], ratios[-1]]}


HEAD = ["model", "batch", "embeddings", "full", "GaLore", "LISA", "OwLore", "first step, OwLore", "OwLore / LISA", "of single steps"]  # fmt: skip


def line(row: dict[str, Any]) -> list[Any]:
    """A setting's line, milliseconds."""
    arms = row["arms"]
    low, high = row["spread"]
    return [
        row["name"], f"{row['batch']} × {row['sequence']}", row["embedding"],
        *(f"{1e3 * arms[arm]['per_step']:.0f}" for arm in ("full", "GaLore", "LISA", "OwLore")),
        f"{1e3 * arms['OwLore']['first']:.0f}", f"**{ratio(row):.3f}**", f"{low:.2f} to {high:.2f}",
    ]  # fmt: skip


def ratio(row: dict[str, Any]) -> float:
    """OwLore's time per step as a multiple of LISA's."""
    return float(row["arms"]["OwLore"]["per_step"] / row["arms"]["LISA"]["per_step"])


def write_up(results: dict[str, Any]) -> None:
    """README.md from results.json."""
    rows = results["steps"]
    above = sum(ratio(row) > GOAL for row in rows)
    text = f"""# Time of a whole training step

`python -m reports.step_time` makes this page. {common.facts(results["machine"])} One thread, float32, milliseconds of
processor time for forward, backward and optimizer; random weights of the named shapes; the methods take turns. γ = {ACTIVE},
r = {RANK}; LISA and OwLore draw the same blocks (uniformly) and treat embedding and head alike. Per step: the first step
of an interval, with its projectors from a cold start, spread over the default {BLOCKS} steps between draws (for GaLore,
warm, over the default {REFRESH} between projectors).

The largest ratio of OwLore to LISA is {max(ratio(row) for row in rows):.2f} (goal: at most {GOAL}; {above} of {len(rows)} settings are above).
The last column is the range of the ratios of single steps without projectors.

{common.table(HEAD, [line(row) for row in rows])}"""
    (HERE / "README.md").write_text(text)


if __name__ == "__main__":
    sys.exit(main())
