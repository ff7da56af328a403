"""The folder of a run: whether it is free, whose run is in it, and the recipe that it keeps."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from htsr._version import __version__
from htsr.errors import HtsrError, SourceError, UsageError, reason_of
from htsr.files import written
from htsr.finetuning.recipe import USUAL_RATE, Recipe
from htsr.finetuning.recipe_values import dump_yaml, load_yaml, made
from htsr.finetuning.starts import START

RECIPE, RESULTS, DATA = "recipe.yaml", "results.json", "data.json"
ACCURACY_BEFORE = "accuracy_before.json"
_OLD_RECIPE = "recipe.json"  # of 0.2.0 and before
PREPARED = (RECIPE, DATA, _OLD_RECIPE, "spectra_before.npz", ACCURACY_BEFORE, "outliers.json", START)
_MAY_CHANGE = frozenset(  # neither of these changes a weight; the folder may have another name by now
    (
        "output",
        "frozen_weights",
        *(f"training.save_{key}" for key in ("steps", "strategy", "total_limit")),
        *(f"training.logging_{key}" for key in ("steps", "strategy", "first_step")),
        *(f"training.{key}" for key in ("report_to", "run_name", "disable_tqdm", "log_level", "push_to_hub")),
        *(f"training.hub_{key}" for key in ("model_id", "private_repo", "revision", "strategy", "always_push")),
    )
)


def check_output(output: Path, resume: bool) -> None:
    """Insist on a folder `output` in which no run has trained, unless `resume` says to go on with that run.

    What a run left that ended before its training (`PREPARED`) does not count: the next one makes it anew.

    Raises:
        UsageError: it is a file, or holds a run or anything else.
        HtsrError: it cannot be read.
    """
    try:
        if output.exists() and not output.is_dir():
            raise UsageError(f"output: {output} is a file; name a folder")
        holder = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
        if not holder.is_dir():
            raise UsageError(f"output: {output} cannot be a folder, {holder} is a file")
        found = [path for path in output.iterdir() if path.name not in PREPARED] if output.is_dir() else []
    except OSError as error:
        raise HtsrError(f"output: {output} cannot be used: {error.strerror}") from error
    if found and not resume:
        raise UsageError(f"{output} is not empty; --resume goes on with the run in it, or name another output")


def check_same_run(recipe: Recipe, output: Path, say: Callable[[str], None]) -> None:
    """Insist that the run in the folder `output` is one of this `recipe`, before it goes on.

    What is saved, logged and tracked may change, and where frozen weights live.

    Args:
        recipe: recipe of the run that goes on.
        output: folder of the run.
        say: function that is told where the folder does not say what its recipe was.

    Raises:
        UsageError: the recipe is another; all keys that differ are named.
        SourceError: the recipe in the folder cannot be read.
    """
    kept = _kept_recipe(output)
    if kept is None:
        if any(output.glob("checkpoint-*")):
            say(f"{output} holds no {RECIPE}; whether its run is one of this recipe is not known")
        return
    then, now = dict(kept_leaves(kept)), dict(leaves(plain(recipe)))
    changed = sorted(key for key in then.keys() | now.keys() if then.get(key) != now.get(key))
    changed = [key for key in changed if key not in _MAY_CHANGE]
    if changed:
        what = ", ".join(f"{key} was {_word(then, key)} and is {_word(now, key)}" for key in changed)
        raise UsageError(
            f"{output} holds a run of another recipe, and --resume would mix the two: {what}. Undo that, or name "
            "another output"
        )


def begin_folder(recipe: Recipe, output: Path, resume: bool) -> None:
    """Make the folder `output`, with its `recipe` in it.

    Without `resume` what an earlier start left in it goes.

    Raises:
        HtsrError: it cannot be made.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name in (RESULTS, _OLD_RECIPE) if resume else PREPARED:
            (output / name).unlink(missing_ok=True)
    except OSError as error:
        raise HtsrError(f"output: {output} cannot be made: {error.strerror}") from error
    with written(output / RECIPE) as temporary:
        temporary.write_text(resolved(recipe), encoding="utf-8")


