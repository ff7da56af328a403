"""The forms that a record may have, told by its fields, each checked and brought to one shape.

    text          {"text": str}
    completion    {"prompt": str, "completion": str}, or both as turns of a chat
    chat          {"messages": [{"role": str, "content": str, …}, …]}; so are ShareGPT's {"conversations": […]} written
    instruction   {"instruction": str, "input": str, "output": str} of Alpaca, input and system may be absent
    preference    {"chosen": str or turns, "rejected": …, "prompt": …}, the prompt may be absent
    question      {"question": str, "choices": [str, …], "answer": index of the right choice}

Chats may have ``tools`` and ``chat_template_kwargs``, which go to the chat template, and conversations a ``system``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from htsr.calibration.record_turns import (
    FOR_TEMPLATE,
    KNOWN_KEYS,
    are_turns,
    checked_turns,
    for_template,
    kind_of,
    turns_in,
)
from htsr.errors import SourceError, UsageError, reason_of

Record = dict[str, Any]

_FORMS: dict[str, tuple[str, ...]] = {
    "text": ("text",),
    "chat": ("messages",),
    "conversations": ("conversations",),
    "completion": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "preference": ("chosen", "rejected"),
    "question": ("question", "choices", "answer"),
}
_OF_TURNS = ("messages", "conversations")
_FURTHER: dict[str, tuple[str, ...]] = {
    "chat": FOR_TEMPLATE,
    "conversations": ("system", *FOR_TEMPLATE),
    "instruction": ("input", "system"),
    "preference": ("prompt", *FOR_TEMPLATE),
}
NAMES = tuple(dict.fromkeys(key for form, keys in _FORMS.items() for key in (*keys, *_FURTHER.get(form, ()))))


@dataclass(frozen=True)
class Names:
    """What the fields of records are called.

    Attributes:
        text: field that holds the text of each record; None where the form is told by the fields.
        columns: our name of a field by the name that it has in the data; None for a field that is left out.

    Examples:
        >>> from htsr.calibration.record_forms import Names
        >>> Names(columns={"response": "completion", "id": None}).ours({"prompt": "1 +", "response": " 1", "id": 7})
        {'prompt': '1 +', 'completion': ' 1'}
    """

    text: str | None = None
    columns: Mapping[str, str | None] = field(default_factory=dict)

    def ours(self, record: Any) -> Any:
        """The `record` with our names, and turns that are JSON in a text, as in tables; no object stays as it is.

        Raises:
            SourceError: the field that holds the text is absent.
        """
        if not isinstance(record, dict):
            return record
        if self.text is not None:
            if record.get(self.text) is None:
                raise SourceError(f"the field {self.text} is absent; there are {_fields(record)}{_beneath(record)}")
            return {"text": record[self.text]}
        renamed = {ours: record[theirs] for theirs, ours in self.columns.items() if ours and theirs in record}
        record = {key: value for key, value in record.items() if key not in self.columns} | renamed
        record |= {key: turns_in(record[key]) for key in _OF_TURNS if isinstance(record.get(key), str)}
        return record | _turns_of_pairs(record)


def checked(record: Any, place: str = "", names: Names = Names()) -> Record:
    """A record with the fields of its form alone, their values of the kind that the form has.

    ShareGPT's conversations become messages; turns are those of `htsr.calibration.record_turns.checked_turns`.

    Args:
        record: record as it was read; fields that are None count as absent.
        place: file and line, for the message.
        names: what its fields are called.

    Raises:
        SourceError: the record has no form or two at once, or a value has no meaning in its form.

    Examples:
        >>> from htsr.calibration.record_forms import checked
        >>> checked({"prompt": "1 + 1 =", "completion": " 2", "source": "arithmetic"})
        {'prompt': '1 + 1 =', 'completion': ' 2'}
    """
    where = f"{place}: " if place else ""
    try:
        found = _checked(names.ours(record))
        json.dumps(found, ensure_ascii=False).encode()
    except (SourceError, UsageError) as error:
        raise SourceError(f"{where}{error}") from None
    except UnicodeEncodeError as error:
        raise SourceError(f"{where}half of a surrogate pair, which is no text: {error.object[error.start]!r}") from None
    except (RecursionError, TypeError, ValueError) as error:
        raise SourceError(f"{where}no text, and no JSON of a reasonable depth: {reason_of(error)}") from None
    return found


def _turns_of_pairs(record: Record) -> Record:
    """Turns by field, where a prompt and its completion, or two answers, are both such in JSON; one may be a text."""
    for pair in (("prompt", "completion"), ("chosen", "rejected")):
        texts = {key: record[key] for key in ("prompt", *pair) if isinstance(record.get(key), str)}
        found = {key: turns for key, text in texts.items() if are_turns(turns := turns_in(text))}
        if set(pair) <= set(found):
            return found
    return {}


def unread(record: Record, names: Names = Names()) -> Iterator[str]:
    """What nothing reads in a `record` that `checked` has taken: fields, and keys of turns.

    Args:
        record: record as it was read.
        names: what its fields are called; those that are left out on purpose are not named.

    Examples:
        >>> from htsr.calibration.record_forms import unread
        >>> list(unread({"prompt": "1 + 1 =", "completion": " 2", "source": "arithmetic"}))
        ['source']
    """
    named = names.ours(record)
    form = form_of(named)
    read = {*_FORMS[form], *_FURTHER.get(form, ())}
    if form == "completion" and isinstance(named["prompt"], list):
        read |= {*FOR_TEMPLATE}
    renamed = set(names.columns.values())
    for key, value in record.items():
        if names.text is not None:
            taken = key == names.text
        elif key in names.columns:
            taken = names.columns[key] is None or names.columns[key] in read
        else:
            taken = key in read and key not in renamed
        if value not in (None, "") and not taken:
            yield str(key)
    turns = [
        turn for key in read for turn in _listed(named.get(key)) if isinstance(turn, dict) and key not in FOR_TEMPLATE
    ]
    yield from sorted({f"{key} of turns" for turn in turns for key in turn if key not in KNOWN_KEYS})


def form_of(record: Record) -> str:
    """The form of a `record`: ``text``, ``chat``, ``completion``, ``instruction``, ``preference`` or ``question``.

    Conversations that were not checked are ``conversations``. The ``text`` beside an instruction and its output, as in
    Alpaca, is the two of them written out, and does not count. Nor does a form of which a field is an empty text, as an
    empty cell of a table is, beside another form.

    Raises:
        SourceError: it has none of them, or several.

    Examples:
        >>> from htsr.calibration.record_forms import form_of
        >>> form_of({"question": "1 + 1?", "choices": ["1", "2"], "answer": 1})
        'question'
    """
    found = [form for form, keys in _FORMS.items() if all(record.get(key) is not None for key in keys)]
    if found == ["text", "instruction"]:
        return "instruction"
    if not found:
        raise SourceError(
            "a record has text, messages, conversations, prompt and completion, instruction and output, or question, "
            f"choices and answer; this one has {_fields(record)}"
            + (_beneath(record) or "; data.columns in a recipe gives fields these names")
        )
    if len(found) > 1:
        found = [form for form in found if not any(record[key] == "" for key in _FORMS[form])] or found
    if len(found) > 1:
        both = " and ".join(" + ".join(_FORMS[form]) for form in found)
        raise SourceError(f"{both} in one record: which of them is trained on cannot be told; leave one")
    return found[0]


def columns_of(record: Record) -> str:
    """The columns that a checked `record` brings, in words; all records of a data set have the same."""
    form = form_of(record)
    keys = ("prompt", "completion") if form == "question" else _FORMS[form]
    return " and ".join(keys) + " of turns" * ("prompt" in keys and is_chat(record))


def is_chat(record: Record) -> bool:
    """Whether a chat template is needed to write the `record`."""
    return "messages" in record or any(isinstance(record.get(key), list) for key in ("prompt", "chosen"))


def _checked(record: Any) -> Record:
    if not isinstance(record, dict):
        raise SourceError(f"a JSON object is wanted, not {kind_of(record)}")
    form = form_of(record)
    kept: Record = {key: record[key] for key in _FORMS[form]}
    if form == "question":
        question_of(kept)
        return kept
    if form in ("instruction", "preference"):
        kept |= {k: record[k] for k in _FURTHER[form] if k not in FOR_TEMPLATE and record.get(k) not in (None, "")}
    if form == "conversations":
        turns = checked_turns(kept["conversations"], "conversations", of_sharegpt=True)
        return {"messages": [*_system(record), *turns], **for_template(record)}
    kinds = {isinstance(value, list) for value in kept.values()}
    if form in ("completion", "preference") and len(kinds) > 1:
        both = " and ".join(kind_of(value) for value in kept.values())
        raise SourceError(f"{' and '.join(kept)} are both texts or both lists of turns, not {both}")
    for key, value in kept.items():
        if form == "chat" or (form in ("completion", "preference") and isinstance(value, list)):
            kept[key] = checked_turns(value, key)
        elif not isinstance(value, str):
            raise SourceError(f"{key} is a text, not {kind_of(value)}")
    return kept | for_template(record) if is_chat(kept) else kept


def _system(record: Record) -> list[Record]:
    """The turn that a conversation's ``system`` is, in front of the others."""
    system = record.get("system")
    if not system:
        return []
    if not isinstance(system, str):
        raise SourceError(f"system is a text, not {kind_of(system)}")
    return [{"role": "system", "content": system}]


