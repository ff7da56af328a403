"""Param groups: split one per matrix, and carry a checkpoint over from or to an optimizer that is not split.

What is known about a group rides in it as plain numbers and strings, which every checkpoint format keeps:

================ ======================================================================================
``name``         the matrix, or what kind of parameters are together in it
``role``         role of the matrix
``multiplier``   multiplier in force at the last step
``score``        score at the last event; NaN where not measured
``status``       outcome of the last event: ``ok``, ``frozen``, or why it could not be measured and kept its multiplier
``htsr_start``   multiplier at the last event
``htsr_target``  multiplier that it has been moving to since
``htsr_event``   step of the last event, 0 before the first
``htsr_step``    optimizer steps done
``htsr_policy``  the policy, as JSON
``htsr_place``   index of the group among those of the optimizer
``htsr_origin``  index of the group that it was split from
``htsr_order``   places of its parameters in that group
================ ======================================================================================
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any, TypeVar

from htsr.errors import UsageError
from htsr.matrices.roles import stem
from htsr.training.layerwise.policy import Policy
from htsr.training.layerwise.units import ParameterUnit, pinned, unit_of, vector_role

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

Value = TypeVar("Value")

_OF_ONE_RATE = frozenset({"d0", "d_max", "numerator_weighted"})  # in the groups of Prodigy and D-Adaptation

OWN_KEYS = (
    "name", "role", "multiplier", "score", "status", "htsr_start", "htsr_target", "htsr_event", "htsr_step",
    "htsr_policy", "htsr_place", "htsr_origin", "htsr_order",
)  # fmt: skip
_AT_START = {"multiplier": 1.0, "status": "ok", "htsr_start": 1.0, "htsr_target": 1.0, "htsr_event": 0, "htsr_step": 0}
_ORIGINAL_NAME = "htsr_name"  # the user's own `name` of the group that was split


@dataclass(frozen=True)
class Subgroup:
    """Parameters of one group that go together into a new one.

    Attributes:
        unit: index of their unit.
        places: places of the parameters in the old group.
        name: name of the new group.
    """

    unit: int
    places: tuple[int, ...]
    name: str


def steps_itself(optimizer: Any) -> Any:
    """The optimizer whose own step moves the parameters: `optimizer`, or the one that accelerate has wrapped.

    Raises:
        UsageError: it is no optimizer of torch, or another one steps inside.
    """
    import torch

    while type(optimizer).__module__.startswith("accelerate.") and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    kind = type(optimizer).__name__
    if kind == "ZeroRedundancyOptimizer":
        raise UsageError("layerwise does not go with ZeroRedundancyOptimizer: take FSDP2, or DeepSpeed's ZeRO")
    inner = (
        name for name, value in getattr(optimizer, "__dict__", {}).items() if isinstance(value, torch.optim.Optimizer)
    )
    if (name := next(inner, None)) is not None:
        raise UsageError(f"{kind} steps through another optimizer: call htsr.layerwise on that one, its .{name}")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UsageError(
            f"{kind} is no torch.optim.Optimizer: make the optimizer layerwise before it is wrapped "
            "(before deepspeed.initialize)"
        )
    return optimizer


def require_fresh(optimizer: torch.optim.Optimizer, policy: Policy) -> None:
    """Refuse an `optimizer` whose groups others already count on, or that cannot do what the `policy` sets.

    Raises:
        UsageError: it is split already, has a scheduler, sets its own learning rate, or has one for all groups.
    """
    import torch

    groups, kind = optimizer.param_groups, type(optimizer).__name__
    if is_layerwise(groups):
        raise UsageError("this optimizer is layerwise already; htsr.remove_layerwise makes it a plain one")
    if any("initial_lr" in group for group in groups) or hasattr(optimizer.step, "_wrapped_by_lr_sched"):
        raise UsageError("this optimizer has a scheduler already: call htsr.layerwise first, then make the scheduler")
    if any(group.get("lr", 0.0) is None for group in groups):
        raise UsageError("this optimizer sets its own learning rate (lr=None, relative_step); give it an lr")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise UsageError(f"{kind} takes one group of parameters, which cannot have a learning rate for each matrix")
    if getattr(optimizer, "gradients", None) == "update":
        raise UsageError(
            f"{kind}(gradients='update') moves its parameters during backward, where no multiplier can be set: take "
            "gradients='project'"
        )
    if policy.sets != "lr":
        return
    if any("d" in group and not _OF_ONE_RATE.isdisjoint(group) for group in groups):
        raise UsageError(
            f"{kind} finds one learning rate for all parameters and takes no other; policies that set the weight decay "
            "go with it (alphadecay)"
        )
    if isinstance(optimizer, torch.optim.Rprop):
        raise UsageError(
            f"{kind} reads its learning rate at the first step only, and no multiplier can change it later"
        )


def split_groups(
    optimizer: torch.optim.Optimizer,
    names: Mapping[int, str],
    units: list[ParameterUnit],
    adapters: Mapping[int, tuple[str, float]],
    pin: Mapping[str, float],
    policy: str,
) -> tuple[list[int], list[float]]:
    """Split the groups of `optimizer` in place, so that each has one unit.

    Args:
        optimizer: optimizer without a scheduler, not split yet.
        names: names of the model's parameters by their id.
        units: units of the model's matrices. Units for the parameters that belong to none of them are appended.
        adapters: parameters of adapters that do not follow their matrix, by their id: what `pinned_adapters` returns.
        pin: multipliers by pattern; parameters that belong to no unit stay together where theirs are equal.
        policy: the policy as JSON, which is written into the groups.

    Returns:
        Index of the unit of each new group; and the multiplier of each unit that was appended.

    Raises:
        UsageError: no parameter of the optimizer belongs to the model.
    """
    if not any(id(parameter) in names for group in optimizer.param_groups for parameter in group["params"]):
        raise UsageError(
            "the optimizer has no parameter of this model: give both the same module, before deepspeed.initialize "
            "(FSDP1's flat parameters have no matrices; fully_shard keeps them)"
        )
    sorter = _Sorter(names, units, adapters, pin)
    taken: set[str] = set()
    groups: list[dict[str, Any]] = []
    unit_indices = []
    for origin, group in enumerate(optimizer.param_groups):
        for subgroup in sorter.subgroups(group["params"]):
            wanted = f"{group['name']}: {subgroup.name}" if "name" in group else subgroup.name
            alternatives = (wanted if i == 0 else f"{wanted} ({i})" for i in count())
            name = next(name for name in alternatives if name not in taken)
            taken.add(name)
            own = {"name": name, "role": units[subgroup.unit].role, "htsr_policy": policy}
            groups.append(_new_group(group, subgroup, own | {"htsr_place": len(groups), "htsr_origin": origin}))
            unit_indices.append(subgroup.unit)
    if len(optimizer.param_groups) > 1:
        logger.info(
            "the %d groups of the optimizer are %d now: a scheduler takes a list for them through htsr.per_group",
            len(optimizer.param_groups),
            len(groups),
        )
    optimizer.param_groups[:] = groups
    return unit_indices, sorter.values


class _Sorter:
    """Sorts parameters into units, of which it makes new ones for those that go with no matrix, with their `values`."""

    def __init__(
        self,
        names: Mapping[int, str],
        units: list[ParameterUnit],
        adapters: Mapping[int, tuple[str, float]],
        pin: Mapping[str, float],
    ) -> None:
        self.names, self.units, self.adapters, self.pin = names, units, adapters, pin
        self.matrices = {unit.name: i for i, unit in enumerate(units)}
        self.others: dict[tuple[str, float | None], int] = {}
        self.values: list[float] = []

    def subgroups(self, parameters: Sequence[Any]) -> list[Subgroup]:
        """Parameters of one group sorted by unit, in their order; an empty group stays one subgroup."""
        names = [self.names.get(id(parameter), "") for parameter in parameters]
        places: dict[int, list[int]] = {}
        for place, (name, parameter) in enumerate(zip(names, parameters, strict=True)):
            places.setdefault(self._unit(name, self.adapters.get(id(parameter))), []).append(place)
        if not parameters:
            places[self._unit("", None)] = []
        return [Subgroup(unit, tuple(own), self._label(unit, [names[i] for i in own])) for unit, own in places.items()]

    def _unit(self, name: str, adapter: tuple[str, float] | None) -> int:
        """Index of the unit of a parameter; one is made where the parameter goes with no matrix."""
        if adapter is not None:
            return self._other(*adapter, name=adapter[0])
        found = unit_of(name, self.matrices)
        if found is not None:
            return found
        role = vector_role(name)
        value = pinned(ParameterUnit(name, role), self.pin)
        return self._other("rest", None, "rest") if value is None else self._other(role, value, name)

    def _other(self, role: str, value: float | None, name: str) -> int:
        """Index of the unit of parameters without a matrix that have a `role` and a multiplier in common."""
        if (role, value) not in self.others:
            self.others[role, value] = len(self.units)
            self.units.append(ParameterUnit(name, role))
            self.values.append(1.0 if value is None else value)
        return self.others[role, value]

    def _label(self, unit: int, names: Sequence[str]) -> str:
        """Name of a new group: the unit's where its matrix is in it, else the first parameter's, such as a bias."""
        own = self.units[unit]
        if not own.parts:
            return own.role
        return own.name if any(stem(name) == own.name for name in names) else names[0]


def _new_group(group: dict[str, Any], subgroup: Subgroup, own: dict[str, Any]) -> dict[str, Any]:
    import torch

    new = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in group.items()}
    for key in ("params", "param_names"):
        if key in group:
            new[key] = [group[key][place] for place in subgroup.places]
    if "name" in group:
        new[_ORIGINAL_NAME] = group["name"]
    return new | own | _AT_START | {"score": float("nan"), "htsr_order": list(subgroup.places)}


def per_group(optimizer: Any, values: Sequence[Value]) -> list[Value]:
    """Values for the groups that an optimizer had before it was made layerwise, as a list for those that it has now.

    Schedulers with a list take it so: ``LambdaLR(optimizer, htsr.per_group(optimizer, [f, g]))``.

    Args:
        optimizer: optimizer from `htsr.layerwise`, also one that accelerate has wrapped. One that is not layerwise has
            the groups that it had.
        values: one value for each of its own groups, in their order; groups that were added later come last.

    Raises:
        UsageError: there are more or fewer groups than values, or these are no list.

    Examples:
        Two groups of the user's own, the first with two matrices:

        >>> import htsr, torch
        >>> body, head = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)), torch.nn.Linear(64, 64)
        >>> groups = [{"params": body.parameters()}, {"params": head.parameters()}]
        >>> model = torch.nn.Sequential(body, head)
        >>> optimizer = htsr.layerwise(torch.optim.SGD(groups, lr=0.1), model)
        >>> htsr.per_group(optimizer, ["slow", "fast"])
        ['slow', 'slow', 'fast']
    """
    if not isinstance(values, Sized):
        raise UsageError(f"per_group takes a list, one value for each group, not {values!r}")
    origins: list[Any] = []
    for place, group in enumerate(optimizer.param_groups):
        origins.append(group.get("htsr_origin", ("added", place)))
    distinct = list(dict.fromkeys(origins))
    if len(distinct) != len(values):
        raise UsageError(
            f"the optimizer had {len(distinct)} groups before it was layerwise, and there are {len(values)} values"
        )
    return [values[distinct.index(origin)] for origin in origins]


def is_layerwise(groups: Sequence[Mapping[str, Any]]) -> bool:
    """Whether these param `groups`, of an optimizer or of its state dict, were split here."""
    return any("htsr_step" in group for group in groups)


def plain_state_dict(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict of a layerwise optimizer as one that the same optimizer loads without htsr.

    Args:
        state_dict: state dict of the optimizer.

    Returns:
        A state dict with the groups that were there before they were split; multipliers are dropped.
    """
    merged: dict[int, dict[str, Any]] = {}
    places: dict[int, dict[int, tuple[Any, Any]]] = {}
    for position, group in enumerate(state_dict["param_groups"]):
        origin = group.get("htsr_origin", -1 - position)
        if origin not in merged:
            merged[origin] = {k: v for k, v in group.items() if k not in (*OWN_KEYS, _ORIGINAL_NAME)}
            if _ORIGINAL_NAME in group:
                merged[origin]["name"] = group[_ORIGINAL_NAME]
        order = group.get("htsr_order", range(len(group["params"])))
        labels = group.get("param_names", [None] * len(group["params"]))
        places.setdefault(origin, {}).update(zip(order, zip(group["params"], labels, strict=True), strict=True))
    for origin, group in merged.items():
        members = [places[origin][place] for place in sorted(places[origin])]
        group["params"] = [parameter for parameter, _ in members]
        if "param_names" in group:
            group["param_names"] = [label for _, label in members]
    return {**state_dict, "param_groups": list(merged.values())}


