"""Records as the model will see them: their tokens, those of them that enter the loss, and what cutting leaves.

The tokens are made as TRL makes them, without a model, so that they can be counted and shown before one is loaded.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from htsr.calibration.record_forms import Record, is_chat, question_of
from htsr.calibration.record_texts import for_model, text_of, turns_of, written_by_template
from htsr.errors import SourceError
from htsr.finetuning.answers import AnswerTemplate, common, marked

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tokens:
    """The tokens of one record before it is cut.

    Attributes:
        ids: token ids.
        labels: whether each token enters the loss.

    Examples:
        >>> from htsr.finetuning.tokens import Tokens
        >>> Tokens([5, 6, 7], [False, True, True]).between(1, 3)
        Tokens(ids=[6, 7], labels=[True, True])
    """

    ids: list[int]
    labels: list[bool]

    def between(self, first: int, last: int) -> Tokens:
        """Those from position `first` to before `last`."""
        return Tokens(self.ids[first:last], self.labels[first:last])


def tokenized(records: Iterable[Record], tokenizer: Any, arguments: Any) -> Iterator[Tokens]:
    """The tokens of each record.

    Args:
        records: records that were checked (`htsr.calibration.record_forms.checked`).
        tokenizer: tokenizer of the model.
        arguments: arguments of TRL; completion_only_loss and assistant_only_loss are read.

    Raises:
        SourceError: the chat template cannot write a record, or answers alone have labels and cannot be told in it.
    """
    how = _how(tokenizer, arguments)
    for record in records:
        yield _tokens_of(record, tokenizer, arguments.completion_only_loss is False, how)


def with_labels(found: Any, tokenizer: Any, arguments: Any) -> Any:
    """A data set of `datasets`, or a stream, of chats with token ids and labels, which TRL takes as they are.

    A record of a stream in which answers cannot be told has no label; of such the first is named in a warning, the
    10th, the 100th …, with how many there were: a stream may have very many of them, and have them again and again.

    Args:
        found: data set with the columns of `htsr.calibration.record_texts.columns`, all chats.
        tokenizer: tokenizer of the model.
        arguments: arguments of TRL; completion_only_loss, assistant_only_loss and dataset_num_proc are read.
    """
    whole, how = arguments.completion_only_loss is False, _how(tokenizer, arguments)
    columns = found.column_names or list(next(iter(found)))  # those of a stream are not known
    more = {"num_proc": arguments.dataset_num_proc} if hasattr(found, "num_rows") else {}
    row_of = partial(_row, tokenizer=tokenizer, whole=whole, how=how, left_out=Counter())
    return found.map(row_of, remove_columns=columns, **more)


def _row(
    row: Record, tokenizer: Any, whole: bool, how: AnswerTemplate | None, left_out: Counter[str]
) -> dict[str, list[int]]:
    record = {key: value for key, value in row.items() if value is not None}
    try:
        tokens = _tokens_of(record, tokenizer, whole, how)
    except SourceError as error:
        left_out["records"] += 1
        if str(left_out["records"]).rstrip("0") == "1":
            logger.warning("a record is left out (%d so far, told of at 1, 10, 100 …): %s", left_out["records"], error)
        tokens = Tokens([tokenizer.eos_token_id], [False])
    labels = [i if its else -100 for i, its in zip(tokens.ids, tokens.labels, strict=True)]
    return {"input_ids": tokens.ids, "labels": labels}


def _how(tokenizer: Any, arguments: Any) -> AnswerTemplate | None:
    """How answers are found; None where they are not looked for."""
    wanted = getattr(arguments, "assistant_only_loss", False) and getattr(tokenizer, "chat_template", None)
    return AnswerTemplate.of(tokenizer) if wanted else None


def _tokens_of(record: Record, tokenizer: Any, whole: bool, how: AnswerTemplate | None) -> Tokens:
    record = for_model(record, tokenizer)
    how = how if is_chat(record) else None
    own = {"add_special_tokens": False} if is_chat(record) else {}  # templates write special tokens

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, **own)["input_ids"])

    if how is None:
        ids = encode(_whole(record, tokenizer))
        answers = [True] * len(ids)
    else:
        ids, answers = marked(turns_of(record), record, tokenizer, how)
    prompt = "" if whole else _prompt(record, tokenizer, how.variables if how else {})
    begin = common(encode(prompt), ids) if prompt else 0
    return Tokens(ids, [answer and i >= begin for i, answer in enumerate(answers)])


def bounds(size: int, arguments: Any) -> tuple[int, int]:
    """First and last position of `size` tokens that TRL's `arguments` leave of a record."""
    limit = arguments.max_length
    if limit is None or (arguments.packing and arguments.packing_strategy in ("wrapped", "bfd_split")):
        return 0, size  # what is too long goes on in the next sequence
    if arguments.truncation_mode == "keep_end" and not arguments.packing:
        return max(0, size - limit), size
    return 0, min(size, limit)


def _prompt(record: Record, tokenizer: Any, variables: Mapping[str, Any]) -> str:
    """What a completion is an answer to; empty where all of a record is one text."""
    if not is_chat(record):
        return question_of(record)[0] if "question" in record else str(record.get("prompt", ""))
    if "messages" in record:
        return ""
    return written_by_template(record["prompt"], record, tokenizer, add_generation_prompt=True, **variables)


def _whole(record: Record, tokenizer: Any) -> str:
    """The text of a record to its end."""
    if is_chat(record):
        return written_by_template(turns_of(record), record, tokenizer)
    both, end = text_of(record), tokenizer.eos_token
    return both if both.endswith(end) else both + end
