"""Recipes read from YAML, and checked before anything is loaded."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from htsr.errors import Refusals, SourceError
from htsr.finetuning.arguments import check_lora, check_training
from htsr.finetuning.overrides import override, split_override
from htsr.finetuning.recipe import SECTIONS_OF, Recipe, needed_by
from htsr.finetuning.recipe_values import load_yaml, made

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent / "recipes"


def read_recipe(path: str, changes: Mapping[str, Any] | None = None, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, or one that htsr carries, by its name (``one_cpu``, ``one_gpu_24gb`` …).

    Args:
        path: path of the file, or a name.
        changes: top-level keys that replace the file's.
        overrides: any keys that replace the file's, as in ``training.learning_rate=1e-4``; values are YAML.

    Raises:
        SourceError: there is no such file, or it is no YAML.
        UsageError: keys are unknown, or values are of the wrong kind or out of their range: all of them, each with its
            place.
        MissingDependencyError: TRL is not installed.
    """
    content, refusals = read_contents(path, changes, overrides), Refusals()
    recipe = refusals.unless(recipe_of, content, path)
    if recipe is None and isinstance(content.get("training"), dict):
        refusals.unless(check_training, content["training"])
    refusals.end()
    assert recipe is not None
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
        check_lora(recipe.lora, recipe.method)


def recipe_text(path: str) -> str:
    """The text of the file `path`, or of the recipe that htsr carries under that name.

    Raises:
        SourceError: there is no such file, or it is no text.
    """
    try:
        return _file(path).read_text(encoding="utf-8")
    except OSError as error:
        known = ", ".join(shipped())
        raise SourceError(f"{path} is neither a file nor one of the recipes {known}") from error
    except ValueError as error:
        raise SourceError(f"{path} is no YAML: {error}") from error


def shipped() -> dict[str, str]:
    """The recipes that htsr carries: what each is for, its first line, by name."""
    files = sorted(FOLDER.glob("*.yaml"))
    return {file.stem: file.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ") for file in files}


def _file(path: str) -> Path:
    file, carried = Path(path), FOLDER / f"{path}.yaml"
    return carried if not file.exists() and carried.exists() else file


def read_keys(path: str, changes: Mapping[str, Any] | None = None, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe without checking the options of TRL and PEFT: neither is imported.

    Args:
        path: path of the file, or a name.
        changes: top-level keys that replace the file's.
        overrides: any keys that replace the file's, as in ``training.learning_rate=1e-4``; values are YAML.

    Raises:
        SourceError: there is no such file, or it is no YAML.
        UsageError: a key is unknown, or a value is of the wrong kind or out of its range; its place is named.

    Examples:
        >>> from htsr.finetuning.reading import read_keys
        >>> recipe = read_keys("one_cpu", {"method": "lisa", "seed": 3})
        >>> recipe.method, recipe.seed, recipe.sampling.active
        ('lisa', 3, 4)
    """
    return recipe_of(read_contents(path, changes, overrides), path)


def recipe_of(content: Mapping[str, Any], path: str) -> Recipe:
    """The recipe that `content` is, as `read_contents` returns it; `path` is named in errors.

    Raises:
        UsageError: a key is unknown, or a value is of the wrong kind or out of its range; its place is named.
    """
    recipe: Recipe = made(Recipe, content, _file(path).name)
    return recipe


def read_contents(
    path: str,
    changes: Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
    say: Callable[[str], None] = logger.warning,
) -> dict[str, Any]:
    """The keys and values of which `read_keys` makes a recipe, without defaults; those of `overrides` are known ones.

    Where the method changes, what the file says for its own method and the new one does not need is left out.

    Args:
        path: path of the file, or a name.
        changes: top-level keys that replace the file's.
        overrides: any keys that replace the file's, as in ``training.learning_rate=1e-4``; values are YAML.
        say: function that is told, in one sentence, which keys of the file are left out.

    Raises:
        SourceError: there is no such file, or it is no YAML.
        UsageError: a key of `overrides` is unknown.
    """
    try:
        content = load_yaml(recipe_text(path))
    except ValueError as error:
        raise SourceError(f"{path} is no YAML: {error}") from error
    if not isinstance(content, dict):
        raise SourceError(f"{path} holds no keys and values")
    wanted = [split_override(text) for text in overrides]
    changes = {**(changes or {}), **{key: value for key, value in wanted if key == "method"}}
    left: list[str] = []
    if "method" in changes:
        then = str(content.get("method", Recipe.method))
        left = _of_another_method(content, then, str(changes["method"]))
        content = {key: value for key, value in content.items() if key not in left}
    content |= changes
    for key, value in wanted:
        override(content, key, value)
    frozen = "frozen_weights"
    if "method" in changes and frozen in content and frozen not in {*changes, *dict(wanted)}:
        samples = "sampling" in needed_by(str(content["method"])) or content.get("sampling") is not None
        if content[frozen] != "device" and (not samples or content["method"] == "qlora"):
            left.append(frozen)
            del content[frozen]
    if left:
        say(f"method {content['method']}: left out what the recipe says for the method {then}: {', '.join(left)}")
    return content


def _of_another_method(content: Mapping[str, Any], then: str, method: str) -> list[str]:
    """Sections of a recipe of the method `then` that `method` has not, or only where a recipe of its own asks."""
    mine = {*needed_by(method), *({*SECTIONS_OF.get(method, ())} & {*SECTIONS_OF.get(then, ())} - {*needed_by(then)})}
    known = {section for sections in SECTIONS_OF.values() for section in sections}
    return [key for key in content if key in known - mine and content[key] is not None]
