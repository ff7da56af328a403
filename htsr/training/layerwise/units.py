"""Which parameters have a multiplier in common, and what it becomes once the scores are known. Knows no optimizer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import numpy as np

from htsr import allocate
from htsr.errors import UsageError
from htsr.matrices.models import WeightMatrix, by_tensor
from htsr.matrices.patterns import matches, require
from htsr.matrices.roles import role_of, stem, whole_name
from htsr.training.layerwise.policy import Policy

if TYPE_CHECKING:
    from torch import nn

_NORM = re.compile(r"norm|(^|[._])ln(_|\d|\.|$)|layer_?norm|(^|\.)bn\d*\.", re.IGNORECASE)
_FOLLOWS = ("lora_", "base_layer.", "parametrizations.")


@dataclass(frozen=True)
class ParameterUnit:
    """What has one multiplier: a parameter with its followers (bias, LoRA factors), or parameters that stay together.

    Attributes:
        name: name of the parameter, without ``.weight``.
        role: role of the parameter; a fused tensor that is split has the roles of its parts in one: ``attn.qkv``.
        block: index of its block.
        parts: names of the matrices in it: one, several of a fused or stacked tensor, none for vectors.
        part_roles: roles of the parts, in their order.
        size: number of eigenvalues of the smallest part, those of a kernel's slices together; 0 without parts.
    """

    name: str
    role: str
    block: int | None = None
    parts: tuple[str, ...] = ()
    part_roles: tuple[str, ...] = ()
    size: int = 0

    @property
    def is_embedding(self) -> bool:
        """Whether it is an input embedding or an output head."""
        return self.is_head or "embed" in self.role.split(".")

    @property
    def is_head(self) -> bool:
        """Whether it is an output head."""
        return "head" in self.role.split(".")


@dataclass(frozen=True)
class Outcome:
    """Scores and multipliers of all units, in their order.

    Attributes:
        scores: mean score over the parts of each unit; NaN where it was not measured or has none.
        multipliers: multiplier of the learning rate or weight decay of each unit.
    """

    scores: tuple[float, ...]
    multipliers: tuple[float, ...]


def matrix_units(matrices: Iterable[WeightMatrix]) -> list[ParameterUnit]:
    """One unit for each tensor, parts of a fused one together: an optimizer knows one learning rate per parameter.

    Args:
        matrices: matrices of a model, in its order.
    """
    return [
        ParameterUnit(
            name=whole_name(parts[0].name),
            role=_common_role([matrix.role for matrix in parts]),
            block=parts[0].block,
            parts=tuple(matrix.name for matrix in parts),
            part_roles=tuple(matrix.role for matrix in parts),
            size=min(min(matrix.shape) * matrix.pieces for matrix in parts),
        )
        for parts in by_tensor(matrices)
    ]


def _common_role(roles: Sequence[str]) -> str:
    distinct = list(dict.fromkeys(roles))
    if len(distinct) == 1:
        return distinct[0]
    family = distinct[0].rpartition(".")[0]
    endings = [role.rpartition(".")[2] for role in distinct]
    return f"{family}.{('' if max(map(len, endings)) == 1 else '_').join(endings)}".lstrip(".")


def unit_of(parameter: str, names: Mapping[str, int]) -> int | None:
    """The unit that a parameter belongs to: its own, or that of the matrix whose bias or adapter it is.

    Args:
        parameter: full name of the parameter, wrappers' prefixes removed.
        names: indices of units by their name.

    Returns:
        Index of the unit; None where the parameter belongs to no matrix.

    Examples:
        >>> from htsr.training.layerwise.units import unit_of
        >>> units = {"layers.0.q": 0, "layers.0.k": 1}
        >>> unit_of("layers.0.k.bias", units), unit_of("layers.0.k.lora_A.weight", units), unit_of("norm.weight", units)
        (1, 1, None)
    """
    for own in (parameter, parameter.removesuffix("_bias"), re.sub(r"bias$", "weight", parameter)):
        if own in names:
            return names[own]
    pieces = parameter.split(".")
    for end in range(len(pieces) - 1, 0, -1):
        name, rest = ".".join(pieces[:end]), ".".join(pieces[end:])
        if name in names:
            return names[name] if "." not in rest or rest.startswith(_FOLLOWS) else None
    return None


def vector_role(parameter: str) -> str:
    """Role of a `parameter`, by its name, that belongs to no matrix: ``norm`` or ``vector``."""
    return "norm" if _NORM.search(parameter) else "vector"


def require_patterns(
    policy: Policy, units: Sequence[ParameterUnit], vectors: Iterable[str], of: str, adapters: Iterable[str] = ()
) -> None:
    """Refuse patterns of a `policy` that change nothing.

    Args:
        policy: policy whose pins and exclusions are looked at.
        units: all units of the model.
        vectors: names of the parameters that belong to no unit.
        of: name of the model, for the message.
        adapters: names of what adapters train, as `htsr.training.layerwise.names.adapter_names` has them.

    Raises:
        UsageError: a pattern matches nothing, or only some parts of fused tensors.
    """
    names = list(vectors)
    wholes = {subject for unit in units for subject in (unit.role, unit.name)}
    others = {subject for name in names for subject in (vector_role(name), name, stem(name))}
    others |= {subject for name in adapters for subject in _adapter_subjects(name, units)}
    parts = [(unit, part) for unit in units for parts in (unit.part_roles, unit.parts) for part in parts]
    for patterns, subjects in ((policy.pin, wholes | others), (policy.exclude, wholes)):
        unmatched = [pattern for pattern in patterns if not any(_matches(subject, pattern) for subject in subjects)]
        for pattern in unmatched:
            fused = [unit for unit, part in parts if _matches(part, pattern)]
            if not fused:
                require([pattern], subjects | {part for _, part in parts}, of, "role or name")
            elif patterns is policy.exclude or all(pinned(unit, policy.pin) is None for unit in fused):
                raise UsageError(
                    f"{pattern!r} matches a part of {fused[0].name}, which has one multiplier for "
                    f"{', '.join(fused[0].part_roles)}: match all of them, or {fused[0].role}"
                )


def require_head(policy: Policy, units: Iterable[ParameterUnit], of: str) -> None:
    """Refuse a rule of a `policy` for a head that no unit is.

    Args:
        policy: policy whose head is looked at.
        units: all units of the model.
        of: name of the model, for the message.

    Raises:
        UsageError: there is no head of its own, and the policy has another rule for it than for embeddings.
    """
    if policy.of_head != policy.embeddings and not any(unit.is_head for unit in units):
        raise UsageError(
            f"head is {policy.head!r}, and {of} has no output head of its own: one that is tied to the embedding is "
            "one tensor with it, whose multiplier embeddings says"
        )


def pinned(unit: ParameterUnit, pin: Mapping[str, float]) -> float | None:
    """The multiplier that the first matching pattern gives.

    A fused tensor whose own role and name match nothing takes the mean over its parts, where all of them match.

    Args:
        unit: unit whose role and name, or those of its parts, are matched.
        pin: multipliers by shell-style pattern.

    Returns:
        A multiplier; None where nothing matches.

    Examples:
        >>> from htsr.training.layerwise.units import ParameterUnit, pinned
        >>> pinned(ParameterUnit("layers.0.self_attn.q_proj", "attn.q"), {"attn.*": 4.0, "*": 1.0})
        4.0
    """
    if (value := _first(pin, unit.role, unit.name)) is not None or not unit.parts:
        return value
    values = [_first(pin, role, name) for role, name in zip(unit.part_roles, unit.parts, strict=True)]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def pinned_adapters(
    names: Mapping[int, str], units: Sequence[ParameterUnit], pin: Mapping[str, float]
) -> dict[int, tuple[str, float]]:
    """The parameters of adapters that do not follow their matrix, since a pattern names them.

    Args:
        names: names of what adapters train, as `htsr.training.layerwise.names.adapter_names` has them.
        units: all units of the model.
        pin: multipliers by pattern, which match as in ``*.lora_B`` or, by the role of the matrix, ``attn.*.lora_B``.
            The first that matches counts; where it matches the matrix, too, the adapter follows that.

    Returns:
        Attribute of the adapter, such as ``lora_B``, and multiplier, by the id of the parameter.

    Examples:
        >>> from htsr.training.layerwise.units import ParameterUnit, pinned_adapters
        >>> units = [ParameterUnit("0.q_proj", "attn.q", parts=("0.q_proj",), part_roles=("attn.q",), size=64)]
        >>> pinned_adapters({1: "0.q_proj.lora_A", 2: "0.q_proj.lora_B"}, units, {"*.lora_B": 16})
        {2: ('lora_B', 16.0)}
    """
    by_name = {unit.name: unit for unit in units}
    found: dict[int, tuple[str, float]] = {}
    for key, name in names.items():
        layer, _, attribute = name.rpartition(".")
        unit = by_name.get(layer, ParameterUnit(layer, role_of(layer)))
        of_matrix = (unit.role, unit.name, *unit.part_roles, *unit.parts)
        own = _adapter_subjects(name, [unit])
        for pattern, value in pin.items():
            if any(_matches(subject, pattern) for subject in of_matrix):
                break
            if any(_matches(subject, pattern) for subject in own):
                found[key] = attribute, float(value)
                break
    return found


def _adapter_subjects(name: str, units: Iterable[ParameterUnit]) -> tuple[str, str]:
    """What patterns match for what an adapter trains: its `name`, and the same by the role of its matrix."""
    layer, _, attribute = name.rpartition(".")
    role = next((unit.role for unit in units if unit.name == layer), None) or role_of(layer)
    return name, f"{role}.{attribute}"


def _first(pin: Mapping[str, float], *subjects: str) -> float | None:
    for pattern, value in pin.items():
        if any(_matches(subject, pattern) for subject in subjects):
            return float(value)
    return None


def _matches(subject: str, pattern: str) -> bool:
    """Whether a pattern matches, with brackets as part of a name or as a set of letters: ``attn.[qk]``."""
    return matches(subject, (pattern,)) or fnmatchcase(subject, pattern)


def ends(units: Sequence[ParameterUnit], *, tied: bool = False) -> set[int]:
    """Indices of the first and the last layer: what embeds and what is a head, and where there is none, the matrix
    that stands there.

    Args:
        units: all units of the model, in its order.
        tied: whether the embedding is the head, too.
    """
    matrices = [i for i, unit in enumerate(units) if unit.parts]
    if not matrices:
        return set()
    found = {i for i in matrices if units[i].is_embedding}
    if not any(units[i].role.split(".")[-1] == "embed" for i in found):
        found.add(matrices[0])
    if not tied and not any(units[i].is_head for i in found):
        found.add(matrices[-1])
    return found


def has_tied_head(model: nn.Module) -> bool:
    """Whether a table of embeddings of `model` is the weight of another module, too."""
    from torch import nn

    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    others = (module for module in model.modules() if not isinstance(module, nn.Embedding))
    return any(id(parameter) in tables for module in others for parameter in module.parameters(recurse=False))


def fixed(policy: Policy, units: Sequence[ParameterUnit], *, tied: bool = False) -> list[float | None]:
    """The multiplier of every unit that needs no measuring.

    Args:
        policy: rules that say what is measured.
        units: all units of the model, in its order.
        tied: whether the embedding is the head, too.

    Returns:
        A multiplier for each unit; None where the unit is to be measured; NaN where it is ``max``, which the
        others decide.

    Examples:
        >>> from htsr.training.layerwise.policy import Policy
        >>> from htsr.training.layerwise.units import ParameterUnit, fixed
        >>> q, k = (ParameterUnit(name, name, parts=(name,), part_roles=(name,), size=64) for name in "qk")
        >>> norm = ParameterUnit("norm", "norm")
        >>> fixed(Policy(pin={"k": 2.0}), [q, k, norm])
        [None, 2.0, 1.0]
    """
    left_out = ends(units, tied=tied) if policy.exclude_ends else set()

    def of(index: int, unit: ParameterUnit) -> float | None:
        if (value := pinned(unit, policy.pin)) is not None:
            return value
        unwanted = any(_first({pattern: 1.0}, unit.role, unit.name) for pattern in policy.exclude)
        if not unit.parts or unwanted or index in left_out:
            return 1.0
        rule = policy.of_head if unit.is_head else policy.embeddings
        if unit.is_embedding and rule != "measured":
            return {"leave": 1.0, "max": np.nan}[rule] if isinstance(rule, str) else float(rule)
        return 1.0 if unit.size < policy.min_size or policy.score is None else None

    return [of(i, unit) for i, unit in enumerate(units)]


def decide(
    policy: Policy, units: Sequence[ParameterUnit], multipliers: Sequence[float | None], scores: Mapping[str, float]
) -> Outcome:
    """The multiplier of every unit.

    Args:
        policy: rules that turn scores into multipliers.
        units: all units of the model, in its order.
        multipliers: what is settled already: what `fixed` returns.
        scores: score of each matrix, by name; a tensor's score is the mean over its parts. Missing and NaN scores
            give 1.

    Examples:
        >>> from htsr.training.layerwise.policy import Policy
        >>> from htsr.training.layerwise.units import ParameterUnit, decide
        >>> units = [ParameterUnit(name, name, parts=(name,), part_roles=(name,), size=64) for name in "qkv"]
        >>> decide(Policy(), units, [None, None, None], {"q": 2.0, "k": 4.0, "v": 3.0}).multipliers
        (1.0, 5.0, 3.0)
    """
    means = [_mean([scores.get(part, np.nan) for part in unit.parts]) for unit in units]
    measured = [value is None for value in multipliers]
    labels = [_label(policy, unit) for unit in units]
    result = allocate.multipliers(
        [mean if free else np.nan for mean, free in zip(means, measured, strict=True)],
        map=policy.map,
        bounds=policy.bounds,
        reverse=policy.reverse,
        units=labels,
        pin=multipliers,
    )
    known = [float(m) for m, free, mean in zip(result, measured, means, strict=True) if free and not np.isnan(mean)]
    largest = max(known) if known else (1.0 if any(measured) else policy.bounds[1])
    final = tuple(largest if np.isnan(m) else float(m) for m in result)
    return Outcome(tuple(mean if free else np.nan for mean, free in zip(means, measured, strict=True)), final)


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else np.nan


def _label(policy: Policy, unit: ParameterUnit) -> tuple[str, object]:
    if policy.unit == "block" and unit.block is not None:
        return ("block", (unit.role.split(".")[0] if unit.role.count(".") > 1 else "", unit.block))
    return ("role", unit.role) if policy.unit == "role" else ("matrix", unit.name)