def adapt_state_dict(optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any]) -> dict[str, Any] | None:
    """The state that a layerwise `optimizer` is to load: one saved without htsr is split like the optimizer itself.

    Args:
        optimizer: optimizer whose groups are split.
        state_dict: state dict of the checkpoint.

    Returns:
        The state dict to load, or None to load the given one.

    Raises:
        UsageError: the groups of the checkpoint are neither those that were split nor those after splitting.
    """
    saved, own = list(state_dict["param_groups"]), optimizer.param_groups
    if is_layerwise(saved):
        if [len(g["params"]) for g in saved] != [len(g["params"]) for g in own]:
            raise UsageError(
                f"the checkpoint has {len(saved)} layerwise groups and this optimizer {len(own)}, or of other sizes: "
                "make it with the model, min_size and pins of the checkpoint's run"
            )
        theirs, ours = saved[0].get("htsr_policy"), own[0].get("htsr_policy")
        if theirs != ours:
            logger.warning("the checkpoint's run had the policy %s; from here on it is %s", theirs, ours)
        return None
    origins = {group["htsr_origin"] for group in own if "htsr_origin" in group}
    sizes = [sum(len(g["params"]) for g in own if g.get("htsr_origin") == origin) for origin in sorted(origins)]
    if [len(group["params"]) for group in saved[: len(sizes)]] != sizes:
        raise UsageError("the checkpoint was made without htsr and by an optimizer with other groups than this one had")
    logger.info("the checkpoint was made without htsr: layerwise multipliers begin at step 1 of their own count")
    groups = []
    for group in own:
        if "htsr_origin" not in group:
            continue
        source = saved[group["htsr_origin"]]
        state = {key: value for key, value in source.items() if key != "name"}
        for key in ("params", "param_names"):
            if key in source:
                state[key] = [source[key][place] for place in group["htsr_order"]]
        fresh = {key: group[key] for key in (*OWN_KEYS, _ORIGINAL_NAME) if key in group}
        groups.append(state | fresh | _AT_START)
    return {**state_dict, "param_groups": groups + saved[len(sizes) :]}
