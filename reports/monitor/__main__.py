"""What a SpectralMonitor takes of the time of a training, and how old its numbers are for it.

    python -m reports.monitor            the whole study, about two minutes on one core
    python -m reports.monitor --quick    two blocks, 12 steps

A LLaMA of random weights trains on random tokens under the Trainer, once without and once with each share, each in a
process of its own, with one thread. Times are processor time of the process, which other work on the machine changes
little. "Taken" is the time within the monitor's own calls, its look at the weights at the start included, over the time
of the rest of the training: the ratio of two whole runs scatters by more than one percent.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from reports import common

HERE = Path(__file__).parent
EVERY = 10
SHARES = ("0.01", "0.05", "inf")
SIZES = ("576x576", "576x1536", "2048x2048")
THREAD = {"OMP_NUM_THREADS": "1"}

RUN = """
import json, sys, tempfile, time
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
import htsr
share, quick, every = sys.argv[1], sys.argv[2] == "True", int(sys.argv[3])
width, blocks, steps, tokens = (64, 2, 12, 32) if quick else (256, 4, 100, 64)
torch.set_num_threads(1)
torch.manual_seed(0)
config = LlamaConfig(hidden_size=width, intermediate_size=3 * width, num_hidden_layers=blocks, vocab_size=2000,
                     num_attention_heads=max(1, width // 64), max_position_embeddings=tokens)
model = LlamaForCausalLM(config)
rows = [{"input_ids": row, "labels": row} for row in torch.randint(0, 2000, (64, tokens))]
within = [0.0]
class Timed(htsr.SpectralMonitor):
    def timed(self, call, *args, **kwargs):
        start = time.process_time()
        call(*args, **kwargs)
        within[0] += time.process_time() - start
    def on_train_begin(self, *args, **kwargs):
        self.timed(super().on_train_begin, *args, **kwargs)
    def on_step_end(self, *args, **kwargs):
        self.timed(super().on_step_end, *args, **kwargs)
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(folder, max_steps=steps, per_device_train_batch_size=4, report_to="none", use_cpu=True,
                                  disable_tqdm=True, logging_steps=10**6, save_strategy="no", learning_rate=1e-3)
    callbacks = [] if share == "none" else [Timed(every=every, share=float(share))]
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=callbacks)
    start = time.process_time()
    trainer.train()
    out = {"seconds": time.process_time() - start, "within": within[0], "steps": steps}
    logged = [entry for entry in trainer.state.log_history if "spectrum/measured" in entry]
    out["matrices"] = len(htsr.describe(model, where=htsr.Filter(min_size=50)).matrices)
    out["parameters"] = sum(p.numel() for p in model.parameters())
    if callbacks:
        file = open(f"{folder}/trajectory.jsonl")
        points = [json.loads(line) for line in file.readlines()[1:]]
        latest = {point["name"]: point["step"] for point in points}
        ages = [steps - step for step in latest.values()]
        out |= {"points": len(points), "known": len(latest), "age": sum(ages) / len(ages) if ages else None}
print(json.dumps(out))
"""

MATRIX = """
import json, sys, time
import torch
import htsr
from htsr.spectra.sketch import sketch
torch.set_num_threads(1)
out = {}
for size in sys.argv[1:]:
    m, n = map(int, size.split("x"))
    W = torch.randn(m, n)
    def clock(work):
        start = time.process_time(); work(); return time.process_time() - start
    times = 1 if m > 1000 else 3
    out[size] = {"sketch": min(clock(lambda: sketch(W, 0)) for _ in range(times)),
                 "row": min(clock(lambda: htsr.analyze({"w.weight": W}, bulk=True)) for _ in range(times))}
print(json.dumps(out))
"""


def main() -> None:
    """Measure, keep, write up."""
    args = common.arguments(__doc__ or "", ("--write-up", {"action": "store_true", "help": "only rewrite the page"}))
    if not args.write_up:
        results: dict[str, Any] = {"runs": {}}
        for share in ("inf",) if args.quick else ("none", *SHARES):
            words = [share, str(args.quick), str(EVERY)]
            results["runs"][share] = common.in_process(RUN, *words, environment=THREAD).result
            print(json.dumps({share: results["runs"][share]}), flush=True)
        if args.quick:
            return
        results["matrix"] = common.in_process(MATRIX, *SIZES, environment=THREAD).result
        common.keep(HERE, results)
    write_up(json.loads((HERE / "results.json").read_text()))


def taken(run: dict[str, Any]) -> float:
    """The monitor's time over that of the rest of the training."""
    return float(run["within"] / (run["seconds"] - run["within"]))


def write_up(results: dict[str, Any]) -> None:
    """README.md from results.json."""
    runs = results["runs"]
    plain = runs["none"]
    rows = [
        [
            "everything" if share == "inf" else f"{float(share):.0%}",
            f"**{taken(run):.2%}**",
            run["points"],
            f"{run['known']} of {run['matrices']}",
            "" if run["age"] is None else f"{run['age']:.0f}",
            f"{run['seconds'] / plain['seconds']:.2f}",
        ]
        for share, run in ((share, runs[share]) for share in SHARES)
    ]
    sizes = [[size.replace("x", " × "), one["sketch"], one["row"]] for size, one in results["matrix"].items()]
    text = f"""# What a monitor takes of the time of a training

`python -m reports.monitor` makes this page. {common.facts(results["machine"])}

**The share is kept: of 1 % the monitor took {taken(runs["0.01"]):.1%}, of 5 % {taken(runs["0.05"]):.1%}.** A LLaMA with {plain["parameters"] / 1e6:.0f} M parameters and
{plain["matrices"]} matrices trains for {plain["steps"]} steps ({plain["seconds"]:.0f} s) under the Trainer, with an event every {EVERY} steps. Processor
time of one thread, on a CPU alone: no accelerator was at hand.

{common.table(["share", "taken", "measurements", "matrices with a number", "mean age at the end, steps", "whole run, ratio"], rows)}
"Taken" is the time within the monitor's own calls over the time of the rest: with the sketches at the start, and with the logs
and the file, which the share leaves out. The monitor keeps its share by the clock on the wall; other work shared the machine.
One percent of so short a training measures next to nothing, and the monitor says so at the end; of an hour it is 36 s. The
ratio of whole runs has the noise of the machine in it.

What one matrix takes, in seconds: its sketch, at the start and each time that it is measured, and its row of numbers.

{common.table(["matrix", "sketch", "numbers"], sizes)}"""
    (HERE / "README.md").write_text(text)


if __name__ == "__main__":
    sys.exit(main())
