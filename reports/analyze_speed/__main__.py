"""Speed and memory of `htsr analyze` beside WeightWatcher 0.7.7, and how the cost grows with the matrix.

    python -m reports.analyze_speed                 the whole study, about twelve minutes on two cores
    python -m reports.analyze_speed --only null     one part; the others stay as they were (repeatable)
    python -m reports.analyze_speed --missing       the parts that are not there yet: after an interruption
    python -m reports.analyze_speed --quick         a short pass over every part on a tiny model

Every figure of a pair is taken in the same run, the two tools alternating, each in a process of its own that reads the
same weights from disk. "Whole process" is wall clock from the start of Python to its end: imports, reading, analysis.
"Analysis" is the call alone. Each part is kept in results.json as it ends, and the page is written from what is there.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from reports import common
from reports.analyze_speed import parts, scaling
from reports.analyze_speed.page import write_up

HERE = Path(__file__).parent
PARTS: dict[str, Callable[[parts.Setting], Any]] = {
    "causal": parts.causal,
    "encoder": parts.encoder,
    "erg": parts.erg,
    "null": parts.null,
    "precision": parts.precision,
    "resampling": parts.resampling,
    "stages": scaling.stages,
    "billion": scaling.billion,
    "growth": scaling.growth,
}


def main() -> None:
    """Run the study, or some of it."""
    args = common.arguments(
        str(__doc__),
        ("--work", {"type": Path, "help": "folder for models made on the way"}),
        ("--only", {"choices": PARTS, "action": "append", "help": "one part"}),
        ("--missing", {"action": "store_true", "help": "the parts that results.json lacks"}),
    )
    results = _kept()
    chosen = args.only or [name for name in PARTS if not (args.missing and name in results)]
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        for name in chosen:
            found = PARTS[name](parts.Setting(work, args.quick))
            if not args.quick:
                results[name] = {"machine": common.machine(), "found": found}
                (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    if not args.quick:
        write_up(results, HERE)


def _kept() -> dict[str, Any]:
    file = HERE / "results.json"
    content = json.loads(file.read_text()) if file.exists() else {}
    return {name: content[name] for name in PARTS if name in content}


if __name__ == "__main__":
    sys.exit(main())
