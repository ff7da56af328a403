"""htsr on an accelerator: the same numbers as on the CPU, the analysis of a 7B model's shapes, a step by method.

    python -m reports.gpu                     all parts, about eight minutes on an H100
    python -m reports.gpu --part checks       one of checks, analysis, steps
    python -m reports.gpu --quick             the same code with small shapes, on a CPU where there is nothing else

Each result is kept as soon as it is there, in results.json under `--output`, so that a run that is cut short loses
nothing. A check that fails is a line with what it said, and does not end the others.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import htsr
from reports import common

HERE = Path(__file__).parent
SEVEN_B = {  # LLaMA-2-7B: rows, columns, how many
    "attn.q/k/v/o": (4096, 4096, 128),
    "mlp.gate/up": (11008, 4096, 64),
    "mlp.down": (4096, 11008, 32),
    "embed/head": (32000, 4096, 2),
}
SMALL_SHAPES = {"attn.q/k/v/o": (96, 96, 8), "mlp.gate/up": (256, 96, 4), "mlp.down": (96, 256, 2)}
MODEL: dict[str, Any] = {  # TinyLlama-1.1B
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
}
SMALL: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {  # arm: method and options as of htsr.predict_memory
    "full": ("full", {}),
    "LoRA": ("lora", {"rank": 16}),
    "LISA": ("lisa", {"active_blocks": 2}),
    "GaLore": ("galore", {"rank": 128, "gradients": "update"}),
    "OwLore": ("owlore", {"rank": 128, "active_blocks": 2, "gradients": "update"}),
}
NUMBERS = ("alpha", "matrix_rank", "entropy", "stable_rank", "norm", "lambda_max", "trace_log", "erg_num")


def main() -> None:
    """Run the parts and keep what they find."""
    parser = argparse.ArgumentParser(description=str(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small shapes; printed and not kept")
    parser.add_argument("--part", choices=list(PARTS), action="append", help="only this one; may be repeated")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of results.json")
    args = parser.parse_args()
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device is None and not args.quick:
        sys.exit("there is no accelerator here; --quick runs the same code on the CPU")
    device = device or torch.device("cpu")
    file = args.output / "results.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() and not args.quick else {}
    results |= {"device": device_name(device), "machine": common.machine()}
    for part in args.part or PARTS:
        results[part] = []
        for row in PARTS[part](device, args.quick):
            results[part].append(row)
            print(json.dumps(row), flush=True)
            if not args.quick:
                file.write_text(json.dumps(results, indent=1) + "\n")
    if not args.quick:
        write_up(results, args.output)


def device_name(device: torch.device) -> str:
    """What the maker calls it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def clocked(work: Callable[[], Any], device: torch.device) -> tuple[float, int, Any]:
    """Seconds until the device has done `work`, the most bytes that it held meanwhile, and what came out."""
    accelerated = device.type == "cuda"
    gc.collect()
    if accelerated:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    out = work()
    if accelerated:
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, torch.cuda.max_memory_allocated(device) if accelerated else 0, out


