"""How bfloat16 weights are rounded, against float32: SmolLM2-135M by full training, LISA and OwLore.

    python -m reports.rounding --data FOLDER --work FOLDER     half an hour of one core and more; taken up where it was stopped
    python -m reports.rounding --longer                        a small model for 300 steps, a few minutes
    python -m reports.rounding --quick                         a tiny model, a few steps
    python -m reports.rounding --write-up                      only the page again

FOLDER of the data holds arc_easy_train.jsonl, openbookqa_train.jsonl and arc_easy_test.jsonl: question, choices, answer.
Weights are kept in bfloat16, but forward and backward run in float32 on copies of them, and so do gradients: the arms
differ in how weights are rounded and in nothing else, and a CPU without units for bfloat16 can do it. All arms start from the same bfloat16 numbers; seeds differ in the order of the data and in the draws
of blocks. "float32" is the same with weights in float32.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import htsr
from reports import common
from reports.rounding.write_up import write_up

HERE = Path(__file__).parent
ARMS = ("float32", "nearest", "stochastic", "kahan", "master")
METHODS: dict[str, dict[str, Any]] = {  # learning rates as in the recipes that are shipped
    "owlore": {"lr": 1e-4, "rank": 128, "scale": 1.0, "active": 4},
    "lisa": {"lr": 1e-5, "active": 4},
    "full": {"lr": 1e-5},
}
LONGER: dict[str, dict[str, Any]] = {"full": {"lr": 3e-5}, "lisa": {"lr": 3e-5, "active": 2}}
LONGER_SIZE = {"steps": 240, "interval": 50, "batch": 4, "tokens": 24, "evaluation": 16}
SIZE = {"steps": 16, "interval": 8, "batch": 1, "tokens": 48, "evaluation": 12}
QUICK = {"steps": 4, "interval": 2, "batch": 2, "tokens": 16, "evaluation": 4}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "vocab_size": 200,
}


@dataclass(frozen=True)
class Text:
    """Token ids (sequences, tokens) to train on and to be asked about; -100 where a label is not counted."""

    train: Tensor
    evaluation: Tensor


def main() -> None:
    """Run what is not done yet, then write the page."""
    args = common.arguments(
        str(__doc__),
        ("--data", {"type": Path, "help": "folder of the questions"}),
        ("--work", {"type": Path, "help": "where the model and the runs are kept"}),
        ("--methods", {"default": ",".join(METHODS), "help": "only these, with commas"}),
        ("--longer", {"action": "store_true", "help": "only the small model that is trained for longer"}),
        ("--write-up", {"action": "store_true", "help": "only write README.md anew"}),
    )
    torch.set_num_threads(1)
    if args.quick:
        small(METHODS | {"owlore": METHODS["owlore"] | {"rank": 8}}, QUICK, seeds=1)
        return
    file = HERE / "results.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    if args.longer:
        results["longer"] = {"size": LONGER_SIZE, "methods": LONGER, "runs": small(LONGER, LONGER_SIZE, seeds=3)}
    elif not args.write_up:
        if not (args.data and args.work):
            sys.exit("this study needs its questions and a folder for its runs: --data FOLDER --work FOLDER")
        results |= {"size": SIZE, "methods": METHODS, "runs": smollm2(args.data, args.work, args.methods.split(","))}
    if not args.write_up:
        common.keep(HERE, {key: value for key, value in results.items() if key != "machine"})
    write_up(json.loads(file.read_text()), HERE)


def smollm2(data: Path, work: Path, methods: list[str]) -> list[dict[str, Any]]:
    """All runs of SmolLM2, those that are done taken from `work`."""
    work.mkdir(parents=True, exist_ok=True)
    file = work / "runs.jsonl"
    runs = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    folder = common.smollm2(work)
    text = questions(data, folder, SIZE)
    for seed in range(3):
        for method in methods:
            done = {r["arm"] for r in runs if (r["method"], r["seed"]) == (method, seed)}
            if done.issuperset(ARMS):
                continue
            arms = [
                "float32",
                *(arm for arm in ARMS if arm not in done | {"float32"}),
            ]  # the others are held against it
            for row in compare(load(folder), text, method, METHODS[method], seed, SIZE, arms):
                if row["arm"] not in done:
                    runs.append(row)
                    print(json.dumps(row), flush=True)
                    file.write_text("".join(json.dumps(r) + "\n" for r in runs))
    return runs


def small(methods: dict[str, dict[str, Any]], size: dict[str, int], seeds: int) -> list[dict[str, Any]]:
    """All runs of a small model."""
    model, text = tiny(size["steps"] * 2 // 3), chain(17, 3, 512, size)
    runs = []
    for seed in range(seeds):
        for method, options in methods.items():
            for row in compare(model, text, method, options, seed, size, ARMS):
                runs.append(row)
                print(json.dumps(row), flush=True)
    return runs


def compare(
    model: Any, text: Text, method: str, options: dict[str, Any], seed: int, size: dict[str, int], arms: Any
) -> Iterator[dict[str, Any]]:
    """One row per arm, the first of which is float32: evaluation loss before and after, and how the weights moved.

    ``still`` is the part of the entries of trained parameters that are what they were, ``distance`` the norm of the
    difference of the weights from float32's, as a part of how far those have moved.
    """
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    before = loss_of(model, text.evaluation, size)
    reference: dict[str, Tensor] = {}
    for arm in arms:
        began = time.process_time()
        narrow, reached = train(model, text, method, options, seed, size, arm)
        if arm == "float32":
            reference = narrow
        moved = sum(float((reference[n] - start[n]).square().sum()) for n in reached)
        off = sum(float((narrow[n] - reference[n]).square().sum()) for n in reached)
        still = sum(int((narrow[n] == start[n]).sum()) for n in reached) / sum(start[n].numel() for n in reached)
        after = loss_of(model, text.evaluation, size)
        yield {
            "method": method, "arm": arm, "seed": seed, "before": before, "loss": after, "still": still,
            "distance": (off / moved) ** 0.5, "seconds": time.process_time() - began,
        }  # fmt: skip
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(start[name])


def train(
    model: Any, text: Text, method: str, options: dict[str, Any], seed: int, size: dict[str, int], arm: str
) -> tuple[dict[str, Tensor], set[str]]:
    """Train; returns the weights in float32, and the names of those that were ever trained.

    `model` computes in float32; a second one holds what the optimizer knows and is never run.
    """
    import copy

    kept = copy.deepcopy(model).to(torch.float32 if arm == "float32" else torch.bfloat16)
    rounding: Any = "nearest" if arm == "float32" else arm
    if "rank" in options:
        groups = htsr.low_rank_groups(kept, options["rank"], scale=options["scale"])
    else:
        groups = list(kept.parameters())
    optimizer = htsr.LowRankAdamW(groups, lr=options["lr"], rounding=rounding, seed=seed)
    if "active" in options:
        sampler = htsr.LayerSampler(kept, active=options["active"], interval=size["interval"], seed=seed)
        sampler.attach(optimizer)
    for parameter in kept.parameters():
        parameter.grad_dtype = torch.float32
    pairs = [(name, p, q) for (name, p), q in zip(model.named_parameters(), kept.parameters(), strict=True)]
    order = torch.randperm(len(text.train), generator=torch.Generator().manual_seed(seed))
    reached: set[str] = set()
    for step in range(size["steps"]):
        for _, wide, narrow in pairs:
            wide.requires_grad_(narrow.requires_grad)
        at = torch.arange(step * size["batch"], (step + 1) * size["batch"]) % len(order)
        loss_on(model, text.train[order[at]]).backward()
        for name, wide, narrow in pairs:
            if wide.grad is not None:
                narrow.grad, wide.grad = wide.grad, None
                reached.add(name)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for name, wide, narrow in pairs:
                if name in reached:
                    wide.copy_(narrow)
    for _, wide, _ in pairs:
        wide.requires_grad_(True)
    return {name: q.detach().float() for name, _, q in pairs}, reached


def loss_on(model: Any, labels: Tensor) -> Tensor:
    """Mean loss of a batch of labels, -100 where nothing is counted."""
    loss: Tensor = model(input_ids=labels.clamp(min=0), attention_mask=(labels >= 0).long(), labels=labels).loss
    return loss


@torch.no_grad()
def loss_of(model: Any, labels: Tensor, size: dict[str, int]) -> float:
    """Mean loss over all tokens of the held-out sequences."""
    total = count = 0.0
    for some in labels[: size["evaluation"]].split(4):
        tokens = int((some[:, 1:] >= 0).sum())
        total, count = total + float(loss_on(model, some)) * tokens, count + tokens
    return total / count


def load(folder: Path) -> Any:
    """SmolLM2 in float32, its numbers rounded to bfloat16."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).float()
    model.config.use_cache = False
    return model.train()


