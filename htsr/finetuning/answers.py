"""Which tokens of a chat are the assistant's, so that answers alone enter the loss.

A chat template with ``{% generation %}`` says so itself, and for some families TRL knows one that does. With any other
the answers are what the template writes from one turn to the next: between the turns before an answer with the
beginning of the answer's turn (``add_generation_prompt``), and the turns up to it. That is exact where what is written
of these turns is the beginning of what is written of all, which is looked at for each answer. Where it is not, as with
templates that leave out the reasoning of all answers but the last, the answer is not what the model would write, and
has no label.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from htsr.calibration.record_forms import Record, is_chat, short
from htsr.calibration.record_texts import turns_of, written_by_template
from htsr.errors import SourceError, reason_of

_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class AnswerTemplate:
    """How the answers of chats are found.

    Attributes:
        has_marks: whether the template that is used marks them.
        template: TRL's template for the tokenizer; None where its own one is used.
        trailing: beginning of another answer that the template writes after the last turn without being asked.
    """

    has_marks: bool
    template: str | None = None
    trailing: str = ""

    @staticmethod
    def of(tokenizer: Any) -> AnswerTemplate:
        """The one for a `tokenizer` that has a chat template."""
        from trl.chat_template_utils import get_training_chat_template

        own = tokenizer.chat_template
        if _MARK.search(own if isinstance(own, str) else str(own.get("default"))):
            return AnswerTemplate(True)
        try:
            return AnswerTemplate(True, get_training_chat_template(tokenizer))
        except ValueError:  # TRL knows none; so it is with a template of several variants in TRL 1.10
            return AnswerTemplate(False, trailing=_trailing(tokenizer))

    @property
    def variables(self) -> dict[str, Any]:
        """What `htsr.calibration.record_texts.written_by_template` is told."""
        return {} if self.template is None else {"chat_template": self.template}


def marked(turns: list[Record], record: Record, tokenizer: Any, how: AnswerTemplate) -> tuple[list[int], list[bool]]:
    """Token ids of a chat, and whether each is the assistant's; so are those that are partly.

    Args:
        turns: turns of the chat.
        record: record that they are from, for tools and variables of the template.
        tokenizer: tokenizer of the model.
        how: how answers are found.

    Raises:
        SourceError: the template cannot write the chat, or answers cannot be told in it.
    """
    if not how.has_marks:
        text, spans = spans_of(turns, record, tokenizer, how.trailing)
        try:
            found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        except NotImplementedError as error:  # of a tokenizer in Python
            raise SourceError("the tokenizer does not tell where in the text its tokens are") from error
        ids, places = list(found["input_ids"]), found["offset_mapping"]
        return ids, list(_within(text, places, spans))
    variables = {"tools": record.get("tools"), **record.get("chat_template_kwargs", {}), **how.variables}
    try:
        found = tokenizer.apply_chat_template(
            turns, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **variables
        )
    except Exception as error:  # whatever the template or the tokenizer raises
        raise SourceError(f"training.assistant_only_loss: {reason_of(error)}, in {short(turns)}") from error
    return list(found["input_ids"]), [bool(answer) for answer in found["assistant_masks"]]


def spans_of(
    turns: list[Record], record: Record, tokenizer: Any, trailing: str = ""
) -> tuple[str, list[tuple[int, int]]]:
    """The text of a chat, and first and last position of each answer in it.

    An assistant's turn before which nobody has spoken answers nothing, and counts as none. An answer that the template
    writes otherwise when others follow is not among those found; the last one of a chat is, as a rule.

    Args:
        turns: turns of the chat.
        record: record that they are from, for tools and variables of the template.
        tokenizer: tokenizer of the model.
        trailing: what the template writes after the last turn, whichever that is, and which is of no answer.

    Raises:
        SourceError: the template cannot write the chat, or no answer of it is found.

    Examples:
        >>> from types import SimpleNamespace
        >>> from htsr.finetuning.answers import spans_of
        >>> def written(turns, tokenize, add_generation_prompt=False):
        ...     text = "".join(f"<{turn['role']}>{turn['content']}</>" for turn in turns)
        ...     return text + "<assistant>" * add_generation_prompt
        >>> turns = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]
        >>> text, [(first, last)] = spans_of(turns, {}, SimpleNamespace(apply_chat_template=written))
        >>> text[first:last]
        '2</>'
    """

    def write(count: int, **more: Any) -> str:
        return written_by_template(turns[:count], record, tokenizer, **more)

    text, spans, answers = write(len(turns)), [], _answers(turns)
    for i in answers:
        before = write(i, add_generation_prompt=True)
        after = (text if i + 1 == len(turns) else write(i + 1)).removesuffix(trailing)
        if text.startswith(after) and after.startswith(before):
            spans.append((len(before), len(after)))
    if answers and not spans:
        turn = short(turns[answers[-1]])
        raise SourceError(f"the chat template writes the turns up to {turn} otherwise than with them")
    return text, spans


def _answers(turns: Sequence[Record]) -> list[int]:
    """Which turns are answers: the assistant's after somebody has spoken."""
    spoken = next((i for i, turn in enumerate(turns) if turn["role"] not in ("system", "developer")), len(turns))
    return [i for i, turn in enumerate(turns) if turn["role"] == "assistant" and i > spoken]


