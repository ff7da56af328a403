"""The forms that a record may have, each checked and brought to one shape, written as text or as columns for TRL.

    text         {"text": str}
    completion   {"prompt": str, "completion": str}, or both as turns of a chat
    chat         {"messages": [{"role": str, "content": str, …}, …]}
    question     {"question": str, "choices": [str, …], "answer": index of the right choice}

Chats may have ``tools`` and ``chat_template_kwargs``, which go to the chat template.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from htsr.errors import SourceError, UsageError, reason_of

if TYPE_CHECKING:
    from datasets import Dataset

Record = dict[str, Any]

_FORMS = {
    "text": ("text",),
    "chat": ("messages",),
    "completion": ("prompt", "completion"),
    "question": ("question", "choices", "answer"),
}
_FOR_TEMPLATE = ("tools", "chat_template_kwargs")


def checked(record: Any, place: str = "") -> Record:
    """A record with the fields of its form alone, their values of the kind that the form has.

    The parts of a turn's content are joined, where all are text; a turn that only calls tools has the content ``""``.

    Args:
        record: record as it was read; fields that are None count as absent.
        place: file and line, for the message.

    Raises:
        SourceError: the record has no form or two at once, or a value has no meaning in its form.

    Examples:
        >>> from htsr.calibration.record_forms import checked
        >>> checked({"prompt": "1 + 1 =", "completion": " 2", "source": "arithmetic"})
        {'prompt': '1 + 1 =', 'completion': ' 2'}
    """
    where = f"{place}: " if place else ""
    try:
        found = _checked(record)
        json.dumps(found, ensure_ascii=False).encode()
    except (SourceError, UsageError) as error:
        raise SourceError(f"{where}{error}") from None
    except UnicodeEncodeError as error:
        raise SourceError(f"{where}half of a surrogate pair, which is no text: {error.object[error.start]!r}") from None
    except (RecursionError, TypeError, ValueError) as error:
        raise SourceError(f"{where}no text, and no JSON of a reasonable depth: {reason_of(error)}") from None
    return found


def form_of(record: Record) -> str:
    """The form of a `record`: ``text``, ``chat``, ``completion`` or ``question``.

    Raises:
        SourceError: it has none of them, or several.

    Examples:
        >>> from htsr.calibration.record_forms import form_of
        >>> form_of({"question": "1 + 1?", "choices": ["1", "2"], "answer": 1})
        'question'
    """
    found = [form for form, keys in _FORMS.items() if all(record.get(key) is not None for key in keys)]
    if not found:
        has = (
            ", ".join(sorted(f"{k}: null" if value is None else str(k) for k, value in record.items())[:8]) or "nothing"
        )
        raise SourceError(
            f"a record has text, messages, prompt and completion, or question, choices and answer; this one has {has}"
            + ("; rename them to prompt, completion" if {"instruction", "output"} <= record.keys() else "")
        )
    if len(found) > 1:
        both = " and ".join(" + ".join(_FORMS[form]) for form in found)
        raise SourceError(f"{both} in one record: which of them is trained on cannot be told; leave one")
    return found[0]


def columns_of(record: Record) -> str:
    """The columns that a `record` has in a data set of TRL, in words; all records of a data set have the same."""
    row = _columns(record)
    return " and ".join(key for key in row if key not in _FOR_TEMPLATE) + " of turns" * (
        "prompt" in row and is_chat(row)
    )


def is_chat(record: Record) -> bool:
    """Whether a chat template is needed to write the `record`."""
    return "messages" in record or isinstance(record.get("prompt"), list)


def _checked(record: Any) -> Record:
    if not isinstance(record, dict):
        raise SourceError(f"a JSON object is wanted, not {_kind(record)}")
    form = form_of(record)
    kept: Record = {key: record[key] for key in _FORMS[form]}
    if form == "question":
        question_of(kept)
        return kept
    if form == "completion" and isinstance(kept["prompt"], list) != isinstance(kept["completion"], list):
        both = f"{_kind(kept['prompt'])} and {_kind(kept['completion'])}"
        raise SourceError(f"prompt and completion are both texts or both lists of turns, not {both}")
    for key, value in kept.items():
        if form == "chat" or (form == "completion" and isinstance(value, list)):
            kept[key] = _turns(value, key)
        elif not isinstance(value, str):
            raise SourceError(f"{key} is a text, not {_kind(value)}")
    if is_chat(kept):
        kept |= _for_template(record)
    return kept


def _turns(value: Any, key: str) -> list[Record]:
    if not isinstance(value, list) or not value:
        raise SourceError(f"{key} is a list of turns, not {_kind(value) if value != [] else 'an empty one'}")
    return [_turn(turn, f"{key}[{i}]") for i, turn in enumerate(value)]


def _turn(value: Any, where: str) -> Record:
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        raise SourceError(f"{where} is a turn with role and content, not {_kind(value)}")
    turn = {key: part for key, part in value.items() if part is not None}
    content = turn.get("content")
    if isinstance(content, list):
        parts = [part for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)]
        if len(parts) < len(content) or any(part.get("type") != "text" for part in parts):
            raise SourceError(f"{where} has content that is not text; causal language models are trained on text")
        content = "".join(part["text"] for part in parts)
    if content is None and turn.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise SourceError(f"{where}.content is a text, not {_kind(content)}")
    return turn | {"content": content}


def _for_template(record: Record) -> Record:
    """Tools and variables of the chat template, each absent or of its kind."""
    found = {key: record[key] for key in _FOR_TEMPLATE if record.get(key) is not None}
    if isinstance(found.get("tools"), str):  # as TRL takes them, too
        try:
            found["tools"] = json.loads(found["tools"])
        except ValueError as error:
            raise SourceError(f"tools is no JSON: {reason_of(error)}") from error
    if not isinstance(found.get("tools", []), list):
        raise SourceError(f"tools is a list, not {_kind(found['tools'])}")
    more = found.get("chat_template_kwargs", {})
    if not isinstance(more, dict):
        raise SourceError(f"chat_template_kwargs holds keys and values, not {_kind(more)}")
    return found


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
        raise SourceError(f"question is a text, not {_kind(question)}")
    if not isinstance(choices, list) or not all(isinstance(c, (str, int, float)) and c == c for c in choices):
        raise SourceError(f"the choices of {_short(question)} are a list of texts or numbers")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise SourceError(f"answer {_short(answer)} is no index of the choices of {_short(question)}")
    return f"Question: {question}\nAnswer:", [f" {choice}" for choice in choices]


def text_of(record: Record, tokenizer: Any = None) -> str:
    """The text of a record: ``text``, ``prompt`` + ``completion``, chat ``messages``, or a multiple-choice question.

    A chat is written by the tokenizer's template; without one its contents stand below each other.

    Args:
        record: record of any form.
        tokenizer: tokenizer with or without a chat template; None for none.

    Raises:
        SourceError: the record has no known form, or the template cannot write it.

    Examples:
        >>> from htsr.calibration.record_forms import text_of
        >>> text_of({"prompt": "1 + 1 =", "completion": " 2"})
        '1 + 1 = 2'
    """
    record = checked(record)
    if "text" in record:
        return str(record["text"])
    if "question" in record:
        prompt, choices = question_of(record)
        return prompt + choices[record["answer"]]
    if not is_chat(record):
        return f"{record['prompt']}{record['completion']}"
    turns = record.get("messages") or [*record["prompt"], *record["completion"]]
    if not getattr(tokenizer, "chat_template", None):
        return "\n".join(turn["content"] for turn in turns)
    return written_by_template(turns, record, tokenizer)


def written_by_template(turns: list[Record], record: Record, tokenizer: Any, **more: Any) -> str:
    """Turns as the tokenizer's chat template writes them, with the record's tools and variables.

    Args:
        turns: turns of a chat.
        record: record that they are from.
        tokenizer: tokenizer with a chat template.
        **more: variables of the template; the record's own replace them.

    Raises:
        SourceError: the template refuses them.
    """
    from jinja2.exceptions import TemplateError

    variables = {
        **({"tools": record["tools"]} if record.get("tools") else {}),
        **record.get("chat_template_kwargs", {}),
    }
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, **(more | variables)))
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise SourceError(f"the chat template cannot write {_short(turns)}: {reason_of(error)}") from error


def as_dataset(records: Sequence[Record]) -> Dataset:
    """The columns that TRL reads: text, messages, or prompt and completion (which questions are turned into).

    Turns, tools and variables stay as they are: Arrow alone would give every turn the keys of all others, and templates
    would write them.

    Args:
        records: records, all of one form.

    Raises:
        SourceError: a record has no known form.
        UsageError: the records have several forms, or the installed version of datasets would change their turns.
    """
    import datasets

    rows = [_columns(checked(record)) for record in records]
    forms = {tuple(key for key in row if key not in _FOR_TEMPLATE) for row in rows}
    if len(forms) > 1 or len({is_chat(row) for row in rows}) > 1:
        raise UsageError("the records of a data set are all of one form: text, messages, or prompt and completion")
    for key, absent in (("tools", None), ("chat_template_kwargs", {})):
        if any(key in row for row in rows):
            rows = [{**row, key: row.get(key, absent)} for row in rows]
    if not is_chat(rows[0]):
        return datasets.Dataset.from_list(rows)
    if hasattr(datasets, "Json"):
        kinds = {key: datasets.Json() if key in _FOR_TEMPLATE else datasets.List(datasets.Json()) for key in rows[0]}
        return datasets.Dataset.from_list(rows, features=datasets.Features(kinds))
    found = datasets.Dataset.from_list(rows)
    if found.to_list() != rows:
        raise UsageError("turns with different keys, tools or chat_template_kwargs need datasets 4.7 or later")
    return found


def _columns(record: Record) -> Record:
    if "question" not in record:
        return record
    prompt, choices = question_of(record)
    return {"prompt": prompt, "completion": choices[record["answer"]]}


def _kind(value: Any) -> str:
    names = {type(None): "null", dict: "an object", list: "a list", str: "a text", bool: "true or false"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else type(value).__name__)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
