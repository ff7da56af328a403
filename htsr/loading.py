"""Models, tokenizers and texts from paths, hub ids and installed packages, for what runs a model."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from htsr.errors import MissingDependencyError, SourceError

if TYPE_CHECKING:
    import torch

Record = dict[str, Any]


def resolve(name: str) -> str:
    """`name`, with ``package:MODULE/PATH`` made the path of a file that the installed Python package MODULE carries.

    Raises:
        SourceError: the package is not installed, or carries no such file.
    """
    if not name.startswith("package:"):
        return name
    module, _, inside = name.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    if spec is None or spec.origin is None:
        raise SourceError(f"{name}: the package {module} is not installed")
    path = Path(spec.origin).parent / inside
    if not path.exists():
        raise SourceError(f"{name}: the package {module} carries no {inside}")
    return str(path)


def load_model(
    name: str, *, revision: str | None = None, dtype: torch.dtype | None = None, causal: bool = False
) -> torch.nn.Module:
    """A transformers model with the weights and the class that its configuration names.

    Args:
        name: folder, hub id, .gguf file (de-quantised), each also as ``package:MODULE/PATH``.
        revision: branch, tag or commit of a hub id.
        dtype: of the weights; as stored when None.
        causal: insist on a causal language model.

    Raises:
        SourceError: it cannot be loaded.
    """
    import transformers

    folder, more = _where(name, revision)
    more["dtype"] = dtype or "auto"
    try:
        if causal or "gguf_file" in more:  # that format holds language models, and does not name their class
            model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, **more)
        else:
            config = transformers.AutoConfig.from_pretrained(folder, **{k: v for k, v in more.items() if k != "dtype"})
            named = getattr(transformers, (config.architectures or ["AutoModel"])[0], transformers.AutoModel)
            model = named.from_pretrained(folder, **more)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise SourceError(f"{name} could not be loaded: {str(error).splitlines()[0]}") from error
    if "gguf_file" in more:  # it holds plain floats now, and may be saved and trained as such
        model.hf_quantizer.remove_quantization_config(model)
    return model  # type: ignore[no-any-return]


def load_tokenizer(name: str, *, revision: str | None = None) -> Any:
    """The tokenizer of a model; a missing padding token is made the end-of-text token, padding is on the right.

    Raises:
        SourceError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    folder, more = _where(name, revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **more)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise SourceError(f"the tokenizer of {name} could not be loaded: {str(error).splitlines()[0]}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def _where(name: str, revision: str | None) -> tuple[str, dict[str, Any]]:
    path = resolve(name)
    if path.endswith(".gguf"):
        return str(Path(path).parent), {"gguf_file": Path(path).name}
    return path, {"revision": revision} if revision else {}


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
