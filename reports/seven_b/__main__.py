"""Analyze a 7B-shaped sharded checkpoint, watching memory; kill and resume it; let two processes share it.

    python -m reports.seven_b              LLaMA-2-7B's shapes in bfloat16 (13.5 GB on disk, about half an hour on two cores)
    python -m reports.seven_b --quick      the same steps at a tenth of the width, about half a minute

The weights are synthetic: Gaussian entries with heavy-tailed column scales. The checkpoint is made for the run and
removed after it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from htsr.analysis.execution import workers
from reports import common

HERE = Path(__file__).parent
SHAPES = {"blocks": 32, "width": 4096, "inner": 11008, "vocabulary": 32000}
QUICK = {"blocks": 8, "width": 384, "inner": 1032, "vocabulary": 2000}


def main() -> None:
    """Run the study."""
    args = common.arguments(str(__doc__), ("--work", {"type": Path, "help": "where the checkpoint is made"}))
    with tempfile.TemporaryDirectory(dir=args.work) as temporary:
        results = study(Path(temporary), **(QUICK if args.quick else SHAPES))
    print(json.dumps(results, indent=1))
    if not args.quick:
        common.keep(HERE, results)
        write_up(json.loads((HERE / "results.json").read_text()))


def study(work: Path, **shapes: int) -> dict[str, Any]:
    """All steps; raises if a row differs."""
    folder = work / "model"
    parameters = make(folder, **shapes)
    environment = os.environ | {"HTSR_CACHE": str(work / "cache")}
    command = [sys.executable, "-m", "htsr.analysis", str(folder), "--device", "cpu", "-v", "-o"]

    started = time.perf_counter()
    total = 7 * shapes["blocks"] + 2
    first = watch([*command, str(work / "never.json")], environment, stop_at=(work / "cache", total // 3))
    second = watch([*command, str(work / "one.json"), "--resume"], environment)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", *command[1:]]
    shared = ["--block", f"0-{shapes['blocks'] // 4 - 1}"]
    two = watch([*launch, str(work / "two.json"), *shared], environment | {"OMP_NUM_THREADS": "1"})

    one_rows, two_rows = (json.loads((work / f"{name}.json").read_text())["rows"] for name in ("one", "two"))
    names = {row["name"] for row in two_rows}
    worst = compare([row for row in one_rows if row["name"] in names], two_rows)
    imports = common.in_process(
        "import torch, numpy, scipy.linalg, safetensors.torch, htsr.analysis.analyze, htsr_cli.run"
    )
    return {
        "parameters": parameters,
        "matrices": len(one_rows),
        "matrices_of_two": len(two_rows),
        "threads": workers(),
        "bytes_on_disk": sum(f.stat().st_size for f in folder.glob("*.safetensors")),
        "imports_mib": imports.peak_mib,
        "killed": first,
        "resumed": second,
        "two_processes": two,
        "largest_relative_difference": worst,
        "minutes": (time.perf_counter() - started) / 60,
    }


def compare(one: list[dict[str, Any]], two: list[dict[str, Any]]) -> float:
    """Largest relative difference of any number between two lists of rows, which must be of the same matrices in order."""
    worst = 0.0
    for a, b in zip(one, two, strict=True):
        for field in a.keys() - {"seconds"}:
            x, y = a[field], b[field]
            if isinstance(x, float) and isinstance(y, float) and x != y:
                worst = max(worst, abs(x - y) / max(abs(x), abs(y)))
            elif x != y and not (isinstance(x, (int, float)) and isinstance(y, (int, float))):
                raise AssertionError(f"{a['name']}: {field} is {x} in one process and {y} in two")
            elif x != y:
                worst = max(worst, abs(x - y) / max(abs(x), abs(y)))
    return worst


def watch(command: list[str], environment: dict[str, str], stop_at: tuple[Path, int] | None = None) -> dict[str, Any]:
    """Run a command, taking its largest resident memory (the largest of its processes), until it ends or is stopped.

    `stop_at`: kill it when the journal in this folder holds so many rows.
    """
    started = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    peak: dict[str, float] = {"resident": 0.0, "anonymous": 0.0}
    killed = False
    while process.poll() is None:
        for pid in family(process.pid):
            for key, value in memory(pid).items():
                peak[key] = max(peak[key], value)
        if stop_at and not killed and journal_rows(stop_at[0]) >= stop_at[1]:
            process.kill()
            killed = True
        time.sleep(0.2)
    words = process.stderr.read() if process.stderr else ""
    expected = -signal.SIGKILL if stop_at else 0
    if process.returncode != expected:
        raise RuntimeError(f"exit code {process.returncode}:\n{words[-2000:]}")
    said = [line for line in words.splitlines() if "kept" in line or "taken up" in line]
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "peak_mib": peak["resident"], "peak_anonymous_mib": peak["anonymous"], "said": said}


def family(pid: int) -> list[int]:
    """A process and its children."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    try:
        found = [int(child) for child in children.read_text().split()]
    except OSError:
        found = []
    return [pid, *(grandchild for child in found for grandchild in family(child))]


