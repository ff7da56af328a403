"""Records of text to calibrate, train and test on: read, split, and written as text."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from htsr.errors import MissingDependencyError, SourceError, UsageError
from htsr.loading import resolve

if TYPE_CHECKING:
    from datasets import Dataset

Record = dict[str, Any]


def read_records(source: str, limit: int | None = None) -> list[Record]:
    """The records of a data file or data set, in its order.

    Args:
        source: a .jsonl file (one object a line), a .txt file (one record ``{"text": …}`` a paragraph), or an id of
            the `datasets` hub with an optional split, as in ``org/name:train`` (the split ``train`` by default).
        limit: the first so many only.

    Raises:
        SourceError: it cannot be read, or holds no records.
    """
    path = Path(resolve(source)).expanduser()
    is_file = path.suffix in (".jsonl", ".json", ".txt")
    records = _read_file(path)[:limit] if is_file else _read_dataset(source, limit)
    if not records:
        raise SourceError(f"{source} holds no records")
    return records


def _read_file(path: Path) -> list[Record]:
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path} cannot be read: {error}") from error
    if path.suffix == ".txt":
        return [{"text": part.strip()} for part in content.split("\n\n") if part.strip()]
    records = []
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise SourceError(f"{path}, line {number}: no JSON object: {error.msg}") from error
        if not isinstance(record, dict):
            raise SourceError(f"{path}, line {number}: one JSON object a line is wanted, not a {type(record).__name__}")
        records.append(record)
    return records


def _read_dataset(source: str, limit: int | None) -> list[Record]:
    try:
        import datasets
    except ImportError as error:
        raise MissingDependencyError("a data set of the hub needs datasets: pip install 'htsr[finetune]'") from error
    name, _, split = source.partition(":")
    try:
        data = datasets.load_dataset(name, split=split or "train", streaming=limit is not None)
        return list(data.take(limit) if limit is not None else data)
    except Exception as error:  # the library lets through whatever its file systems raise
        raise SourceError(f"{source} is no .jsonl or .txt file, nor a data set that can be had: {error}") from error


def text_of(record: Record, tokenizer: Any = None) -> str:
    """The text of a record: ``text``, ``prompt`` + ``completion``, chat ``messages``, or a multiple-choice question.

    A chat is written by the tokenizer's template; without one its contents stand below each other.

    Raises:
        SourceError: none of these fields.
    """
    if isinstance(record.get("text"), str):
        return str(record["text"])
    if "messages" in record:
        return _chat(record["messages"], tokenizer)
    if "prompt" in record and "completion" in record:
        if isinstance(record["prompt"], str):
            return f"{record['prompt']}{record['completion']}"
        return _chat([*record["prompt"], *record["completion"]], tokenizer)
    if {"question", "choices", "answer"} <= record.keys():
        prompt, choices = question_of(record)
        return prompt + choices[record["answer"]]
    raise SourceError(
        f"a record has text, messages, prompt and completion, or question, choices and answer, not {sorted(record)}"
    )


def question_of(record: Record) -> tuple[str, list[str]]:
    """Prompt and continuations of a multiple-choice record with ``question``, ``choices`` and ``answer`` (an index).

    Raises:
        SourceError: a field is missing or has no meaning.
    """
    try:
        question, choices, answer = record["question"], record["choices"], record["answer"]
    except KeyError as error:
        raise SourceError(f"a multiple-choice record has question, choices and answer; {error} is missing") from error
    if not isinstance(choices, list) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise SourceError(f"answer {answer!r} is no index of the choices of {question!r}")
    return f"Question: {question}\nAnswer:", [f" {choice}" for choice in choices]


def _chat(messages: list[dict[str, str]], tokenizer: Any) -> str:
    if getattr(tokenizer, "chat_template", None):
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    return "\n".join(message["content"] for message in messages)


def split(records: Sequence[Record], share: float, seed: int) -> tuple[list[Record], list[Record]]:
    """`records` in an order drawn by the seed: those to train on, and the `share` that is held out.

    Raises:
        UsageError: nothing would be left to train on.
    """
    if not 0 <= share < 1:
        raise UsageError(f"the share that is held out is in [0, 1), not {share}")
    shuffled = random.Random(seed).sample(records, len(records))
    held = round(share * len(records))
    if held == len(records):
        raise UsageError(f"of {len(records)} records none is left to train on")
    return shuffled[held:], shuffled[:held]


def as_dataset(records: Sequence[Record]) -> Dataset:
    """The columns that TRL reads: text, messages, or prompt and completion (which questions are turned into).

    Raises:
        SourceError: a record of no known form.
        UsageError: records of several forms.
    """
    from datasets import Dataset

    rows: list[Record] = []
    for record in records:
        if {"question", "choices", "answer"} <= record.keys():
            prompt, choices = question_of(record)
            rows.append({"prompt": prompt, "completion": choices[record["answer"]]})
        else:
            text_of(record)  # says what is missing
            kept = ("messages",) if "messages" in record else ("prompt", "completion")
            rows.append({key: record[key] for key in (("text",) if "text" in record else kept)})
    if len({tuple(row) for row in rows}) > 1:
        raise UsageError("the records of a data set are all of one form: text, messages, or prompt and completion")
    return Dataset.from_list(rows)