def heavy(rows: int, columns: int, seed: int, device: torch.device, rank: int | None = None) -> torch.Tensor:
    """A matrix with power-law correlations on a noise floor, or of a low `rank`; the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    if rank is not None:
        return (torch.randn(rows, rank, generator=generator) @ torch.randn(rank, columns, generator=generator)).to(
            device
        )
    scale = (1 - torch.rand(columns, generator=generator)) ** -0.4
    return (0.02 * torch.randn(rows, columns, generator=generator) * scale).to(device)


# --- the same numbers as on the CPU


def checks(device: torch.device, quick: bool) -> Iterator[dict[str, Any]]:
    """One line per check: the largest relative difference from the CPU, and what it allows."""
    for name, (check, allowed) in CHECKS.items():
        start = time.perf_counter()
        try:
            difference, detail = check(device, quick)
            row: dict[str, Any] = {"check": name, "difference": difference, "allowed": allowed, "detail": detail}
            row["ok"] = difference <= allowed
        except Exception as error:  # a study of what fails goes on
            where = traceback.extract_tb(error.__traceback__)[-1]
            said = f"{type(error).__name__}: {str(error)[:300]} ({Path(where.filename).name}:{where.lineno})"
            row = {"check": name, "ok": False, "detail": said}
        yield row | {"seconds": round(time.perf_counter() - start, 2)}


def rows_agree(options: dict[str, Any]) -> Callable[[torch.device, bool], tuple[float, str]]:
    """A check of `htsr.analyze` with these options: small and square, wide, low rank, full rank at M = 1200."""

    def check(device: torch.device, quick: bool) -> tuple[float, str]:
        shapes = {"small": (64, 80), "wide": (300, 800), "square": (600, 600) if quick else (1200, 1200)}
        state = {f"{n}.weight": heavy(*shape, i, torch.device("cpu")) for i, (n, shape) in enumerate(shapes.items())}
        state["low.weight"] = heavy(400, 300, 9, torch.device("cpu"), rank=8)
        there = {name: tensor.to(device) for name, tensor in state.items()}
        found = [htsr.analyze(s, device=str(d), **options) for s, d in ((state, "cpu"), (there, device))]
        worst, where = 0.0, ""
        for a, b in zip(*found, strict=True):
            for number in NUMBERS:
                x, y = getattr(a, number), getattr(b, number)
                if x == y:
                    continue
                off = abs(x - y) / max(abs(x), abs(y)) if x is not None and y is not None else float("inf")
                if off > worst:
                    worst, where = off, f"{a.name} {number}: {x} and {y} ({b.route})"
        return worst, where

    return check


def trained(device: torch.device, make: Callable[[Any], Any], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Weights after four steps of a small LLaMA on fixed tokens; `make` gives the optimizer of a model."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL), dtype=dtype).to(device)
    optimizer = make(model)
    for step in range(4):
        tokens = torch.randint(0, SMALL["vocab_size"], (2, 16), generator=torch.Generator().manual_seed(step)).to(
            device
        )
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach().cpu().float() for name, p in model.named_parameters()}


def training_agrees(make: Callable[[Any], Any]) -> Callable[[torch.device, bool], tuple[float, str]]:
    """A check that the steps of an optimizer on the device move the weights as on the CPU."""

    def check(device: torch.device, quick: bool) -> tuple[float, str]:
        here, there = trained(torch.device("cpu"), make), trained(device, make)
        start = trained(torch.device("cpu"), lambda model: torch.optim.SGD(model.parameters(), lr=0.0))
        off = {n: float((here[n] - there[n]).norm() / max(float((here[n] - start[n]).norm()), 1e-12)) for n in here}
        moved = {
            n: d for n, d in off.items() if not torch.equal(here[n], start[n]) or not torch.equal(there[n], start[n])
        }
        worst = max(moved, key=lambda n: moved[n])
        return moved[worst], f"{worst}; {len(moved)} of {len(off)} tensors move"

    return check


def layerwise(model: Any) -> Any:
    """AdamW with LLR's rates."""
    return htsr.layerwise(torch.optim.AdamW(model.parameters(), lr=1e-3), model, total_steps=10)


def low_rank(**options: Any) -> Callable[[Any], Any]:
    """LowRankAdamW with the given options."""
    return lambda model: htsr.LowRankAdamW(htsr.low_rank_groups(model, rank=8), lr=1e-3, **options)


