"""What training costs on the device: layerwise events, a step and the peak by method, the host's time, rounding."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

import htsr
from reports import common
from reports.gpu.card import Bench, fastest, forget, llama, llama_config, peak, said
from reports.gpu.shapes import LAYERED, SEVEN_B, SMALL
from reports.step_time.host import host_times

# --- layerwise


def layerwise(bench: Bench) -> Iterator[dict[str, Any]]:
    """One row per model: a plain step, a layerwise one, and an event; float32 weights, bfloat16 autocast, 8 × 512 tokens."""
    sizes = {"small": SMALL} if bench.small else LAYERED
    for name, config in sizes.items():
        row: dict[str, Any] = {"model": name}
        try:
            for key, value in layered(bench, config):
                row[key] = value
        except Exception as error:
            row["failed"] = said(error)
        yield row


def layered(bench: Bench, config: dict[str, int]) -> Iterator[tuple[str, Any]]:
    """Milliseconds by what was done."""
    device = bench.device
    forget(device)
    model = llama(device, torch.float32, **config)
    tokens = torch.randint(0, config["vocab_size"], (1, 32) if bench.small else (8, 512), device=device)

    def backward() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens).loss
        model.zero_grad()
        loss.backward()

    yield "parameters", sum(p.numel() for p in model.parameters())
    yield "tokens", tokens.numel()
    yield "forward_backward_ms", 1e3 * fastest(backward, device)
    plain = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    yield "plain_ms", 1e3 * fastest(plain.step, device, 10)
    del plain
    ours = htsr.layerwise(torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True), model, interval=None)
    start = time.perf_counter()
    ours.step()
    common.wait_for(device)
    yield "first_step_with_event_ms", 1e3 * (time.perf_counter() - start)
    yield "layerwise_ms", 1e3 * fastest(ours.step, device, 10)
    yield "groups", len(ours.param_groups)


# --- a step by method

METHODS: dict[str, tuple[str, dict[str, Any]]] = {  # arm: method and options as of htsr.predict_memory
    "OwLore": ("owlore", {"rank": 128, "active_blocks": 2, "gradients": "update"}),
    "OwLore, streamed": ("owlore", {"rank": 128, "active_blocks": 2, "gradients": "update", "frozen_weights": "host"}),
    "LISA": ("lisa", {"active_blocks": 2}),
    "GaLore": ("galore", {"rank": 128, "gradients": "update"}),
    "LoRA": ("lora", {"rank": 16}),
    "full": ("full", {}),
}
BATCH, SEQUENCE = 1, 1024


def sized_methods(small: bool) -> dict[str, tuple[str, dict[str, Any]]]:
    """The arms, at a rank that a model in miniature can have where it is `small`."""
    ranks = {"rank": 8} if small else {}
    return {arm: (method, o | ranks if "rank" in o else o) for arm, (method, o) in METHODS.items()}


def methods(bench: Bench) -> Iterator[dict[str, Any]]:
    """Milliseconds of a step and peak memory by method; LLaMA-2-7B in bfloat16, checkpointing, 1 × 1024 tokens."""
    for arm, (method, options) in sized_methods(bench.small).items():
        forget(bench.device)
        try:
            if bench.left() < 8:
                raise TimeoutError("no time was left")
            row = step(bench, method, options)
        except Exception as error:
            row = {"failed": said(error)}
        gc.collect()
        yield {"arm": arm, **row}


def step(bench: Bench, method: str, options: dict[str, Any]) -> dict[str, Any]:
    """Six steps, or three, of which the first has the projectors and the states to make; the median of the last ones."""
    device, config = bench.device, SMALL if bench.small else SEVEN_B
    batch, sequence = (1, 32) if bench.small else (BATCH, SEQUENCE)
    start = time.perf_counter()
    model, train = prepared(device, config, method, options)
    common.wait_for(device)
    made = time.perf_counter() - start
    forget(device)  # the peak is that of training
    tokens = torch.randint(0, config["vocab_size"], (batch, sequence), device=device)
    taken = []
    for _ in range(3 if bench.small else 6):
        start = time.perf_counter()
        model(input_ids=tokens, labels=tokens).loss.backward()
        train.step()
        train.zero_grad()
        common.wait_for(device)
        taken.append(time.perf_counter() - start)
    later = common.median(taken[2:])
    return {
        "making_s": made,
        "first_ms": 1e3 * taken[0],
        "step_ms": 1e3 * later,
        "tokens_per_second": batch * sequence / later,
        "peak_gib": peak(device) / 2**30,
        "reserved_gib": torch.accelerator.max_memory_reserved(device) / 2**30 if device.type == "cuda" else 0.0,
    }


def prepared(device: torch.device, config: dict[str, int], method: str, options: dict[str, Any]) -> tuple[Any, Any]:
    """A model that trains by this method, and its optimizer."""
    streamed = options.get("frozen_weights", "device") != "device"
    model = llama(device, **config)
    if streamed:
        model.to("cpu")
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
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)
    if method in ("lisa", "owlore"):
        sampler = htsr.LayerSampler(model, active=options["active_blocks"], interval=100)
        if streamed:
            htsr.stream_frozen(model, sampler, device=device)
        sampler.attach(optimizer)
    return model, optimizer


def predictions(small: bool) -> dict[str, Any]:
    """GiB at the peak by method as `htsr.predict_memory` has it, of the first two if `small`; needs no device."""
    config, (batch, sequence) = (SMALL, (1, 32)) if small else (SEVEN_B, (BATCH, SEQUENCE))
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(llama_config(**config))
    found: dict[str, Any] = {}
    for arm, (method, options) in list(sized_methods(small).items())[: 2 if small else None]:
        try:
            plan = htsr.predict_memory(
                model, method, batch=batch, sequence=sequence, dtype="bfloat16", checkpointing=True, **options
            )  # type: ignore[arg-type]
            found[arm] = plan.total / 2**30
        except htsr.HtsrError as error:
            found[arm] = said(error)
    return found


# --- the optimizers' host time


def hosts(bench: Bench) -> Iterator[dict[str, Any]]:
    """Milliseconds of the host for a step of many tiny tensors, and ratios to torch's AdamW."""
    return host_times(bench.device, *((2, 2) if bench.small else (30, 15)))


