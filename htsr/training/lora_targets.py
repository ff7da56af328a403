"""Which modules of a model adapters go on, and which train whole beside them, by name or by role."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from htsr.errors import Refusals, UsageError
from htsr.matrices.patterns import matches
from htsr.matrices.roles import role_of

if TYPE_CHECKING:
    import torch

ALL_LINEAR = "all-linear"  # PEFT's own word


def target_modules(model: torch.nn.Module, targets: str | Sequence[str]) -> list[str]:
    """Names of the modules that are meant: linear layers, embeddings, and GPT-2's Conv1D.

    Args:
        model: the model to be adapted.
        targets: a role (shell-style, as in ``attn.*``), a name or the end of one after a dot (``q_proj``), or several
            of them; a single text that is neither is a regular expression that matches whole names.

    Returns:
        Full names, in the order of the model.

    Raises:
        UsageError: some of `targets` mean no module, a line for each.

    Examples:
        >>> import torch
        >>> from htsr.training.lora_targets import target_modules
        >>> model = torch.nn.TransformerEncoderLayer(d_model=8, nhead=2)
        >>> target_modules(model, "mlp.*"), target_modules(model, ["linear1"]), target_modules(model, r"linear\\d")
        (['linear1', 'linear2'], ['linear1'], ['linear1', 'linear2'])

    Source: names and regular expressions as in PEFT's ``target_modules``; roles are ours.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    known = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Embedding, Conv1D))]
    if isinstance(targets, str) and not any(_is_meant(name, targets) for name in known):
        try:
            found = [name for name in known if re.fullmatch(targets, name)]
        except re.error as error:
            raise UsageError(f"lora.targets: {targets!r} is no regular expression: {error}") from None
        if found:
            return found
    return _meant(known, (targets,) if isinstance(targets, str) else targets, "lora.targets", type(model).__name__)


def saved_modules(model: torch.nn.Module, wanted: Sequence[str]) -> list[str]:
    """Names of the modules that train whole: those with parameters that `wanted` means, by name or by role.

    Args:
        model: the model to be adapted.
        wanted: roles, names, and ends of names after a dot.

    Returns:
        Full names, in the order of the model.

    Raises:
        UsageError: some of `wanted` mean no module, a line for each.

    Examples:
        >>> import torch
        >>> from htsr.training.lora_targets import saved_modules
        >>> saved_modules(torch.nn.TransformerEncoderLayer(d_model=8, nhead=2), ["norm1"])
        ['norm1']
    """
    known = [name for name, module in model.named_modules() if next(module.parameters(recurse=False), None) is not None]
    return _meant(known, wanted, "lora.modules_to_save", type(model).__name__)


def tied_modules(model: torch.nn.Module) -> list[str]:
    """Names of embedding and head where the `model` keeps one tensor for both; else none."""
    one: Any = model
    try:
        into, out = one.get_input_embeddings(), one.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return []
    weight = getattr(into, "weight", None)
    if weight is None or weight is not getattr(out, "weight", None):
        return []
    return [name for name, module in model.named_modules() if module is into or module is out]


def module_options(
    model: torch.nn.Module, targets: str | Sequence[str], whole: Sequence[str], options: Mapping[str, Any]
) -> dict[str, Any]:
    """The `options` of PEFT's ``LoraConfig`` with those that say which modules get adapters, and which train whole.

    Args:
        model: the model to be adapted; its weights are not read.
        targets: what gets adapters: ``all-linear``, or see `target_modules`.
        whole: what trains whole, see `saved_modules`. An embedding and a head that are one tensor stay one.
        options: other options of ``LoraConfig``.

    Raises:
        UsageError: names or roles mean no module, a line for each; or two things are asked of one; or an adapter of a
            tied embedding or head is wanted, which PEFT would merge into both.

    Examples:
        >>> import torch
        >>> from htsr.training.lora_targets import module_options
        >>> module_options(torch.nn.TransformerEncoderLayer(d_model=8, nhead=2), "mlp.*", ["norm1"], {})
        {'target_modules': ['linear1', 'linear2'], 'modules_to_save': ['norm1']}
    """
    refusals = Refusals()
    names = [] if targets == ALL_LINEAR else refusals.unless(target_modules, model, targets)
    saved = refusals.unless(saved_modules, model, whole)
    refusals.end()
    assert names is not None
    assert saved is not None
    if twice := [name for name in names if name in saved]:
        raise UsageError(f"lora: {twice[0]} is among targets and modules_to_save; it has an adapter or trains whole")
    tied = tied_modules(model)
    if not {*tied}.isdisjoint(names):
        raise UsageError(
            f"lora.targets: {' and '.join(tied)} are one tensor, into which PEFT would merge an adapter of one of them "
            "for both: name them in modules_to_save, and they train whole"
        )
    found: dict[str, Any] = {"target_modules": names or ALL_LINEAR, **with_exclusions(model, names, options)}
    if saved:
        found["modules_to_save"] = saved
    if not {*tied}.isdisjoint(saved):
        found.setdefault("ensure_weight_tying", True)
    return found


def with_exclusions(model: torch.nn.Module, wanted: Collection[str], options: Mapping[str, Any]) -> dict[str, Any]:
    """The `options` of ``LoraConfig``, excluding modules whose names only end like those of wanted ones.

    PEFT matches the ends of names, so that ``layers.0.…`` is ``teacher.layers.0.…``, too, but a pattern by the whole.

    Args:
        model: the model to be adapted.
        wanted: full names of the modules to be adapted.
        options: options of ``LoraConfig``, of which ``exclude_modules`` are kept.
    """
    given = options.get("exclude_modules")
    endings = tuple(f".{name}" for name in wanted)
    unwanted = [name for name, _ in model.named_modules() if name not in wanted and name.endswith(endings)]
    if not unwanted:
        return dict(options)
    patterns = [re.escape(name) for name in unwanted]
    if isinstance(given, str):
        patterns.append(f"(?:{given})")
    elif given:
        patterns += [rf"(?:.*\.)?{re.escape(name)}" for name in given]
    return {**options, "exclude_modules": "|".join(patterns)}


def _meant(known: Collection[str], wanted: Iterable[str], key: str, model: str) -> list[str]:
    meant = {item: {name for name in known if _is_meant(name, item)} for item in wanted}
    refused = [
        f"{key}: no module of {model} has the name or role {item!r}{_nearest(item, known)}"
        for item, own in meant.items()
        if not own
    ]
    if refused:
        raise UsageError("\n".join(refused))
    found = set[str]().union(*meant.values())
    return [name for name in known if name in found]


def _is_meant(name: str, item: str) -> bool:
    return name == item or name.endswith(f".{item}") or matches(role_of(name), (item,))


def _nearest(item: str, known: Collection[str]) -> str:
    words = sorted({name.rpartition(".")[2] for name in known} | {role_of(name) for name in known})
    near = get_close_matches(item, words, n=1) or get_close_matches(item.rpartition(".")[2], words, n=1)
    return f"; did you mean {near[0]}?" if near else f"; there are {', '.join(words)}" if len(words) <= 30 else ""