def sampled(model: Any) -> Any:
    """AdamW, one block at a time."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    htsr.LayerSampler(model, active=1, interval=2).attach(optimizer)
    return optimizer


def resumes(make: Callable[[Any], Any]) -> Callable[[torch.device, bool], tuple[float, str]]:
    """A check that a state dict that went through the CPU goes on bit for bit."""

    def check(device: torch.device, quick: bool) -> tuple[float, str]:
        from transformers import AutoModelForCausalLM, LlamaConfig

        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL)).to(device)
        twin: Any = copy.deepcopy(model)

        def steps(model: Any, optimizer: Any, which: range) -> None:
            for step in which:
                tokens = torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(step)).to(device)
                model(input_ids=tokens, labels=tokens).loss.backward()
                optimizer.step()
                optimizer.zero_grad()

        optimizer = make(model)
        steps(model, optimizer, range(3))
        kept = [torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.detach().cpu().clone(), x.state_dict())
                for x in (model, optimizer)]  # fmt: skip
        steps(model, optimizer, range(3, 6))
        other = make(twin)
        twin.load_state_dict(kept[0])
        other.load_state_dict(kept[1])
        steps(twin, other, range(3, 6))
        pairs = zip(model.parameters(), twin.parameters(), strict=True)
        return max(float((a - b).detach().abs().max()) for a, b in pairs), "largest difference of a weight"

    return check


CHECKS: dict[str, tuple[Callable[[torch.device, bool], tuple[float, str]], float]] = {
    "analyze": (rows_agree({}), 1e-4),
    "analyze, hill": (rows_agree({"fit": "hill"}), 1e-4),
    "analyze, float64": (rows_agree({"dtype": "float64"}), 1e-6),
    "analyze, windows": (rows_agree({"windows": htsr.Windows(100, 3)}), 1e-4),
    "AdamW (torch's own distance)": (
        training_agrees(lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3)),
        1e-1,
    ),
    "layerwise": (training_agrees(layerwise), 1e-1),
    "low rank, svd": (training_agrees(low_rank(method="svd")), 1e-1),
    "low rank, randomized": (training_agrees(low_rank()), 1e-1),
    "low rank, project": (training_agrees(low_rank(gradients="project")), 1e-1),
    "low rank, update": (training_agrees(low_rank(gradients="update")), 1e-1),
    "low rank, bfloat16 moments": (training_agrees(low_rank(state_dtype="bfloat16")), 1e-1),
    "sampler": (training_agrees(sampled), 1e-1),
    "resume: layerwise": (resumes(layerwise), 0.0),
    "resume: low rank": (resumes(low_rank()), 0.0),
    "resume: sampler": (resumes(sampled), 0.0),
}


# --- the analysis of a 7B model's shapes


def analysis(device: torch.device, quick: bool) -> Iterator[dict[str, Any]]:
    """Seconds per matrix by shape and precision, on the device and with `device="cpu"`, and what a 7B model adds up to."""
    shapes = SMALL_SHAPES if quick else SEVEN_B
    rows_agree({})(device, True)  # initialises the solver
    for dtype in ("auto", "float32", "float64"):
        total = 0.0
        for role, (rows, columns, count) in shapes.items():
            W = heavy(rows, columns, 1, device).bfloat16()
            try:
                seconds, peak, out = clocked(
                    lambda W=W, dtype=dtype: htsr.analyze({"w.weight": W}, device=str(device), dtype=dtype), device
                )
            except Exception as error:
                yield {"dtype": dtype, "role": role, "failed": f"{type(error).__name__}: {str(error)[:200]}"}
                continue
            row = next(iter(out))
            total += seconds * count
            yield {
                "dtype": dtype, "role": role, "rows": rows, "columns": columns, "count": count, "seconds": seconds,
                "peak_mib": peak / 2**20, "route": row.route, "alpha": row.alpha, "status": row.status,
            }  # fmt: skip
        yield {"dtype": dtype, "role": "all", "seconds": total}


# --- a training step by method


def steps(device: torch.device, quick: bool) -> Iterator[dict[str, Any]]:
    """Milliseconds of a step and peak memory by method, measured and predicted; bfloat16, checkpointing, 2 × 1024."""
    config, (batch, sequence) = (SMALL, (1, 32)) if quick else (MODEL, (2, 1024))
    for arm, (method, options) in METHODS.items():
        options = options | ({"rank": 8} if quick and "rank" in options else {})
        try:
            yield {"arm": arm, **step(device, config, method, options, batch, sequence)}
        except Exception as error:
            yield {"arm": arm, "failed": f"{type(error).__name__}: {str(error)[:300]}"}


def step(
    device: torch.device, config: dict[str, Any], method: Any, options: dict[str, Any], batch: int, sequence: int
) -> dict[str, Any]:
    """Six steps, the last four timed."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    llama = LlamaConfig(**config)
    plan = htsr.predict_memory(
        AutoModelForCausalLM.from_config(llama, dtype=torch.bfloat16), method, batch=batch, sequence=sequence,
        dtype="bfloat16", checkpointing=True, **options,
    )  # fmt: skip

    def run() -> list[float]:
        with torch.device(device):
            model: Any = AutoModelForCausalLM.from_config(llama, dtype=torch.bfloat16)
        model.config.use_cache = False
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if method == "lora":
            import peft

            model.enable_input_require_grads()
            lora = peft.LoraConfig(r=options["rank"], target_modules="all-linear", task_type="CAUSAL_LM")
            model = peft.get_peft_model(model, lora)
        if method in ("galore", "owlore"):
            groups = htsr.low_rank_groups(model, options["rank"])
            optimizer: Any = htsr.LowRankAdamW(groups, lr=1e-5, gradients=options["gradients"])
        else:
            trained = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
        if method in ("lisa", "owlore"):
            htsr.LayerSampler(model, active=options["active_blocks"], interval=100).attach(optimizer)
        tokens = torch.randint(0, config["vocab_size"], (batch, sequence), device=device)

        def one() -> None:
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        taken = []
        for _ in range(6):
            start = time.perf_counter()
            one()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            taken.append(time.perf_counter() - start)
        return taken

    _, peak, taken = clocked(run, device)
    later = common.median(taken[2:])
    return {
        "method": method, "first_ms": 1e3 * taken[0], "step_ms": 1e3 * later,
        "tokens_per_second": batch * sequence / later, "peak_mib": peak / 2**20, "predicted_mib": plan.total / 2**20,
    }  # fmt: skip


