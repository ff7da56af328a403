"""The parts of the study that take the analysis apart, or look at how its cost grows."""

from __future__ import annotations

import json
from typing import Any

from reports import common
from reports.analyze_speed.checkpoint import make_llama
from reports.analyze_speed.parts import ONE_THREAD, Setting
from reports.analyze_speed.processes import medians, ours, theirs

# the function that does each stage; none of them calls another
STAGES = {
    "reading": "opened",
    "Gram matrices": "gram",
    "eigenvalues": "symmetric_eigenvalues",
    "permutation": "permute_entries",
    "power-law fits": "fit_power_law",
    "MP bulk": "fit_bulk",
}
STAGES_CODE = """
import cProfile, json, pstats, sys, time
import scipy.linalg, htsr.spectra.lanczos
from threadpoolctl import threadpool_limits
from htsr.analysis.execution import unmeasured_row
from htsr.matrices.sources import open_model
from htsr.spectra.measure import measure
from htsr.spectra.metrics import Options
stages = json.loads(sys.argv[2])
options = Options(permuted=True, bulk=True)
profile = cProfile.Profile(time.process_time)
with threadpool_limits(1):
    matrices = open_model(sys.argv[1])
    profile.enable()
    for matrix in matrices:
        measure(matrix.opened, unmeasured_row(matrix), options)
    profile.disable()
stats = pstats.Stats(profile)
total = {name: 0.0 for name in stages.values()}
for (file, line, name), (_, _, _, seconds, _) in stats.stats.items():
    if name in total and "htsr" in file:
        total[name] += seconds
assert all(total.values()), total
spent = {label: total[name] for label, name in stages.items()}
print(json.dumps({**spent, "the rest": stats.total_tt - sum(spent.values()), "total": stats.total_tt}))
"""


def stages(setting: Setting) -> dict[str, dict[str, float]]:
    """Processor seconds of each stage of the analysis, one thread, everything but alternatives computed."""
    result = {}
    for model in setting.models:
        words = (setting.folder(model), json.dumps(STAGES))
        result[model] = common.in_process(STAGES_CODE, *words, environment=ONE_THREAD).result
        print(f"stages ({model}): {result[model]}", flush=True)
    return result


def billion(setting: Setting) -> dict[str, Any]:
    """Speed and peak memory on a LLaMA-shaped checkpoint of 1.1 billion float32 weights with heavy-tailed spectra."""
    size = {"blocks": 22, "width": 2048, "inner": 5632, "kv": 256, "vocabulary": 32000}
    folder = setting.folder("causal") if setting.quick else str(make_llama(setting.work / "one_billion", **size))
    result: dict[str, Any] = {"weightwatcher": {} if setting.quick else theirs(folder, {}, "causal")}
    for name, dtype in (("htsr", "float64"), ("float32", "float32")):
        result[name] = medians([ours(folder, {"dtype": dtype})])
        print(f"1.1 B: {dtype} {result[name]['process']:.1f} s, peak {result[name]['peak_mib']:.0f} MiB", flush=True)
    imports = "import htsr.analysis.analyze, scipy.linalg" + (", torch" if result["htsr"]["torch"] else "")
    result["imports_mib"] = common.in_process(imports).peak_mib
    return result


GROWTH_CODE = """
import json, sys, time
import numpy as np
import torch
from htsr.spectra.eigenvalues import gram
from htsr.spectra.esd import esd
from htsr.spectra.lanczos import lanczos_esd
from htsr.spectra.tail import fit_power_law
n = int(sys.argv[1])
random = np.random.default_rng(0)
W = random.standard_normal((n, n), dtype=np.float32) * ((1 - random.random(n, dtype=np.float32)) ** -0.35)
def clock(f, *a, **k):
    best = float("inf")
    for _ in range(3 if n <= 2048 else 1):
        start = time.perf_counter(); value = f(*a, **k); best = min(best, time.perf_counter() - start)
    return best, value
out = {"n": n}
out["gram_float64"], G = clock(gram, W)
del G
out["float64"], exact = clock(esd, W, route="gram", dtype="float64")
out["float32"], _ = clock(esd, W, route="gram", dtype="float32")
out["lanczos"], rough = clock(lanczos_esd, W)
out["fit"], fit = clock(fit_power_law, exact.eigenvalues)
out["lanczos_error"] = rough.error
hill = [fit_power_law(e.eigenvalues, "hill").alpha for e in (exact, rough)]
out["lanczos_alpha_error"] = abs(hill[1] - hill[0])
if n <= 2048:
    out["svd"], _ = clock(esd, W, route="svd")
print(json.dumps(out))
"""


def growth(setting: Setting) -> list[dict[str, float]]:
    """Seconds for one n × n matrix by route, all threads, against the flops of the eigenvalue problem."""
    rows = []
    for n in (256,) if setting.quick else (512, 1024, 2048, 4096, 8192):
        rows.append(common.in_process(GROWTH_CODE, str(n)).result)
        print(rows[-1], flush=True)
    return rows