def _trailing(tokenizer: Any) -> str:
    """The beginning of another answer that a template writes after the last turn unasked; mostly none.

    It is what stands after a last answer beyond the answer's end. The end is what stands between an answer and the next
    question, but for the question's beginning, which a first question has, too. Where nothing is left so, since the
    template writes a system's turn of its own before the first, the end is all that a next question would not change.
    """
    question, answer, other = "Question0", "Answer0", "Question1"
    turns = [{"role": r, "content": c} for r, c in (("user", question), ("assistant", answer), ("user", other))]
    try:
        longer, text = (written_by_template(turns[:count], {}, tokenizer) for count in (3, 2))
    except SourceError:  # what is wrong with it shows in the chats themselves
        return ""
    start, _, after_question = longer.partition(question)
    next_start = after_question.partition(answer)[2].partition(other)[0]
    before, _, last = text.partition(question)[2].partition(answer)
    whole = sorted({*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}, key=len, reverse=True)
    piece = re.compile("|".join([*map(re.escape, whole), "."]), re.DOTALL)
    first, later, ending = map(piece.findall, (start, next_start, last))
    end = "".join(later[: len(later) - common(first[::-1], later[::-1])])
    if not end.strip():
        end = "".join(later[: common(ending, later)])
    beyond = last.removeprefix(end)
    is_begin = not next_start.startswith(last) and last.startswith(end) and beyond.strip() and before.endswith(beyond)
    return beyond if is_begin else ""


def common(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How long the beginning is that the sequences `a` and `b` have in common."""
    shorter = min(len(a), len(b))
    return next((i for i in range(shorter) if a[i] != b[i]), shorter)


def _within(text: str, places: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> Iterator[bool]:
    """Whether each of several stretches of a `text` overlaps one of the `spans`, both in order.

    One that goes on after a span, and has but white space of it, belongs to what follows.
    """
    left = list(spans)
    for first, last in places:
        while left and first >= left[0][1]:
            left.pop(0)
        overlaps = bool(left) and last > left[0][0]
        yield overlaps and (last <= left[0][1] or bool(text[first : left[0][1]].strip()))


def answers_alone(
    name: str, tokenizer: Any, records: Sequence[Record], wanted: bool | None, say: Callable[[str], None]
) -> bool:
    """Whether the answers of chats alone are to enter the loss: as it is `wanted`, or else where they can be told.

    Of a prompt and a completion the latter alone does in any case.

    Args:
        name: name of the model, for the message.
        tokenizer: tokenizer of the model.
        records: records of training and evaluation in the form in which they are read.
        wanted: what the recipe says; None where it says nothing.
        say: function that is told what is decided.

    Raises:
        SourceError: it is wanted, and they cannot be told.
    """
    chats = [record for record in records if (is_chat(record) if wanted else "messages" in record)]
    if not chats or wanted is False:
        return bool(wanted)
    how = AnswerTemplate.of(tokenizer)
    untold, count, left_out = _untold(chats, tokenizer, how)
    if untold is not None:
        error = (
            f"{untold} (so in {count} of {len(chats)} chats)" if len(chats) > 1 and not how.has_marks else str(untold)
        )
        help = f"training.chat_template_path may name a template with {{% generation %}}, which that of {name} lacks"
        if wanted:
            raise SourceError(f"training.assistant_only_loss: {error}; {help}") from untold
        say(
            "messages: every token has a label, those of system prompts and questions too, since answers cannot be "
            f"told from them: {error}; {help}"
        )
        return False
    if left_out:
        say(
            f"messages: the chat template of {name} writes {left_out:,} of the answers otherwise once others follow: "
            "these have no label"
        )
    if not wanted:
        say("messages: the answers alone have labels; training.assistant_only_loss: false gives them to all tokens")
    if not _learns_to_stop(*marked(turns_of(chats[0]), chats[0], tokenizer, how), tokenizer):
        say(
            f"messages: the chat template of {name} ends an answer by no special token within it, so that the model "
            "may not learn to stop"
        )
    return True


def _untold(chats: Sequence[Record], tokenizer: Any, how: AnswerTemplate) -> tuple[SourceError | None, int, int]:
    """Why no answer can be told in the first of the chats of which that holds, how many they are, and in the others how
    many answers cannot.

    Where marks tell them, the first chat stands for all.
    """
    first, count, left_out = None, 0, 0
    for i, record in enumerate(chats[:1] if how.has_marks else chats):
        turns = turns_of(record)
        try:
            if i == 0:  # the tokenizer has to tell places, too
                marked(turns, record, tokenizer, how)
            if not how.has_marks:
                left_out += len(_answers(turns)) - len(spans_of(turns, record, tokenizer, how.trailing)[1])
        except SourceError as error:
            first, count = first or error, count + 1
    return first, count, left_out


def _learns_to_stop(ids: Sequence[int], is_answer: Sequence[bool], tokenizer: Any) -> bool:
    """Whether the last token of an answer that is more than white space is a special one, or there is no answer."""
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    last = (
        i for i, its in zip(reversed(ids), reversed(is_answer), strict=True) if its and tokenizer.decode([i]).strip()
    )
    return next(last, tokenizer.eos_token_id) in special
