"""Keys of a recipe from the command line: ``--set training.learning_rate=1e-4``."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from typing import Any, Union, get_args, get_origin, get_type_hints

from htsr.errors import HtsrError, UsageError
from htsr.finetuning.arguments import check_training
from htsr.finetuning.recipe import Recipe
from htsr.finetuning.recipe_values import kind_of, load_yaml, nearest


def split_override(text: str) -> tuple[str, Any]:
    """Dotted key and value of a `text` such as ``training.learning_rate=1e-4``, whose value is YAML.

    Raises:
        UsageError: it has no key, or what follows the first = is no YAML.

    Examples:
        >>> from htsr.finetuning.overrides import split_override
        >>> split_override("training.learning_rate=1e-4"), split_override("lora={rank: 4}")
        (('training.learning_rate', 0.0001), ('lora', {'rank': 4}))
    """
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not all(part.strip() for part in key.split(".")):
        raise UsageError(f"--set {text[:80]}: it is KEY=VALUE, as in training.learning_rate=1e-4")
    try:
        return key, load_yaml(value)
    except ValueError as error:
        raise UsageError(f"--set {key}: {error}") from error


def override(content: dict[str, Any], key: str, value: Any) -> None:
    """Put `value` into the `content` of a recipe under its dotted `key`; sections that are not there are made.

    Args:
        content: keys and values of the recipe, which are changed in place.
        key: key, as in ``training.learning_rate``. In a section whose keys are patterns, what follows is one key.
        value: value of the key.

    Raises:
        UsageError: a recipe has no such key, and the nearest is named; or what is above it is no section.

    Examples:
        >>> from htsr.finetuning.overrides import override
        >>> content = {"model": "org/name", "training": {"max_steps": 10}}
        >>> override(content, "training.learning_rate", 1e-4)
        >>> override(content, "lora.rank", 4)
        >>> content["training"], content["lora"]
        ({'max_steps': 10, 'learning_rate': 0.0001}, {'rank': 4})
    """
    *above, last = _parts(key, value)
    holder = content
    for depth, part in enumerate(above, start=1):
        inner = holder.get(part)
        if inner is not None and not isinstance(inner, dict):
            raise UsageError(f"--set {key}: {'.'.join(above[:depth])} is {kind_of(inner)} in the recipe, no section")
        holder[part] = holder = dict(inner or {})
    holder[last] = value


def _parts(key: str, value: Any) -> list[str]:
    """The parts of a dotted `key`, each of which a recipe has at its place."""
    parts = key.split(".")
    kind: Any = Recipe
    for depth, part in enumerate(parts):
        hints = get_type_hints(kind)
        if part not in hints:
            what = f"{'.'.join(parts[:depth])} has no key {part}" if depth else f"unknown key {part}"
            near = _elsewhere(part, value) if len(parts) == 1 else ""
            raise UsageError(f"--set {key}: {what}{near or nearest(part, hints)}")
        kinds = _kinds(hints[part])
        sections = [option for option in kinds if dataclasses.is_dataclass(option)]
        if any(get_origin(option) is Mapping for option in kinds):  # whose keys are those of a library, or patterns
            rest = parts[depth + 1 :]
            return [*parts[: depth + 1], ".".join(rest)] if any("*" in name for name in rest) else parts
        if depth + 1 < len(parts):
            if not sections:
                raise UsageError(f"--set {key}: {'.'.join(parts[: depth + 1])} is a value, and no section of keys")
            kind = sections[0]
    return parts


def _kinds(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _elsewhere(name: str, value: Any) -> str:
    """Where in a section a key is that is named without it, as the end of a message."""
    for section, hint in get_type_hints(Recipe).items():
        for kind in _kinds(hint):
            if dataclasses.is_dataclass(kind) and name in get_type_hints(kind):
                return f"; did you mean {section}.{name}?"
    try:
        check_training({name: value})
    except HtsrError:
        return ""
    return f"; did you mean training.{name}?"
