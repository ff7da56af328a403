"""The parts of the study that analyze whole models: each gives its numbers, which are kept, and says them."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from htsr.spectra.metrics import Options
from reports import common
from reports.analyze_speed.checkpoint import make_llama
from reports.analyze_speed.processes import medians, ours, theirs

ERG = {"permuted": True, "bulk": True}
FULL = ERG | {"alternatives": True}
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Setting:
    """Where models are made, and whether this is the short pass."""

    work: Path
    quick: bool = False

    @property
    def runs(self) -> int:
        """How often each arm is measured."""
        return 1 if self.quick else 3

    @property
    def models(self) -> tuple[str, ...]:
        """What parts about both models are run on."""
        return ("causal",) if self.quick else ("causal", "encoder")

    def folder(self, model: str) -> str:
        """Folder of the model called ``encoder`` or ``causal``; in the short pass of a tiny one instead."""
        if self.quick:
            return str(make_llama(self.work / "tiny", blocks=2, width=128, inner=320, kv=64, vocabulary=512))
        return str(common.minilm() if model == "encoder" else common.smollm2(self.work))


def causal(setting: Setting) -> list[dict[str, Any]]:
    """Default metrics of the causal LM beside WeightWatcher's."""
    return beside(setting, "causal", {"default metrics": {}}, {})


def encoder(setting: Setting) -> list[dict[str, Any]]:
    """Default metrics of the encoder beside WeightWatcher's."""
    return beside(setting, "encoder", {"default metrics": {}}, {})


def erg(setting: Setting) -> list[dict[str, Any]]:
    """All that WeightWatcher has beside its default, against the same of htsr and against `--full`, which has more."""
    arms = {"ERG + permuted + MP": ERG, "`--full`": FULL}
    return beside(setting, "encoder", arms, {"ERG": True, "randomize": True, "mp_fit": True})


def beside(
    setting: Setting, model: str, arms: dict[str, dict[str, Any]], their_options: dict[str, Any]
) -> list[dict[str, Any]]:
    """WeightWatcher and each of htsr's arms in turn, medians; the short pass has WeightWatcher beside the first only."""
    folder = setting.folder(model)
    taken: dict[str, list[dict[str, Any]]] = {name: [] for name in arms}
    other: list[dict[str, Any]] = []
    for _ in range(setting.runs):
        for name, options in arms.items():
            taken[name].append(ours(folder, options))
        if not setting.quick or model == "causal":
            other.append(theirs(folder, their_options, model))
    rows = []
    for name, runs in taken.items():
        rows.append({"name": name, "model": model, "htsr": medians(runs), "weightwatcher": medians(other)})
        for key in ("analysis", "process", "peak_mib") if other else ():
            b, a = (rows[-1][tool][key] for tool in ("weightwatcher", "htsr"))
            _say(f"{name} ({model}), {key}", {"WeightWatcher": b, "htsr": a, "ratio": b / a})
    return rows


def null(setting: Setting) -> list[dict[str, Any]]:
    """What the shape null adds: drawn, from the file of an earlier run, from the table of the package."""
    rows = []
    for model in setting.models:
        folder = setting.folder(model)
        taken: dict[str, list[dict[str, Any]]] = {"none": [], "drawn": [], "file": [], "table": []}
        for _ in range(setting.runs):
            with tempfile.TemporaryDirectory() as cache:
                taken["none"].append(ours(folder, {"null": False}))
                for name in ("drawn", "file"):  # the second finds what the first has kept
                    taken[name].append(ours(folder, {}, table=False, environment={"HTSR_CACHE": cache}))
                taken["table"].append(ours(folder, {}))
        rows.append({"model": model, **{name: medians(runs) for name, runs in taken.items()}})
        _say(f"shape null ({model})", {name: medians(runs)["analysis"] for name, runs in taken.items()})
    return rows


def precision(setting: Setting) -> list[dict[str, Any]]:
    """float32 against float64 on one thread, and the largest relative difference that it makes to an α."""
    rows = []
    for model in setting.models:
        taken: dict[str, list[dict[str, Any]]] = {"float64": [], "float32": []}
        for _ in range(setting.runs):
            for name in taken:
                options = {"dtype": name, "null": False}
                taken[name].append(ours(setting.folder(model), options, environment=ONE_THREAD))
        pairs = zip(taken["float64"][0]["alpha"], taken["float32"][0]["alpha"], strict=True)
        off = max(abs(b / a - 1) for a, b in pairs if a and b)
        rows.append({"model": model, "off": off, **{name: medians(runs) for name, runs in taken.items()}})
        _say(f"precision ({model})", {name: medians(runs)["analysis"] for name, runs in taken.items()} | {"off": off})
    return rows


def resampling(setting: Setting) -> list[dict[str, Any]]:
    """What bootstrap and goodness of fit add on the encoder, on one thread: processor seconds of the whole process."""
    count = 10 if setting.quick else 100
    arms = {"default metrics": {}, f"bootstrap {count}": {"bootstrap": count}}
    if "gof" in {field.name for field in fields(Options)}:
        arms[f"goodness of fit {count}"] = {"gof": count}
    rows = []
    for name, options in arms.items():
        runs = [ours(setting.folder("encoder"), options, environment=ONE_THREAD) for _ in range(setting.runs)]
        rows.append({"name": name, **medians(runs)})
    _say("resampling", {row["name"]: row["processor"] for row in rows})
    return rows


def _say(what: str, numbers: dict[str, float]) -> None:
    print(f"{what}: " + ", ".join(f"{name} {value:.3g}" for name, value in numbers.items()), flush=True)
