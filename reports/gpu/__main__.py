"""htsr on an accelerator: its tests, the analysis of a 7B model's shapes, what training takes, each beside its prediction.

    python -m reports.gpu                     all stages, at most eight minutes; --output FOLDER for the results
    python -m reports.gpu --stage analysis    one of tests, analysis, layerwise, methods, hosts, rounding; repeatable
    python -m reports.gpu --dry               the same code in miniature on the pretended device of the tests; also --quick
    python -m reports.gpu --predict           only the predictions of memory again, which need no device
    python -m reports.gpu --write-up          only the page again

Nothing is downloaded: weights are random and made on the device. Stages run in order of worth, each in a process of
its own that is ended when its time is over, and every row is kept in results.json as soon as it is there. What fails
is a row with what it said, and ends nothing else. Wanted beside htsr's own needs: pytest, for the first stage.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from reports import common

HERE = Path(__file__).parent
STAGES = {"tests": 90, "analysis": 90, "layerwise": 60, "methods": 90, "hosts": 40, "rounding": 60}  # seconds
GRACE = 5  # seconds for which a stage may go on with what it is doing
TOTAL = 470
NO_DEVICE = "there is no accelerator here; --dry runs the same code in miniature on a pretended one"


def main() -> None:
    """Run the stages and keep what they find."""
    parser = argparse.ArgumentParser(description=str(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", "--quick", action="store_true", help="in miniature; printed and not kept")
    parser.add_argument("--stage", choices=list(STAGES), action="append", help="only this one; may be repeated")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of results.json and README.md")
    parser.add_argument("--write-up", action="store_true", help="only write README.md anew")
    parser.add_argument("--predict", action="store_true", help="only compute the predictions anew")
    parser.add_argument("--rows-of", choices=list(STAGES), help=argparse.SUPPRESS)  # in the process of a stage
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)  # of time.monotonic
    args = parser.parse_args()
    if args.rows_of:
        from reports.gpu.card import find_device

        for row in rows_of(args.rows_of, find_device(), False, args.until):
            print(json.dumps(row), flush=True)
        return
    if args.dry:
        sys.exit(dry(args.stage or list(STAGES)))
    if args.predict:
        from reports.gpu.training import predictions

        keep(predictions(small=False), HERE / "predicted.json")
    args.output.mkdir(parents=True, exist_ok=True)
    file = args.output / "results.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    if not (args.write_up or args.predict):
        run(args.stage or list(STAGES), results, file)
    from reports.gpu.writing import write_up

    write_up(results, json.loads((HERE / "predicted.json").read_text()), args.output)


def run(stages: list[str], results: dict[str, Any], file: Path) -> None:
    """Run the stages one after the other, each in a process of its own; every row is kept at once."""
    from reports.gpu.card import find_device

    if find_device() is None:
        sys.exit(NO_DEVICE)
    ends = time.monotonic() + TOTAL
    results["machine"] = common.machine()
    for stage in stages:
        results[stage] = {"rows": []}
        started = time.monotonic()
        seconds = min(STAGES[stage], ends - started - GRACE)
        if seconds < 5:
            results[stage]["said"] = "there was no time left"
            continue
        for row in in_process(stage, seconds):
            if "device" in row:
                results[stage] |= row
                results["device"] = row["device"]
            else:
                results[stage]["rows"].append(row)
                print(json.dumps({"stage": stage, **row}), flush=True)
            keep(results, file)
        results[stage]["seconds"] = round(time.monotonic() - started, 1)
        keep(results, file)


def keep(results: dict[str, Any], file: Path) -> None:
    """Write the results, whole or not at all."""
    part = file.with_suffix(".part")
    part.write_text(json.dumps(results, indent=1) + "\n")
    part.replace(file)


def in_process(stage: str, seconds: float) -> Iterator[dict[str, Any]]:
    """The rows of a stage from a process that is ended when its time is over; one more if it fails."""
    command = [sys.executable, "-W", "ignore", "-m", "reports.gpu", "--rows-of", stage]
    command += ["--until", str(time.monotonic() + seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    errors: list[str] = []
    reader = threading.Thread(target=lambda: errors.extend(process.stderr), daemon=True)  # type: ignore[arg-type]
    timer = threading.Timer(seconds + GRACE, process.kill)
    reader.start()
    timer.start()
    try:
        for line in process.stdout:
            if line.startswith("{"):
                yield json.loads(line)
        code = process.wait()
    finally:
        timer.cancel()
        process.kill()
    reader.join(5)
    if code < 0:
        yield {"failed": f"ended after {seconds + GRACE:.0f} s" if code == -9 else f"ended by signal {-code}"}
    elif code:
        yield {"failed": "".join(errors)[-1500:]}


def rows_of(stage: str, device: Any, small: bool, until: float) -> Iterator[dict[str, Any]]:
    """What a stage finds, in this process; first the device."""
    from reports.gpu import card

    yield {"device": card.describe(device)}
    yield from work_of(stage)(card.Bench(device, small, until))


def work_of(stage: str) -> Callable[[Any], Iterator[dict[str, Any]]]:
    """The function of a stage."""
    from reports.gpu import analysis, device_tests, training

    home = {"tests": device_tests, "analysis": analysis}.get(stage, training)
    work: Callable[[Any], Iterator[dict[str, Any]]] = getattr(home, stage)
    return work


def dry(stages: list[str]) -> int:
    """All stages in miniature; 1 if a row says that something failed."""
    from reports.gpu.training import predictions

    failed = 0
    with pretended() as device:
        for stage in stages:
            started = time.monotonic()
            for row in rows_of(stage, device, True, started + STAGES[stage]):
                failed += "failed" in row
                print(json.dumps({"stage": stage, **row}), flush=True)
            print(f"{stage}: {time.monotonic() - started:.1f} s", flush=True)
    print(json.dumps(predictions(small=True)))
    return int(failed > 0)


@contextmanager
def pretended() -> Iterator[Any]:
    """The device that the tests pretend; the CPU where this torch cannot."""
    import torch

    from tests.device import pretended as device

    try:
        device.install()
    except (ImportError, AttributeError):
        yield torch.device("cpu")
        return
    with device.switched_on() as found:
        yield found


if __name__ == "__main__":
    main()
