"""Peak memory of training by method: predicted by `htsr.predict_memory`, and measured on real steps.

    python -m reports.memory            the whole study, about 10 minutes on one core
    python -m reports.memory --quick    one small model, one setting

"Measured" is the most that torch's CPU allocator held at once over two training steps (torch.profiler), weights
included; each measurement has a process of its own. Weights are random, which changes no size.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from reports import common

HERE = Path(__file__).parent

SMALL = {
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "vocab_size": 16000,
}
MODELS: dict[str, dict[str, Any]] = {
    "LLaMA, 42M": SMALL,
    "SmolLM2-135M": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "LLaMA-2-7B": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32000,
        "dtype": "bfloat16",
    },
}
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("full", {}),
    "LoRA": ("lora", {"rank": 16}),
    "GaLore": ("galore", {"rank": 128}),
    "GaLore, gradients kept": ("galore", {"rank": 128, "gradients": "keep"}),
    "LISA": ("lisa", {"active_blocks": 2}),
    "OwLore": ("owlore", {"rank": 128, "active_blocks": 2}),
    "OwLore, embeddings frozen": ("owlore", {"rank": 128, "active_blocks": 2, "embeddings": "freeze"}),
}
MEASURE = """
import json, sys
from transformers import LlamaConfig
from reports.memory.measure import peak_allocated, train
config, method, options = json.loads(sys.argv[1])
model = LlamaConfig(**config)
options.setdefault("rank", 8)
print()
print(json.dumps({"bytes": peak_allocated(lambda: train(model, method, **options))}))
"""


def main() -> None:
    """Run the study."""
    args = common.arguments(str(__doc__))
    if args.quick:
        config = SMALL | {"num_hidden_layers": 2, "vocab_size": 2000}
        rows = [compare(config, arm, {"batch": 2, "sequence": 64}) for arm in ARMS]
        print(common.table(["method", "predicted, MiB", "measured, MiB", "ratio"], [cells(r) for r in rows]))
        return
    results: dict[str, Any] = {"small": [], "smollm2": []}
    for setting in ({"batch": 1, "sequence": 128}, {"batch": 4, "sequence": 256}):
        for arm in ARMS:
            results["small"].append(compare(MODELS["LLaMA, 42M"], arm, setting) | setting)
            print(results["small"][-1], flush=True)
    for checkpointing in (False, True):
        setting = {"batch": 2, "sequence": 256, "checkpointing": checkpointing}
        for arm in ARMS:
            results["smollm2"].append(compare(MODELS["SmolLM2-135M"], arm, setting) | setting)
            print(results["smollm2"][-1], flush=True)
    results["seven_b"] = seven_b()
    common.keep(HERE, results)
    write_up(json.loads((HERE / "results.json").read_text()))


def compare(config: dict[str, Any], arm: str, setting: dict[str, Any]) -> dict[str, Any]:
    """Predicted and measured bytes of one arm."""
    method, options = ARMS[arm]
    measured = common.in_process(MEASURE, json.dumps([config, method, options | setting]))
    plan = predict(config, method, **options, **setting)
    return {"arm": arm, "predicted": plan["total"], "measured": measured.result["bytes"], "moment": plan["moment"]}


def predict(config: dict[str, Any], method: str, **options: Any) -> dict[str, Any]:
    """The plan of a LLaMA of this configuration."""
    import tempfile
    from dataclasses import asdict

    from transformers import LlamaConfig

    from htsr import predict_memory

    with tempfile.TemporaryDirectory() as folder:
        LlamaConfig(**config).save_pretrained(folder)
        return asdict(predict_memory(folder, method, **options))


def seven_b() -> list[dict[str, Any]]:
    """What each measure saves on the way from full fine-tuning to OwLore on LLaMA-2-7B; predicted."""
    base: dict[str, Any] = {"batch": 1, "sequence": 1024}
    steps: list[tuple[str, str, dict[str, Any]]] = [
        ("full fine-tuning, bf16", "full", {}),
        ("+ activation checkpointing", "full", {"checkpointing": True}),
        ("LISA, γ=2", "lisa", {"checkpointing": True, "active_blocks": 2}),
        ("LISA, γ=5", "lisa", {"checkpointing": True, "active_blocks": 5}),
        ("OwLore, γ=5, r=128, gradients kept", "owlore",
         {"checkpointing": True, "active_blocks": 5, "rank": 128, "gradients": "keep"}),
        ("+ update during backward", "owlore", {"checkpointing": True, "active_blocks": 5, "rank": 128}),
        ("+ 8-bit moments", "owlore", {"checkpointing": True, "active_blocks": 5, "rank": 128, "state_dtype": "8bit"}),
        ("+ low-rank embedding and head", "owlore",
         {"checkpointing": True, "active_blocks": 5, "rank": 128, "state_dtype": "8bit", "embeddings": "low_rank"}),
        ("+ embedding and head frozen instead", "owlore",
         {"checkpointing": True, "active_blocks": 5, "rank": 128, "state_dtype": "8bit", "embeddings": "freeze"}),
        ("OwLore, γ=2, r=128, update during backward", "owlore",
         {"checkpointing": True, "active_blocks": 2, "rank": 128}),
        ("GaLore, r=128, update during backward", "galore", {"checkpointing": True, "rank": 128}),
        ("LoRA, r=16", "lora", {"checkpointing": True, "rank": 16}),
        ("QLoRA, r=16", "qlora", {"checkpointing": True, "rank": 16}),
    ]  # fmt: skip
    return [{"step": name, **predict(MODELS["LLaMA-2-7B"], method, **base, **o)} for name, method, o in steps]


def cells(row: dict[str, Any]) -> list[Any]:
    """An arm's line."""
    predicted, measured = row["predicted"] / 2**20, row["measured"] / 2**20
    return [row["arm"], f"{predicted:.0f}", f"{measured:.0f}", f"{predicted / measured:.3f}"]


