"""The records of a recipe: those to train on, from one source or several, and those held out; or a stream of them."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

from htsr.calibration.record_forms import Names, Record, form_of, is_chat
from htsr.calibration.record_texts import as_messages, columns, for_model, is_unanswered, merged, turns_of
from htsr.calibration.record_turns import FOR_TEMPLATE
from htsr.calibration.records import Source, iterated, mixed, probabilities, read_records, split
from htsr.errors import UsageError
from htsr.ranks import is_first

if TYPE_CHECKING:
    from datasets import IterableDataset

    from htsr.finetuning.recipe import Data, Recipe

logger = logging.getLogger(__name__)

HEAD = 256  # records of each source that are looked at before a stream begins
BUFFER = 1000  # records among which a stream is shuffled


def training_records(
    recipe: Recipe, tokenizer: Any, say: Callable[[str], None]
) -> tuple[list[Record], list[Record], IterableDataset | None]:
    """Records to train on, records held out, and the stream of the former where training is streaming.

    Instructions become turns or prompts as the tokenizer has it (`for_model`), and all records have one form. Of a
    stream the records to train on are its first ones, which stand for all in whatever is checked or measured before.

    Args:
        recipe: recipe, of which data, seed and sampling are read.
        tokenizer: tokenizer of the model.
        say: function that is told how many records there are, and what becomes of several sources.

    Raises:
        UsageError: nothing is left to train on, or the records are no training records.
        SourceError: a source cannot be read, or the sources are of several forms.
    """
    data, sources = recipe.data, recipe.data.sources("train")
    sections = (recipe.sampling, recipe.lora, recipe.gum)
    measured = [section.calibration_samples for section in sections if section is not None]
    head = max([HEAD, *measured]) if data.streaming else None
    skipped = data.evaluation_records or 0
    read = [_read(source, data, tokenizer, head and head + skipped) for source in sources]
    forms = [records[0] for records in read]
    read = merged(read)
    if any(("messages" in a) != ("messages" in b[0]) for a, b in zip(forms, read, strict=True)):
        say("data.train: some sources have messages, so all records are written as such")
    weights = [source.weight for source in sources]
    if data.streaming:
        parts = [(records[skipped:], records[:skipped]) for records in read]
        if short := [source.source for source, (left, _) in zip(sources, parts, strict=True) if not left]:
            raise UsageError(f"data.evaluation_records: {short[0]} has no more than {skipped} records")
    else:
        share = 0.0 if data.evaluation else data.evaluation_share or 0.0
        parts = [split(records, share, recipe.seed) for records in read]
    train = mixed([left for left, _ in parts], weights, recipe.seed)
    held_out = [record for _, held in parts for record in held]
    if data.evaluation:
        held = [_read(source, data, tokenizer, None) for source in data.sources("evaluation")]
        held_out = [record for part in merged(held) for record in part]
    train = train[: data.limit]
    _count_common(held_out, train)
    if not data.streaming:
        _tell_shares(sources, [left for left, _ in parts], train, say)
        return train, held_out, None
    say(
        f"streaming: what is checked and measured before training is so on the first {len(train)} records; the others "
        f"are read as training goes on, shuffled {BUFFER} at a time, and those of a source again when it has ended"
    )
    is_messages = "messages" in read[0][0]
    streams = [_stream(source, data, tokenizer, skipped, is_messages) for source in sources]
    return train, held_out, _mixed_streams(streams, weights, recipe.seed)


def _read(source: Source, data: Data, tokenizer: Any, limit: int | None) -> list[Record]:
    found = read_records(source.source, limit, alike=True, names=data.names(source))
    if form_of(found[0]) == "preference":
        raise UsageError(
            f"{source.source} holds preferences (chosen and rejected), and htsr finetune trains on single answers: "
            "TRL's DPOTrainer trains on them, with the optimizers and callbacks of htsr; or name the answer to train "
            "on, as in data.columns: {chosen: completion, rejected: null}"
        )
    records = [for_model(record, tokenizer) for record in found]
    if is_first() and (empty := sum(map(is_unanswered, records))):
        logger.warning(
            "%s: %d of %d records have an empty text or answer, or none: they teach to end at once",
            source.source,
            empty,
            len(records),
        )
    return records


def _count_common(held_out: Sequence[Record], train: Sequence[Record]) -> None:
    """Tell how many held-out records are trained on."""
    if not held_out or not is_first():
        return
    trained = set(map(_written, train))
    if common := sum(_written(record) in trained for record in held_out):
        logger.warning(
            "data: %d of %d held-out records are trained on, too, and their loss tells nothing of others",
            common,
            len(held_out),
        )


def _written(record: Record) -> str:
    return json.dumps(turns_of(record) if is_chat(record) else columns(record), sort_keys=True)


def _tell_shares(
    sources: Sequence[Source], parts: Sequence[Sequence[Record]], train: Sequence[Record], say: Callable[[str], None]
) -> None:
    """How many records of each of several sources there are, and how often they are taken."""
    if len(sources) == 1:
        return
    source_of = {id(record): i for i, part in enumerate(parts) for record in part}
    taken = Counter(source_of[id(record)] for record in train)
    for i, (source, part) in enumerate(zip(sources, parts, strict=True)):
        times = taken[i] / len(part)
        say(f"{source.source}: {taken[i]} of {len(train)} training records" + f", each {times:.2g} times" * (times > 1))


def _stream(source: Source, data: Data, tokenizer: Any, skipped: int, is_messages: bool) -> IterableDataset:
    import datasets

    rows = partial(_rows, source.source, data.names(source), tokenizer, skipped, is_messages)
    found: IterableDataset = datasets.IterableDataset.from_generator(rows)
    return found.repeat(None)  # so that the Trainer, which skips what is done, never comes to an end of it


def _rows(source: str, names: Names, tokenizer: Any, skipped: int, is_messages: bool) -> Iterator[Record]:
    """The columns of TRL of each record of a source but the first ones; all rows have the same keys."""
    for record in islice(iterated(source, names, told=0), skipped, None):
        row = columns(for_model(record, tokenizer))
        row = as_messages(row) if is_messages else row
        yield {**{key: None if key == "tools" else {} for key in FOR_TEMPLATE}, **row} if is_chat(row) else row


def _mixed_streams(streams: Sequence[Any], weights: Sequence[float | None], seed: int) -> IterableDataset:
    import datasets

    one = streams[0]
    if len(streams) > 1:
        one = datasets.interleave_datasets(list(streams), probabilities(weights), seed=seed)
    found: IterableDataset = one.shuffle(seed=seed, buffer_size=BUFFER)
    return found
