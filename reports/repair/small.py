"""The same question of a small model, which minutes are enough for: three seeds, the whole line, every setting.

A LLaMA of 4 blocks and width 128 is trained on the bytes of the sources of Python's standard library, then fine-tuned
on the Python language reference, in full and by LoRA at rates that forget. Learned is the loss on held-out parts of the
reference; forgotten is the rise of the loss on held-out sources, and on what the base itself writes.
"""

from __future__ import annotations

import shutil
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import htsr
from reports.llr_small import corpus
from reports.repair import evaluating

BYTES = 256  # the vocabulary
WINDOW = 96


@dataclass(frozen=True)
class Steps:
    """How long the base and the fine-tuned models are trained, and with how many windows they are asked."""

    base: int
    tuned: int
    windows: int
    seeds: int


FULL = Steps(base=450, tuned=100, windows=40, seeds=3)
RATES = {"full": 3e-3, "lora": 2e-2}
LINE: dict[str, dict[str, Any]] = {
    f"{t:g}·ΔW": {"method": "interpolate", "factor": t} for t in (0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9)
}
REPAIRS: dict[str, dict[str, Any]] = {
    "denoise": {"method": "denoise"},
    "ecs": {"method": "ecs"},
    **{f"{k} leading": {"method": "leading", "k": k} for k in (1, 4, 16)},
    **{f"intruders × {f:g}": {"method": "intruders", "factor": f} for f in (0.75, 0.5, 0)},
}


def model_of() -> Any:
    """A small LLaMA with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=BYTES, bos_token_id=10, tie_word_embeddings=True, **sizes))


def train(
    model: Any,
    tokens: torch.Tensor,
    steps: int,
    rate: float,
    seed: int,
    batch: int = 12,
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """AdamW, or another optimizer, on random windows, warm-up over a tenth, then down to 0."""
    draw = torch.Generator().manual_seed(seed)
    if optimizer is None:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.01)
    ramp = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / ramp, (steps - step) / (steps - ramp))
    )
    model.train()
    for _ in range(steps):
        starts = torch.randint(len(tokens) - WINDOW, (batch,), generator=draw).tolist()
        ids = torch.stack([tokens[start : start + WINDOW] for start in starts])
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()


def windows(tokens: torch.Tensor, count: int) -> torch.Tensor:
    """(count, WINDOW) tokens at even distances."""
    starts = torch.linspace(0, len(tokens) - WINDOW, count).long().tolist()
    return torch.stack([tokens[start : start + WINDOW] for start in starts])


def sources() -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes of the standard library's sources, to train on and held out by file."""
    files = dict(corpus.texts(Path(sysconfig.get_path("stdlib"))))
    parts = (
        "".join(text for name, text in files.items() if corpus.is_validation(name) is held) for held in (False, True)
    )
    train, held_out = (as_tokens(part) for part in parts)
    return train, held_out


def reference() -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes of the language reference, of which every fifth topic is held out."""
    import pydoc_data.topics

    found = list(pydoc_data.topics.topics.values())
    held_out = found[::5]
    return as_tokens("\n".join(t for i, t in enumerate(found) if i % 5)), as_tokens("\n".join(held_out))


def as_tokens(text: str) -> torch.Tensor:
    """A text as its bytes."""
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()


def study(work: Path, steps: Steps) -> list[dict[str, Any]]:
    """The answers of the base and of every fine-tuned model in every setting, as those of the large one."""
    from transformers import AutoModelForCausalLM

    base = work / f"small-base-{steps.base}"
    (train_on, held_out), (learn, task) = sources(), reference()
    if not (base / "model.safetensors").exists():
        model = model_of()
        train(model, train_on, steps.base, 3e-3, seed=0)
        model.save_pretrained(base)
    size = evaluating.Size(windows=steps.windows, tokens=WINDOW, questions=0, asked=0)
    own = evaluating.own(evaluating.load(base), None, size)
    asked = {"reference": windows(held_out, steps.windows), "own": own, "questions": windows(task, 2 * steps.windows)}

    def answers(folder: Path) -> dict[str, Any]:
        model = evaluating.load(folder)
        return {name: evaluating.text_losses(model, ids) for name, ids in asked.items()}

    runs = [{"arm": "base", "seed": 0, "setting": "base", "norm_kept": 0.0, **answers(base)}]
    for arm, rate in RATES.items():
        for seed in range(steps.seeds):
            model = AutoModelForCausalLM.from_pretrained(base)
            tuned, repaired = work / "small-tuned", work / "small-repaired"
            tune(model, arm, learn, steps.tuned, rate, seed).save_pretrained(tuned)
            runs.append({"arm": arm, "seed": seed, "setting": "ΔW", "norm_kept": 1.0, **answers(tuned)})
            for setting, options in (LINE | REPAIRS).items():
                shutil.rmtree(repaired, ignore_errors=True)
                found = htsr.repair(tuned, base, repaired, **options)
                same = found.changed == 0 and not found.others_changed
                facts = {"norm_kept": found.norm_kept, "matrices": found.changed}
                runs.append(
                    {"arm": arm, "seed": seed, "setting": setting, **facts, **({} if same else answers(repaired))}
                )
    return runs


def tune(model: Any, arm: str, tokens: torch.Tensor, steps: int, rate: float, seed: int) -> Any:
    """The model after fine-tuning; LoRA merged into it."""
    torch.manual_seed(seed)
    if arm == "full":
        train(model, tokens, steps, rate, seed)
        return model
    from peft import LoraConfig, get_peft_model

    wrapped: Any = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    train(wrapped, tokens, steps, rate, seed)
    return wrapped.merge_and_unload()
