"""Recipes read from YAML, and checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from htsr.errors import SourceError
from htsr.finetuning.arguments import check_lora, check_training
from htsr.finetuning.recipe import SECTIONS_OF, Recipe
from htsr.finetuning.recipe_values import load_yaml, made

FOLDER = Path(__file__).parent / "recipes"


def read_recipe(path: str, changes: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe in a YAML file, or one that htsr carries, by its name (``one_cpu``, ``one_gpu_24gb`` …).

    Args:
        path: path of the file, or a name.
        changes: top-level keys that replace the file's.

    Raises:
        SourceError: there is no such file, or it is no YAML.
        UsageError: a key is unknown, or a value is of the wrong kind or out of its range; its place is named.
        MissingDependencyError: TRL is not installed.
    """
    recipe = read_keys(path, changes)
    check_options(recipe)
    return recipe


def check_options(recipe: Recipe) -> None:
    """Insist that TRL and PEFT, which this imports, take what is theirs in a `recipe`.

    Raises:
        UsageError: a key is unknown, or a value is of the wrong kind or out of its range; its place is named.
        MissingDependencyError: TRL is not installed.
    """
    check_training(recipe.training)
    if recipe.lora is not None:
        check_lora(recipe.lora)


def read_keys(path: str, changes: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe without checking the options of TRL and PEFT: neither is imported.

    Args:
        path: path of the file, or a name.
        changes: top-level keys that replace the file's.

    Raises:
        SourceError: there is no such file, or it is no YAML.
        UsageError: a key is unknown, or a value is of the wrong kind or out of its range; its place is named.

    Examples:
        >>> from htsr.finetuning.reading import read_keys
        >>> recipe = read_keys("one_cpu", {"method": "lisa", "seed": 3})
        >>> recipe.method, recipe.seed, recipe.sampling.active
        ('lisa', 3, 4)
    """
    file = Path(path)
    try:
        if not file.exists() and (FOLDER / f"{path}.yaml").exists():
            file = FOLDER / f"{path}.yaml"
        content = load_yaml(file.read_text(encoding="utf-8"))
    except OSError as error:
        known = ", ".join(sorted(found.stem for found in FOLDER.glob("*.yaml")))
        raise SourceError(f"{path} is neither a file nor one of the recipes {known}") from error
    except ValueError as error:
        raise SourceError(f"{file} is no YAML: {error}") from error
    if not isinstance(content, dict):
        raise SourceError(f"{file} holds no keys and values")
    content |= changes or {}
    if changes and "method" in changes:  # the file's sections may be those of another method
        content = {
            k: v
            for k, v in content.items()
            if k not in ("sampling", "low_rank", "lora") or k in SECTIONS_OF.get(str(changes["method"]), ())
        }
    recipe: Recipe = made(Recipe, content, file.name)
    return recipe