def questions(data: Path, folder: Path, size: dict[str, int]) -> Text:
    """Questions with their answers as text: those of training in both sets, the evaluation from ARC-Easy's test."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)

    def encode(names: tuple[str, ...], most: int) -> Tensor:
        rows = []
        for name in names:
            for line in (data / f"{name}.jsonl").read_text().splitlines()[:most]:
                asked = json.loads(line)
                ids = tokenizer(f"Question: {asked['question']}\nAnswer: {asked['choices'][asked['answer']]}").input_ids
                ids = ids[: size["tokens"]]
                rows.append(ids + [-100] * (size["tokens"] - len(ids)))
        return torch.tensor(rows)

    most = size["steps"] * size["batch"] * 2
    return Text(encode(("arc_easy_train", "openbookqa_train"), most), encode(("arc_easy_test",), size["evaluation"]))


def tiny(steps: int) -> Any:
    """A small LLaMA that has been trained a little in float32; its weights are bfloat16 numbers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**TINY))
    model.config.use_cache = False
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    text = chain(31, 7, 8 * steps, LONGER_SIZE).train
    for step in range(steps):
        loss_on(model, text[step * 4 : step * 4 + 4]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.bfloat16().float().train()


def chain(factor: int, shift: int, count: int, size: dict[str, int]) -> Text:
    """Sequences in which each token is a fixed function of the one before, but for one in five."""
    draw = torch.Generator().manual_seed(factor)
    words = TINY["vocab_size"]
    tokens = torch.randint(0, words, (count + size["evaluation"], size["tokens"]), generator=draw)
    free = torch.rand(tokens.shape, generator=draw) < 0.2
    for i in range(1, size["tokens"]):
        tokens[:, i] = torch.where(free[:, i], tokens[:, i], (factor * tokens[:, i - 1] + shift) % words)
    return Text(tokens[:count], tokens[count:])


if __name__ == "__main__":
    main()
