"""The arms of the study: who gets which multiple of the learning rate, or of the weight decay.

Arms that read no spectra are plain parameter groups; the others go through `htsr.layerwise`. One-dimensional
parameters (norms) have multiplier 1 everywhere. Weight decay is on all matrices and on no norm; as AdamW has it, a
multiple of the learning rate is also one of the decay.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from htsr.matrices.roles import role_of
from htsr.spectra.esd import Windows

S1, S2 = 1.0, 5.0  # LLR's range
EVENTS_PER_RUN = 20  # LLR's interval of 100 steps and ramp of 50 are these shares of 2000 steps
ENDS = ("embed", "head")
SHARPNESS = {"q": 8.0, "k": 8.0, "v": 4.0, "o": 4.0, "gate": 6.0, "up": 6.0, "down": 6.0, "embed": 10.0, "head": 10.0}

Factor = Callable[[str, tuple[int, ...]], float]


@dataclass(frozen=True)
class Arm:
    """One way to share the learning rate out: fixed factors, or a policy of `htsr.layerwise` with changes."""

    title: str
    factor: Factor | None = None
    policy: str | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)

    def optimizer(
        self, model: nn.Module, lr: float, weight_decay: float, steps: int, **options: Any
    ) -> torch.optim.Optimizer:
        """AdamW with this arm's groups."""
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            self._groups(model, lr, weight_decay), lr=lr, weight_decay=weight_decay, **options
        )
        if self.policy is not None:
            import htsr

            interval = max(1, steps // EVENTS_PER_RUN)
            ramp = {} if self.policy == "alphadecay" else {"ramp": interval // 2}
            optimizer = htsr.layerwise(
                optimizer, model, self.policy, total_steps=steps, interval=interval, **ramp, **self.changes
            )
        return optimizer

    def _groups(self, model: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        found: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
        for name, parameter in model.named_parameters():
            matrix = parameter.ndim > 1
            factor = self.factor(name, tuple(parameter.shape)) if self.factor and matrix else 1.0
            found[factor, weight_decay if matrix else 0.0].append(parameter)
        return [{"params": p, "lr": lr * factor, "weight_decay": decay} for (factor, decay), p in found.items()]

    def multipliers(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, float]:
        """Mean multiplier of the matrices of each role at the last step."""
        found: dict[str, list[float]] = defaultdict(list)
        if self.policy is not None:
            for group in optimizer.param_groups:
                if group["role"] not in ("rest", "norm"):
                    found[group["role"]].append(group["multiplier"])
        else:
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1:
                    found[role_of(name)].append(self.factor(name, tuple(parameter.shape)) if self.factor else 1.0)
        return {role: round(float(np.mean(values)), 3) for role, values in found.items()}

    def had_event(self, optimizer: torch.optim.Optimizer, step: int) -> bool:
        """Whether spectra were measured in this step, counted from 1."""
        return self.policy is not None and optimizer.param_groups[0]["htsr_event"] == step


def ends_only(name: str, shape: tuple[int, ...], multiplier: float = S2, roles: tuple[str, ...] = ENDS) -> float:
    """The embedding and the head, or one of them, by default at LLR's largest multiplier."""
    return multiplier if role_of(name) in roles else 1.0


def embedding_by_width(name: str, shape: tuple[int, ...]) -> float:
    """The embedding at √width, to which its best rate over the body's is proportional for large vocabularies (arXiv
    2506.15025, which leaves the constant open; here it is 1)."""
    return math.sqrt(shape[1]) if role_of(name) == "embed" else 1.0


def ends_apart(name: str, shape: tuple[int, ...]) -> float:
    """The embedding at √width and the head at LLR's largest multiplier."""
    return S2 if role_of(name) == "head" else embedding_by_width(name, shape)


def by_shape(name: str, shape: tuple[int, ...]) -> float:
    """What LLR would give to pure noise of the same shapes, square matrices and the MLP's; the ends at S2."""
    return S1 if shape[0] == shape[1] and role_of(name) not in ENDS else S2


def sharpness(name: str, shape: tuple[int, ...]) -> float:
    """Ratios of the blockwise sharpness rule, norms at 1."""
    return SHARPNESS[role_of(name).split(".")[-1]]


ARMS: dict[str, Arm] = {
    "uniform": Arm("uniform"),
    "ends": Arm("embedding and head alone, ×5", ends_only),
    "llr": Arm("LLR", policy="llr"),
    "shape": Arm("static by shape", by_shape),
    "sharpness": Arm("sharpness ratios (norm 1, QK 8, VO 4, MLP 6, ends 10)", sharpness),
    "no-boost": Arm("LLR without the boost of the ends", policy="llr", changes={"embeddings": "leave"}),
    "reversed": Arm("LLR reversed in the body, ends ×5", policy="llr", changes={"reverse": True}),
    "corrected": Arm("LLR on α minus its shape null", policy="llr", changes={"score": "alpha_minus_null"}),
    "farms": Arm("LLR on FARMS windows", policy="llr", changes={"windows": Windows(rows=64, count=5)}),
    "alphadecay": Arm("AlphaDecay", policy="alphadecay"),
    "matched": Arm("LLR in the body, ends ×15, 5 × the body's mean", policy="llr", changes={"embeddings": 15.0}),
    "ends-15": Arm("embedding and head alone, ×15", partial(ends_only, multiplier=15.0)),
    "embed": Arm("embedding alone, ×5", partial(ends_only, roles=("embed",))),
    "head": Arm("head alone, ×5", partial(ends_only, roles=("head",))),
    "sqrt-width": Arm("embedding alone, ×√width", embedding_by_width),
    "apart": Arm("ends apart: embedding ×√width, head ×5", ends_apart),
}
