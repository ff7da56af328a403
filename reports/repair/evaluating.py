"""What a model still knows: the loss on held-out questions, and on text that it was not fine-tuned on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from htsr.calibration.multiple_choice import log_likelihoods, multiple_choice_accuracy
from htsr.calibration.record_forms import question_of

TEXTS = ("reference", "own")  # the Python language reference; what the base itself writes


@dataclass(frozen=True)
class Size:
    """How much is asked: windows of tokens of each text, questions for the loss and for the accuracy."""

    windows: int
    tokens: int
    questions: int
    asked: int


def reference(tokenizer: Any, size: Size) -> torch.Tensor:
    """(windows, tokens) of the language reference that comes with Python, at even distances."""
    import pydoc_data.topics

    ids = tokenizer("\n".join(pydoc_data.topics.topics.values()))["input_ids"]
    starts = torch.linspace(0, len(ids) - size.tokens, size.windows).long().tolist()
    return torch.stack([torch.tensor(ids[start : start + size.tokens]) for start in starts])


def own(model: Any, tokenizer: Any, size: Size) -> torch.Tensor:
    """(windows, tokens) that the model writes from nothing at temperature 1: its loss on them rises by the
    divergence of another model from it."""
    torch.manual_seed(0)
    start = tokenizer.bos_token_id if tokenizer is not None else model.config.bos_token_id
    ids, past = torch.full((size.windows, 1), start), None
    with torch.no_grad():
        for _ in range(size.tokens - 1):
            out = model(input_ids=ids[:, -1:], past_key_values=past, use_cache=True)
            past = out.past_key_values
            drawn = torch.multinomial(out.logits[:, -1].float().softmax(-1), 1)
            ids = torch.cat([ids, drawn], dim=1)
    return ids


def texts(base: Any, tokenizer: Any, size: Size, work: Path) -> dict[str, torch.Tensor]:
    """The texts, kept in `work`."""
    file = work / f"texts-{size.windows}x{size.tokens}.json"
    if not file.exists():
        found = {"reference": reference(tokenizer, size), "own": own(base, tokenizer, size)}
        file.write_text(json.dumps({name: ids.tolist() for name, ids in found.items()}))
    return {name: torch.tensor(ids) for name, ids in json.loads(file.read_text()).items()}


def text_losses(model: Any, ids: torch.Tensor) -> list[float]:
    """Loss of each window, in nats per token."""
    found: list[float] = []
    with torch.no_grad():
        for window in ids.split(8):
            logits = model(input_ids=window, use_cache=False).logits[:, :-1].float()
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten(), reduction="none")
            found += loss.view(len(window), -1).mean(dim=1).tolist()
    return found


def question_losses(model: Any, tokenizer: Any, records: list[Any]) -> list[float]:
    """Loss of the right answer of each question, in nats per character."""
    pairs = []
    for record in records:
        prompt, choices = question_of(record)
        pairs.append((prompt, choices[record["answer"]]))
    found = log_likelihoods(model, tokenizer, pairs, batch_size=8)
    return [-float(score) / len(answer) for score, (_, answer) in zip(found, pairs, strict=True)]


def accuracy(model: Any, tokenizer: Any, records: list[Any]) -> dict[str, float]:
    """Share of questions answered rightly, by likelihood per character, with its standard error."""
    found = multiple_choice_accuracy(model, tokenizer, records, batch_size=8)
    p, n = found.per_character, found.questions
    return {"accuracy": p, "standard_error": (p * (1 - p) / n) ** 0.5}


def read(file: Path, count: int) -> list[Any]:
    """The first records of a file."""
    return [json.loads(line) for line in _lines(file)][:count]


def _lines(file: Path) -> Iterator[str]:
    return (line for line in file.read_text().splitlines() if line.endswith("}"))


def load(folder: Path) -> Any:
    """A causal language model in float32, to be asked."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
