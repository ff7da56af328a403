"""The tests of tests/device on the device: the same numbers as on the CPU, and no stray synchronisation."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Timer
from typing import Any

from reports.gpu.card import Bench

FOLDER = Path("tests/device")
ROOT = Path(__file__).parents[2]
_LINE = re.compile(r"^(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)")
_REASON = re.compile(r"^(?:FAILED|ERROR|SKIPPED) (.+)")


def tests(bench: Bench) -> Iterator[dict[str, Any]]:
    """One row per test that did not pass, with what it said, and one with the counts; in miniature those of one file are only collected."""
    if not (ROOT / FOLDER).is_dir():
        yield {"test": str(FOLDER), "outcome": "missing"}
        return
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(FOLDER / "test_execution.py" if bench.small else FOLDER),
        f"--confcutdir={FOLDER}",
        "-p",
        "no:cacheprovider",
        "-o",
        "addopts=",
    ]
    how = (
        ["--collect-only", "-q"]
        if bench.small
        else ["--device", bench.device.type, "-v", "--tb=line", "-rfEs", "-W", "ignore"]
    )
    process = subprocess.Popen([*command, *how], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    timer = Timer(max(1.0, bench.left() - 2), process.kill)
    timer.start()
    counts: dict[str, int] = {}
    last: list[str] = []
    assert process.stdout is not None
    for line in process.stdout:
        last = [*last[-15:], line.rstrip()]
        if found := _LINE.match(line):
            outcome = found[2].lower()
            counts[outcome] = counts.get(outcome, 0) + 1
            if outcome in ("failed", "error"):
                yield {"test": found[1].removeprefix(f"{FOLDER}/"), "outcome": outcome}
        elif found := _REASON.match(line):  # of the summary at the end
            yield {"said": found[1][:500]}
    code = process.wait()
    timer.cancel()
    row: dict[str, Any] = {"counts": counts, "exit_code": code, "cut_short": code < 0}
    if code not in (0, 1):
        row["last"] = last
    if bench.small and code:
        row["failed"] = " ".join(last)
    yield row
