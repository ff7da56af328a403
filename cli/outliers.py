"""What `htsr outliers` does, once its arguments are understood."""

from __future__ import annotations

import random
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from htsr_cli.output import Target, Words

from htsr.analysis.devices import pick_device
from htsr.calibration.loading import load_model, load_tokenizer
from htsr.calibration.outlier_scores import checked_thresholds, measure_outliers
from htsr.calibration.records import read_records, text_of
from htsr.files import check_writable
from htsr.reporting.plots import check_picture, write_picture
from htsr.reporting.text import plain_console

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def outliers(
    name: str,
    data: str,
    thresholds: list[float],
    words: Words,
    target: Target,
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
    """Calibrate, score, and write what was asked for."""
    thresholds = list(checked_thresholds(thresholds))
    if picture:
        check_picture(picture)
    if save:
        check_writable(save)
    with words.of_others():
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
    if save:
        found.save(save)
    if picture:
        write_picture(found.plot(), picture)
    target.write(found, words)


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