def memory(pid: int) -> dict[str, float]:
    """Resident and anonymous memory of a process in MiB."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    fields = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith(("VmRSS", "RssAnon"))}
    return {"resident": int(fields.get("VmRSS", 0)) / 1024, "anonymous": int(fields.get("RssAnon", 0)) / 1024}


def journal_rows(folder: Path) -> int:
    """Rows that the journal holds."""
    return (
        sum(max(0, len(file.read_bytes().splitlines()) - 1) for file in folder.glob("*.jsonl"))
        if folder.is_dir()
        else 0
    )


def make(folder: Path, *, blocks: int, width: int, inner: int, vocabulary: int) -> int:
    """A bfloat16 LLaMA checkpoint in shards of a few blocks; returns its number of parameters."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    folder.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    count = 0

    def heavy(rows: int, columns: int) -> torch.Tensor:
        scale = (1 - torch.rand(columns)) ** -0.35
        return (torch.randn(rows, columns) * scale * 0.02).bfloat16()

    def save(file: str, tensors: dict[str, torch.Tensor]) -> None:
        nonlocal count
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
        count += sum(t.numel() for t in tensors.values())

    ends = {"model.embed_tokens.weight": heavy(vocabulary, width), "lm_head.weight": heavy(vocabulary, width)}
    save("model-ends.safetensors", ends)
    for first in range(0, blocks, 8):
        shard = {}
        for i in range(first, min(first + 8, blocks)):
            for part in "qkvo":
                shard[f"model.layers.{i}.self_attn.{part}_proj.weight"] = heavy(width, width)
            shard[f"model.layers.{i}.mlp.gate_proj.weight"] = heavy(inner, width)
            shard[f"model.layers.{i}.mlp.up_proj.weight"] = heavy(inner, width)
            shard[f"model.layers.{i}.mlp.down_proj.weight"] = heavy(width, inner)
            shard[f"model.layers.{i}.input_layernorm.weight"] = torch.ones(width, dtype=torch.bfloat16)
        save(f"model-{first:02}.safetensors", shard)
    index = {"metadata": {"total_size": 2 * count}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": width}))
    return count


def write_up(results: dict[str, Any]) -> None:
    """README.md from results.json."""
    steps = [
        ["one process, killed", results["killed"]],
        ["one process, resumed", results["resumed"]],
        ["two processes", results["two_processes"]],
    ]
    rows = [
        [
            name,
            step["seconds"] / 60,
            round(step["peak_mib"]),
            round(step["peak_mib"] - results["imports_mib"]),
            "; ".join(step["said"]),
        ]
        for name, step in steps
    ]
    beyond = max(row[3] for row in rows)
    (HERE / "README.md").write_text(f"""# A 7B checkpoint in little memory

`python -m reports.seven_b` makes this page. {common.facts(results["machine"])}

LLaMA-2-7B's shapes in bfloat16: {results["parameters"] / 1e9:.2f} billion synthetic weights, {results["matrices"]} matrices,
{results["bytes_on_disk"] / 1e9:.1f} GB in five shards. `htsr analyze` with its defaults (float64). Resident memory is that of
the largest process, mapped files included, sampled five times a second; {results["imports_mib"]:.0f} MiB of it are imports.
At most **{beyond} MiB** came on top.

{common.table(["run", "minutes", "peak MiB", "beyond imports", "it said"], rows)}
Two processes shared the first quarter of the blocks, {results["matrices_of_two"]} matrices: the same as from the killed and resumed run,
in the same order, and the largest relative difference of any number in them is {results["largest_relative_difference"]:.1g}. Each of
the two had one BLAS thread, the single process {results["threads"]}. The machine had other work meanwhile, so the minutes are an
upper bound.
""")


if __name__ == "__main__":
    main()
