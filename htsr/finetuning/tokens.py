"""Records as the model will see them: their tokens, those of them that enter the loss, and what cutting leaves.

The tokens are made as TRL makes them, without a model, so that they can be counted and shown before one is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from htsr.calibration.record_forms import Record, is_chat, question_of
from htsr.calibration.record_texts import for_model, text_of, turns_of, written_by_template
from htsr.errors import SourceError, reason_of


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
        SourceError: the chat template cannot write a record, or marks no answer in it where answers alone have labels.
    """
    whole = arguments.completion_only_loss is False
    answers = bool(getattr(arguments, "assistant_only_loss", False))
    for record in records:
        record = for_model(record, tokenizer)
        prompt, both, encode = _written(record, tokenizer)
        ids = encode(both)
        begin = _common(encode(prompt), ids) if prompt and not whole else 0
        labels = [i >= begin for i in range(len(ids))]
        if answers and is_chat(record):
            labels = [a and b for a, b in zip(labels, _answers(record, tokenizer), strict=True)]
        yield Tokens(ids, labels)


def bounds(size: int, arguments: Any) -> tuple[int, int]:
    """First and last position of `size` tokens that TRL's `arguments` leave of a record."""
    limit = arguments.max_length
    if limit is None or (arguments.packing and arguments.packing_strategy in ("wrapped", "bfd_split")):
        return 0, size  # what is too long goes on in the next sequence
    if arguments.truncation_mode == "keep_end" and not arguments.packing:
        return max(0, size - limit), size
    return 0, min(size, limit)


def _written(record: Record, tokenizer: Any) -> tuple[str, str, Callable[[str], list[int]]]:
    """The prompt of a record as text, the whole of it, and what makes tokens of them."""
    if is_chat(record):
        prompt = ""
        if "messages" not in record:
            prompt = written_by_template(record["prompt"], record, tokenizer, add_generation_prompt=True)
        both = written_by_template(turns_of(record), record, tokenizer)
        # templates write special tokens
        return prompt, both, lambda text: list(tokenizer(text, add_special_tokens=False)["input_ids"])
    prompt = question_of(record)[0] if "question" in record else record.get("prompt", "")
    both, end = text_of(record), tokenizer.eos_token
    return prompt, both if both.endswith(end) else both + end, lambda text: list(tokenizer(text)["input_ids"])


def _answers(record: Record, tokenizer: Any) -> list[bool]:
    """Whether each token of a chat is the assistant's, by the template that TRL takes for it."""
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    template = None
    if not has_generation_markers(tokenizer.chat_template):
        template = get_training_chat_template(tokenizer)
    variables = {"tools": record.get("tools"), **record.get("chat_template_kwargs", {})}
    try:
        found = tokenizer.apply_chat_template(
            turns_of(record),
            chat_template=template,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            **variables,
        )
    except Exception as error:  # whatever the template or the tokenizer raises
        raise SourceError(f"training.assistant_only_loss: {reason_of(error)}") from error
    return [bool(answer) for answer in found["assistant_masks"]]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    shorter = min(len(a), len(b))
    return next((i for i in range(shorter) if a[i] != b[i]), shorter)
