"""Which repair of a fine-tuned model undoes forgetting at less cost than going back towards the base?

    python -m reports.repair --data FOLDER --work FOLDER     hours on two cores; taken up where it was stopped
    python -m reports.repair --work FOLDER --finished        only runs that have come to their end, nothing is trained
    python -m reports.repair --work FOLDER --small           the small model instead, half an hour of one core
    python -m reports.repair --quick                         a tiny model and a change drawn for it
    python -m reports.repair --write-up                      only the page again

FOLDER of the data holds arc_easy_train.jsonl, arc_easy_test.jsonl and openbookqa_train.jsonl: question, choices, answer.
SmolLM2-135M-Instruct is fine-tuned on the questions, full and by LoRA, three seeds each, at rates that forget. Each
model is repaired by `htsr.repair` in every setting, and asked: loss of the right answers to held-out questions (what
was learned), loss on the Python language reference and on text that the base itself writes (what was forgotten).
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import htsr
from reports import common
from reports.repair import evaluating, small
from reports.repair.evaluating import Size
from reports.repair.training import ARMS, SEEDS, is_there, losses, questions, tuned
from reports.repair.writing import write_up

HERE = Path(__file__).parent
SIZE = Size(windows=8, tokens=128, questions=64, asked=100)
QUICK = Size(windows=2, tokens=16, questions=4, asked=4)
Settings = dict[str, dict[str, Any]]
LINE: Settings = {f"{t:g}·ΔW": {"method": "interpolate", "factor": t} for t in (0.75, 0.5, 0.25)}
SETTINGS: dict[str, Settings] = {
    "full": {
        "0.5·ΔW": LINE["0.5·ΔW"],
        "denoise": {"method": "denoise"},
        "0.75·ΔW": LINE["0.75·ΔW"],
        "ecs": {"method": "ecs"},
        "intruders × 0.5": {"method": "intruders", "factor": 0.5},
        "0.25·ΔW": LINE["0.25·ΔW"],
        "10 leading": {"method": "leading", "k": 10},
        "intruders × 0": {"method": "intruders", "factor": 0.0},
    },
    "lora": {
        "0.5·ΔW": LINE["0.5·ΔW"],
        "intruders × 0.5": {"method": "intruders", "factor": 0.5},
        "0.75·ΔW": LINE["0.75·ΔW"],
        "4 leading": {"method": "leading", "k": 4},
        "intruders × 0": {"method": "intruders", "factor": 0.0},
        "0.25·ΔW": LINE["0.25·ΔW"],
        "1 leading": {"method": "leading", "k": 1},
        "intruders × 0.75": {"method": "intruders", "factor": 0.75},
        "denoise": {"method": "denoise"},
        "ecs": {"method": "ecs"},
    },
}


def main() -> None:
    """Run what is not done yet, then write the page."""
    args = common.arguments(
        str(__doc__),
        ("--data", {"type": Path, "help": "folder of the questions"}),
        ("--work", {"type": Path, "help": "where models and answers are kept"}),
        ("--finished", {"action": "store_true", "help": "train nothing, take what is there"}),
        ("--small", {"action": "store_true", "help": "the small model, and not SmolLM2"}),
        ("--accuracy", {"action": "store_true", "help": "ask for the accuracy, too: four times as long"}),
        ("--write-up", {"action": "store_true", "help": "only the page again"}),
    )
    if args.quick:
        quick()
        return
    if not args.write_up:
        if args.work is None or not (args.data or args.finished or args.small):
            sys.exit("this study needs its questions and a place: --data FOLDER --work FOLDER")
        file = HERE / "results.json"
        kept: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
        if args.small:
            kept |= {"small": {"steps": asdict(small.FULL), "runs": small.study(args.work, small.FULL)}}
        else:
            if not args.finished:
                questions(args.data, args.work)
            kept |= {"size": asdict(SIZE), "runs": study(args.work, SIZE, args.finished, args.accuracy)}
        common.keep(HERE, {key: value for key, value in kept.items() if key != "machine"})
    write_up(json.loads((HERE / "results.json").read_text()), HERE)


def study(work: Path, size: Size, finished: bool, ask: bool) -> list[dict[str, Any]]:
    """The answers of the base and of every model in every setting, seed by seed; kept in `work`."""
    file = work / "answers.jsonl"
    runs = [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")] if file.exists() else []
    while job := next(todo(runs, work, finished), None):  # models may come to their end meanwhile
        arm, seed, setting = job
        found = {"arm": arm, "seed": seed, "setting": setting, **answer(arm, seed, setting, work, size, ask)}
        print(json.dumps({key: value for key, value in found.items() if not isinstance(value, list)}), flush=True)
        runs.append(found)
        with file.open("a") as opened:
            opened.write(json.dumps(found) + "\n")
    return runs


def todo(runs: list[dict[str, Any]], work: Path, finished: bool) -> Iterator[tuple[str, int, str]]:
    """What has not been asked yet: the base, then setting by setting each model, so that seeds are compared early."""
    done = {(r["arm"], r["seed"], r["setting"]) for r in runs}
    models = [(arm, seed) for seed in SEEDS for arm in ARMS if not finished or is_there(arm, seed, work)]
    most = max(map(len, SETTINGS.values()))
    jobs = [("base", 0, "base"), *((arm, seed, "ΔW") for arm, seed in models)]
    jobs += [(*m, list(SETTINGS[m[0]])[i]) for i in range(most) for m in models if i < len(SETTINGS[m[0]])]
    yield from (job for job in jobs if job not in done)


def answer(arm: str, seed: int, setting: str, work: Path, size: Size, ask: bool) -> dict[str, Any]:
    """What a model says in one setting, and how much of its change is left."""
    base = common.smollm2(work)
    if arm == "base":
        return {"norm_kept": 0.0, "matrices": 0, **asked(base, base, work, size, ask)}
    folder = tuned(arm, seed, work)
    own = losses(folder)
    facts: dict[str, Any] = {"train_loss": own.get("train_loss"), "norm_kept": 1.0, "matrices": 0}
    if setting == "ΔW":
        return facts | asked(folder, base, work, size, ask)
    goal = work / "repaired"
    shutil.rmtree(goal, ignore_errors=True)
    found = htsr.repair(folder, base, goal, **SETTINGS[arm][setting])
    facts |= {"norm_kept": found.norm_kept, "matrices": found.changed, "shares": shares(found)}
    facts["intruders"] = sum(row.intruders_before or 0 for row in found.matrices)
    same = found.changed == 0 and not found.others_changed
    said = {} if same else asked(goal, base, work, size, ask)  # nothing to ask anew
    shutil.rmtree(goal)
    return facts | said


def shares(found: htsr.Repair) -> dict[str, float]:
    """Median share of the directions that were kept, by role."""
    by_role: dict[str, list[float]] = {}
    for row in found.matrices:
        if row.kept is not None and row.total:
            by_role.setdefault(row.role, []).append(row.kept / row.total)
    return {role: common.median(values) for role, values in by_role.items()}


def asked(folder: Path, base: Path, work: Path, size: Size, ask: bool) -> dict[str, Any]:
    """Losses of one model."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = evaluating.load(folder)
    texts = evaluating.texts(model, tokenizer, size, work)  # written by the base, which is asked first
    found: dict[str, Any] = {name: evaluating.text_losses(model, ids) for name, ids in texts.items()}
    records = evaluating.read(work / "evaluation.jsonl", size.questions)
    found["questions"] = evaluating.question_losses(model, tokenizer, records)
    if ask:
        found |= evaluating.accuracy(model, tokenizer, evaluating.read(work / "test.jsonl", size.asked))
    return found


def quick() -> None:
    """Every method on a tiny model with a change that is drawn, asked for its loss on drawn text."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with tempfile.TemporaryDirectory() as temporary:
        base, other, goal = (Path(temporary) / name for name in ("base", "tuned", "repaired"))
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=200, **sizes))
        model.save_pretrained(base)
        ids = torch.randint(200, (QUICK.windows, QUICK.tokens))
        with torch.no_grad():
            for W in model.parameters():
                W += 0.005 * torch.randn_like(W)
                if W.ndim == 2:
                    W += 0.02 * torch.randn(len(W), 2) @ torch.randn(2, W.shape[1])
        model.save_pretrained(other)
        for setting, options in SETTINGS["full"].items():
            found = htsr.repair(other, base, goal, **options)
            loss = sum(evaluating.text_losses(evaluating.load(goal), ids)) / QUICK.windows
            print(json.dumps({"setting": setting, "norm_kept": found.norm_kept, "loss": loss}), flush=True)
            shutil.rmtree(goal)


if __name__ == "__main__":
    main()
