"""Multiple-choice accuracy by log-likelihood: the choice that the model finds most likely after the question."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from htsr.analysis.sharing import model_difference
from htsr.calibration.activations import evaluating
from htsr.calibration.records import Record, question_of
from htsr.errors import UsageError
from htsr.matrices.sources import open_model
from htsr.ranks import Ranks

if TYPE_CHECKING:
    import torch

_CALL = "multiple_choice_accuracy"


@dataclass(frozen=True)
class Accuracy:
    """Share of questions answered rightly.

    Attributes:
        accuracy: share, in [0, 1], where the choice with the largest log-likelihood Σ log p is the answer.
        per_character: share where the one with the largest log-likelihood per character is the answer.
        questions: number of questions.
        standard_error: standard error √(p(1-p)/n) of `accuracy`.
    """

    accuracy: float
    per_character: float
    questions: int
    standard_error: float


def multiple_choice_accuracy(
    model: torch.nn.Module,
    tokenizer: Any,
    records: Sequence[Record],
    *,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> Accuracy:
    """Ask a causal language model questions, prompt ``Question: …\\nAnswer:``, continuations `` <choice>``.

    Under `accelerate launch` each process asks a part of the questions, and all get the whole result.

    Args:
        model: causal language model on its device, not sharded.
        tokenizer: tokenizer of the model.
        records: records with ``question``, ``choices`` and ``answer``, the index of the right choice.
        batch_size: number of prompts with a continuation that run at a time.
        progress: function that is called with the number of choices of this process that are done, and of all of them.

    Returns:
        The `Accuracy` over all records.

    Raises:
        SourceError: a record lacks one of these fields.
        UsageError: there are no records, or the processes do not ask one model the same questions.

    Examples:
        A model that finds every next token equally likely always takes the shorter choice, and per character the
        longer one:

        >>> from types import SimpleNamespace
        >>> import torch
        >>> from htsr.calibration.multiple_choice import multiple_choice_accuracy
        >>> class Uniform(torch.nn.Linear):
        ...     def forward(self, input_ids, **_):
        ...         return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 256))
        >>> def tokenizer(text):
        ...     return {"input_ids": list(text.encode())}
        >>> question = {"question": "Which one?", "choices": ["a", "bb"]}
        >>> multiple_choice_accuracy(Uniform(1, 1), tokenizer, [{**question, "answer": i} for i in (0, 1)])
        Accuracy(accuracy=0.5, per_character=0.5, questions=2, standard_error=0.353...)
    """
    if not records:
        raise UsageError("there are no multiple-choice questions")
    asked = [(*question_of(record), record["answer"]) for record in records]
    ranks = Ranks.launched(_CALL)
    _agree(ranks, model, asked)
    mine = asked[ranks.rank :: ranks.size]
    right = ranks.gather_from(lambda: _answered(model, tokenizer, mine, batch_size, progress))
    total = np.array(right, dtype=np.float64)
    p, per_character = total.mean(axis=0)
    return Accuracy(float(p), float(per_character), len(total), float(np.sqrt(p * (1 - p) / len(total))))


def _agree(ranks: Ranks, model: torch.nn.Module, asked: Sequence[tuple[str, Sequence[str], int]]) -> None:
    """Make sure that all ranks ask one model the same questions."""
    if ranks.size == 1:
        return
    ranks.meet(_CALL)
    differ = ranks.difference([f"question {i}, {question!r:.200}" for i, question in enumerate(asked)])
    what = f"the questions differ, {differ}" if differ else model_difference(ranks, open_model(model))
    if what:
        raise UsageError(f"the processes do not ask one model the same questions: {what}")


def _answered(
    model: torch.nn.Module,
    tokenizer: Any,
    asked: Sequence[tuple[str, Sequence[str], int]],
    batch_size: int,
    progress: Callable[[int, int], None] | None,
) -> list[tuple[bool, bool]]:
    """Whether each question is answered rightly, by the likelihood of the choices and by that per character."""
    pairs = [(prompt, choice) for prompt, choices, _ in asked for choice in choices]
    scores = log_likelihoods(model, tokenizer, pairs, batch_size=batch_size, progress=progress)
    right, start = [], 0
    for _, choices, answer in asked:
        found = scores[start : start + len(choices)]
        start += len(choices)
        characters = np.array([len(choice) - 1 for choice in choices])
        right.append((int(np.argmax(found)) == answer, int(np.argmax(found / np.maximum(characters, 1))) == answer))
    return right


def log_likelihoods(
    model: torch.nn.Module,
    tokenizer: Any,
    pairs: Sequence[tuple[str, str]],
    *,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Log-likelihood log p(continuation | prompt) of each pair, the sum over the continuation's tokens, in nats.

    A token that the tokenizer makes of the end of the prompt and the beginning of the continuation counts as
    continuation.

    Args:
        model: causal language model on its device; in evaluation mode meanwhile.
        tokenizer: tokenizer of the model.
        pairs: pairs of prompt and continuation.
        batch_size: number of pairs that run at a time, longest first.
        progress: function that is called with the number of pairs done and the number of all.

    Returns:
        (pairs,) float64 log-likelihoods.

    Examples:
        Three bytes at 1/256 each are 3·ln(1/256) = -16.64:

        >>> from types import SimpleNamespace
        >>> import torch
        >>> from htsr.calibration.multiple_choice import log_likelihoods
        >>> class Uniform(torch.nn.Linear):
        ...     def forward(self, input_ids, **_):
        ...         return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 256))
        >>> def tokenizer(text):
        ...     return {"input_ids": list(text.encode())}
        >>> log_likelihoods(Uniform(1, 1), tokenizer, [("1 + 1 =", " 2."), ("1 + 1 =", " 2")]).round(2)
        array([-16.64, -11.09])
    """
    import torch

    encoded = []
    for prompt, continuation in pairs:
        alone, both = tokenizer(prompt)["input_ids"], tokenizer(prompt + continuation)["input_ids"]
        shorter = min(len(alone), len(both))
        common = next((i for i in range(shorter) if alone[i] != both[i]), shorter)
        encoded.append((both, max(1, min(common, len(both) - 1))))
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i][0]))
    result = np.zeros(len(encoded))
    device = next(model.parameters()).device
    with evaluating(model), torch.no_grad():
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            longest = max(len(encoded[i][0]) for i in indices)
            tokens = torch.zeros(len(indices), longest, dtype=torch.long)
            mask = torch.zeros_like(tokens)
            for row, i in enumerate(indices):
                ids = encoded[i][0]
                tokens[row, : len(ids)] = torch.tensor(ids)
                mask[row, : len(ids)] = 1
            tokens = tokens.to(device)
            logits = model(input_ids=tokens, attention_mask=mask.to(device), use_cache=False).logits
            wide = torch.float32 if logits.device.type == "mps" else torch.float64
            said = []
            for row, i in enumerate(indices):
                ids, begin = encoded[i]
                wanted = tokens[row, begin : len(ids), None].to(logits.device)
                likely = logits[row, begin - 1 : len(ids) - 1].float().log_softmax(-1).gather(-1, wanted)
                said.append(likely.sum(dtype=wide))
            result[indices] = torch.stack(said).cpu().numpy()  # the one thing that is waited for
            if progress:
                progress(start + len(indices), len(order))
    return result