def question_of(record: Record) -> tuple[str, list[str]]:
    """Prompt and continuations of a multiple-choice `record` with ``question``, ``choices`` and ``answer`` (an index).

    Raises:
        SourceError: a field is missing or has no meaning.

    Examples:
        >>> from htsr.calibration.record_forms import question_of
        >>> question_of({"question": "1 + 1?", "choices": [1, 2], "answer": 1})
        ('Question: 1 + 1?\\nAnswer:', [' 1', ' 2'])
    """
    try:
        question, choices, answer = record["question"], record["choices"], record["answer"]
    except KeyError as error:
        raise SourceError(f"a multiple-choice record has question, choices and answer; {error} is missing") from error
    if not isinstance(question, str):
        raise SourceError(f"question is a text, not {kind_of(question)}")
    if not isinstance(choices, list) or not all(isinstance(c, (str, int, float)) and c == c for c in choices):
        raise SourceError(f"the choices of {short(question)} are a list of texts or numbers")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise SourceError(f"answer {short(answer)} is no index of the choices of {short(question)}")
    return f"Question: {question}\nAnswer:", [f" {choice}" for choice in choices]


def short(value: Any) -> str:
    """The beginning of a `value` as Python writes it, for a message."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _fields(record: Record) -> str:
    return ", ".join(sorted(f"{k}: null" if value is None else str(k) for k, value in record.items())[:8]) or "nothing"


def _beneath(record: Record) -> str:
    """Where the records of a file lie under a key of one object, the end of a message that says so."""
    keys = [
        str(key)
        for key, value in record.items()
        if _listed(value) and all(isinstance(one, dict) for one in value) and not are_turns(value)
    ]
    if not keys:
        return ""
    return f"; the records seem to lie under {' and '.join(keys[:8])}: let the file be such a list alone"