PARTS: dict[str, Callable[[torch.device, bool], Iterator[dict[str, Any]]]] = {
    "checks": checks,
    "analysis": analysis,
    "steps": steps,
}


def write_up(results: dict[str, Any], folder: Path) -> None:
    """README.md from the results that are there."""
    text = f"# On an accelerator\n\n`python -m reports.gpu` makes this page. {results['device']}; {common.facts(results['machine'])}\n"
    if rows := results.get("checks"):
        bad = sum(not row["ok"] for row in rows)
        text += f"\n## The same numbers as on the CPU\n\n{bad} of {len(rows)} checks fail.\n\n"
        cells = [
            [r["check"], "ok" if r["ok"] else "**fails**", r.get("difference", ""), r.get("allowed", ""), r["detail"]]
            for r in rows
        ]
        text += common.table(["check", "", "largest difference", "allowed", "where"], cells)
    if rows := results.get("analysis"):
        text += "\n## Analysis of LLaMA-2-7B's shapes, bfloat16\n\nSeconds per matrix, default metrics; the last line of each precision is the whole model.\n\n"
        cells = [
            [r["dtype"], r["role"], r.get("route", r.get("failed", "")), r.get("seconds", ""), r.get("peak_mib", "")]
            for r in rows
        ]
        text += common.table(["precision", "matrices", "route", "seconds", "peak MiB"], cells)
    if rows := results.get("steps"):
        text += (
            "\n## A training step by method\n\nTinyLlama-1.1B's shapes, bfloat16, checkpointing, 2 × 1024 tokens.\n\n"
        )
        cells = [
            [
                r["arm"],
                r.get("step_ms", r.get("failed", "")),
                r.get("tokens_per_second", ""),
                r.get("peak_mib", ""),
                r.get("predicted_mib", ""),
            ]
            for r in rows
        ]
        text += common.table(["method", "ms per step", "tokens/s", "peak MiB", "predicted MiB"], cells)
    (folder / "README.md").write_text(text)


if __name__ == "__main__":
    main()
