"""A text corpus anyone has: the Python standard library's sources, or a folder of text; split by file, tokens by BPE."""

from __future__ import annotations

import hashlib
import json
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

END = "<|endoftext|>"
VALIDATION = 0.06  # of the files
SKIP = {"site-packages", "dist-packages", "test", "tests", "__pycache__", "encodings", "idle_test", "pydoc_data"}
SUFFIXES = {".py", ".rst", ".txt", ".md"}


@dataclass(frozen=True)
class Corpus:
    """Token streams (int64, 1-D) of the training and the validation files, and what they were made of."""

    train: torch.Tensor
    validation: torch.Tensor
    facts: dict[str, Any]

    def batch(self, random: torch.Generator, batch: int, context: int) -> torch.Tensor:
        """(batch, context + 1) tokens from random places of the training stream."""
        starts = torch.randint(len(self.train) - context - 1, (batch,), generator=random)
        return torch.stack([self.train[s : s + context + 1] for s in starts.tolist()])

    def held_out(self, windows: int, context: int) -> torch.Tensor:
        """(windows, context + 1) tokens at even distances over the validation stream, the same for every run."""
        starts = torch.linspace(0, len(self.validation) - context - 1, windows).long().tolist()
        return torch.stack([self.validation[s : s + context + 1] for s in starts])


def texts(folder: Path) -> Iterator[tuple[str, str]]:
    """Relative name and content of each text file, in the order of the names."""
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.suffix in SUFFIXES and path.is_file() and not SKIP & set(relative.parts):
            text = path.read_text(encoding="utf-8", errors="replace")
            if text.strip():
                yield relative.as_posix(), text


def is_validation(name: str) -> bool:
    """Whether a file is held out: decided by the hash of its name alone."""
    return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) < VALIDATION * 2**32


def prepare(work: Path, vocabulary: int, folder: Path | None) -> Corpus:
    """The corpus, its tokenizer trained on the training files; kept in `work` by the hash of its content."""
    source = folder or Path(sysconfig.get_path("stdlib"))
    files = dict(texts(source))
    digest = hashlib.sha256()
    for name, text in files.items():
        digest.update(name.encode() + b"\0" + text.encode() + b"\0")
    kept = work / f"corpus-{digest.hexdigest()[:16]}-{vocabulary}.pt"
    if not kept.exists():
        tokenizer = tokenizer_of([text for name, text in files.items() if not is_validation(name)], vocabulary)
        end = tokenizer.token_to_id(END)
        streams: dict[bool, list[int]] = {False: [], True: []}
        for name, text in files.items():
            streams[is_validation(name)] += [*tokenizer.encode(text).ids, end]
        facts = {
            "source": "the Python standard library's sources" if folder is None else folder.name,
            "sha256": digest.hexdigest(),
            "files": len(files),
            "validation_files": sum(is_validation(name) for name in files),
            "megabytes": round(sum(len(text.encode()) for text in files.values()) / 1e6, 2),
            "train_tokens": len(streams[False]),
            "validation_tokens": len(streams[True]),
            "vocabulary": vocabulary,
        }
        content = {"train": torch.tensor(streams[False]), "validation": torch.tensor(streams[True])}
        torch.save(content | {"facts": json.dumps(facts)}, kept.with_suffix(".part"))
        kept.with_suffix(".part").rename(kept)
    return load(kept)


def load(file: Path) -> Corpus:
    """The corpus in a file that `prepare` or `reports.llr_small.debian` has written."""
    content = torch.load(file, weights_only=True)
    return Corpus(content["train"].long(), content["validation"].long(), json.loads(content["facts"]))


def tokenizer_of(training: list[str], vocabulary: int) -> Any:
    """A byte-level BPE of `vocabulary` tokens, trained on texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training, trainer)
    return tokenizer
