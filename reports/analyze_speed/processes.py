"""One analysis in a process of its own, by either tool."""

from __future__ import annotations

import json
from typing import Any

from reports import common

OURS = """
import json, sys, time
start = time.perf_counter()
import htsr
options, tabled = json.loads(sys.argv[2]), sys.argv[3] == "table"
if not tabled:
    import htsr.spectra.known_nulls
    htsr.spectra.known_nulls.table = dict
imported = time.perf_counter()
analysis = htsr.analyze(sys.argv[1], device="cpu", **options)
done = time.perf_counter()
print(json.dumps({
    "import": imported - start, "load": 0.0, "analysis": done - imported, "rows": len(analysis),
    "processor": time.process_time(), "torch": "torch" in sys.modules, "alpha": [row.alpha for row in analysis],
}))
"""
THEIRS = """
import json, sys, time
start = time.perf_counter()
import logging, weightwatcher
logging.getLogger("weightwatcher").setLevel(logging.ERROR)
from transformers import AutoModel, AutoModelForCausalLM
imported = time.perf_counter()
kind = AutoModelForCausalLM if sys.argv[3] == "causal" else AutoModel
model = kind.from_pretrained(sys.argv[1])
loaded = time.perf_counter()
details = weightwatcher.WeightWatcher(model=model).analyze(plot=False, savefig=False, **json.loads(sys.argv[2]))
done = time.perf_counter()
print(json.dumps({
    "import": imported - start, "load": loaded - imported, "analysis": done - loaded, "rows": len(details),
    "processor": time.process_time(),
}))
"""


def ours(
    folder: str, options: dict[str, Any], *, table: bool = True, environment: dict[str, str] | None = None
) -> dict[str, Any]:
    """What one `htsr.analyze` took; without `table` the package's shape nulls are not used."""
    words = (folder, json.dumps(options), "table" if table else "no table")
    return _flat(common.in_process(OURS, *words, environment=environment))


def theirs(folder: str, options: dict[str, Any], model: str) -> dict[str, Any]:
    """What one analysis by WeightWatcher took."""
    return _flat(common.in_process(THEIRS, folder, json.dumps(options), model))


def medians(runs: list[dict[str, Any]]) -> dict[str, float]:
    """The median of each number; nothing of no runs."""
    names = [name for name in runs[0] if name != "alpha"] if runs else []
    return {name: common.median([run[name] for run in runs]) for name in names}


def _flat(measured: common.Measurement) -> dict[str, Any]:
    return {"process": measured.seconds, "peak_mib": measured.peak_mib, **measured.result}
