"""Low-rank training without the bias of its subspaces: GUM (Pan et al., arXiv 2510.17802).

    optimizer = GUM(gum_groups(model, rank=128), lr=1e-4, active=2)

LowRankAdamW sees of a gradient what lies in its subspace, for T steps, and nothing else. Here γ blocks are drawn with
each new subspace, and see the rest, at full rank. With q the probability that a block is drawn, its matrices use

    drawn     (G - P·Pᵀ·G)/q          at full rank
    others    Pᵀ·G/(1 - q)            in the subspace

(or the same from the right), so that the expectation over the draws is G. States begin anew with each subspace.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from torch import Tensor
from torch.distributed import ProcessGroup

from htsr.errors import UsageError
from htsr.training.lowrank import muon
from htsr.training.lowrank.moments import StateDtype
from htsr.training.lowrank.optimizer import LowRankAdamW
from htsr.training.lowrank.projection import basis
from htsr.training.lowrank.released import Gradients, ReleasedGradient
from htsr.training.lowrank.rounding import STATE, Rounding
from htsr.training.lowrank.subspace import Method, add_projected_back, local, project, projects_right
from htsr.training.lowrank.update import Group, Pending
from htsr.training.sampling.probabilities import inclusion_probabilities

Base: TypeAlias = Literal["adamw", "muon"]
Reweight: TypeAlias = Literal["gradient", "update"]


class GUM(LowRankAdamW):
    """Unbiased low-rank training: each matrix in its subspace, and now and then in all that lies outside of it.

    Every T steps each matrix gets a new subspace, from its gradient, and `active` blocks are drawn, without replacement
    and with the weights that their groups have. A drawn block is trained for T steps in the complement of its
    subspaces, with states of full size, the others in their subspaces. Draw n is a function of the seed and n alone,
    so that all processes draw the same, and the count of steps rides in the groups: a resumed run repeats the
    uninterrupted one bit for bit.

    The gradient that is used, divided by q or 1 - q, has the whole gradient as its expectation over the draws. **Both
    base optimizers divide such a factor out again**: Adam by its second moment (but for eps), Muon by orthogonalising,
    since it stays the same while a state lives. So with ``reweight="gradient"``, the paper's, the expected update is
    that of the subspace with the weight 1 - q and that of the complement with the weight q, and it is the update
    that is small in the complement, not unbiased. ``reweight="update"`` divides the update instead; with Muon, whose
    update splits into that of a singular subspace and that of its complement, the expected first update after a draw is
    that of Muon itself. It makes steps 1/q times as large in drawn blocks, which wants a smaller learning rate.

    What is the paper's: the two gradients, that states begin anew, Muon as the base, one q for all blocks. Ours: a
    fixed number of blocks in each draw, where each is drawn independently there; weights of blocks, with q their
    probability to be among those drawn; AdamW as a base; Nesterov's momentum as in torch.optim.Muon, which the paper
    writes without (``nesterov=False``); and what `LowRankAdamW` brings along.

    A gradient's norm is that of its parts before they are divided, under ``gradients="project"`` and in
    `clip_grad_norm_`; torch's ``clip_grad_norm_`` under ``keep`` sees the whole gradients, whose norm is larger. A
    clipped gradient is not unbiased.

    Groups without a rank are trained by AdamW, as those of `LowRankAdamW`.

    Args:
        params: groups from `gum_groups`: those with a rank have the keys ``unit``, the number of what is drawn
            together, and ``weight``, its weight in the draws.
        lr: learning rate. Muon's updates are scaled to the size of AdamW's, so it means the same for both.
        betas: decay rates of Adam's two moments.
        eps: number that is added to the root of the second moment, after its bias correction.
        weight_decay: decoupled weight decay, W ← (1 - lr·weight_decay)·W.
        active: number γ of units, such as blocks, in each draw.
        refresh_every: optimizer steps T from one subspace and draw to the next.
        base: what trains the matrices: ``adamw`` or ``muon``.
        reweight: what is divided by q and 1 - q: the ``gradient``, or the ``update``.
        momentum: decay rate of Muon's momentum.
        nesterov: whether Muon's momentum is Nesterov's.
        scale: factor of the updates in subspaces.
        method: method of the projector, as in `LowRankAdamW`.
        state_dtype: dtype of the moments, as in `LowRankAdamW`.
        seed: seed of the draws, of the randomised method and of the rounding.
        gradients: what becomes of the gradients, as in `LowRankAdamW`; ``project`` keeps those of drawn blocks whole.
        process_group: processes over which released gradients are averaged, as in `LowRankAdamW`.
        rounding: rounding of weights in bfloat16 and float16, as in `LowRankAdamW`.

    Raises:
        UsageError: an option has no meaning, a group with a rank says no unit or has a matrix with a side that is not
            larger, or not 1 ≤ `active` < units.
        MissingDependencyError: at the first step, bitsandbytes, which ``8bit`` needs, is not installed.

    Examples:
        One of two blocks is drawn, and has moments of full size:

        >>> import htsr, torch
        >>> _ = torch.manual_seed(0)
        >>> layer = torch.nn.TransformerEncoderLayer(d_model=16, nhead=2, dim_feedforward=32)
        >>> model = torch.nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        >>> optimizer = htsr.GUM(htsr.gum_groups(model, rank=4), lr=1e-3, active=1, refresh_every=10)
        >>> model(torch.randn(3, 1, 16)).square().mean().backward()
        >>> optimizer.step()
        >>> [tuple(optimizer.state[block.linear1.weight]["exp_avg"].shape) for block in model.layers]
        [(32, 16), (32, 4)]

    Source: Unbiased Gradient Low-Rank Projection (arXiv 2510.17802), algorithm 2.
    """

    _weights: tuple[tuple[Any, ...], tuple[float, ...]] | None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        active: int = 2,
        refresh_every: int = 200,
        base: Base = "adamw",
        reweight: Reweight = "gradient",
        momentum: float = 0.95,
        nesterov: bool = True,
        scale: float = 1.0,
        method: Method = "randomized",
        state_dtype: StateDtype = "float32",
        seed: int = 0,
        gradients: Gradients = "keep",
        process_group: ProcessGroup | None = None,
        rounding: Rounding = "stochastic",
    ) -> None:
        self._own_defaults = {
            "active": active,
            "base": base,
            "reweight": reweight,
            "momentum": momentum,
            "nesterov": nesterov,
            "unit": None,
            "weight": 1.0,
            "steps": 0,  # of the optimizer
        }
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            scale=scale,
            refresh_every=refresh_every,
            method=method,
            state_dtype=state_dtype,
            seed=seed,
            gradients=gradients,
            process_group=process_group,
            rounding=rounding,
        )
        self._units()

    def add_param_group(self, param_group: Group) -> None:
        """Add a group, which counts the optimizer's steps as those that are there.

        Args:
            param_group: group as torch takes it; with the key ``rank`` it has ``unit``, too.

        Raises:
            UsageError: an option has no meaning, a group with a rank holds anything but matrices with larger sides, or
                it is added while a draw holds, which is of the units that were there.
        """
        if self.param_groups and "steps" not in param_group:
            steps = self.param_groups[0]["steps"]
            if param_group.get("rank") is not None and self._is_amid_a_draw():
                raise UsageError(
                    f"a group with a rank is added after {steps} steps, amid those of one draw: add it after a "
                    "multiple of refresh_every steps, before backward"
                )
            param_group["steps"] = steps
        super().add_param_group(param_group)
        _check_group(self.param_groups[-1])
        self._weights = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state as `LowRankAdamW` does.

        Args:
            state_dict: state dict of an optimizer with the same groups.
        """
        super().load_state_dict(state_dict)
        self._weights = None

    def before_loading(self, steps: int) -> None:
        """Have the next step, with which FSDP2's loading makes states to be filled, make those of a step's number.

        torch.distributed.checkpoint fills states that are there, and those of drawn blocks are larger. Call it before
        ``set_optimizer_state_dict``; `load_state_dict` needs no such word.

        Args:
            steps: number of steps that the saved optimizer has made, at least 1.
        """
        for group in self.param_groups:
            group["steps"] = steps - 1

    @property
    def drawn(self) -> frozenset[int]:
        """Units that train outside of their subspaces now."""
        units, weights = self._units()
        group = next(group for group in self.param_groups if group["rank"] is not None)
        return frozenset(units[i] for i in _draw(group["seed"], _period(group), weights, group["active"]))

    def _begin(self) -> None:
        super()._begin()
        self._weights = None

    def _units(self) -> tuple[tuple[Any, ...], tuple[float, ...]]:
        """The units, and the weight of each."""
        if self._weights is None:
            found = {group["unit"]: group for group in self.param_groups if group["rank"] is not None}
            most = max((group["active"] for group in found.values()), default=0)
            if not most < len(found):
                raise UsageError(
                    f"active is {most}, and there are {len(found)} units to draw from: it is less than these, else all "
                    "train outside of their subspaces alone"
                )
            units = tuple(sorted(found))
            self._weights = units, tuple(float(found[unit]["weight"]) for unit in units)
        return self._weights

    def _drawn_with(self, group: Group) -> tuple[bool, float]:
        """Whether a group's unit is drawn now, and the probability that it is."""
        units, weights = self._units()
        place, active = units.index(group["unit"]), group["active"]
        return place in _draw(group["seed"], _period(group), weights, active), _inclusion(weights, active)[place]

    def _is_amid_a_draw(self) -> bool:
        ranked = [group for group in self.param_groups if group["rank"] is not None]
        if any(group["steps"] % group["refresh_every"] for group in ranked):
            return True
        gradients = (parameter.grad for group in ranked for parameter in group["params"])
        return any(isinstance(gradient, ReleasedGradient) and not gradient.spent for gradient in gradients)

    def _one(self, group: Group, parameter: Tensor, *others: Any) -> Pending:
        one = super()._one(group, parameter, *others)
        if group["rank"] is None or group["rank"] >= min(parameter.shape[-2:]):
            return one
        held = one.R.R if isinstance(one.R, ReleasedGradient) else one.state.get("exp_avg")
        is_drawn, _ = self._drawn_with(group)
        if held is not None and is_drawn != (held.shape == parameter.shape):
            raise UsageError(
                f"unit {group['unit']} {'is' if is_drawn else 'is not'} drawn now, and was otherwise when the draw "
                "that holds began: active, seed, refresh_every and weights change after a multiple of refresh_every "
                "steps, before backward"
            )
        return one

    def _is_due(self, one: Pending) -> bool:
        return "exp_avg" not in one.state

    def _coordinates(self, one: Pending, *, anew: bool, checked: bool, keeps: bool = True) -> Tensor:
        P = basis(one, self._average, anew=anew, checked=checked, keeps=keeps)
        is_drawn, _ = self._drawn_with(one.group)
        return complement(one.R, P) if is_drawn else project(one.R, P)

    def _projected(self, one: Pending, steps: bool = True) -> Pending:
        one = super()._projected(one, steps)
        if one.group["rank"] is None or not self._drawn_with(one.group)[0]:
            return one
        return one._replace(group=one.group | {"rank": None})  # its state has the size of the matrix

    def _reweighted(self, one: Pending) -> Pending:
        """With what is divided by q or 1 - q; after clipping, so that a norm is of the gradient's parts as they are."""
        is_drawn, q = self._drawn_with(one.group)
        if one.group["reweight"] == "gradient":
            local(one.R).mul_(1 / q if is_drawn else 1 / (1 - q))
            return one
        lr, scale, decay = one.constants.lr, one.constants.scale, one.constants.weight_decay
        changed = {"lr": lr / q, "weight_decay": decay * q} if is_drawn else {"scale": scale / (1 - q)}
        return one._replace(constants=one.constants._replace(**changed))

    def _update(self, pending: Iterable[Pending]) -> None:
        def others() -> Iterable[Pending]:
            for one in pending:
                one = self._reweighted(one) if "projector" in one.state else one
                if one.group["base"] == "muon" and "projector" in one.state:
                    muon.update(one)
                else:
                    yield one

        super()._update(others())

    def _end_step(self) -> None:
        """Count the step, and drop the moments where the next one begins with new subspaces."""
        kept = {"projector", *STATE.values()}
        begun = False
        for group in self.param_groups:
            group["steps"] += 1
            if group["rank"] is not None and group["steps"] % group["refresh_every"] == 0:
                begun = True
                for parameter in group["params"]:
                    state = self.state.get(parameter, {})
                    for name in [name for name in state if name not in kept]:
                        del state[name]
        for group in self.param_groups if begun else ():
            group["drops"] += 1
        super()._end_step()


