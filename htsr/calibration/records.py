"""Records of text to calibrate, train and test on: read, checked, split and mixed."""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

from htsr.calibration.record_files import raw_records
from htsr.calibration.record_forms import Names, Record, checked, columns_of, question_of, unread
from htsr.calibration.record_texts import as_dataset, text_of
from htsr.errors import SourceError, UsageError
from htsr.ranks import is_first

__all__ = ["Names", "Record", "Source", "as_dataset", "mixed", "question_of", "read_records", "split", "text_of"]

logger = logging.getLogger(__name__)

MOST_TIMES = 100  # a mixture that repeats more than this is a slip in its weights


@dataclass(frozen=True, kw_only=True)
class Source:
    """One of several sources of records.

    Attributes:
        source: file, folder or id, see `read_records`.
        weight: share of the records that are its, up to a factor that all sources have; None where each record of all
            sources is taken once.
        text_field: field that holds the text of its records; None for that of all sources.
        columns: our names of its fields by theirs, in place of those of all sources.

    Raises:
        UsageError: the weight is not above 0.
    """

    source: str
    weight: float | None = None
    text_field: str | None = None
    columns: Mapping[str, str | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.weight is not None and not 0 < self.weight < float("inf"):
            raise UsageError(f"weight is {self.weight}; it is above 0 and finite")


def read_records(
    source: str, limit: int | None = None, *, alike: bool = False, names: Names | None = None
) -> list[Record]:
    """The records of a data file or data set, in its order, each of a form that `htsr.calibration.record_forms` knows.

    What nothing reads in them is named in one warning.

    Args:
        source: a .jsonl or .ndjson file (one object a line), a .json file (an array of objects, one object a line, or
            one alone), a .csv, .tsv or .parquet file (one record a row, by the names of its columns), a .txt file (one
            record ``{"text": …}`` a paragraph), each but .parquet also compressed (.gz, .zst, .bz2, .xz) and each also
            as ``package:MODULE/PATH``; a folder of such files, or one that `datasets` has saved; or an id of the hub of
            `datasets`. Folders and ids have an optional split, as in ``org/name:train`` (``train`` by default), and
            before it a configuration, where there are several: ``org/name:easy:train``.
        limit: number of records after which reading ends; None for all.
        alike: whether all records must go into one data set of TRL (`as_dataset`).
        names: what the fields of the records are called.

    Raises:
        SourceError: it cannot be read, holds no records, one that has no form, or one unlike the first where they are
            to be `alike`; file and line are named.
        MissingDependencyError: datasets, or the package of a compression, is needed and not installed.

    Examples:
        >>> from pathlib import Path
        >>> from htsr.calibration.records import read_records
        >>> _ = Path("poems.txt").write_text("A first paragraph.\\n\\nA second one.")
        >>> read_records("poems.txt")
        [{'text': 'A first paragraph.'}, {'text': 'A second one.'}]
    """
    return list(islice(iterated(source, names or Names(), alike=alike, streaming=limit is not None, told=limit), limit))


def iterated(
    source: str, names: Names, *, alike: bool = True, streaming: bool = True, told: int | None = None
) -> Iterator[Record]:
    """The records of a `source`, one after the other, as `read_records` returns them.

    Args:
        source: file, folder or id.
        names: what the fields of the records are called.
        alike: whether all records must go into one data set of TRL.
        streaming: whether a data set of the hub is read while it comes.
        told: number of records after which it is told what nothing reads in them; None for the end, 0 for never.

    Raises:
        SourceError: the source cannot be read, or a record has no form or another one than the first.
        MissingDependencyError: a package that the source needs is not installed.
    """
    ignored: Counter[str] = Counter()
    number, seen = 0, set[str]()
    for place, raw in raw_records(source, streaming=streaming):
        number += 1
        record = checked(raw, place, names)
        if alike and number == 1:
            wanted, first = columns_of(record), place.rpartition(", ")[2]
        elif alike and (kind := columns_of(record)) != wanted:
            raise SourceError(f"{place}: {kind}, while {first} has {wanted}; a data set is of one form")
        if told != 0:
            seen |= raw.keys()
            ignored.update(unread(raw, names))
        if number == told:
            _tell(source, names, seen, ignored, number)
            told = 0
        yield record
    if not number:
        raise SourceError(f"{source} holds no records")
    if told != 0:
        _tell(source, names, seen, ignored, number)


def _tell(source: str, names: Names, seen: set[str], ignored: Counter[str], number: int) -> None:
    """Name what nothing reads in the records of a source, and the fields that were to be there and are not."""
    if not is_first():
        return
    if missing := sorted(name for name in names.columns if name not in seen):
        logger.warning("%s: of %d records none has %s, which columns names", source, number, ", ".join(missing))
    if ignored:
        what = ", ".join(f"{key} ({count})" for key, count in ignored.most_common(12))
        more = f" and {len(ignored) - 12} more" if len(ignored) > 12 else ""
        logger.warning("%s: of %d records nothing reads %s%s", source, number, what, more)


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


def mixed(parts: Sequence[Sequence[Record]], weights: Sequence[float | None], seed: int) -> list[Record]:
    """The records of several sources in one list.

    Without weights each record of all sources is taken once, in an order drawn by the seed, so that the first ones
    stand for all. With weights each record is of a source that is drawn by them, until every record of every source
    was taken at least once: the others begin again before that (`datasets.interleave_datasets`, ``all_exhausted``).

    Args:
        parts: records of each source.
        weights: weight of each source; None stands for 1 where others have one.
        seed: seed of the draws.

    Raises:
        UsageError: a weight is so small that the mixture would have a hundred times the records of its sources.

    Examples:
        >>> from htsr.calibration.records import mixed
        >>> few, many = [{"text": "a"}], [{"text": str(i)} for i in range(6)]
        >>> len(mixed([few, many], [None, None], seed=0)), len(mixed([few, many], [1.0, 2.0], seed=0))
        (7, 9)
    """
    if len(parts) == 1:
        return list(parts[0])
    if all(weight is None for weight in weights):
        every = [record for part in parts for record in part]
        return random.Random(seed).sample(every, len(every))
    import datasets

    shares = probabilities(weights)
    longest = max(len(part) / share for part, share in zip(parts, shares, strict=True))
    if longest > MOST_TIMES * sum(map(len, parts)):
        raise UsageError(f"data.train: by these weights an epoch has about {longest:,.0f} records, nearly all repeated")
    places = [
        datasets.Dataset.from_dict({"part": [i] * len(part), "index": list(range(len(part)))})
        for i, part in enumerate(parts)
    ]
    drawn = datasets.interleave_datasets(places, shares, seed=seed, stopping_strategy="all_exhausted")
    return [parts[row["part"]][row["index"]] for row in drawn]


def probabilities(weights: Sequence[float | None]) -> list[float]:
    """The probability of each source by its weight, where None stands for 1.

    Args:
        weights: weight of each source.

    Examples:
        >>> from htsr.calibration.records import probabilities
        >>> probabilities([3.0, None])
        [0.75, 0.25]
    """
    numbers = [1.0 if weight is None else weight for weight in weights]
    return [number / sum(numbers) for number in numbers]
