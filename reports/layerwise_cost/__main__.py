"""What layerwise learning rates cost: one event by ingredient, a run's events as a share of it, the optimizer's step.

    python -m reports.layerwise_cost [--quick]

Everything runs on the CPU. LLaMA-shaped models of freshly drawn weights, 32,000 words, embedding and head untied.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from reports import common

HERE = Path(__file__).parent
MODELS = {"768/1512/6": (768, 1512, 6), "768/2048/12": (768, 2048, 12)}
QUICK = {"256/512/2": (256, 512, 2)}
# the paper's settings: events at step 1 and every 100 steps of the first fifth, 0.52 M tokens a step
INTERVAL, ACTIVE, TOKENS, STEPS = 100, 0.2, 524_288, 10_000
SMALL_BATCH = 8_192

COMMON = """
import json, statistics, sys, time
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM
hidden, inner, blocks, quick = (int(value) for value in sys.argv[1:5])
config = LlamaConfig(hidden_size=hidden, intermediate_size=inner, num_hidden_layers=blocks,
                     num_attention_heads=max(1, hidden // 64), vocab_size=2000 if quick else 32000,
                     max_position_embeddings=1024, tie_word_embeddings=False)
torch.manual_seed(0)
model = LlamaForCausalLM(config)
def clock(work, times):
    taken = []
    for _ in range(times):
        start = time.perf_counter(); work(); taken.append(time.perf_counter() - start)
    return statistics.median(taken)
"""

EVENT = (
    COMMON
    + """
import htsr
from htsr.analysis.sharing import share
from htsr.matrices.sharded import open_live
from htsr.spectra.esd import esd
from htsr.spectra.scores import score
from htsr.training.layerwise import live_scores as scoring
from htsr.training.layerwise.hooks import engine_of
times = 1 if quick else 3
matrices = open_live(model).matrices
body = [m for m in matrices if min(m.shape) >= 50 and not m.role.startswith(("embed", "head"))]
ends = [m for m in matrices if m.role.startswith(("embed", "head"))]
# LAPACK's SVD takes minutes for what it is worth: one matrix of each shape, times their number
def svd_all(matrices):
    shapes = {}
    for m in matrices:
        shapes.setdefault(m.shape, []).append(m)
    return sum(len(same) * clock(lambda: torch.linalg.svdvals(same[0].load().detach()), 1) for same in shapes.values())
def one_by_one(matrices, **how):
    for m in matrices:
        score(esd(m.load().detach(), **how), "alpha")
out = {"matrices": len(body), "parameters": sum(p.numel() for p in model.parameters())}
out["svd_everything"] = svd_all(body) + svd_all(ends)
out["svd"] = out["svd_everything"] - svd_all(ends)
out["gram_float64"] = clock(lambda: one_by_one(body, route="gram", dtype="float64"), times)
out["gram_float32"] = clock(lambda: one_by_one(body, route="gram", dtype="float32"), times)
out["lanczos"] = clock(lambda: one_by_one(body[:7], route="lanczos"), 1) * len(body) / 7
exact = [score(esd(m.load().detach(), route="gram", dtype="float64"), "alpha") for m in body[:7]]
single = [score(esd(m.load().detach(), route="gram", dtype="float32"), "alpha") for m in body[:7]]
rough = [score(esd(m.load().detach(), route="lanczos"), "alpha") for m in body[:7]]
out["float32_error"] = float(np.abs(np.subtract(single, exact)).max())
out["lanczos_error"] = float(np.abs(np.subtract(rough, exact)).max())
policy = htsr.Policy()
out["side_by_side"] = clock(lambda: scoring.scores(body, policy, "cpu"), times)
mine = [body[i] for i in share([m.cost for m in body], 8)[0]]
out["one_of_eight_ranks"] = clock(lambda: scoring.scores(mine, policy, "cpu"), times)
optimizer = htsr.layerwise(torch.optim.SGD(model.parameters(), lr=1e-3), model)
out["event"] = clock(lambda: engine_of(optimizer).event(optimizer, 1), times)
out["opening"] = clock(lambda: open_live(model), times)
print(json.dumps(out))
"""
)

STEP = (
    COMMON
    + """
import htsr
tokens = torch.randint(0, config.vocab_size, (1, 128 if quick else 512))
def forward_backward():
    model.zero_grad()
    model(input_ids=tokens, labels=tokens).loss.backward()
out = {"tokens": tokens.numel(), "forward_backward": clock(forward_backward, 2 if quick else 3)}
options = {"loop": {"foreach": False}, "fused": {"fused": True}}
for name, more in options.items():
    plain = torch.optim.AdamW(model.parameters(), lr=1e-9, **more)
    ours = htsr.layerwise(torch.optim.AdamW(model.parameters(), lr=1e-9, **more), model, interval=None)
    out["groups"] = len(ours.param_groups)
    plain.step(); ours.step()
    pairs = []
    for _ in range(3 if quick else 40):
        pairs.append([clock(plain.step, 1), clock(ours.step, 1)])
    fastest = [min(taken) for taken in zip(*pairs)]  # whatever else the machine does only adds
    out[name] = {"plain": fastest[0], "layerwise": fastest[1], "ratio": fastest[1] / fastest[0]}
    del plain, ours
print(json.dumps(out))
"""
)


def main() -> None:
    """Measure, keep, write up."""
    args = common.arguments(__doc__ or "", ("--write-up", {"action": "store_true", "help": "only rewrite the page"}))
    if not args.write_up:
        results: dict[str, Any] = {"models": {}}
        for name, shape in (QUICK if args.quick else MODELS).items():
            words = [*map(str, shape), str(int(args.quick))]
            event, step = common.in_process(EVENT, *words), common.in_process(STEP, *words)
            results["models"][name] = {"event": event.result, "step": step.result}
            print(json.dumps({name: results["models"][name]}, indent=1), flush=True)
            print({k: f"{v:.2e}" for k, v in shares(results["models"][name]).items()}, flush=True)
        if args.quick:
            return
        common.keep(HERE, results)
    write_up(json.loads((HERE / "results.json").read_text()))


def events(steps: int = STEPS) -> int:
    """Events of a run at the paper's settings."""
    return 1 + int(ACTIVE * steps) // INTERVAL


def shares(measured: dict[str, Any]) -> dict[str, float]:
    """Seconds of all events over seconds of all steps, at the paper's batch and at one of 8,192 tokens."""
    step, event = measured["step"], measured["event"]["event"]
    per_token = step["forward_backward"] / step["tokens"]
    return {
        str(tokens): events() * event / (STEPS * (per_token * tokens + step["fused"]["plain"]))
        for tokens in (TOKENS, SMALL_BATCH)
    }


def write_up(results: dict[str, Any]) -> None:
    """README.md from results.json."""
    models = results["models"]
    labels = {
        "svd_everything": "SVD of every matrix, embedding and head too (as the reference does)",
        "svd": "SVD, pinned matrices left out",
        "gram_float64": "Gram matrix, float64, one after the other",
        "gram_float32": "Gram matrix, float32",
        "side_by_side": "… side by side, one BLAS thread each",
        "one_of_eight_ranks": "… the share of one of eight ranks",
        "lanczos": "(Lanczos quadrature instead, one after the other)",
        "event": "**the whole event, one process**",
    }
    rows = [[label, *(m["event"][key] for m in models.values())] for key, label in labels.items()]
    steps = [
        [
            f"{name}, {kind}",
            1000 * m["step"][kind]["plain"],
            1000 * m["step"][kind]["layerwise"],
            f"**{m['step'][kind]['ratio']:.3f}**",
        ]
        for name, m in models.items()
        for kind in ("loop", "fused")
    ]
    part = [
        [f"{int(tokens):,}", *(f"{100 * shares(m)[tokens]:.2g} %" for m in models.values())]
        for tokens in shares(next(iter(models.values())))
    ]
    errors = max(m["event"]["float32_error"] for m in models.values())
    rough = max(m["event"]["lanczos_error"] for m in models.values())
    counts = ", ".join(
        f"{name}: {m['event']['matrices']} measured matrices, {m['event']['parameters'] / 1e6:.0f} M parameters, "
        f"{m['step']['groups']} groups"
        for name, m in models.items()
    )
    text = f"""# What layerwise learning rates cost

`python -m reports.layerwise_cost` makes this page. {common.facts(results["machine"])}

LLaMA shapes (hidden / feed-forward / blocks), vocabulary 32,000, embedding and head untied. {counts}.
**CPU only**: no accelerator was at hand, so nothing here says what an event costs on one, nor what many small groups
cost where each of them launches its own kernels.

## One event

Seconds, medians of three. The SVD rows are one matrix of each shape times their number.

{common.table(["", *models], rows)}
α in float32 differs from float64 by at most {errors:.1e}; by Lanczos by up to {rough:.2g}, which is why it is left out
below M = 16384. Matrices of equal shape go through LAPACK in one call only up to M = 500: above that it releases the
interpreter's lock and threads do the same without the copy. An event computes neither shape nulls nor ERG unless the
score asks for them; naming roles and finding the matrices anew takes {max(m["event"]["opening"] for m in models.values()) * 1000:.0f} ms.

## A run's events as a share of its training time

{events()} events in {STEPS:,} steps: step 1 and every {INTERVAL} of the first {ACTIVE:.0%}. Time of forward and backward
is measured at {models[next(iter(models))]["step"]["tokens"]} tokens and taken to be proportional to their number.

{common.table(["tokens a step", *models], part)}
The paper's batch is {TOKENS:,} tokens; its implementation reports about 0.8 % (on GPUs, which are better at training
steps than at eigenvalues: a share measured on a CPU does not carry over).

## One optimizer step

AdamW, milliseconds: one group against one group per matrix with hooks, alternating, the fastest of forty each.
The loop over parameters does the same work in both and is bound by memory: its ratio scatters to either side of 1 from run
to run and shows how far such figures can be trusted.

{common.table(["", "plain", "layerwise", "ratio"], steps)}"""
    (HERE / "README.md").write_text(text)


if __name__ == "__main__":
    sys.exit(main())