def complement(G: Tensor, P: Tensor) -> Tensor:
    """What of a gradient lies outside of its subspace: G - G·P·Pᵀ or G - P·Pᵀ·G.

    Args:
        G: (m, n) gradient, or (E, m, n) stack.
        P: (min(m, n), r) basis from `projector`, or a stack of them.

    Returns:
        The shape and dtype of G, in memory of its own.

    Examples:
        >>> import torch
        >>> from htsr.training.lowrank.gum import complement
        >>> complement(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0], [0.0]]))
        tensor([[0., 2.],
                [0., 4.]])
    """
    R, out = project(G, P), G.clone()
    add_projected_back(local(out), local(R), local(P), projects_right(G.shape), kept=1.0, factor=-1.0)
    return out


def _period(group: Group) -> int:
    return int(group["steps"] // group["refresh_every"])


@lru_cache(maxsize=256)
def _draw(seed: int, number: int, weights: tuple[float, ...], active: int) -> frozenset[int]:
    """Places of the units of draw `number`, as `LayerSampler` draws blocks."""
    random = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, number])))
    p = np.array(weights) / sum(weights)
    return frozenset(random.choice(len(weights), size=active, replace=False, p=p).tolist())


@lru_cache
def _inclusion(weights: tuple[float, ...], active: int) -> tuple[float, ...]:
    return tuple(inclusion_probabilities(weights, active).tolist())


