"""The `htsr outliers` command."""

from __future__ import annotations

import random
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from htsr_cli.options import (
    Device,
    Format,
    Output,
    Quiet,
    Revision,
    Seed,
    Verbose,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from htsr_cli.output import Words


def outliers(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, folder, or .gguf file of a transformer.")],
    data: Annotated[
        str,
        typer.Option(
            help="Calibration texts: .jsonl, .json, .csv, .tsv, .parquet or .txt, a folder of these, or a data set of "
            "the hub as in org/name:train."
        ),
    ],
    threshold: Annotated[
        list[float] | None, typer.Option(help="τ, multiples of the mean score; 3 5 7 10 13 if none. Repeatable.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Records of the calibration set, drawn by the seed.")] = 128,
    length: Annotated[int, typer.Option(min=1, help="Longest sample in tokens.")] = 512,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples at a time; the result does not depend on it.")] = 8,
    revision: Revision = None,
    device: Device = "auto",
    seed: Seed = 0,
    save: Annotated[Path | None, typer.Option(help="Save the result (.json) for training and for Python.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw it, as .png, .svg or .pdf.")] = None,
    format: Format = None,
    output: Output = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Layer outlier distribution: which blocks hold the outliers of |W|·‖X‖ on a calibration text.

    For example:  [bold]htsr outliers ./model --data train.jsonl --threshold 13 --save outliers.json[/bold]
    """
    from htsr_cli.output import Target, Words

    from htsr.analysis.devices import pick_device
    from htsr.calibration.loading import load_model, load_tokenizer
    from htsr.calibration.outlier_scores import checked_thresholds, measure_outliers
    from htsr.calibration.outliers import THRESHOLDS
    from htsr.calibration.records import read_records, text_of
    from htsr.files import check_writable
    from htsr.reporting.plots import check_picture, write_picture

    words, target = Words(quiet, verbose), Target.of(context)
    thresholds = list(checked_thresholds(threshold or THRESHOLDS))
    if picture:
        check_picture(picture)
    if save:
        check_writable(save)
    with words.of_others():
        tokenizer = load_tokenizer(model, revision=revision)
        records = read_records(data)
        if len(records) > samples:
            records = random.Random(seed).sample(records, samples)
        texts = [text_of(record, tokenizer) for record in records]
        loaded = load_model(model, revision=revision).to(pick_device(device))
        with _bar(words) as progress:
            found = measure_outliers(
                loaded, tokenizer, texts, thresholds=thresholds, batch_size=batch_size, length=length, progress=progress
            )
    found = replace(found, label=model, meta={**found.meta, "data": data, "length": length, "seed": seed})
    if save:
        found.save(save)
    if picture:
        write_picture(found.plot(), picture)
    target.write(found, words)


@contextmanager
def _bar(words: Words) -> Iterator[Callable[[int, int], None] | None]:
    if words.quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.progress import Progress

    from htsr.reporting.text import plain_console

    with Progress(console=plain_console(stderr=True), transient=True) as bar:
        task = bar.add_task("calibration")
        yield lambda done, total: bar.update(task, completed=done, total=total)
