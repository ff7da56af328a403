"""Which models a run has left, and after how many steps: checkpoints in a folder, revisions of a hub id, any others."""

from __future__ import annotations

import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from htsr.analysis.trajectory_file import is_trajectory
from htsr.errors import SourceError, UsageError
from htsr.matrices.adapters import is_adapter
from htsr.matrices.folders import SUFFIXES, model_files
from htsr.matrices.hub import is_hub_id
from htsr.matrices.sources import Source

logger = logging.getLogger(__name__)

Sources: TypeAlias = "Source | Iterable[Source] | Mapping[str | int, Source]"

_STATE, _RESULTS = "trainer_state.json", "results.json"  # of the Trainer, which writes it last; of `htsr finetune`
_EPOCH = "epoch"
_WORDS = ("step", "checkpoint", "ckpt", "iter", _EPOCH)  # before the number in a name, the most telling first


@dataclass(frozen=True)
class Checkpoint:
    """One model of those that are tracked.

    Attributes:
        label: name by which it is known in a trajectory.
        source: model, as `htsr.analyze` takes it.
        revision: branch, tag or commit of a hub id; else None.
        step: number of steps, or of epochs, after which a run has left it; None where it is no step of one run.
        run: folder of the run that it is in; None where it is in none, or in memory or on the hub.
    """

    label: str
    source: Source
    revision: str | None = None
    step: int | None = None
    run: Path | None = None

    @property
    def is_unfinished(self) -> bool:
        """Whether it lacks what the Trainer writes last, and others of its run have that."""
        if self.run is None or not isinstance(self.source, Path) or (self.source / _STATE).is_file():
            return False
        return any(self.run.glob(f"*/{_STATE}"))


def checkpoints_of(sources: Sources) -> list[Checkpoint]:
    """The models that `sources` stand for: by step where they are those of one run, else in their order.

    Args:
        sources: a folder with checkpoints (`find_checkpoints`); a model as `htsr.analyze` takes it, of a hub id also as
            ``owner/name@revision``; several of these; or models by label, or by their step as a whole number.

    Raises:
        SourceError: a folder cannot be read.
        UsageError: there is no source, two have one label, or one of several is a saved trajectory.

    Examples:
        >>> from htsr.analysis.checkpoints import checkpoints_of
        >>> names = [f"EleutherAI/pythia-70m@step{step}" for step in (1000, 512)]
        >>> [(checkpoint.label, checkpoint.step) for checkpoint in checkpoints_of(names)]
        [('step512', 512), ('step1000', 1000)]
    """
    if isinstance(sources, Mapping) and not _is_state_dict(sources):
        found = [
            Checkpoint(str(label), *_parts(source), step=label if isinstance(label, int) else None)
            for label, source in sources.items()
        ]
        return _checked(found, len(found) == 1 or all(checkpoint.step is not None for checkpoint in found))
    if isinstance(sources, (str, os.PathLike, Mapping)) or hasattr(sources, "named_parameters"):
        sources = [sources]  # type: ignore[list-item]
    found, homes = [], set()
    for source in sources:
        home, more = _expanded(source)  # type: ignore[arg-type]
        homes.add(home)
        found += more
    if len(homes) > 1 or None in homes:
        found = [replace(checkpoint, label=_whole_label(checkpoint)) for checkpoint in found]
    return _checked(_numbered(found), len(homes) == 1 and None not in homes)