def _check_group(group: Group) -> None:
    for name, known in (("base", get_args(Base)), ("reweight", get_args(Reweight))):
        if group[name] not in known:
            raise UsageError(f"unknown {name} {group[name]!r}: one of {', '.join(known)}")
    if not 0 <= group["momentum"] < 1:
        raise UsageError(f"momentum is {group['momentum']!r}; it is a number in [0, 1)")
    if group["scaled_by"] is not None:
        raise UsageError("scaled_by is for LowRankAdamW: here gradients are trained in subspaces and outside of them")
    if group["moments"] != "keep":
        raise UsageError("moments begin anew with each subspace here; leave moments out")
    if group["rank"] is None:
        return
    if not isinstance(group["active"], int) or group["active"] < 1:
        raise UsageError(f"active is {group['active']!r}; it is a whole number, at least 1")
    if group["unit"] is None or not group["weight"] > 0:
        raise UsageError(
            "a group with a rank says its unit, what is drawn together, and a weight above 0: take htsr.gum_groups"
        )
    for parameter in group["params"]:
        if group["rank"] >= min(parameter.shape[-2:]):
            raise UsageError(
                f"a group has rank {group['rank']} and a parameter of the shape {tuple(parameter.shape)}, of which "
                "nothing lies outside of its subspace: the rank is below the smaller side, or None to train it whole"
            )
