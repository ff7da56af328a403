"""What training will read, shown before it begins: some records as the model sees them, and the sizes of all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from htsr.calibration.record_forms import Record
from htsr.finetuning.labels import Labels
from htsr.finetuning.tokens import Tokens, bounds, tokenized

QUANTILES = {"shortest": 0.0, "median": 0.5, "90 %": 0.9, "99 %": 0.99, "longest": 1.0}


@dataclass(frozen=True)
class Shown:
    """One record as the model will see it.

    Attributes:
        pieces: the text of its tokens in pieces, each with whether its tokens enter the loss; special tokens are
            written out.
        tokens: number of tokens that are left when it is cut.
        labels: number of them that enter the loss.
        cut: number of tokens that are cut off.
    """

    pieces: tuple[tuple[str, bool], ...]
    tokens: int
    labels: int
    cut: int


@dataclass(frozen=True)
class Preview:
    """What training will read.

    Attributes:
        shown: the first records.
        records: number of records.
        tokens: number of tokens of all records, after cutting.
        labels: number of these that enter the loss.
        lengths: tokens of a record before cutting, by name of the quantile: shortest, median, 90 %, 99 %, longest.
        cut: what is cut off, in numbers and, as a text, in words.
        kept: bytes of each record, one for each token that cutting leaves, 1 where it enters the loss; empty where
            records are not packed.
    """

    shown: tuple[Shown, ...]
    records: int
    tokens: int
    labels: int
    lengths: Mapping[str, int]
    cut: Labels
    kept: tuple[bytes, ...]

    def sequences(self, arguments: Any) -> int:
        """Number of sequences that training has in an epoch: packed, and without those in which no token has a label.

        Args:
            arguments: arguments of TRL.
        """
        return _packed(self.kept, arguments) if arguments.packing else self.records - self.cut.empty


def preview(records: Sequence[Record], tokenizer: Any, arguments: Any, *, shown: int = 3) -> Preview:
    """What TRL will make of `records`, without a model.

    Args:
        records: training records that were checked (`htsr.calibration.record_forms.checked`), at least one.
        tokenizer: tokenizer of the model.
        arguments: arguments of TRL; max_length, truncation_mode, packing, packing_strategy, completion_only_loss and
            assistant_only_loss are read.
        shown: number of records that are shown.

    Raises:
        SourceError: the chat template cannot write a record.
    """
    first: list[Shown] = []
    sizes: list[int] = []
    kept: list[bytes] = []
    cut = empty = wanted = labels = tokens = highest = 0
    for whole in tokenized(records, tokenizer, arguments):
        size = len(whole.ids)
        part = whole.between(*bounds(size, arguments))
        sizes.append(size)
        tokens += len(part.ids)
        if arguments.packing:
            kept.append(bytes(part.labels))
        its_labels = sum(part.labels)
        if len(first) < shown:
            pieces = tuple(_pieces(part, tokenizer))
            first.append(Shown(pieces, len(part.ids), its_labels, size - len(part.ids)))
        highest = max(highest, max(whole.ids, default=0))
        cut += len(part.ids) < size
        empty += its_labels == 0
        wanted += sum(whole.labels)
        labels += its_labels
    counts = Labels(len(sizes), cut, empty, wanted, wanted - labels, highest)
    ordered = sorted(sizes)
    lengths = {name: ordered[round(share * (len(ordered) - 1))] for name, share in QUANTILES.items()}
    return Preview(tuple(first), len(sizes), tokens, labels, lengths, counts, tuple(kept))


def _pieces(tokens: Tokens, tokenizer: Any) -> Iterator[tuple[str, bool]]:
    """Texts of the runs of tokens that enter the loss or do not; joined they are the text of all tokens."""
    end, before = 0, ""
    for has_label, run in groupby(tokens.labels):
        end += len(list(run))
        text = tokenizer.decode(tokens.ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        yield text[len(before) :], has_label
        before = text


def _packed(records: Sequence[bytes], arguments: Any) -> int:
    """Number of sequences with a label into which TRL packs records of such tokens."""
    import datasets
    from trl.data_utils import pack_dataset

    rows = datasets.Dataset.from_dict({"labels": [np.frombuffer(record, np.uint8) for record in records]})
    if arguments.shuffle_dataset:  # sequences are packed from a thousand records at a time
        rows = rows.shuffle(seed=arguments.seed)
    packed = pack_dataset(rows, arguments.max_length, arguments.packing_strategy)
    return sum(any(row["labels"][1:]) for row in packed)  # what comes first is predicted from nothing