def check_same_data(found: Mapping[str, str], output: Path) -> None:
    """Insist that the run in the folder `output` began with the data that was found, before it goes on.

    Args:
        found: what is found now: number and digest of the records by what they are for.
        output: folder of the run; one of an older version says nothing of its data.

    Raises:
        UsageError: the data is other; all that differs is named.
        SourceError: what the folder says of it cannot be read.
    """
    path = output / DATA
    try:
        then = dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else dict(found)
    except (OSError, ValueError, TypeError) as error:
        raise SourceError(f"{path} cannot be read: {reason_of(error, path)}") from error
    if changed := [f"{key}, {then.get(key)} and now {found[key]}" for key in found if then.get(key) != found[key]]:
        raise UsageError(
            f"{output} holds a run that began with other data, and --resume would mix the two: {'; '.join(changed)}. "
            "Bring the data back, or name another output"
        )


def write_json(path: Path, content: Any) -> None:
    """`content` as JSON in the file `path`, whole or not at all."""
    with written(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")


def _kept_recipe(output: Path) -> Any:
    """The recipe in a folder, or in the results there: those of a run of an older version; None where there is none."""
    for name, inside in ((RECIPE, ()), (_OLD_RECIPE, ()), (RESULTS, ("recipe",))):
        path = output / name
        try:
            if path.exists():
                text = path.read_text(encoding="utf-8")
                found = load_yaml(text) if name == RECIPE else json.loads(text)
                for key in inside:
                    found = found[key]
                return dict(found)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SourceError(f"{path} cannot be read: {reason_of(error, path)}") from error
    return None


def plain(recipe: Recipe) -> dict[str, Any]:
    """The `recipe` as JSON has it."""
    return dict(json.loads(json.dumps(dataclasses.asdict(recipe), default=str)))


def resolved(recipe: Recipe) -> str:
    """The `recipe` as YAML, our defaults filled in; `htsr.finetuning.reading.read_recipe` makes the same of it."""
    heading = f"# a recipe of htsr finetune, with the defaults of htsr {__version__};\n"
    heading += "# what training does not name is as TRL's SFTConfig has it\n"
    return heading + dump_yaml(json.loads(json.dumps(_given(recipe), default=str)))


def _given(section: Any) -> Any:
    """The keys of a `section` that are set, those of its sections alike; what libraries are told stays as it is."""
    if isinstance(section, (list, tuple)):
        return [_given(one) for one in section]
    if not dataclasses.is_dataclass(section):
        return section
    values = {field.name: (getattr(section, field.name), field.default) for field in dataclasses.fields(section)}
    return {key: _given(value) for key, (value, default) in values.items() if value is not None or default is not None}


def leaves(content: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of everything in `content`, whose keys begin with `above`.

    Examples:
        >>> from htsr.finetuning.run_folder import leaves
        >>> dict(leaves({"seed": 0, "lora": {"rank": 4}}))
        {'seed': 0, 'lora.rank': 4}
    """
    for key, value in content.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def kept_leaves(content: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The `leaves` of the `content` of a kept recipe, with the defaults of keys that an older version had not.

    One of an older version may leave SFTConfig's learning rate out.

    Examples:
        >>> from htsr.finetuning.run_folder import kept_leaves
        >>> kept = {"model": "org/name", "output": "out", "data": {"train": "train.jsonl"}, "lora": {"rank": 4}}
        >>> found = dict(kept_leaves(kept))
        >>> found["training.learning_rate"], found["lora.rank"], found["frozen_weights"]
        (2e-05, 4, 'device')
    """
    content = {**content, "training": {"learning_rate": USUAL_RATE, **(content.get("training") or {})}}
    with suppress(UsageError):  # of a version that had other keys
        content = plain(made(Recipe, content, RECIPE))
    return leaves(content)


def _word(content: Mapping[str, Any], key: str) -> str:
    return json.dumps(content[key]) if content.get(key) is not None else "not set"
