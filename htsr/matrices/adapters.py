"""LoRA adapters in PEFT's folder format: ΔW = scaling · B·A, alone or added to their base.

scaling is lora_alpha/r, or lora_alpha/√r with `use_rslora`; `rank_pattern` and `alpha_pattern` override r and
lora_alpha by module. Source: LoRA (arXiv 2106.09685), rsLoRA (arXiv 2312.03732), DoRA (arXiv 2402.09353).
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from htsr.errors import SourceError
from htsr.matrices.entries import Entry
from htsr.matrices.files import file_entries, read_json
from htsr.spectra.esd import Array, as_numpy

_PREFIX = "base_model.model."


def is_adapter(folder: Path) -> bool:
    """Whether `folder` is a PEFT adapter."""
    return (folder / "adapter_config.json").is_file()


def base_of(folder: Path) -> str | None:
    """The base model that an adapter names."""
    return read_json(folder / "adapter_config.json").get("base_model_name_or_path")


def adapter_entries(folder: Path) -> list[Entry]:
    """One entry for the ΔW of each adapted module, and those of `modules_to_save`, under the base's names.

    Raises:
        SourceError: no adapter weights, or another method than LoRA.
    """
    config = read_json(folder / "adapter_config.json")
    if (method := config.get("peft_type", "LORA")) != "LORA":
        raise SourceError(f"{folder} is a {method} adapter; htsr reads LoRA adapters (and DoRA on their base)")
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        if (folder / name).is_file():
            stored = {e.name.removeprefix(_PREFIX): e for e in file_entries(folder / name)}
            break
    else:
        raise SourceError(f"{folder} has no adapter_model.safetensors")

    entries = []
    for name, entry in stored.items():
        if match := re.fullmatch(r"(.+)\.lora_(A|embedding_A)(\.weight)?", name):
            module = match[1]
            B = stored.get(name.replace("lora_A", "lora_B").replace("lora_embedding_A", "lora_embedding_B"))
            if B is None:
                raise SourceError(f"{folder}: {name} has no B beside it")
            magnitude = stored.get(f"{module}.lora_magnitude_vector") or stored.get(
                f"{module}.lora_magnitude_vector.weight"
            )
            entries.append(_delta(module, entry, B, magnitude, config, embedding=match[2] != "A"))
        elif "lora_" not in name:
            name = name.replace(".modules_to_save.weight", ".weight").replace(".base_layer.", ".")
            entries.append(replace(entry, name=name))
    return entries


def merged_with_base(adapter: list[Entry], base: list[Entry]) -> list[Entry]:
    """The base's entries, those that the adapter touches replaced by W + ΔW (or by what `modules_to_save` holds).

    Raises:
        SourceError: an adapted module that the base has not, or of another shape.
    """
    by_name = {entry.name: entry for entry in base}
    for entry in adapter:
        matches = [name for name in by_name if name == entry.name or name.endswith("." + entry.name)]
        matches = matches or [name for name in by_name if entry.name.endswith("." + name)]
        if len(matches) != 1:
            raise SourceError(f"the adapter's {entry.name} matches {len(matches)} tensors of the base model, not one")
        target = by_name[matches[0]]
        if entry.kind != "adapter":
            by_name[target.name] = replace(entry, name=target.name)
            continue
        if target.shape != entry.shape:
            raise SourceError(f"{target.name} is {target.shape} in the base model and {entry.shape} in the adapter")
        by_name[target.name] = _sum(target, entry)
    return list(by_name.values())


def _delta(
    module: str, A: Entry, B: Entry, magnitude: Entry | None, config: dict[str, Any], *, embedding: bool
) -> Entry:
    rank = A.shape[0]
    alpha = _pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", rank))
    scaling = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    transpose = embedding or bool(config.get("fan_in_fan_out"))
    shape = (B.shape[0], A.shape[1])

    def read(index: int | None = None) -> Array:
        a, b = (as_numpy(x.read()).astype("float32") for x in (A, B))
        product = scaling * (b.reshape(b.shape[0], rank) @ a.reshape(rank, -1))
        product = product.T if transpose else product.reshape(*b.shape[:1], *a.shape[1:])
        return product if index is None else product[index]

    full = shape[::-1] if transpose else (*shape, *A.shape[2:])
    problem = None
    if magnitude is not None:
        problem = (
            "needs_base",
            f"{module} is a DoRA module, whose ΔW depends on its base: analyze it with base=…",
        )
    return Entry(
        f"{module}.weight", full, A.dtype, _WithMagnitude(read, magnitude), kind="adapter", problem=problem,
        warning=f"ΔW of rank {rank}",
    )  # fmt: skip


class _WithMagnitude:
    """Reads ΔW; carries the DoRA magnitude for the sum with the base."""

    def __init__(self, read: Any, magnitude: Entry | None) -> None:
        self.read, self.magnitude = read, magnitude

    def __call__(self, index: int | None = None) -> Array:
        return self.read(index)  # type: ignore[no-any-return]


def _sum(base: Entry, delta: Entry) -> Entry:
    magnitude = getattr(delta.read, "magnitude", None)

    def read(index: int | None = None) -> Array:
        total = as_numpy(base.read()).astype("float32") + as_numpy(delta.read())
        if magnitude is not None:
            m = as_numpy(magnitude.read()).reshape(-1, *[1] * (total.ndim - 1))
            total *= m / (total.reshape(total.shape[0], -1) ** 2).sum(axis=1).reshape(m.shape) ** 0.5
        return total if index is None else total[index]

    return replace(base, read=read, storage=None)


def _pattern(patterns: dict[str, Any] | None, module: str, default: Any) -> float:
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return float(value)
    return float(default)