# --- narrow weights

ROUNDINGS = ("nearest", "stochastic", "kahan", "master")


def rounding(bench: Bench) -> Iterator[dict[str, Any]]:
    """What bfloat16 weights lose: 40 steps of a LLaMA of 60M parameters on a chain of words, by how they are rounded."""
    arms: dict[str, tuple[torch.dtype, Callable[[Any], Any]]] = {
        "float32": (torch.float32, lambda model: torch.optim.AdamW(model.parameters(), lr=LR, fused=True)),
        "bfloat16, torch's AdamW": (
            torch.bfloat16,
            lambda model: torch.optim.AdamW(model.parameters(), lr=LR, fused=True),
        ),
    }
    for how in ROUNDINGS:
        arms[f"bfloat16, {how}"] = (
            torch.bfloat16,
            lambda model, how=how: htsr.LowRankAdamW(model.parameters(), lr=LR, rounding=how),
        )
    for arm, (dtype, make) in arms.items():
        forget(bench.device)
        try:
            row = narrow(bench, dtype, make)
        except Exception as error:
            row = {"failed": said(error)}
        yield {"arm": arm, **row}


LR = 2e-5


def narrow(bench: Bench, dtype: torch.dtype, make: Callable[[Any], Any]) -> dict[str, Any]:
    """Part of the entries that have not moved, the mean loss of the last ten steps, milliseconds of a step, the peak."""
    device, config = bench.device, SMALL if bench.small else LAYERED["60M"]
    steps = 4 if bench.small else 40
    model = llama(device, dtype, **config)
    optimizer = make(model)
    before = {name: p.detach().cpu().clone() for name, p in model.named_parameters()}
    losses, times = [], []
    for number in range(steps):
        tokens = chain(number, config["vocab_size"], (1, 32) if bench.small else (8, 512), device)
        common.wait_for(device)
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        common.wait_for(device)
        times.append(time.perf_counter() - start)
    still = sum(int((before[name] == p.detach().cpu()).sum()) for name, p in model.named_parameters())
    return {
        "still": still / sum(p.numel() for p in model.parameters()),
        "loss": float(torch.stack(losses[-10:]).float().mean()),
        "step_ms": 1e3 * common.median(times[1:]),
        "peak_gib": peak(device) / 2**30,
    }


def chain(seed: int, words: int, shape: tuple[int, int], device: torch.device) -> torch.Tensor:
    """Tokens that a model can learn: each is a fixed function of the one before, but for one in five."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, words, shape, generator=generator)
    free = torch.rand(shape, generator=generator) < 0.2
    for i in range(1, shape[1]):
        tokens[:, i] = torch.where(free[:, i], tokens[:, i], (31 * tokens[:, i - 1] + 7) % words)
    return tokens.to(device)
