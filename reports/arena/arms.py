"""The arms: each a recipe of `htsr finetune`, with ranks and active blocks in proportion to the size of the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from reports.arena.sizes import Size

Recipe = dict[str, Any]


@dataclass(frozen=True)
class Arm:
    """One way to fine-tune.

    Attributes:
        title: what the page calls it.
        recipe: sections of its recipe at a size.
        start: learning rate at which the search begins; the nearest of the grid is taken.
        ours: whether it is one of htsr's own methods, and not a baseline (full fine-tuning and PEFT's adapters).
        bfloat16: whether weights are in bfloat16, which takes 5 to 100 times as long on most processors.
    """

    title: str
    recipe: Callable[[Size], Recipe]
    start: float
    ours: bool = True
    bfloat16: bool = False


def _lora(r: int, **options: Any) -> Callable[[Size], Recipe]:
    section = {"options": options} if options else {}
    return lambda size: {"method": "lora", "lora": {"rank": size.rank(r), **section}}


def _lora_plus(r: int) -> Callable[[Size], Recipe]:
    return lambda size: {"method": "lora", "lora": {"rank": size.rank(r)}, "layerwise": {"*.lora_B": 16.0}}


def _sampled(method: str, share: float, **changes: Any) -> Callable[[Size], Recipe]:
    """A sampled method that trains a share of the blocks at a time, at full rank."""

    def recipe(size: Size) -> Recipe:
        return {"method": method, "sampling": {"active": size.active(share), "interval": size.interval, **changes}}

    return recipe


def _low_rank(share: float, r: int, strategy: str, **changes: Any) -> Callable[[Size], Recipe]:
    """A share of the blocks at a time in subspaces, whose gradients are projected as soon as they are there."""

    def recipe(size: Size) -> Recipe:
        sampling = {"active": size.active(share), "interval": size.interval, "strategy": strategy}
        if strategy == "owlore":
            sampling |= {"threshold": 3.0}
        low_rank = {"rank": size.rank(r), "refresh_every": size.refresh_every, "gradients": "project", **changes}
        return {"method": "owlore", "sampling": sampling, "low_rank": low_rank}

    return recipe


def _galore(r: int) -> Callable[[Size], Recipe]:
    return lambda size: {"method": "galore", "low_rank": {"rank": size.rank(r), "refresh_every": size.refresh_every}}


def _apollo(**changes: Any) -> Callable[[Size], Recipe]:
    """All blocks in every step, learning rates from a random projection; embedding and head are frozen."""

    def recipe(size: Size) -> Recipe:
        low_rank = {"refresh_every": size.refresh_every, "embedding": "freeze", **changes}
        if "rank" in low_rank:
            low_rank["rank"] = size.rank(low_rank["rank"])
        return {"method": "apollo", "low_rank": low_rank, **_unclipped(low_rank)}

    return recipe


def _gum(
    share: float, r: int, base: str, draws: Mapping[str, Any] = MappingProxyType({}), **changes: Any
) -> Callable[[Size], Recipe]:
    """All blocks in every step, a share of them at full rank outside of their subspaces; embedding and head are frozen."""

    def recipe(size: Size) -> Recipe:
        low_rank = {"rank": size.rank(r), "refresh_every": 3 * size.interval, "embedding": "freeze"}
        low_rank |= {"gradients": "project", **changes}
        gum = {"active": size.active(share), "base": base, **draws}
        return {"method": "gum", "low_rank": low_rank, "gum": gum, **_unclipped(low_rank)}

    return recipe


def _unclipped(low_rank: Recipe) -> Recipe:
    """No clipping where gradients are used up as they come."""
    return {"training": {"max_grad_norm": 0.0}} if low_rank.get("gradients") == "update" else {}


def _in_bfloat16(recipe: Callable[[Size], Recipe]) -> Callable[[Size], Recipe]:
    """Weights in bfloat16, rounded stochastically where they train; adapters stay in float32 over them."""

    def changed(size: Size) -> Recipe:
        own = recipe(size)
        return own | {"dtype": "bfloat16"} | ({} if own["method"] == "lora" else {"rounding": "stochastic"})

    return changed


ARMS: dict[str, Arm] = {
    "full": Arm("full", lambda size: {"method": "full"}, 1e-4, ours=False),
    "lora-8": Arm("LoRA r8", _lora(8), 3.2e-3, ours=False),
    "lora-32": Arm("LoRA r32", _lora(32), 8e-4, ours=False),
    "rslora-64": Arm("rsLoRA r64", _lora(64, use_rslora=True), 4e-4, ours=False),
    "lora-plus-32": Arm("LoRA+ r32, B at 16 times the rate", _lora_plus(32), 2e-4, ours=False),
    "dora-32": Arm("DoRA r32", _lora(32, use_dora=True), 8e-4, ours=False),
    "lisa": Arm("LISA, a fifth of the blocks", _sampled("lisa", 0.2), 4e-4),
    "lisa-half": Arm("LISA, half of the blocks", _sampled("lisa", 0.5), 2e-4),
    "misa": Arm(
        "MISA, matrices of a fifth of the weights",
        _sampled("lisa", 0.2, unit="matrix", strategy="gradient_norm"),
        4e-4,
    ),
    "owlore": Arm("OwLore (OWS), half of the blocks, r128, 8-bit", _low_rank(0.5, 128, "owlore", state_dtype="8bit"), 8e-4),
    "galore": Arm("GaLore r128, all weights", _galore(128), 2e-4),
    "galore-frozen": Arm("GaLore r128, 8-bit, embedding frozen", _low_rank(1, 128, "uniform", state_dtype="8bit"), 2e-4),
    "galore-64": Arm("GaLore r64, 8-bit, embedding frozen", _low_rank(1, 64, "uniform", state_dtype="8bit"), 4e-4),
    "apollo-mini": Arm("APOLLO-Mini, embedding frozen", _apollo(scaled_by="tensor"), 4e-4),
    "apollo-mini-e": Arm(
        "APOLLO-Mini, embedding too", _apollo(scaled_by="tensor", embedding="lowrank", gradients="update"), 4e-4
    ),
    "apollo-16-e": Arm(
        "APOLLO r16, embedding too", _apollo(rank=16, embedding="lowrank", gradients="update"), 8e-4
    ),
    "apollo": Arm("APOLLO r128, embedding frozen", _apollo(rank=128), 4e-4),
    "gum-muon": Arm("GUM with Muon, a fifth of the blocks, r128, embedding frozen", _gum(0.2, 128, "muon"), 8e-4),
    "gum-muon-32": Arm(
        "GUM with Muon, a tenth of the blocks, r32, bf16 momentum, embedding frozen",
        _gum(0.1, 32, "muon", gradients="update", state_dtype="bfloat16"),
        8e-4,
    ),
    "gum-muon-32-e": Arm(
        "GUM with Muon, a tenth of the blocks, r32, bf16 momentum, embedding at low rank",
        _gum(0.1, 32, "muon", gradients="update", state_dtype="bfloat16", embedding="lowrank"),
        1.6e-3,
    ),
    "gum-adamw": Arm("GUM with AdamW, a fifth of the blocks, r128, embedding frozen", _gum(0.2, 128, "adamw"), 4e-4),
    "gum-adamw-update": Arm(
        "GUM with AdamW, updates reweighted, a fifth of the blocks, r128, embedding frozen",
        _gum(0.2, 128, "adamw", {"reweight": "update"}),
        2e-4,
    ),
    "gum-adamw-owlore": Arm(
        "GUM with AdamW, blocks drawn by outliers, a fifth of them, r128, embedding frozen",
        _gum(0.2, 128, "adamw", {"strategy": "owlore", "threshold": 3.0}),
        4e-4,
    ),
}  # fmt: skip
for _name in ("lora-32", "full", "lisa", "galore", "apollo-mini-e"):
    ARMS[f"{_name}-bf16"] = Arm(
        f"{ARMS[_name].title}, bfloat16" + (" with stochastic rounding" if ARMS[_name].ours or _name == "full" else ""),
        _in_bfloat16(ARMS[_name].recipe),
        ARMS[_name].start,
        ARMS[_name].ours,
        bfloat16=True,
    )
