"""Peak memory of training by method: predicted by `htsr.predict_memory`, and measured on real steps.

    python -m reports.memory            the whole study, about 15 minutes on one core
    python -m reports.memory --quick    one small model, one setting

"Measured" is the most that torch's CPU allocator held at once over two training steps (torch.profiler), weights
included; each setting has a process of its own. Weights are random, which changes no size.
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
    "QLoRA, bfloat16": ("qlora", {"rank": 16, "dtype": "bfloat16"}),
    "GaLore": ("galore", {"rank": 128}),
    "GaLore, gradients kept": ("galore", {"rank": 128, "gradients": "keep"}),
    "LISA, embeddings trained": ("lisa", {"active_blocks": 2, "embeddings": "train"}),
    "LISA": ("lisa", {"active_blocks": 2}),
    "OwLore, embeddings trained": ("owlore", {"rank": 128, "active_blocks": 2, "embeddings": "train"}),
    "OwLore": ("owlore", {"rank": 128, "active_blocks": 2}),
    "OwLore, 8-bit moments": ("owlore", {"rank": 128, "active_blocks": 2, "state_dtype": "8bit"}),
}
SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("LLaMA, 42M", {"batch": 1, "sequence": 128}),
    ("LLaMA, 42M", {"batch": 4, "sequence": 256}),
    ("SmolLM2-135M", {"batch": 1, "sequence": 512}),
    ("SmolLM2-135M", {"batch": 1, "sequence": 512, "checkpointing": True}),
    ("SmolLM2-135M", {"batch": 4, "sequence": 256}),
    ("SmolLM2-135M", {"batch": 1, "sequence": 512, "checkpointing": True, "dtype": "bfloat16"}),
]
MEASURE = """
import json, sys
from transformers import LlamaConfig
from reports.memory.measure import peak_allocated, train
config, arms = json.loads(sys.argv[1])
model = LlamaConfig(**config)
peaks = {}
for arm, (method, options) in arms.items():
    options.setdefault("rank", 8)
    peaks[arm] = peak_allocated(lambda: train(model, method, **options))
print()
print(json.dumps(peaks))
"""


def main() -> None:
    """Run the study."""
    args = common.arguments(str(__doc__))
    if args.quick:
        config = SMALL | {"num_hidden_layers": 2, "vocab_size": 2000}
        rows = compare(config, {"batch": 2, "sequence": 64})
        print(common.table(["method", "predicted, MiB", "measured, MiB", "ratio"], [cells(r) for r in rows]))
        return
    results: dict[str, Any] = {"small": []}
    for model, setting in SETTINGS:
        for row in compare(MODELS[model], setting):
            results["small"].append({"model": model} | row)
            print(results["small"][-1], flush=True)
    results["seven_b"] = seven_b()
    common.keep(HERE, results)
    write_up(json.loads((HERE / "results.json").read_text()))


def compare(config: dict[str, Any], setting: dict[str, Any]) -> list[dict[str, Any]]:
    """Predicted and measured bytes of all arms."""
    arms = {arm: (method, options | setting) for arm, (method, options) in ARMS.items()}
    measured = common.in_process(MEASURE, json.dumps([config, arms])).result
    rows = []
    for arm, (method, options) in arms.items():
        plan = predict(config, method, **options)
        row = {"arm": arm, "predicted": plan["total"], "measured": measured[arm], "moment": plan["moment"]}
        rows.append(row | setting)
    return rows


def predict(config: dict[str, Any], method: str, **options: Any) -> dict[str, Any]:
    """The plan of a LLaMA of this configuration."""
    import tempfile
    from dataclasses import asdict

    from transformers import LlamaConfig

    from htsr import predict_memory

    with tempfile.TemporaryDirectory() as folder:
        LlamaConfig(**config).save_pretrained(folder)
        plan = asdict(predict_memory(folder, method, **options))
        del plan["model"]  # a temporary folder
        return plan


def seven_b() -> list[dict[str, Any]]:
    """What each measure saves on the way from full fine-tuning to OwLore on LLaMA-2-7B; predicted."""
    base: dict[str, Any] = {"batch": 1, "sequence": 1024}
    low = {"checkpointing": True, "rank": 128, "active_blocks": 5}
    papers = low | {"embeddings": "train"}
    steps: list[tuple[str, str, dict[str, Any]]] = [
        ("full fine-tuning, bf16", "full", {}),
        ("+ activation checkpointing", "full", {"checkpointing": True}),
        ("LISA as published, γ=5", "lisa", {"checkpointing": True, "active_blocks": 5, "embeddings": "train"}),
        ("OwLore as published, γ=5, r=128, gradients kept", "owlore", papers | {"gradients": "keep"}),
        ("+ update during backward", "owlore", papers),
        ("+ 8-bit moments", "owlore", papers | {"state_dtype": "8bit"}),
        ("+ low-rank embedding and head", "owlore", papers | {"state_dtype": "8bit", "embeddings": "lowrank"}),
        ("OwLore by default, γ=5: embedding and head frozen, update during backward", "owlore", low),
        ("the same, γ=2", "owlore", low | {"active_blocks": 2}),
        ("GaLore, r=128, update during backward", "galore", {"checkpointing": True, "rank": 128}),
        ("LoRA, r=16", "lora", {"checkpointing": True, "rank": 16}),
        ("QLoRA, r=16", "qlora", {"checkpointing": True, "rank": 16}),
    ]
    return [{"step": name, **predict(MODELS["LLaMA-2-7B"], method, **base, **o)} for name, method, o in steps]


def cells(row: dict[str, Any]) -> list[Any]:
    """An arm's line."""
    predicted, measured = row["predicted"] / 2**20, row["measured"] / 2**20
    return [row["arm"], f"{predicted:.0f}", f"{measured:.0f}", f"{predicted / measured:.3f}"]


def write_up(results: dict[str, Any]) -> None:
    """README.md from results.json."""
    worst = max(abs(r["predicted"] / r["measured"] - 1) for r in results["small"])
    small = [[r["batch"], r["sequence"], *cells(r)] for r in results["small"]]
    parts = ("weights", "gradients", "optimizer", "projectors", "activations", "logits", "workspace")
    big = [
        [r["step"], *(f"{r[part] / 1e9:.2f}" for part in parts), f"**{r['total'] / 1e9:.2f}**"]
        for r in results["seven_b"]
    ]
    text = f"""# Memory of training, predicted and measured

`python -m reports.memory` makes this page. {common.facts(results["machine"])} Peak of torch's CPU allocator over two
steps, float32, by torch.profiler; full, LoRA and LISA with torch's fused AdamW, GaLore and OwLore with `LowRankAdamW`,
which updates during backward unless said otherwise and computes its projectors at every step here. LISA and OwLore
train the two lowest blocks and the last norm; nothing is counted that a sampler would add.

The largest difference between prediction and measurement is {100 * worst:.1f} % (target 10 %).

## LLaMA of 42M parameters, r = 128 (LoRA 16)

{common.table(["batch", "sequence", "method", "predicted, MiB", "measured, MiB", "ratio"], small)}
## LLaMA-2-7B, bfloat16, batch 1 × 1024: predicted only, GB (10⁹ bytes)

Parts are those at the moment of the peak. Not measured here for want of a GPU; without the CUDA context, kernels'
workspaces and fragmentation.

{common.table(["", *parts, "total"], big)}"""
    (HERE / "README.md").write_text(text)


if __name__ == "__main__":
    sys.exit(main())