def find_checkpoints(folder: Path) -> list[Checkpoint]:
    """The checkpoints in the `folder` of a run, by step, and its final model where that is a later one.

    A checkpoint is a folder, or a file of weights, whose name has a number after ``checkpoint``, ``step``, ``ckpt``,
    ``iter`` or ``epoch``, as in ``checkpoint-500`` or ``epoch=1-step=500.ckpt``. The final model is the one in the
    folder itself, or the adapter in ``adapter`` where the checkpoints are adapters; it counts where the folder says
    after how many steps it was saved, and no checkpoint is of that step; where `htsr finetune` has kept the best model,
    it is of the step of that one. Epochs count where nothing else does.

    Returns:
        The checkpoints; nothing where the folder has none.

    Raises:
        SourceError: the folder cannot be read.
    """
    try:
        entries = [entry for entry in folder.iterdir() if entry.is_dir() or entry.suffix in SUFFIXES]
    except OSError as error:
        raise SourceError(f"{folder} cannot be read: {error.strerror or error}") from error
    numbered = {entry: number for entry in entries if (number := _number_in(entry.name)) is not None}
    steps = {entry: step for entry, (word, step) in numbered.items() if word != _EPOCH}
    if steps and (epochs := sorted(entry.name for entry in numbered.keys() - steps.keys())):
        logger.warning("%s: left out, since epochs are no steps: %s", folder, ", ".join(epochs))
    steps = steps or {entry: step for entry, (_, step) in numbered.items()}
    found = [Checkpoint(entry.name, entry, None, step, folder) for entry, step in steps.items()]
    found.sort(key=_place)
    if found and (final := _final_model(folder, found)):
        found = sorted([*found, final], key=_place)
    return found


def _place(checkpoint: Checkpoint) -> tuple[int, str]:
    return checkpoint.step or 0, checkpoint.label


def step_of(name: str) -> int | None:
    """The number of steps in the `name` of a checkpoint or revision; None where it has none.

    Examples:
        >>> from htsr.analysis.checkpoints import step_of
        >>> step_of("checkpoint-500"), step_of("epoch=1-step=0750.ckpt"), step_of("stage1-step1000-tokens4B")
        (500, 750, 1000)
        >>> step_of("global_step500"), step_of("model-00001-of-00002.safetensors")  # DeepSpeed's states; a shard
        (None, None)
    """
    found = _number_in(name)
    return None if found is None else found[1]


def _number_in(name: str) -> tuple[str, int] | None:
    """The number in the `name` of a checkpoint, and the word before it."""
    for word in _WORDS:
        if match := re.search(rf"(?<!global_){word}s?[-_=]?(\d{{1,15}})", name, re.IGNORECASE):
            return word, int(match[1])
    return None


def _is_state_dict(mapping: Mapping[Any, Any]) -> bool:
    """Whether it holds tensors; models of transformers have a ``dtype``, too."""
    return any(hasattr(value, "dtype") and not hasattr(value, "named_parameters") for value in mapping.values())


def _parts(source: Source) -> tuple[Source, str | None]:
    """Source and revision of ``owner/name@revision``, where that is no path."""
    if isinstance(source, str) and "@" in source and not os.path.lexists(os.path.expanduser(source)):
        name, _, revision = source.rpartition("@")
        if revision and is_hub_id(name):
            return name, revision
    return source, None


def _expanded(source: Source) -> tuple[Any, list[Checkpoint]]:
    """The run that a source is or belongs to, None where there is none, and the checkpoints that it stands for."""
    name, revision = _parts(source)
    if revision is not None:
        return name, [Checkpoint(revision, name, revision, step_of(revision))]
    if not isinstance(source, (str, os.PathLike)):
        return None, [Checkpoint("state dict" if isinstance(source, Mapping) else type(source).__name__, source)]
    path = Path(source).expanduser()
    if is_trajectory(path):
        raise UsageError(f"{path} is a trajectory and no model: it is read alone, or gone on with (save=…, --save)")
    if os.path.isdir(path) and (found := find_checkpoints(path)):
        return path, found
    if os.path.exists(path) and (step := step_of(path.name)) is not None:
        return path.parent, [Checkpoint(path.name, source, None, step, path.parent)]
    return None, [Checkpoint(path.name or os.fspath(source), source)]


def _whole_label(checkpoint: Checkpoint) -> str:
    """What names a checkpoint among those of several runs."""
    if not isinstance(checkpoint.source, (str, os.PathLike)):
        return checkpoint.label
    return os.fspath(checkpoint.source) + (f"@{checkpoint.revision}" if checkpoint.revision else "")


