"""What `htsr outliers` does, once its arguments are understood."""

from __future__ import annotations

import importlib.util
import random
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from htsr_cli.output import Words, console

from htsr.analysis.execution import pick_device
from htsr.calibration.loading import load_model, load_tokenizer
from htsr.calibration.outliers import Outliers, checked_thresholds, measure_outliers
from htsr.calibration.records import read_records, text_of
from htsr.errors import HtsrError, MissingDependencyError, UsageError
from htsr.files import check_writable, written
from htsr.reporting.plots import check_picture
from htsr.reporting.text import plain_console

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def outliers(
    name: str,
    data: str,
    thresholds: list[float],
    words: Words,
    *,
    revision: str | None,
    samples: int,
    length: int,
    batch_size: int,
    device: str,
    seed: int,
    save: Path | None,
    picture: Path | None,
) -> None:
    """Calibrate, score, print the table, and write what was asked for."""
    thresholds = list(checked_thresholds(thresholds))
    _check_targets(save, picture)
    if picture:
        check_picture(picture)
    if save:
        check_writable(save)
    tokenizer = load_tokenizer(name, revision=revision)
    records = read_records(data)
    if len(records) > samples:
        records = random.Random(seed).sample(records, samples)
    texts = [text_of(record, tokenizer) for record in records]
    model = load_model(name, revision=revision).to(pick_device(device))
    with _bar(words) as progress:
        found = measure_outliers(
            model, tokenizer, texts, thresholds=thresholds, batch_size=batch_size, length=length, progress=progress
        )
    found = replace(found, label=name, meta={**found.meta, "data": data, "length": length, "seed": seed})
    _print(found)
    words.say(f"htsr: {found.label}: {found.samples} samples, {found.tokens} tokens")
    if save:
        found.save(save)
    if picture:
        with written(picture) as temporary:
            found.plot().figure.savefig(temporary, dpi=150)


def _check_targets(save: Path | None, picture: Path | None) -> None:
    """What cannot be written is known before anything is loaded."""
    for path in (save, picture):
        if path is not None and not path.parent.is_dir():
            raise HtsrError(f"{path} cannot be written: {path.parent} is no folder")
    if picture is not None:
        if picture.suffix not in (".png", ".svg", ".pdf"):
            raise UsageError(f"--picture ends in .png, .svg or .pdf, not as {picture.name}")
        if importlib.util.find_spec("matplotlib") is None:
            raise MissingDependencyError("the picture needs matplotlib: pip install 'htsr[report]'")


def _print(found: Outliers) -> None:
    from htsr.reporting.outliers import outlier_table

    console().print(outlier_table(found))


@contextmanager
def _bar(words: Words) -> Iterator[Callable[[int, int], None] | None]:
    import sys

    if words.quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.progress import Progress

    with Progress(console=plain_console(stderr=True), transient=True) as bar:
        task = bar.add_task("calibration")
        yield lambda done, total: bar.update(task, completed=done, total=total)
