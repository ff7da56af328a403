"""Peak memory of training by method: predicted by `htsr.predict_memory`, and measured on real steps.

    python -m reports.memory            the whole study, about 20 minutes on one core
    python -m reports.memory --quick    one small model, one setting

"Measured" is the most that torch's CPU allocator held at once over two training steps (torch.profiler), weights
included; the first step is of a few tokens, and makes the optimizer's states. Weights are random, which changes no size.
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
    "SmolLM2-135M": common.SMOLLM2,
    "LLaMA-2-7B": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32000,
        "dtype": "bfloat16",
    },
}
PUBLISHED = {"rank": 128, "active_blocks": 2, "embeddings": "train"}
UPDATE = {"gradients": "update"}  # during backward
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("full", {}),
    "LoRA": ("lora", {"rank": 16}),
    "GaLore": ("galore", {"rank": 128, **UPDATE}),
    "GaLore, gradients kept": ("galore", {"rank": 128}),
    "LISA, embeddings trained": ("lisa", {"active_blocks": 2, "embeddings": "train"}),
    "LISA": ("lisa", {"active_blocks": 2}),
    "OwLore, embeddings trained": ("owlore", PUBLISHED | UPDATE),
    "OwLore": ("owlore", {"rank": 128, "active_blocks": 2, **UPDATE}),
}
SMOLLM2_ARMS = ARMS | {
    "QLoRA": ("qlora", {"rank": 16}),
    "GaLore, 8-bit moments": ("galore", {"rank": 128, "state_dtype": "8bit", **UPDATE}),
    "OwLore, embeddings trained, gradients kept": ("owlore", PUBLISHED),
    "OwLore, embeddings trained, 8-bit moments": ("owlore", PUBLISHED | UPDATE | {"state_dtype": "8bit"}),
    "OwLore, 8-bit moments": ("owlore", {"rank": 128, "active_blocks": 2, "state_dtype": "8bit", **UPDATE}),
}
SMOLLM2_SETTINGS: tuple[dict[str, Any], ...] = (
    {"batch": 1, "sequence": 512, "dtype": "float32", "checkpointing": False},
    {"batch": 1, "sequence": 512, "dtype": "float32", "checkpointing": True},
    {"batch": 4, "sequence": 256, "dtype": "bfloat16", "checkpointing": True},
)
WATERFALL = {  # measure: the arm that has it and all before; 1 × 512, float32, checkpointing
    "activation checkpointing": "full",
    "two blocks at a time (LISA)": "LISA, embeddings trained",
    "low rank (OwLore as published)": "OwLore, embeddings trained, gradients kept",
    "update during backward": "OwLore, embeddings trained",
    "8-bit moments": "OwLore, embeddings trained, 8-bit moments",
    "embedding and head frozen": "OwLore, 8-bit moments",
}
HEADLINE, WANTED = 21, 17  # GB: OwLore's own figure for LLaMA-2-7B, and the goal
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
        config = SMALL | {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 1000}
        rows = compare(config, SMOLLM2_ARMS, {"batch": 2, "sequence": 64})
        print(common.table(["method", "predicted, MiB", "measured, MiB", "ratio"], [cells(r) for r in rows]))
        return
    results: dict[str, Any] = {"small": []}
    for setting in ({"batch": 1, "sequence": 128}, {"batch": 4, "sequence": 256}):
        results["small"] += compare(MODELS["LLaMA, 42M"], ARMS, setting)
    results["smollm2"] = []
    for setting in SMOLLM2_SETTINGS:
        results["smollm2"] += compare(MODELS["SmolLM2-135M"], SMOLLM2_ARMS, setting)
        print(results["smollm2"], flush=True)
    results["seven_b"] = seven_b()
    results["papers"] = papers()
    common.keep(HERE, results)
    write_up(json.loads((HERE / "results.json").read_text()))


def compare(
    config: dict[str, Any], methods: dict[str, tuple[str, dict[str, Any]]], setting: dict[str, Any]
) -> list[dict[str, Any]]:
    """Predicted and measured bytes of all arms."""
    arms = {arm: (method, options | setting) for arm, (method, options) in methods.items()}
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
    low = {"checkpointing": True, "rank": 128, "active_blocks": 5, **UPDATE}
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
        ("GaLore, r=128, update during backward", "galore", {"checkpointing": True, "rank": 128, **UPDATE}),
        ("LoRA, r=16", "lora", {"checkpointing": True, "rank": 16}),
        ("QLoRA, r=16", "qlora", {"checkpointing": True, "rank": 16}),
    ]
    return [{"step": name, **predict(MODELS["LLaMA-2-7B"], method, **base, **o)} for name, method, o in steps]


def papers() -> list[dict[str, Any]]:
    """OwLore on LLaMA-2-7B at the paper's settings, measure by measure, and full fine-tuning; predicted totals."""
    rows = []
    for sequence in (512, 1024):
        base: dict[str, Any] = {"batch": 1, "sequence": sequence, "checkpointing": True}
        full = predict(MODELS["LLaMA-2-7B"], "full", **base)["total"]
        for active in (2, 5):
            published = base | PUBLISHED | {"active_blocks": active}
            variants = {
                "published": published,
                "update": published | UPDATE,
                "8bit": published | UPDATE | {"state_dtype": "8bit"},
                "default": base | {"active_blocks": active, "rank": 128, **UPDATE},
            }
            totals = {v: predict(MODELS["LLaMA-2-7B"], "owlore", **o)["total"] for v, o in variants.items()}
            rows.append({"sequence": sequence, "active_blocks": active, "full": full, **totals})
    return rows


