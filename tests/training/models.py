"""A small language model with LLaMA's names, and training steps for it."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional

VOCABULARY, WIDTH, INNER = 120, 52, 70
MATRICES = [f"layers.{i}.{part}" for i in range(2) for part in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.self_attn = nn.ModuleDict({"q_proj": nn.Linear(WIDTH, WIDTH, bias=True)})
        self.mlp = nn.ModuleDict(
            {"up_proj": nn.Linear(WIDTH, INNER, bias=False), "down_proj": nn.Linear(INNER, WIDTH, bias=False)}
        )

    def forward(self, x):
        x = x + torch.tanh(self.self_attn["q_proj"](self.norm(x)))
        return x + self.mlp["down_proj"](functional.silu(self.mlp["up_proj"](x)))


class TinyLM(nn.Module):
    def __init__(self, tied: bool = False, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed_tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList([Block() for _ in range(2)])
        self.norm = nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, tokens):
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


def loss(model, step: int, rows: slice = slice(None)):
    tokens = torch.randint(0, VOCABULARY, (16, 9), generator=torch.Generator().manual_seed(step))[rows]
    logits = model(tokens[:, :-1])
    return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def train(model, optimizer, steps, scheduler=None, after=None):
    """Train over the steps of an iterable; each step's data depend on its number only."""
    for step in steps:
        optimizer.zero_grad()
        value = loss(model, step)
        value.backward()
        optimizer.step()
        if scheduler is not None:
            if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
                scheduler.step(value.item())
            else:
                scheduler.step()
        if after is not None:
            after(step)


def warmup_cosine(total: int, warmup: int):
    def factor(done: int) -> float:
        if done < warmup:
            return (done + 1) / warmup
        return 0.1 + 0.45 * (1 + math.cos(math.pi * (done - warmup) / (total - warmup)))

    return factor


def decay_groups(model, weight_decay: float = 0.1):
    """The usual two groups: matrices with weight decay, vectors without."""
    decay = [p for p in model.parameters() if p.ndim > 1]
    return [
        {"params": decay, "weight_decay": weight_decay},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]


class Spying:
    """Mixed into an optimizer: notes (group name → lr, weight decay) as its step sees them."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen = []

    def step(self, closure=None):
        self.seen.append({g["name"]: (float(g["lr"]), float(g.get("weight_decay", 0))) for g in self.param_groups})
        return super().step(closure)


class SpyingAdamW(Spying, torch.optim.AdamW):
    pass


class SpyingSGD(Spying, torch.optim.SGD):
    pass
