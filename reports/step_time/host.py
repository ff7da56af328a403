"""What an optimizer's step costs the host: as many tiny tensors as SmolLM2-135M has, so that arithmetic costs nothing.

272 parameters: of each of 30 blocks seven matrices and two norms, then embedding and norm. Sides are a 24th of the
model's, so that what is timed are Python and the launches of operations. An accelerator works on them meanwhile: the
clock stops when `step` returns, and it has finished before the next begins.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

import htsr
from reports import common

RANK = 4
_ROUNDS = 15
BASELINES = ("AdamW foreach", "AdamW fused", "AdamW loop")


class Block(nn.Module):
    """The parameters of one block of a LLaMA, in small."""

    def __init__(self, width: int, inner: int, heads: int) -> None:
        super().__init__()
        sizes = {"q_proj": (width, width), "k_proj": (heads, width), "v_proj": (heads, width), "o_proj": (width, width)}
        self.self_attn, self.mlp = nn.Module(), nn.Module()
        for name, (rows, columns) in sizes.items():
            setattr(self.self_attn, name, nn.Linear(columns, rows, bias=False))
        for name, (rows, columns) in {
            "gate_proj": (inner, width),
            "up_proj": (inner, width),
            "down_proj": (width, inner),
        }.items():
            setattr(self.mlp, name, nn.Linear(columns, rows, bias=False))
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(width), nn.RMSNorm(width)


class Tiny(nn.Module):
    """The parameters of SmolLM2-135M by name and number, at a 24th of their sides."""

    def __init__(self, blocks: int = 30) -> None:
        super().__init__()
        width, inner, heads = 24, 64, 8
        self.embed_tokens = nn.Embedding(96, width)
        self.layers = nn.ModuleList(Block(width, inner, heads) for _ in range(blocks))
        self.norm = nn.RMSNorm(width)


def arms(blocks: int) -> dict[str, Callable[[torch.device], Any]]:
    """Name to a function that makes the optimizer on a device, its parameters with gradients."""

    def model(device: torch.device, dtype: torch.dtype = torch.float32) -> Tiny:
        torch.manual_seed(0)
        made = Tiny(blocks).to(device, dtype)
        for parameter in made.parameters():
            parameter.grad = torch.randn(parameter.shape).to(device, dtype)
        return made

    def adamw(dtype: torch.dtype = torch.float32, **how: bool) -> Callable[[torch.device], Any]:
        return lambda device: torch.optim.AdamW(model(device, dtype).parameters(), lr=1e-6, **how)

    def layered(**how: bool) -> Callable[[torch.device], Any]:
        def make(device: torch.device) -> Any:
            made = model(device)
            optimizer = torch.optim.AdamW(made.parameters(), lr=1e-6, **how)
            return htsr.layerwise(optimizer, made, min_size=8, interval=None, embeddings="measured")

        return make

    def low_rank(dtype: torch.dtype = torch.float32, **options: Any) -> Callable[[torch.device], Any]:
        def make(device: torch.device) -> Any:
            groups = htsr.low_rank_groups(model(device, dtype), RANK, refresh_every=10**9)
            return htsr.LowRankAdamW(groups, lr=1e-6, **options)

        return make

    def without_rank(dtype: torch.dtype = torch.float32, **options: Any) -> Callable[[torch.device], Any]:
        return lambda device: htsr.LowRankAdamW(model(device, dtype).parameters(), lr=1e-6, **options)

    return {
        "AdamW foreach": adamw(foreach=True),
        "AdamW fused": adamw(fused=True),
        "AdamW loop": adamw(foreach=False),
        "layerwise, foreach": layered(foreach=True),
        "layerwise, fused": layered(fused=True),
        f"LowRankAdamW, rank {RANK}": low_rank(),
        f"LowRankAdamW, rank {RANK}, bfloat16": low_rank(torch.bfloat16),
        "LowRankAdamW, no rank": without_rank(),
        "AdamW foreach, bfloat16": adamw(torch.bfloat16, foreach=True),
        "LowRankAdamW, no rank, bfloat16": without_rank(torch.bfloat16),
        "LowRankAdamW, no rank, bfloat16, nearest": without_rank(torch.bfloat16, rounding="nearest"),
    }


def host_times(device: torch.device, blocks: int = 30, rounds: int = _ROUNDS) -> Iterator[dict[str, Any]]:
    """One row per arm: least milliseconds of the host for a step, and its ratio to torch's foreach and fused AdamW.

    On a CPU it is the processor time of the process, since the work is the host's own; the arms take turns.
    """
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    made: dict[str, Any] = {}
    for name, make in arms(blocks).items():
        try:
            made[name] = make(device)
            for _ in range(3):
                made[name].step()
        except Exception as error:
            made.pop(name, None)
            yield {"arm": name, "failed": f"{type(error).__name__}: {str(error)[:200]}"}
    least = dict.fromkeys(made, float("inf"))
    for _ in range(rounds):
        for name, optimizer in made.items():
            common.wait_for(device)
            start = clock()
            optimizer.step()
            least[name] = min(least[name], clock() - start)
    common.wait_for(device)
    for name, seconds in least.items():
        row: dict[str, Any] = {"arm": name, "ms": 1e3 * seconds, "groups": len(made[name].param_groups)}
        row["parameters"] = sum(len(group["params"]) for group in made[name].param_groups)
        for baseline in BASELINES[:2]:
            if baseline in least:
                row[f"of {baseline}"] = seconds / least[baseline]
        yield row
