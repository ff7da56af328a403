"""The two sizes of the study: the base model, what it is fine-tuned on, and what it is asked afterwards."""

from __future__ import annotations

import json
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from reports import common
from reports.llr_small import corpus
from reports.owlore_small.__main__ import Size as Questions
from reports.owlore_small.__main__ import prepare as prepare_questions
from reports.repair import evaluating

SMOLLM2_WIDTH = 576  # the ranks of the arms are meant for it
BASE_BATCH, BASE_TOKENS = 16, 128  # of the small base's own training


@dataclass(frozen=True)
class Size:
    """How large the model is and how long it is fine-tuned.

    Attributes:
        name: name of the size.
        width: width of the model.
        blocks: number of its blocks.
        steps: optimizer steps of a fine-tuning.
        batch: sequences a step.
        tokens: largest number of tokens of a sequence.
        interval: steps between draws of blocks.
        refresh_every: steps between subspaces.
        asked: records on which the rate is chosen, and as many again on which arms are compared.
        windows: windows of ordinary text, on which forgetting is measured.
        isolated: whether each run has a process of its own, so that its peak memory is its own.
        base: steps of the base model's own training; 0 for one that is there already.
        rate: factor of the learning rates at which the searches begin.
        bfloat16: whether a processor, too, has time for the arms in bfloat16.
    """

    name: str
    width: int
    blocks: int
    steps: int
    batch: int
    tokens: int
    interval: int
    refresh_every: int
    asked: int
    windows: int
    isolated: bool = False
    base: int = 0
    rate: float = 1.0
    bfloat16: bool = False

    @property
    def title(self) -> str:
        """What the page calls it."""
        return (
            "SmolLM2-135M" if self.name == "smollm2" else f"A small LLaMA ({self.blocks} blocks of width {self.width})"
        )

    @property
    def about(self) -> str:
        """Model and data, in a sentence or two."""
        if self.name == "smollm2":
            return (
                "SmolLM2-135M-Instruct, de-quantised from 4 bits; training questions of ARC-Easy and OpenBookQA, loss of the "
                "right answers to others of them; ordinary text is the Python language reference."
            )
        return (
            f"Trained here from nothing for {self.base} steps on the sources of Python's standard library, which are its "
            "ordinary text, then fine-tuned on the Python language reference, of which every fifth topic is held out."
        )

    def rank(self, r: int) -> int:
        """The rank that is to this width as `r` to that of SmolLM2-135M."""
        return max(1, round(r * self.width / SMOLLM2_WIDTH))

    def active(self, share: float) -> int:
        """The number of blocks that is a share of all."""
        return max(1, round(share * self.blocks))


SMALL = Size(
    "small", 128, 6, 100, 8, 64, interval=5, refresh_every=20, asked=96, windows=48, base=700, rate=8.0, bfloat16=True
)
SMOLLM2 = Size("smollm2", 576, 30, 72, 4, 128, interval=4, refresh_every=18, asked=100, windows=8, isolated=True)
QUICK = Size("quick", 32, 2, 2, 2, 32, interval=1, refresh_every=2, asked=2, windows=2, base=2)
SIZES = {size.name: size for size in (SMALL, SMOLLM2)}


@dataclass(frozen=True)
class Task:
    """What all runs of a size share: folder of the base model, training records, and what is asked.

    Records are pairs of token ids and of the number of tokens at the end that count.
    """

    base: Path
    train: Path
    records: list[tuple[list[int], int]]
    ordinary: torch.Tensor


def prepare(size: Size, work: Path, data: Path | None) -> Task:
    """Base model and data, made once and kept in `work`."""
    return _questions(size, work, data) if size.name == "smollm2" else _reference(size, work)


