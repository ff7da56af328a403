"""Layerwise learning rates on a small LLaMA: every arm at its own tuned learning rate, several seeds.

    python -m reports.llr_small --quick              three arms, one learning rate, a tiny model: about a minute
    python -m reports.llr_small --work FOLDER        the whole study, about two hours on one core (OMP_NUM_THREADS=1)
    python -m reports.llr_small --work FOLDER --device cuda --text FOLDER --width 512 --blocks 8 --steps 10000 \\
        --batch 128 --context 1024 --vocabulary 32000          a further, larger point

Each finished run is a line of FOLDER/runs.jsonl, so an interrupted study goes on where it was. The learning rate of
every arm is found on one grid of factors of 2 with seed 0: downhill until the best has both neighbours; then come the
other seeds at the best. `--write` makes the page from what FOLDER holds, whatever is missing.
"""

from __future__ import annotations

import json
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
QUICK = Size(width=64, blocks=2, steps=60, vocabulary=1024)
QUICK_TEXT = Path(sysconfig.get_path("stdlib")) / "asyncio"  # half a megabyte


def main() -> None:
    """Run the study."""
    args = common.arguments(
        str(__doc__),
        ("--work", {"type": Path, "help": "folder for the corpus and the finished runs"}),
        ("--text", {"type": Path, "help": "folder of text files in place of the standard library's sources"}),
        ("--device", {"default": "cpu", "help": "cpu or cuda"}),
        ("--seeds", {"type": int, "default": 3}),
        ("--arms", {"type": lambda names: names.split(","), "default": list(ARMS), "help": ",".join(ARMS)}),
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
        points: list[tuple[Size, list[str], Size | None]] = [(replace(MAIN, **given), args.arms, None)]
        if not given:
            points.append((LONG, LONG_ARMS, MAIN))
        facts = {}
        for size, arms, tuned in points:
            text = corpus.prepare(work, size.vocabulary, args.text)
            facts = text.facts
            if not args.write:
                run_point(work / "runs.jsonl", size, arms, args.seeds, tuned, text, args.device)
        runs = search.read(work / "runs.jsonl")
    keep(facts, points, runs)
    from reports.llr_small.write_up import write_up

    write_up(json.loads((HERE / "results.json").read_text()))


def run_point(
    file: Path, size: Size, arms: list[str], seeds: int, tuned: Size | None, text: corpus.Corpus, device: str
) -> None:
    """All runs of one size that are not done yet: the grids of all arms, then the seeds."""
    while jobs := list(search.todo(search.read(file), arms, seeds, size, tuned)):
        job = min(jobs, key=lambda job: job.seed)
        start = time.perf_counter()
        result = train(job, text, device)
        with file.open("a") as lines:
            lines.write(json.dumps(result) + "\n")
        print(
            f"{job.arm:12} lr {job.lr:g} seed {job.seed}: {result['loss']} in {time.perf_counter() - start:.0f} s",
            flush=True,
        )


def keep(facts: dict[str, Any], points: list[tuple[Size, list[str], Size | None]], runs: search.Runs) -> None:
    """results.json: the points of this run beside those that are there already."""
    file = HERE / "results.json"
    before = json.loads(file.read_text())["points"] if file.exists() else {}
    for size, _, tuned in points:
        found = summary.summarise(runs, size, list(ARMS))
        if found:
            before[size.name] = {
                "size": {f.name: getattr(size, f.name) for f in fields(Size)},
                "parameters": size.parameters(),
                "corpus": facts,
                "tuned_on": tuned.name if tuned else size.name,
                "runs": len([run for run in runs if run["name"] == size.name]),
                "hours": sum(
                    sum(run["seconds"][k] for k in ("training", "evaluation"))
                    for run in runs
                    if run["name"] == size.name
                )
                / 3600,
                "arms": found,
            }
    common.keep(HERE, {"points": before})


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
