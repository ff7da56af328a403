"""How many tokens of the training records have a label, that is, enter the loss, and what is refused for want of them.

So that it can be said before a model is loaded that a record has no label left, or a token that the model lacks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from htsr.calibration.record_forms import Record, is_chat
from htsr.calibration.record_texts import text_of, turns_of
from htsr.errors import SourceError, UsageError, reason_of
from htsr.finetuning.tokens import bounds, tokenized


@dataclass(frozen=True)
class Labels:
    """How many labels, tokens that enter the loss, a set of records has.

    Attributes:
        records: number of records.
        cut: number of records longer than the limit.
        empty: number of records that keep no label.
        labels: number of labels that there would be without the limit.
        lost: number of labels beyond the limit.
        highest: highest token id.

    Examples:
        >>> from htsr.finetuning.labels import Labels
        >>> print(Labels(records=10, cut=3, empty=2, labels=1000, lost=150, highest=99))
        3 of 10 records are cut, 15% of the labels are lost; 2 keep none and are not trained on
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
        records: records that were checked (`htsr.calibration.record_forms.checked`).
        tokenizer: tokenizer of the model.
        arguments: arguments of TRL; max_length, truncation_mode, packing, completion_only_loss and assistant_only_loss
            are read.

    Raises:
        SourceError: the chat template cannot write a record.
    """
    cut = empty = labels = lost = highest = 0
    for tokens in tokenized(records, tokenizer, arguments):
        first, last = bounds(len(tokens.ids), arguments)
        kept, wanted = sum(tokens.labels[first:last]), sum(tokens.labels)
        highest = max(highest, max(tokens.ids, default=0))
        cut += last - first < len(tokens.ids)
        empty += kept == 0
        labels += wanted
        lost += wanted - kept
    return Labels(len(records), cut, empty, labels, lost, highest)


def take_own(name: str, tokenizer: Any, arguments: Any) -> None:
    """Give a tokenizer the chat template and the end-of-text token that TRL's arguments name, as TRL will.

    Args:
        name: name of the model, for the message.
        tokenizer: tokenizer of the model, changed.
        arguments: arguments of TRL; chat_template_path and eos_token are read.

    Raises:
        UsageError: there is no such template, or no such token.
    """
    end, path = arguments.eos_token, arguments.chat_template_path
    if end is not None:
        if end not in tokenizer.get_vocab():
            raise UsageError(f"training.eos_token: the tokenizer of {name} has no token {end!r}")
        tokenizer.eos_token = end
        tokenizer.pad_token = tokenizer.pad_token or end
    if path is None:
        return
    if not path.endswith((".jinja", ".j2")):  # of another model TRL would take new tokens, too, and resize this one
        raise UsageError(f"training.chat_template_path: {path} is no .jinja or .j2 file")
    try:
        tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(f"training.chat_template_path: {path} cannot be read: {reason_of(error)}") from error


def check_tokenizer(name: str, tokenizer: Any, records: Sequence[Record], arguments: Any) -> None:
    """Insist on a chat template where there are chats, on chats if wanted, and on a token that ends a text.

    Args:
        name: name of the model, for the message.
        tokenizer: tokenizer of the model.
        records: records that were checked (`htsr.calibration.record_forms.checked`).
        arguments: arguments of TRL.

    Raises:
        SourceError: the tokenizer has no chat template for chats, or no token that ends a text.
        UsageError: the loss of answers alone is wanted, and there are records that are no chats.
    """
    if any(is_chat(record) for record in records) and not getattr(tokenizer, "chat_template", None):
        raise SourceError(
            f"the tokenizer of {name} has no chat template, with which messages are written; take the model's chat "
            "variant, or set training.chat_template_path"
        )
    if arguments.assistant_only_loss and not all(is_chat(record) for record in records):
        raise UsageError("training.assistant_only_loss is for chats, and there are records that are none")
    if tokenizer.eos_token is None:
        raise SourceError(f"the tokenizer of {name} has no token that ends a text; set training.eos_token")


def check_tools(name: str, tokenizer: Any, records: Sequence[Record], say: Callable[[str], None]) -> None:
    """Tell where the chat template leaves out the tools that records have, and insist that it writes their calls.

    Of tools that it leaves out the model is not told; in place of a call it would learn to say nothing.

    Args:
        name: name of the model, for the message.
        tokenizer: tokenizer of the model.
        records: records that were checked.
        say: function that is told.

    Raises:
        UsageError: calls are left out.
    """
    calling = [(record, called) for record in records if (called := _called(record))]
    lost = sum(any(call not in text_of(record, tokenizer) for call in called) for record, called in calling)
    if lost:
        raise UsageError(
            f"tool_calls: the chat template of {name} does not write them, in {lost} of {len(calling)} records that "
            "have some, and the model would learn to say nothing in their place: set training.chat_template_path to a "
            "template that does"
        )
    with_tools = [record for record in records if record.get("tools")]
    if with_tools:
        first = with_tools[0]
        without = {key: value for key, value in first.items() if key != "tools"}
        if text_of(first, tokenizer) == text_of(without, tokenizer):
            say(f"tools: the chat template of {name} does not write them, in {len(with_tools)} records that have some")


def _called(record: Record) -> list[str]:
    """Names of the functions that the turns of a chat call."""
    turns = turns_of(record) if is_chat(record) else []
    return [str(call["function"]["name"]) for turn in turns for call in turn.get("tool_calls") or ()]


def check_labels(found: Labels, arguments: Any, what: str) -> None:
    """Insist that at least one record keeps a label.

    Args:
        found: what `count_labels` returned.
        arguments: arguments of TRL.
        what: what the records are, for the message.

    Raises:
        UsageError: cutting leaves no label.
    """
    if found.empty == found.records:
        raise UsageError(
            f"training.max_length: at {arguments.max_length} tokens none of the {found.records} {what} keeps a label "
            "(a prompt alone is longer than that)"
        )


def insist_on_labels(dataset: Any) -> None:
    """Insist on a label in the `dataset` that TRL has made, whatever it took for one.

    Raises:
        UsageError: there is no label.
    """
    if "labels" in dataset.column_names and not any(any(label != -100 for label in row["labels"]) for row in dataset):
        raise UsageError("training: no token of the training records has a label: see max_length")


def check_vocabulary(name: str, highest: int, size: int) -> None:
    """Insist that the embedding has a row for every token.

    Args:
        name: name of the model, for the message.
        highest: highest token id of the data.
        size: number of rows of the embedding.

    Raises:
        SourceError: the tokenizer makes tokens that the model does not know.
    """
    if highest >= size:
        raise SourceError(
            f"the tokenizer of {name} makes token {highest} of the data, and its embedding has {size} rows: they do "
            "not belong together, or the embedding wants resizing"
        )
