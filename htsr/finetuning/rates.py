"""The key `layerwise` of a recipe: what it means, and what of it would change nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from htsr.errors import UsageError
from htsr.finetuning.recipe_values import kind_of, nearest
from htsr.matrices.roles import stem
from htsr.matrices.sharded import open_live
from htsr.spectra.windows import Windows
from htsr.training.layerwise.hooks import engine_of
from htsr.training.layerwise.names import parameter_names
from htsr.training.layerwise.policy import Policy, make_policy
from htsr.training.layerwise.units import matrix_units
from htsr.training.layerwise.wrapper import layerwise as make_layerwise

if TYPE_CHECKING:
    import torch

_FIELDS = frozenset(f.name for f in fields(Policy))
_BASE = "policy"  # the key for what the fields change


def policy_of(layerwise: str | Mapping[str, Any], *, epoch_steps: int | None = None) -> Policy | None:
    """The policy that a recipe asks for.

    Args:
        layerwise: a policy's name, or ``none``; fields of `Policy` with new values, those of ``llr`` or of the one
            that the key ``policy`` names; or multipliers by pattern. A mapping has fields where any of its keys is
            one, but for ``head``, which is a role, too.
        epoch_steps: optimizer steps of one epoch, the interval of ``tempbalance``; 1 where they are not known yet.

    Returns:
        A policy; None for ``none``.

    Raises:
        UsageError: a key is unknown, or a value has no meaning.

    Examples:
        >>> from htsr.finetuning.rates import policy_of
        >>> policy = policy_of({"score": None, "embeddings": 5})
        >>> policy.score, policy.embeddings
        (None, 5)
        >>> policy_of({"*.lora_B": 16}).pin
        {'*.lora_B': 16}
    """
    if layerwise == "none":
        return None
    changes = dict(layerwise) if isinstance(layerwise, Mapping) else {_BASE: layerwise}
    if not _has_fields(layerwise):
        if not changes:
            raise UsageError("layerwise is an empty section: name a policy, fields of one, or multipliers by pattern")
        for pattern, value in changes.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise UsageError(
                    f"layerwise: {str(pattern)[:80]} is {kind_of(value)}, and a pattern has a number, its multiplier; "
                    f"a policy has no such key{nearest(pattern, [*sorted(_FIELDS), _BASE])}"
                )
        return _checked(changes)
    base = changes.pop(_BASE, "llr")
    for key in changes:
        if key not in _FIELDS:
            raise UsageError(f"layerwise: a policy has no {str(key)[:80]}{nearest(key, [*sorted(_FIELDS), _BASE])}")
    if not isinstance(base, str):
        raise UsageError(f"layerwise.policy is the name of a policy, not {kind_of(base)}")
    if measures_by_epoch(layerwise):
        changes = {"interval": epoch_steps or 1} | changes
    return _checked(base, **{key: _as_field(key, value) for key, value in changes.items()})


def measures_by_epoch(layerwise: str | Mapping[str, Any]) -> bool:
    """Whether the policy's interval is an epoch: that of ``tempbalance`` where no other is given.

    Args:
        layerwise: what the recipe's key says.
    """
    if isinstance(layerwise, str):
        return layerwise == "tempbalance"
    return layerwise.get(_BASE) == "tempbalance" and "interval" not in layerwise


def rates_in_words(layerwise: str | Mapping[str, Any], learning_rate: float) -> str:
    """The learning rates of a run: that of the recipe, and what `layerwise` makes of it.

    Args:
        layerwise: what the recipe's key says.
        learning_rate: learning rate of the recipe.

    Examples:
        >>> from htsr.finetuning.rates import rates_in_words
        >>> rates_in_words("none", 1e-3)
        'learning rate 0.001'
        >>> rates_in_words({"*.lora_B": 16}, 1e-3)
        'learning rate 0.001, for *.lora_B × 16 = 0.016'
    """
    said = f"learning rate {learning_rate:g}"
    if layerwise == "none":
        return said
    if isinstance(layerwise, str):
        return f"{said}, layerwise {layerwise}"
    if _has_fields(layerwise):
        return f"{said}, layerwise {', '.join(f'{key} {value}' for key, value in layerwise.items())}"
    return said + "".join(f", for {key} × {value:g} = {learning_rate * value:g}" for key, value in layerwise.items())


def _has_fields(layerwise: str | Mapping[str, Any]) -> bool:
    """Whether these are a name or fields, and no multipliers by pattern."""
    return isinstance(layerwise, str) or not (_FIELDS - {"head"} | {_BASE}).isdisjoint(layerwise)


def _checked(policy: Any, **changes: Any) -> Policy:
    try:
        return make_policy(policy, **changes)
    except UsageError as error:
        raise UsageError(f"layerwise: {str(error)[:500]}") from None


def _as_field(key: str, value: Any) -> Any:
    """A field of a policy as YAML can write it: a list for a tuple, a section for windows."""
    if key == "windows" and isinstance(value, Mapping):
        if unknown := [name for name in value if name not in ("rows", "count", "aspect")]:
            raise UsageError(f"layerwise.windows has no {unknown[0]!r}: rows, count and aspect")
        try:
            return Windows(**value)
        except (TypeError, ValueError) as error:
            raise UsageError(f"layerwise.windows: {error}") from None
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(value)
    return value


def require_effect(
    layerwise: str | Mapping[str, Any],
    policy: Policy,
    *,
    method: str,
    adapters: bool,
    frozen_by: str | None,
    decays: bool,
) -> None:
    """Refuse a `policy` whose multipliers are of what does not train, or of a weight decay of 0.

    Args:
        layerwise: the recipe's own words.
        policy: what they mean.
        method: method of the recipe.
        adapters: whether the method trains adapters.
        frozen_by: key of the recipe by which embedding and head do not train; None where they do.
        decays: whether weights decay.

    Raises:
        UsageError: they are.
    """
    said = f"layerwise: {layerwise}" if isinstance(layerwise, str) else "layerwise"
    ends_alone = policy.score is None and not policy.pin
    if adapters and policy.score is not None:
        raise UsageError(
            f"{said} sets learning rates by the spectra of whole matrices, which the method {method} does not train: "
            "give its adapters multipliers by pattern, such as {'*.lora_B': 16}"
        )
    given = [rule for rule in ("embeddings", "head") if _has_fields(layerwise) and rule in layerwise]
    if frozen_by and (ends_alone or any(getattr(policy, rule) not in ("leave", 1, None) for rule in given)):
        why = (
            f"the method {method} trains only where {frozen_by} has them: name them there"
            if adapters
            else f"{frozen_by}: freeze does not train: take {frozen_by}: train"
        )
        raise UsageError(f"{said} sets the learning rates of embedding and head, which {why}, or leave layerwise out")
    if policy.sets == "weight_decay" and not decays:
        raise UsageError(f"{said} shares out weight decay, which is 0 where training.weight_decay is not set")


def check_rates(policy: Policy, model: torch.nn.Module, adapters: Any, *, ends_train: bool) -> None:
    """Insist that a `policy` moves the rate of something that trains, and each of its patterns, too.

    Args:
        policy: policy of the recipe.
        model: model without adapters, on the meta device: nothing is measured.
        adapters: PEFT's configuration of its adapters; None where whole weights train.
        ends_train: whether embedding and head train; adapters say so themselves.

    Raises:
        UsageError: a pattern matches nothing, or nothing that trains; or all rates stay as they are.
    """
    import torch
    from peft import get_peft_model

    if adapters is not None:
        adapters.init_lora_weights = True  # others read weights
        with torch.device("meta"):
            model = get_peft_model(model, adapters)  # type: ignore[arg-type, assignment]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if adapters is None and not ends_train:
        names = parameter_names(model)
        ends = {unit.name for unit in matrix_units(open_live(model).matrices) if unit.is_embedding}
        trained = [parameter for parameter in trained if stem(names[id(parameter)]) not in ends]

    def changes_nothing(some: Policy) -> bool:
        engine = engine_of(make_layerwise(torch.optim.SGD(trained, lr=1.0), model, some, distributed=False))
        return engine is not None and engine.is_idle

    for pattern in policy.pin:
        alone = replace(policy, pin={pattern: 2.0}, score=None, embeddings="leave", head=None, exclude=())
        if changes_nothing(alone):
            whole = "; what lora.modules_to_save names trains" * (adapters is not None)
            raise UsageError(f"layerwise: {pattern!r} matches nothing that trains: all of it is frozen{whole}")
    if changes_nothing(policy):
        raise UsageError(
            f"layerwise changes nothing: no matrix that trains has {policy.min_size} eigenvalues (min_size) or a "
            "multiplier of its own"
            if policy.score is not None
            else "layerwise changes nothing: all that trains has the multiplier 1"
        )
