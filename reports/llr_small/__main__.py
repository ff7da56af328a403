"""Layerwise learning rates on a small LLaMA: every arm at its own tuned learning rate, several seeds.

    python -m reports.llr_small --quick              three arms, one learning rate, a tiny model: about a minute
    python -m reports.llr_small --work FOLDER        the whole study, about two hours on one core (OMP_NUM_THREADS=1)
    python -m reports.llr_small.debian --output debian.pt
    python -m reports.llr_small --work FOLDER --size 60m --device cuda --corpus debian.pt --minutes 8
                                                     the paper's 60M LLaMA, on a GPU; again until nothing is left

Each finished run is a line of FOLDER/runs.jsonl, so an interrupted study goes on where it was. The learning rate of
every arm is found on one grid of factors of 2 with seed 0: downhill until the best has both neighbours; then come the
other seeds at the best. `--write` makes the page from what FOLDER holds, whatever is missing; arms of which it holds no
run stay on the page as they are.
"""

from __future__ import annotations

import json
import math
import sysconfig
import tempfile
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from reports import common
from reports.llr_small import corpus, search, summary
from reports.llr_small.arms import ARMS
from reports.llr_small.training import Job, Size, train

HERE = Path(__file__).parent
MAIN = Size()
LONG = replace(MAIN, steps=2400)
LONG_ARMS = ["uniform", "llr", "ends"]
# LLR's 60M: 8 blocks, 8 heads, context 1024, 32000 tokens. Its batch is four times as large, on a larger corpus: here
# 850 steps of 131,072 tokens see 28 million tokens four times
PAPER = Size(width=512, blocks=8, steps=850, batch=128, context=1024, vocabulary=32_000, head_width=64)
PAPER_ARMS = ["uniform", "ends", "apart", "llr"]
QUICK = Size(width=64, blocks=2, steps=24, vocabulary=1024)
QUICK_TEXT = Path(sysconfig.get_path("stdlib")) / "asyncio"  # half a megabyte


def main() -> None:
    """Run the study."""
    args = common.arguments(
        str(__doc__),
        ("--work", {"type": Path, "help": "folder for the corpus and the finished runs"}),
        (
            "--size",
            {"choices": ["small", "60m"], "default": "small", "help": "0.8 M weights, or the paper's 60M LLaMA"},
        ),
        ("--text", {"type": Path, "help": "folder of text files in place of the standard library's sources"}),
        ("--corpus", {"type": Path, "help": "file of tokens from reports.llr_small.debian"}),
        ("--device", {"default": "cpu", "help": "cpu or cuda"}),
        ("--seeds", {"type": int, "default": 3}),
        ("--arms", {"type": lambda names: names.split(","), "help": ",".join(ARMS)}),
        ("--minutes", {"type": float, "default": math.inf, "help": "begin no run that would end later than this"}),
        ("--write", {"action": "store_true", "help": "run nothing, write the page from what --work holds"}),
        *((f"--{f.name}", {"type": int}) for f in fields(Size)),
    )
    given = {f.name: value for f in fields(Size) if (value := getattr(args, f.name)) is not None}
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        if args.quick:
            quick(work, args)
            return
        main_size, arms = (PAPER, PAPER_ARMS) if args.size == "60m" else (MAIN, list(ARMS))
        points: list[tuple[Size, list[str], Size | None]] = [(replace(main_size, **given), args.arms or arms, None)]
        if args.size == "small" and not given and not args.arms:
            points.append((LONG, LONG_ARMS, MAIN))
        deadline = time.monotonic() + 60 * args.minutes
        facts = {}
        for size, arms, tuned in points:
            text = corpus.load(args.corpus) if args.corpus else corpus.prepare(work, size.vocabulary, args.text)
            if text.facts["vocabulary"] != size.vocabulary:
                raise SystemExit(f"the corpus has {text.facts['vocabulary']} tokens, and the model {size.vocabulary}")
            facts = text.facts
            if not args.write:
                run_point(work / "runs.jsonl", size, arms, args.seeds, tuned, text, args.device, deadline)
        runs = search.read(work / "runs.jsonl")
    keep(facts, points, runs)
    from reports.llr_small.write_up import write_up

    write_up(json.loads((HERE / "results.json").read_text()))


def run_point(
    file: Path,
    size: Size,
    arms: list[str],
    seeds: int,
    tuned: Size | None,
    text: corpus.Corpus,
    device: str,
    deadline: float = math.inf,
) -> None:
    """All runs of one size that are not done yet: the grids of all arms, then the seeds; none that would pass the
    `deadline` by the longest run so far."""
    longest = 0.0
    while jobs := list(search.todo(search.read(file), arms, seeds, size, tuned)):
        if time.monotonic() + longest > deadline:
            print(f"no time for another run: {len(jobs)} arms have more to do; the same command goes on", flush=True)
            return
        job = min(jobs, key=lambda job: job.seed)
        start = time.perf_counter()
        result = train(job, text, device)
        with file.open("a") as lines:
            lines.write(json.dumps(result) + "\n")
        took = time.perf_counter() - start
        longest = max(longest, took)
        print(f"{job.arm:12} lr {job.lr:g} seed {job.seed}: {result['loss']} in {took:.0f} s", flush=True)


def keep(facts: dict[str, Any], points: list[tuple[Size, list[str], Size | None]], runs: search.Runs) -> None:
    """results.json: the points and arms of these runs beside those that are there already."""
    file = HERE / "results.json"
    points_kept = json.loads(file.read_text())["points"] if file.exists() else {}
    for size, _, tuned in points:
        before = points_kept.get(size.name, {"arms": {}, "hours": 0.0})
        found = summary.summarise(runs, size, list(ARMS), before["arms"])
        if not found:
            continue
        points_kept[size.name] = {
            "size": {f.name: getattr(size, f.name) for f in fields(Size)},
            "parameters": size.parameters(),
            "corpus": facts,
            "tuned_on": tuned.name if tuned else size.name,
            "runs": max(
                sum(run["name"] == size.name for run in runs),
                sum(len(arm["grid"]) + len(arm["losses"]) - 1 for arm in found.values()),
            ),
            "hours": before["hours"] - hours_of(before["arms"]) + hours_of(found),
            "arms": found,
        }
    common.keep(HERE, {"points": points_kept})


def hours_of(arms: dict[str, Any]) -> float:
    """Core-hours of the arms that say theirs; those of the first runs are in the sum of all only."""
    return float(sum(arm.get("hours", 0.0) for arm in arms.values()))


def quick(work: Path, args: Any) -> None:
    """Three arms at one learning rate; says nothing about which is better."""
    text = corpus.prepare(work, QUICK.vocabulary, args.text or QUICK_TEXT)
    for arm in ("uniform", "ends", "llr"):
        result = train(Job(arm, 2e-3, 0, QUICK), text, args.device)
        seconds = result["seconds"]
        print(
            f"{ARMS[arm].title}: validation loss {result['loss']:.3f} after {QUICK.steps} steps, "
            f"{seconds['training']:.1f} s, {seconds['spectra']:.2f} s of them on spectra",
            flush=True,
        )


if __name__ == "__main__":
    main()
