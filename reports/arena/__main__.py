"""Which way of fine-tuning has the lowest loss at which memory and time? Every arm at its own best learning rate.

    python -m reports.arena --size small --work FOLDER                    about an hour on one core
    python -m reports.arena --size smollm2 --data FOLDER --work FOLDER    hours; with --device cuda minutes
    python -m reports.arena --quick                                       one arm on a tiny model
    python -m reports.arena --write --work FOLDER                         only the page, from what there is

FOLDER of the data holds arc_easy_train.jsonl, arc_easy_test.jsonl and openbookqa_train.jsonl: question, choices, answer.
Every finished run is a line of WORK/SIZE.jsonl, so that an interrupted study goes on where it was; with `--minutes 8`
it stops by itself before a run would take it past. The learning rate of each arm is searched with seed 0 on one grid of
factors of 2, downhill until the best has both neighbours; then come the other seeds at the best, and with `--costs`, on
a quiet machine, short runs for memory and time.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from reports import common
from reports.arena import search
from reports.arena.arms import ARMS
from reports.arena.running import Job, asked, run
from reports.arena.sizes import QUICK, SIZES, Size, Task, prepare
from reports.arena.summary import predicted, summarise
from reports.arena.write_up import write_up

HERE = Path(__file__).parent


def main() -> None:
    """Run what is not done yet, then write the page."""
    args = common.arguments(
        str(__doc__),
        ("--size", {"choices": list(SIZES), "default": "small"}),
        ("--data", {"type": Path, "help": "folder of the questions, for smollm2"}),
        ("--work", {"type": Path, "help": "where models, data and finished runs are kept"}),
        ("--device", {"default": "cpu", "help": "cpu or cuda"}),
        ("--arms", {"type": lambda names: names.split(","), "help": "only these, in this order, with commas"}),
        ("--seeds", {"type": int, "default": 3}),
        ("--minutes", {"type": float, "help": "stop before a run that would end later"}),
        ("--costs", {"action": "store_true", "help": "memory and time at the end: keep the machine quiet"}),
        ("--write", {"action": "store_true", "help": "run nothing, write the page from what --work holds"}),
    )
    if args.quick:
        with tempfile.TemporaryDirectory() as temporary:
            work = Path(temporary)
            task = prepare(QUICK, work, None)
            print(json.dumps(run(Job("loss", "owlore", 2e-4), QUICK, task, work, args.device)), flush=True)
        return
    if args.work is None:
        sys.exit("the study needs a place: --work FOLDER")
    args.work.mkdir(parents=True, exist_ok=True)
    size = SIZES[args.size]
    task = prepare(size, args.work, args.data)
    if not args.write:
        arms = args.arms or list(ARMS)
        too_slow = args.device == "cpu" and not size.bfloat16
        if skipped := [arm for arm in arms if too_slow and ARMS[arm].bfloat16]:
            print(f"left out, bfloat16 takes too long on this processor: {', '.join(skipped)}", file=sys.stderr)
        go_on(size, task, [arm for arm in arms if arm not in skipped], args)
    keep(size, task, args.work)
    write_up(json.loads((HERE / "results.json").read_text()), HERE)


def keep(size: Size, task: Task, work: Path) -> None:
    """results.json: what a size has shown so far, beside the other sizes that are there already."""
    file = HERE / "results.json"
    points = json.loads(file.read_text())["points"] if file.exists() else {}
    runs = search.read(work / f"{size.name}.jsonl")
    done = [arm for arm in ARMS if search.best(runs, arm) is not None]
    found = summarise(runs, size, predicted(size, task, done, work))
    skipped = [arm.title for name, arm in ARMS.items() if name not in done]
    points[size.name] = {"title": size.title, "about": size.about, "size": asdict(size), "skipped": skipped} | found
    common.keep(HERE, {"points": {name: points[name] for name in SIZES if name in points}})


def go_on(size: Size, task: Task, arms: list[str], args: argparse.Namespace) -> None:
    """Run what is not done yet, a line each."""
    file = args.work / f"{size.name}.jsonl"
    began, longest = time.monotonic(), 0.0
    if not file.exists():
        before = {"kind": "base", "arm": "base", "lr": 0.0, "seed": 0, **asked(task.base, size, task, args.device)}
        file.write_text(json.dumps(before) + "\n")
    while job := next(search.todo(search.read(file), arms, size, args.seeds, args.costs), None):
        if args.minutes and time.monotonic() - began + longest > 60 * args.minutes:
            print(f"{args.minutes:g} minutes are over; start again to go on", file=sys.stderr)
            return
        found = run(job, size, task, args.work, args.device)
        longest = max(longest, found["seconds"])
        with file.open("a") as lines:
            lines.write(json.dumps(found) + "\n")
        loss = f"{search.validation(found):.4f}" if job.kind == "loss" else f"{found['peak_mib']:.0f} MiB"
        print(f"{time.strftime('%H:%M:%S')} {job.kind} {job.arm} lr {job.lr:g} seed {job.seed}: {loss}, "
              f"{found['seconds']:.0f} s", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