def _questions(size: Size, work: Path, data: Path | None) -> Task:
    """SmolLM2-135M-Instruct and questions of ARC-Easy and OpenBookQA; ordinary text is the Python language reference."""
    from transformers import AutoTokenizer

    if not (work / "evaluation.jsonl").exists():
        if data is None:
            raise SystemExit("this size needs its questions: --data FOLDER")
        prepare_questions(data, work, Questions(size.steps, size.batch, 4))
    tokenizer = AutoTokenizer.from_pretrained(base := common.smollm2(work))
    records = []
    for record in evaluating.read(work / "evaluation.jsonl", 2 * size.asked):
        prompt, choices = evaluating.question_of(record)
        counted = tokenizer(choices[record["answer"]])["input_ids"]
        records.append((tokenizer(prompt)["input_ids"] + counted, len(counted)))
    asked = evaluating.Size(windows=size.windows, tokens=size.tokens, questions=0, asked=0)
    return Task(base, work / "train.jsonl", records, evaluating.reference(tokenizer, asked))


def _reference(size: Size, work: Path) -> Task:
    """A LLaMA trained here on the sources of Python's standard library, and the language reference to learn."""
    import pydoc_data.topics

    base, train = work / f"base-{size.width}x{size.blocks}-{size.base}", work / "reference.jsonl"
    topics = list(pydoc_data.topics.topics.values())
    files = dict(corpus.texts(Path(sysconfig.get_path("stdlib")) / ("asyncio" if size.name == "quick" else "")))
    parts = {
        held: [text for name, text in files.items() if corpus.is_validation(name) is held] for held in (False, True)
    }
    if not (base / "model.safetensors").exists():
        _train_base(size, parts[False], base)
    pieces = [piece for i, topic in enumerate(topics) if i % 5 for piece in _pieces(topic, 5 * size.tokens // 2)]
    pieces = pieces[: 8 * size.batch] if size.name == "quick" else pieces
    train.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces))
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    held_out = _windows(tokenizer, "\n".join(topics[::5]), 2 * size.asked, size.tokens)
    return Task(
        base,
        train,
        [(window.tolist(), size.tokens - 1) for window in held_out],
        _windows(tokenizer, "\n".join(parts[True]), size.windows, size.tokens),
    )


def _pieces(text: str, length: int) -> list[str]:
    """A text in pieces of whole lines, of about as many characters."""
    found, lines = [], [""]
    for line in text.splitlines(keepends=True):
        lines.append(line)
        if sum(map(len, lines)) >= length:
            found.append("".join(lines))
            lines = []
    return [piece for piece in [*found, "".join(lines)] if piece.strip()]


def _windows(tokenizer: Any, text: str, count: int, length: int) -> torch.Tensor:
    """(count, length) tokens of a text at even distances."""
    ids = tokenizer(text)["input_ids"]
    starts = torch.linspace(0, len(ids) - length, count).long().tolist()
    return torch.stack([torch.tensor(ids[start : start + length]) for start in starts])


def _train_base(size: Size, texts: list[str], folder: Path) -> None:
    """Train tokenizer and model from nothing; warm-up over a tenth of the steps, cosine to 10 %."""
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
        get_cosine_with_min_lr_schedule_with_warmup,
    )

    vocabulary = 2048 if size.name != "quick" else 300
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=corpus.tokenizer_of(texts, vocabulary), eos_token=corpus.END, pad_token=corpus.END
    )
    ids = torch.tensor(tokenizer("".join(texts))["input_ids"])
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=size.width,
            intermediate_size=size.width * 11 // 4,
            num_hidden_layers=size.blocks,
            num_attention_heads=size.width // 32,
            max_position_embeddings=4 * BASE_TOKENS,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = get_cosine_with_min_lr_schedule_with_warmup(optimizer, size.base // 10, size.base, min_lr_rate=0.1)
    for _ in range(size.base):
        starts = torch.randint(len(ids) - BASE_TOKENS, (BASE_BATCH,)).tolist()
        batch = torch.stack([ids[start : start + BASE_TOKENS] for start in starts])
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
