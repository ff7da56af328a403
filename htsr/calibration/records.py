"""Records of text to calibrate, train and test on: read, checked, and split."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

from htsr.calibration.loading import resolve
from htsr.calibration.record_forms import Record, as_dataset, checked, columns_of, question_of, text_of
from htsr.errors import MissingDependencyError, SourceError, UsageError, reason_of
from htsr.matrices.hub import is_hub_id, reached

__all__ = ["Record", "as_dataset", "question_of", "read_records", "split", "text_of"]


def read_records(source: str, limit: int | None = None, *, alike: bool = False) -> list[Record]:
    """The records of a data file or data set, in its order, each of a form that `htsr.calibration.record_forms` knows.

    Args:
        source: a .jsonl file (one object a line), a .json file (an array of objects, or one object a line), a .txt file
            (one record ``{"text": …}`` a paragraph), each also as ``package:MODULE/PATH``, or an id of the `datasets`
            hub with an optional split, as in ``org/name:train`` (the split ``train`` by default).
        limit: number of records after which reading ends; None for all.
        alike: whether all records must go into one data set of TRL (`as_dataset`).

    Raises:
        SourceError: it cannot be read, holds no records, one that has no form, or one unlike the first where they are
            to be `alike`; file and line are named.
        MissingDependencyError: datasets, which a data set of the hub needs, is not installed.

    Examples:
        >>> from pathlib import Path
        >>> from htsr.calibration.records import read_records
        >>> _ = Path("poems.txt").write_text("A first paragraph.\\n\\nA second one.")
        >>> read_records("poems.txt")
        [{'text': 'A first paragraph.'}, {'text': 'A second one.'}]
    """
    records = []
    for place, record in islice(_read(source, streaming=limit is not None), limit):
        records.append(checked(record, place))
        if not alike:
            continue
        columns = columns_of(records[-1])
        if len(records) == 1:
            wanted, first = columns, place.rpartition(", ")[2]
        elif columns != wanted:
            raise SourceError(f"{place}: {columns}, while {first} has {wanted}; a data set is of one form")
    if not records:
        raise SourceError(f"{source} holds no records")
    return records


def _read(source: str, streaming: bool) -> Iterator[tuple[str, Any]]:
    """Each record, with its place."""
    if source.startswith("package:") or source.lower().endswith((".jsonl", ".json", ".txt")):
        return _read_file(Path(resolve(source)))
    return _read_dataset(source, streaming)


def _read_file(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        path = path.expanduser()
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError, RuntimeError) as error:  # no such file, no UTF-8, no such user
        raise SourceError(f"{path} cannot be read: {reason_of(error, path)}") from error
    if path.suffix == ".txt":
        parts = (part.strip() for part in content.split("\n\n"))
        yield from ((f"{path}, paragraph {i}", {"text": part}) for i, part in enumerate(parts, 1) if part)
    elif path.suffix == ".json" and content.lstrip().startswith("["):
        yield from ((f"{path}, record {i}", found) for i, found in enumerate(_parsed(content, str(path)), 1))
    else:
        for i, line in enumerate(content.split("\n"), 1):  # JSON texts may hold other separators of lines
            if line.strip():
                yield f"{path}, line {i}", _parsed(line, f"{path}, line {i}")


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise SourceError(f"{place}: JSON of a depth without reason") from None
    except ValueError as error:
        raise SourceError(f"{place}: no JSON: {reason_of(error)}") from error


def _read_dataset(source: str, streaming: bool) -> Iterator[tuple[str, Any]]:
    name, _, split = source.partition(":")
    folder = Path(name)
    if not folder.is_dir() and not is_hub_id(name):
        raise SourceError(f"{source} is no .jsonl, .json or .txt file, nor a data set of the hub")
    try:
        import datasets
    except ImportError as error:
        raise MissingDependencyError("a data set of the hub needs datasets: pip install 'htsr[finetune]'") from error
    where = nullcontext() if folder.is_dir() else reached(name, kind="dataset")
    try:
        with where:
            data = datasets.load_dataset(name, split=split or "train", streaming=streaming)
            yield from ((f"{source}, record {i}", record) for i, record in enumerate(data, 1))
    except SourceError:
        raise
    except Exception as error:  # the library lets through whatever its file systems raise
        raise SourceError(f"{source} is a data set that cannot be had: {reason_of(error)}") from error


def split(records: Sequence[Record], share: float, seed: int) -> tuple[list[Record], list[Record]]:
    """`records` in an order drawn by the `seed`: those to train on, and the `share` that is held out.

    Raises:
        UsageError: nothing would be left to train on.

    Examples:
        >>> from htsr.calibration.records import split
        >>> train, held_out = split([{"text": str(i)} for i in range(10)], share=0.2, seed=0)
        >>> len(train), len(held_out)
        (8, 2)
    """
    if not 0 <= share < 1:
        raise UsageError(f"the share that is held out is in [0, 1), not {share}")
    shuffled = random.Random(seed).sample(records, len(records))
    held = round(share * len(records))
    if held == len(records):
        raise UsageError(f"of {len(records)} records none is left to train on")
    return shuffled[held:], shuffled[:held]