def _numbered(found: list[Checkpoint]) -> list[Checkpoint]:
    """Models in memory of one class, by their place among those."""
    counts = Counter(checkpoint.label for checkpoint in found)
    seen: Counter[str] = Counter()
    result = []
    for checkpoint in found:
        label = checkpoint.label
        seen[label] += 1
        in_memory = not isinstance(checkpoint.source, (str, os.PathLike))
        result.append(
            replace(checkpoint, label=f"{label} {seen[label]}") if in_memory and counts[label] > 1 else checkpoint
        )
    return result


def _checked(found: list[Checkpoint], of_one_run: bool) -> list[Checkpoint]:
    if not found:
        raise UsageError("there is nothing to track: name a folder with checkpoints, or models")
    twice = [label for label, count in Counter(checkpoint.label for checkpoint in found).items() if count > 1]
    if twice:
        raise UsageError(
            f"two of the models are called {twice[0]}; name each once, or give a mapping with other labels"
        )
    if not of_one_run or any(checkpoint.step is None for checkpoint in found):
        return [replace(checkpoint, step=None) for checkpoint in found]
    return sorted(found, key=lambda checkpoint: checkpoint.step or 0)


def _final_model(folder: Path, found: list[Checkpoint]) -> Checkpoint | None:
    last = found[-1]
    if not isinstance(last.source, Path) or not last.source.is_dir():
        return None
    step = _last_step(folder)
    if step is None or step in (checkpoint.step for checkpoint in found):
        return None
    final = folder
    if is_adapter(last.source) and not is_adapter(folder):
        final = folder / "adapter"
        if not is_adapter(final):
            return None  # what is in the folder itself is merged
    elif not is_adapter(folder):
        try:
            model_files(folder)
        except SourceError:
            return None
    return Checkpoint("final", final, None, step, folder)


def _last_step(folder: Path) -> int | None:
    """The step after which the run in `folder` has saved its final model, as the run says itself."""
    best = (_RESULTS, ("metrics", "best_step"))  # its weights are those of an earlier step than the last
    for name, keys in (best, (_STATE, ("global_step",)), (_RESULTS, ("metrics", "steps"))):
        try:
            content = json.loads((folder / name).read_text(encoding="utf-8"))
            for key in keys:
                content = content[key]
            return int(content)
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def label_of(checkpoints: Sequence[Checkpoint]) -> str:
    """What to call the run, hub model or collection that the `checkpoints` are.

    Examples:
        >>> from htsr.analysis.checkpoints import checkpoints_of, label_of
        >>> label_of(checkpoints_of(["me/small@step1", "me/small@step2"])), label_of(checkpoints_of(["me/a", "me/b"]))
        ('me/small', 'me/a and 1 more')
    """
    homes = {checkpoint.run or (checkpoint.source if checkpoint.revision else None) for checkpoint in checkpoints}
    if len(homes) == 1 and None not in homes and checkpoints[0].step is not None:
        return os.fspath(homes.pop())  # type: ignore[arg-type]
    if len(checkpoints) == 1:
        return _whole_label(checkpoints[0])
    return f"{checkpoints[0].label} and {len(checkpoints) - 1} more"


def run_of(checkpoints: Sequence[Checkpoint]) -> str | None:
    """What tells the run of the `checkpoints` from others, wherever one is: None where they are no steps of one.

    Examples:
        >>> from htsr.analysis.checkpoints import checkpoints_of, run_of
        >>> run_of(checkpoints_of(["me/small@step1", "me/small@step2"])), run_of(checkpoints_of(["me/a", "me/b"]))
        ('me/small', None)
    """
    if checkpoints[0].step is None:
        return None
    folders = {checkpoint.run for checkpoint in checkpoints}
    folder = folders.pop()
    return label_of(checkpoints) if folders or folder is None else os.path.realpath(folder)
