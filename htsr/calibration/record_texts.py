"""Records as a tokenizer's model reads them: as text, and as the columns of TRL."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from htsr.calibration.record_forms import Record, checked, form_of, is_chat, question_of, short
from htsr.calibration.record_turns import FOR_TEMPLATE
from htsr.errors import SourceError, UsageError, reason_of

if TYPE_CHECKING:
    from datasets import Dataset

_INSTRUCTION, _INPUT, _RESPONSE = "### Instruction:\n", "### Input:\n", "### Response:\n"
_ANSWERS = ("content", "tool_calls", "reasoning_content", "thinking")  # an answer has one of them at least


def for_model(record: Record, tokenizer: Any) -> Record:
    """A record in a form that depends on no tokenizer; all but instructions are so already.

    An instruction is a user's turn and the assistant's where the tokenizer has a chat template, and else a prompt and a
    completion under the headings of the Stanford Alpaca project, without the sentence that stands above them there. A
    template that writes these headings itself (`template_of_headings`) has none for the input, which brings its own.

    Args:
        record: record that was checked (`htsr.calibration.record_forms.checked`).
        tokenizer: tokenizer of the model; None for one without a chat template.

    Examples:
        >>> from htsr.calibration.record_texts import for_model
        >>> for_model({"instruction": "Add.", "input": "2, 3", "output": "5"}, None)
        {'prompt': '### Instruction:\\nAdd.\\n\\n### Input:\\n2, 3\\n\\n### Response:\\n', 'completion': '5'}
    """
    if "instruction" not in record:
        return record
    system, instruction, more = record.get("system"), record["instruction"], record.get("input")
    if template := getattr(tokenizer, "chat_template", None):
        turns = [{"role": "system", "content": system}] if system else []
        heading = _INPUT if _INSTRUCTION.rstrip() in str(template) else ""
        turns.append({"role": "user", "content": f"{instruction}\n\n{heading}{more}" if more else instruction})
        return {"prompt": turns, "completion": [{"role": "assistant", "content": record["output"]}]}
    parts = [system] if system else []
    parts.append(f"{_INSTRUCTION}{instruction}")
    parts += [f"{_INPUT}{more}"] if more else []
    return {"prompt": "\n\n".join([*parts, _RESPONSE]), "completion": record["output"]}


def preamble_of(records: Sequence[Record]) -> str | None:
    """What stands above the headings of Alpaca in most prompts; None where not all records are prompts under these.

    That is nothing, as `for_model` writes them, or the sentence of the Stanford Alpaca project, which has another one
    for instructions with an input; what stands above those without one counts, if there are any: a chat has none.

    Args:
        records: records that were trained on, at least one.

    Examples:
        >>> from htsr.calibration.record_texts import preamble_of
        >>> preamble_of([{"prompt": "Do it.\\n\\n### Instruction:\\nAdd.\\n\\n### Response:\\n", "completion": "5"}])
        'Do it.\\n\\n'
    """
    prompts = [record.get("prompt") for record in records]
    texts = [text for text in prompts if isinstance(text, str) and _INSTRUCTION in text and text.endswith(_RESPONSE)]
    if len(texts) < len(prompts):
        return None
    alone = [text for text in texts if _INPUT not in text] or texts
    return Counter(text.partition(_INSTRUCTION)[0] for text in alone).most_common(1)[0][0]


def template_of_headings(tokenizer: Any, preamble: str = "") -> str:
    """A chat template that writes turns under the headings of Alpaca, as `for_model` writes an instruction.

    So a model that was trained on such instructions can be asked by whatever reads chat templates. Of further turns,
    which it was not trained on, each question with its answer comes after the end of the one before.

    Args:
        tokenizer: tokenizer of the model; where it begins a text by its token for that, so does the template.
        preamble: what stands above the first heading (`preamble_of`); a system prompt replaces it.

    Examples:
        >>> from htsr.calibration.record_texts import template_of_headings
        >>> "### Response:" in template_of_headings(lambda text: {"input_ids": []})
        True
    """
    first = tokenizer("a")["input_ids"][:1]
    begin = "{{ bos_token }}" if first and first == [tokenizer.bos_token_id] else ""
    turns = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] + '\\n\\n' }}"
        "{% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token }}"
        "{% else %}{{ '@' + m['content'] + '\\n\\n$' }}{% endif %}{% endfor %}"
    )
    for sign, heading in (("@", _INSTRUCTION), ("$", _RESPONSE)):
        turns = turns.replace(sign, heading.replace("\n", "\\n"))
    if preamble:  # JSON of a text is a text of Jinja
        written = json.dumps(preamble, ensure_ascii=False)
        begin += f"{{% if messages[0]['role'] != 'system' %}}{{{{ {written} }}}}{{% endif %}}"
    return begin + turns


def text_of(record: Record, tokenizer: Any = None) -> str:
    """The text of a record of any form but preferences.

    A chat is written by the tokenizer's template; without one its contents stand below each other.

    Args:
        record: record of any form.
        tokenizer: tokenizer with or without a chat template; None for none.

    Raises:
        SourceError: the record has no known form, or the template cannot write it.

    Examples:
        >>> from htsr.calibration.record_texts import text_of
        >>> text_of({"prompt": "1 + 1 =", "completion": " 2"})
        '1 + 1 = 2'
    """
    record = for_model(checked(record), tokenizer)
    if "chosen" in record:
        raise SourceError("a record of preferences, with chosen and rejected, is two texts")
    if "text" in record:
        return str(record["text"])
    if "question" in record:
        prompt, choices = question_of(record)
        return prompt + choices[record["answer"]]
    if not is_chat(record):
        return f"{record['prompt']}{record['completion']}"
    if not getattr(tokenizer, "chat_template", None):
        return "\n".join(turn["content"] for turn in turns_of(record))
    return written_by_template(turns_of(record), record, tokenizer)


def turns_of(record: Record) -> list[Record]:
    """The turns of a `record` that is a chat, those of prompt and completion in one."""
    return list(record["messages"]) if "messages" in record else [*record["prompt"], *record["completion"]]


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
        raise SourceError(f"the chat template cannot write {short(turns)}: {reason_of(error)}") from error


def columns(record: Record) -> Record:
    """The columns of TRL that a checked `record` brings: text, messages, prompt and completion, or chosen and rejected.

    A question is a prompt with the right choice as its completion.
    """
    if "question" in record:
        prompt, choices = question_of(record)
        return {"prompt": prompt, "completion": choices[record["answer"]]}
    return for_model(record, None)


def as_dataset(records: Sequence[Record]) -> Dataset:
    """A data set with the columns that TRL reads, see `columns`; of preferences it is one for TRL's DPOTrainer.

    Turns, tools and variables stay as they are: Arrow alone would give every turn the keys of all others, and templates
    would write them.

    Args:
        records: records, all of one form.

    Raises:
        SourceError: a record has no known form.
        UsageError: the records have several forms, or the installed version of datasets would change their turns.
    """
    import datasets

    rows = [columns(checked(record)) for record in records]
    forms = {tuple(key for key in row if key not in FOR_TEMPLATE) for row in rows}
    if len(forms) > 1 or len({is_chat(row) for row in rows}) > 1:
        raise UsageError("the records of a data set are all of one form: text, messages, or prompt and completion")
    for key, absent in (("tools", None), ("chat_template_kwargs", {})):
        if any(key in row for row in rows):
            rows = [{**row, key: row.get(key, absent)} for row in rows]
    if not is_chat(rows[0]):
        return datasets.Dataset.from_list(rows)
    if hasattr(datasets, "Json"):
        kinds = {key: datasets.Json() if key in FOR_TEMPLATE else datasets.List(datasets.Json()) for key in rows[0]}
        return datasets.Dataset.from_list(rows, features=datasets.Features(kinds))
    found = datasets.Dataset.from_list(rows)
    if found.to_list() != rows:
        raise UsageError("turns with different keys, tools or chat_template_kwargs need datasets 4.7 or later")
    return found


def merged(sources: Sequence[Sequence[Record]]) -> list[list[Record]]:
    """The records of several sources in one form: turns in prompt and completion become messages where others are.

    Args:
        sources: records of each source, all of one form within it.

    Raises:
        SourceError: the sources have forms that do not go together.
    """
    kinds = [
        "chat" if "messages" in records[0] else f"{form_of(columns(records[0]))}{' of turns' * is_chat(records[0])}"
        for records in sources
    ]
    if len(set(kinds)) == 1:
        return [list(records) for records in sources]
    if set(kinds) == {"chat", "completion of turns"}:
        return [[as_messages(record) for record in records] for records in sources]
    raise SourceError(f"the sources are of several forms, {' and '.join(dict.fromkeys(kinds))}; one run is of one form")


def is_unanswered(record: Record) -> bool:
    """Whether there is nothing to learn in a checked `record` but to end: no text, no answer, or an empty one.

    Args:
        record: record of any form but preferences.

    Examples:
        >>> from htsr.calibration.record_texts import is_unanswered
        >>> is_unanswered({"prompt": "1 + 1 =", "completion": ""}), is_unanswered({"text": "1 + 1 = 2"})
        (True, False)
    """
    if not is_chat(record):
        row = columns(record)
        return not str(row.get("completion", row.get("text"))).strip()
    answers = [turn for turn in turns_of(record) if turn["role"] == "assistant"]
    return not answers or not all(any(str(turn.get(key) or "").strip() for key in _ANSWERS) for turn in answers)


def as_messages(record: Record) -> Record:
    """A `record` that is a chat as messages, in which its prompt and its completion stand one after the other."""
    return {"messages": turns_of(record), **{key: record[key] for key in FOR_TEMPLATE if key in record}}