def waterfall(rows: list[dict[str, Any]]) -> list[list[Any]]:
    """What each measure saves, one after the other, of what was measured on SmolLM2-135M."""
    plain, checkpointed = (
        {r["arm"]: r for r in rows if all(r[key] == value for key, value in setting.items())}
        for setting in SMOLLM2_SETTINGS[:2]
    )
    before = plain["full"]
    lines: list[list[Any]] = [["full fine-tuning", *cells(before)[1:3], ""]]
    for measure, arm in WATERFALL.items():
        now = checkpointed[arm]
        saved = (before["measured"] - now["measured"]) / 2**20
        lines.append([f"+ {measure}", *cells(now)[1:3], f"{saved:.0f}"])
        before = now
    return lines


def cells(row: dict[str, Any]) -> list[Any]:
    """An arm's line."""
    predicted, measured = row["predicted"] / 2**20, row["measured"] / 2**20
    return [row["arm"], f"{predicted:.0f}", f"{measured:.0f}", f"{predicted / measured:.3f}"]


def write_up(results: dict[str, Any]) -> None:
    """README.md from results.json."""
    worst = max(abs(r["predicted"] / r["measured"] - 1) for r in results["small"] + results["smollm2"])
    small = [[r["batch"], r["sequence"], *cells(r)] for r in results["small"]]
    parts = ("weights", "gradients", "optimizer", "projectors", "activations", "logits", "workspace")
    big = [
        [r["step"], *(f"{r[part] / 1e9:.2f}" for part in parts), f"**{r['total'] / 1e9:.2f}**"]
        for r in results["seven_b"]
    ]
    smollm2 = [
        [
            f"{r['batch']} × {r['sequence']}",
            r["dtype"],
            "yes" if r["checkpointing"] else "no",
            *cells(r)[:3],
            f"{100 * (r['predicted'] / r['measured'] - 1):+.1f}",
        ]
        for r in results["smollm2"]
    ]
    variants = ("full", "published", "update", "8bit", "default")
    settings = [
        [r["sequence"], r["active_blocks"], *(f"{r[v] / 1e9:.2f}" for v in variants)] for r in results["papers"]
    ]
    text = f"""# Memory of training, predicted and measured

`python -m reports.memory` makes this page. {common.facts(results["machine"])} Peak of torch's CPU allocator over two
steps by torch.profiler; full, LoRA, QLoRA and LISA with torch's fused AdamW, GaLore and OwLore with `LowRankAdamW`, updates during backward unless said otherwise and computes its projectors at every step here. LISA and OwLore train the
two lowest blocks and the last norm; nothing is counted that a sampler would add. QLoRA's blocks are bitsandbytes'
`Linear4bit` (NF4, double quantisation) on the CPU; embedding, head and norms keep their dtype.

The largest difference between prediction and measurement is {100 * worst:.1f} % (target 10 %).

## SmolLM2-135M's shapes, r = 128 (LoRA and QLoRA 16), γ = 2

{common.table(["batch", "dtype", "checkpointing", "method", "predicted, MiB", "measured, MiB", "error, %"], smollm2)}
What each measure saves, one after the other, at 1 × 512 in float32:

{common.table(["", "predicted, MiB", "measured, MiB", "saved, MiB (measured)"], waterfall(results["smollm2"]))}
## LLaMA of 42M parameters, float32, r = 128 (LoRA 16)

{common.table(["batch", "sequence", "method", "predicted, MiB", "measured, MiB", "ratio"], small)}
## LLaMA-2-7B, bfloat16, batch 1 × 1024: predicted only, GB (10⁹ bytes)

Parts are those at the moment of the peak. Not measured here for want of a GPU; without the CUDA context, kernels'
workspaces and fragmentation.

{common.table(["", *parts, "total"], big)}
## LLaMA-2-7B at OwLore's setting: prediction, not measurement, GB (10⁹ bytes)

bfloat16, batch 1, r = 128, activation checkpointing. "Published": embedding and head trained, gradients kept until the
step; the next two add to it one after the other; "by default": update during backward, embedding and head frozen,
float32 moments. OwLore reports {HEADLINE} GB; the goal is under {WANTED} GB.

{common.table(["sequence", "γ", "full", "OwLore as published", "+ update during backward", "+ 8-bit moments", "OwLore by default"], settings)}"""
    (HERE / "README.md").write_text(text)


if __name__ == "__main__":
    sys.exit(main())
