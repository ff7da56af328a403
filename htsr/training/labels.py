"""What is trained on: tokens of records, those that the loss is taken of, and what cutting leaves of them.

The tokens are made as TRL makes them, without a model, so that it can be said before one is loaded that a record has no
label left, or a token that the model does not know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from htsr.errors import SourceError, UsageError
from htsr.record_forms import Record, is_chat, question_of, text_of, written_by_template


@dataclass(frozen=True)
class Labels:
    """Tokens of a set of records that the loss is taken of.

    Attributes:
        records: how many.
        cut: records longer than the limit.
        empty: records of which no label is left.
        labels: tokens that the loss would be taken of without the limit.
        lost: those beyond it.
        highest: highest token id.
    """

    records: int
    cut: int
    empty: int
    labels: int
    lost: int
    highest: int

    def __str__(self) -> str:
        share = f"{self.lost / max(self.labels, 1):.0%} of the labels"
        empty = f"; {self.empty} keep none and are not trained on" if self.empty else ""
        return f"{self.cut} of {self.records} records are cut, {share} are lost{empty}"


def count_labels(records: Sequence[Record], tokenizer: Any, arguments: Any) -> Labels:
    """Tokenize `records` and count.

    Args:
        records: checked ones.
        tokenizer: of the model.
        arguments: TRL's; max_length, truncation_mode, packing and what the loss is taken of are read.

    Raises:
        SourceError: the chat template cannot write a record.
    """
    limit = arguments.max_length
    if arguments.packing and arguments.packing_strategy in ("wrapped", "bfd_split"):
        limit = None  # what is too long goes on in the next sequence
    from_end = arguments.truncation_mode == "keep_end" and not arguments.packing
    cut = empty = labels = lost = highest = 0
    for begin, ids in _tokenized(records, tokenizer, arguments):
        size = len(ids)
        highest = max(highest, max(ids, default=0))
        first, last = (0, size) if limit is None else (size - limit, size) if from_end else (0, limit)
        kept = max(0, min(last, size) - max(first, begin, 0))
        cut += limit is not None and size > limit
        empty += kept == 0
        labels += size - begin
        lost += size - begin - kept
    return Labels(len(records), cut, empty, labels, lost, highest)


def _tokenized(records: Sequence[Record], tokenizer: Any, arguments: Any) -> Iterator[tuple[int, list[int]]]:
    """First label and token ids of each record."""
    end = tokenizer.eos_token
    whole = arguments.completion_only_loss is False

    def ids_of(text: str) -> list[int]:
        return list(tokenizer(text)["input_ids"])

    for record in records:
        if is_chat(record):
            turns, prompt, both = record.get("messages"), "", ""
            if turns is None:
                turns = [*record["prompt"], *record["completion"]]
                prompt = written_by_template(record["prompt"], record, tokenizer, add_generation_prompt=True)
            both = written_by_template(turns, record, tokenizer)
            encode: Callable[[str], list[int]] = lambda text: list(  # noqa: E731  # templates write special tokens
                tokenizer(text, add_special_tokens=False)["input_ids"]
            )
        else:
            prompt = question_of(record)[0] if "question" in record else record.get("prompt", "")
            both = text_of(record)
            both, encode = both if both.endswith(end) else both + end, ids_of
        ids = encode(both)
        yield (_common(encode(prompt), ids) if prompt and not whole else 0), ids


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    shorter = min(len(a), len(b))
    return next((i for i in range(shorter) if a[i] != b[i]), shorter)


def check_tokenizer(name: str, tokenizer: Any, records: Sequence[Record], arguments: Any) -> None:
    """Insist on a chat template where there are chats, and on a token that ends a text.

    Args:
        name: of the model, for the message.
        tokenizer: of it.
        records: checked ones.
        arguments: TRL's.

    Raises:
        SourceError: the tokenizer has none.
    """
    own = getattr(arguments, "chat_template_path", None)
    if any(is_chat(record) for record in records) and not getattr(tokenizer, "chat_template", None) and not own:
        raise SourceError(
            f"the tokenizer of {name} has no chat template, with which messages are written; take the model's chat "
            "variant, or set training.chat_template_path"
        )
    if tokenizer.eos_token is None and not getattr(arguments, "eos_token", None):
        raise SourceError(f"the tokenizer of {name} has no token that ends a text; set training.eos_token")


def check_labels(found: Labels, arguments: Any, what: str) -> None:
    """Insist on something to learn from.

    Args:
        found: of `count_labels`.
        arguments: TRL's.
        what: the records are, for the message.

    Raises:
        UsageError: cutting leaves no label.
    """
    if found.empty == found.records:
        raise UsageError(
            f"training.max_length: at {arguments.max_length} tokens none of the {found.records} {what} keeps a label "
            "(a prompt alone is longer than that)"
        )


def insist_on_labels(dataset: Any) -> None:
    """The same of the `dataset` that TRL has made, whatever it took for a label.

    Raises:
        UsageError: there is no label.
    """
    if "labels" in dataset.column_names and not any(any(label != -100 for label in row["labels"]) for row in dataset):
        raise UsageError("training: no token of the training records has a label: see max_length")


def check_vocabulary(name: str, highest: int, size: int) -> None:
    """Insist on a row of the embedding for every token.

    Args:
        name: of the model, for the message.
        highest: highest token id of the data.
        size: rows of the embedding.

    Raises:
        SourceError: the tokenizer makes tokens that the model does not know.
    """
    if highest >= size:
        raise SourceError(
            f"the tokenizer of {name} makes token {highest} of the data, and its embedding has {size} rows: they do "
            "not belong together, or the embedding wants resizing"
        )