def write_up(results: dict[str, Any]) -> None:
    """README.md from results.json."""
    rows = [*results["small"], *results["smollm2"]]
    worst = max(abs(r["predicted"] / r["measured"] - 1) for r in rows)
    small = [[r["batch"], r["sequence"], *cells(r)] for r in results["small"]]
    smollm2 = [["yes" if r["checkpointing"] else "no", *cells(r)] for r in results["smollm2"]]
    parts = ("weights", "gradients", "optimizer", "projectors", "activations", "logits", "workspace")
    big = [
        [r["step"], *(f"{r[part] / 1e9:.2f}" for part in parts), f"**{r['total'] / 1e9:.2f}**"]
        for r in results["seven_b"]
    ]
    text = f"""# Memory of training, predicted and measured

`python -m reports.memory` makes this page. {common.facts(results["machine"])} Peak of torch's CPU allocator over two
steps, float32, by torch.profiler; full, LoRA and LISA with torch's fused AdamW, GaLore and OwLore with `LowRankAdamW`,
which updates during backward unless said otherwise and computes its projectors at every step here. LISA and OwLore
train the two lowest blocks, embedding and head; nothing is counted that a sampler would add.

The largest difference between prediction and measurement is {100 * worst:.1f} % (target 10 %).

## LLaMA of 42M parameters, r = 128 (LoRA 16)

{common.table(["batch", "sequence", "method", "predicted, MiB", "measured, MiB", "ratio"], small)}
## SmolLM2-135M's shape, batch 2 × 256

{common.table(["checkpointing", "method", "predicted, MiB", "measured, MiB", "ratio"], smollm2)}
## LLaMA-2-7B, bfloat16, batch 1 × 1024: predicted only, GB (10⁹ bytes)

Parts are those at the moment of the peak. Not measured here for want of a GPU; without the CUDA context, kernels'
workspaces and fragmentation.

{common.table(["", *parts, "total"], big)}"""
    (HERE / "README.md").write_text(text)


if __name__ == "__main__":
    sys.exit(main())
