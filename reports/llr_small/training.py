"""One run: a LLaMA from random weights, AdamW, warm-up and cosine, one arm, one learning rate, one seed."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, get_cosine_with_min_lr_schedule_with_warmup

from htsr.matrices.roles import role_of
from htsr.spectra.esd import esd
from htsr.spectra.tail import fit_power_law
from reports.llr_small.arms import ARMS
from reports.llr_small.corpus import Corpus

WEIGHT_DECAY = 0.1
BETAS = (0.9, 0.95)
CLIP = 1.0
CURVE_POINTS, CURVE_WINDOWS = 24, 32
FINAL_WINDOWS = 320
ALPHA_POINTS = 8
MOST_TOKENS = 2**15  # in one forward and backward; a larger batch comes in parts


@dataclass(frozen=True)
class Size:
    """How large the model and the run are."""

    width: int = 128
    blocks: int = 4
    steps: int = 600
    batch: int = 8
    context: int = 128
    vocabulary: int = 2048
    head_width: int = 32

    @property
    def name(self) -> str:
        """Short and unique."""
        heads = "" if self.head_width == 32 else f"h{self.head_width}"
        return f"w{self.width}b{self.blocks}s{self.steps}n{self.batch}c{self.context}v{self.vocabulary}{heads}"

    def parameters(self) -> dict[str, int]:
        """Numbers of weights: of the blocks and norms, and of embedding and head."""
        total, ends = sum(p.numel() for p in self.model().parameters()), 2 * self.vocabulary * self.width
        return {"body": total - ends, "embedding and head": ends}

    def model(self) -> LlamaForCausalLM:
        """A LLaMA with random weights; the head is not tied to the embedding."""
        config = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            intermediate_size=math.ceil(self.width * 8 / 3 / 32) * 32,
            num_hidden_layers=self.blocks,
            num_attention_heads=self.width // self.head_width,
            num_key_value_heads=self.width // self.head_width,
            max_position_embeddings=self.context,
            tie_word_embeddings=False,
            use_cache=False,
        )
        return LlamaForCausalLM(config)


@dataclass(frozen=True)
class Job:
    """One run of the study."""

    arm: str
    lr: float
    seed: int
    size: Size


def train(job: Job, corpus: Corpus, device: str = "cpu") -> dict[str, Any]:
    """Train and measure: validation loss (nats per token), its curve, α by role over time, and where the time went.

    Jobs of one seed and size begin with the same weights and see the same batches. A loss that is not finite ends the
    run with a validation loss of infinity. Seconds are those of the process, whatever else runs on the machine.
    """
    size = job.size
    torch.manual_seed(job.seed)
    model: nn.Module = size.model().to(device)
    arm = ARMS[job.arm]
    optimizer = arm.optimizer(model, job.lr, WEIGHT_DECAY, size.steps, betas=BETAS, fused=True)
    scheduler = get_cosine_with_min_lr_schedule_with_warmup(optimizer, size.steps // 10, size.steps, min_lr_rate=0.1)
    random = torch.Generator().manual_seed(1000 + job.seed)
    held_out = corpus.held_out(CURVE_WINDOWS, size.context)
    curve: list[tuple[int, float]] = []
    alphas: list[tuple[int, dict[str, float]]] = []
    multipliers: list[tuple[int, dict[str, float]]] = []
    spent: dict[str, Any] = {"step": 0.0, "optimizer": [], "events": [], "evaluation": 0.0}
    diverged = False
    for step in range(size.steps):
        start = time.process_time()
        if step % max(1, size.steps // ALPHA_POINTS) == 0:
            alphas.append((step, alpha_by_role(model)))
        if step % max(1, size.steps // CURVE_POINTS) == 0 and step:
            curve.append((step, evaluate(model, held_out, device, size.batch)))
        now = time.process_time()
        spent["evaluation"] += now - start
        if not math.isfinite(backward(model, corpus.batch(random, size.batch, size.context), device)):
            diverged = True
            break
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        before = time.process_time()
        optimizer.step()
        event = arm.had_event(optimizer, step + 1)
        spent["events" if event else "optimizer"].append(time.process_time() - before)
        if step in (0, size.steps - 1):
            multipliers.append((step + 1, arm.multipliers(optimizer, model)))
        scheduler.step()
        optimizer.zero_grad()
        spent["step"] += time.process_time() - now
    final = math.inf
    if not diverged:
        curve.append((size.steps, evaluate(model, held_out, device, size.batch)))
        alphas.append((size.steps, alpha_by_role(model)))
        final = evaluate(model, corpus.held_out(FINAL_WINDOWS, size.context), device, size.batch)
    usual = float(np.median(spent["optimizer"] or [0.0]))
    return {
        "arm": job.arm,
        "lr": job.lr,
        "seed": job.seed,
        "size": asdict(size),
        "name": size.name,
        "loss": final if math.isfinite(final) else None,
        "curve": curve,
        "alpha": alphas,
        "multipliers": multipliers,
        "seconds": {
            "training": spent["step"],
            "evaluation": spent["evaluation"],
            "optimizer_step": usual,
            "spectra": sum(max(0.0, event - usual) for event in spent["events"]),
        },
        "device": device,
    }


def loss_of(model: nn.Module, tokens: torch.Tensor, device: str) -> torch.Tensor:
    """Mean cross-entropy of the next token, in nats; bfloat16 products on a GPU."""
    tokens = tokens.to(device)
    with torch.autocast(device, dtype=torch.bfloat16, enabled=device != "cpu"):
        logits = model(input_ids=tokens[:, :-1]).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def backward(model: nn.Module, tokens: torch.Tensor, device: str) -> float:
    """Mean loss of a batch, its gradient left in the model."""
    loss = 0.0
    for part in parts_of(tokens):
        share = loss_of(model, part, device) * (len(part) / len(tokens))
        share.backward()
        loss += share.item()
    return loss


def parts_of(tokens: torch.Tensor, most: int | None = None) -> Sequence[torch.Tensor]:
    """The windows of a batch, at most `most` and at most `MOST_TOKENS` tokens at a time."""
    return tokens.split(min(most or len(tokens), max(1, MOST_TOKENS // (tokens.shape[1] - 1))))


@torch.no_grad()
def evaluate(model: nn.Module, windows: torch.Tensor, device: str, batch: int) -> float:
    """Mean loss over windows."""
    model.eval()
    losses = [loss_of(model, part, device).item() * len(part) for part in parts_of(windows, batch)]
    model.train()
    return sum(losses) / len(windows)


@torch.no_grad()
def alpha_by_role(model: nn.Module) -> dict[str, float]:
    """Mean α (hill) of the matrices of each role."""
    found: dict[str, list[float]] = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            eigenvalues = esd(parameter.detach().float().cpu().numpy()).eigenvalues
            found.setdefault(role_of(name), []).append(fit_power_law(eigenvalues, "hill").alpha)
    return {role: float(np.mean(values)) for role, values in found.items()}
