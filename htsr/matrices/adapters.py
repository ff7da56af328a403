"""LoRA adapters in PEFT's folder format: ΔW = scaling · B·A, alone or added to their base.

scaling is lora_alpha/r, or lora_alpha/√r with `use_rslora`; `rank_pattern` and `alpha_pattern` override r and
lora_alpha by module. Source: LoRA (arXiv 2106.09685), rsLoRA (arXiv 2312.03732), DoRA (arXiv 2402.09353).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from htsr.errors import SourceError
from htsr.matrices.entries import Entry
from htsr.matrices.files import file_entries
from htsr.matrices.folders import read_json
from htsr.spectra.esd import Array, as_numpy
from htsr.spectra.product import Numbers, Product

_PREFIX = "base_model.model."


def is_adapter(folder: Path) -> bool:
    """Whether `folder` is a PEFT adapter."""
    return (folder / "adapter_config.json").is_file()


def base_of(folder: Path) -> str | None:
    """The base model that the adapter in `folder` names; None where it names none.

    Raises:
        SourceError: its configuration cannot be read.
    """
    return read_json(folder / "adapter_config.json").get("base_model_name_or_path")


def adapter_entries(folder: Path) -> list[Entry]:
    """One entry for the ΔW of each adapted module, and those of `modules_to_save`, under the base's names.

    Args:
        folder: of the adapter, as PEFT writes it.

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
        if match := re.fullmatch(r"(.+)\.lora_(embedding_)?A(\.weight)?", name):
            module, rank = match[1], entry.shape[0]
            B = stored.get(name.replace("lora_A", "lora_B").replace("lora_embedding_A", "lora_embedding_B"))
            if B is None:
                raise SourceError(f"{folder}: {name} has no B beside it")
            alpha = _pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", rank))
            scaling = alpha / (rank**0.5 if config.get("use_rslora") else rank)
            transposed = bool(match[2] or config.get("fan_in_fan_out"))
            vector = f"{module}.lora_magnitude_vector"
            magnitude = stored.get(vector) or stored.get(f"{vector}.weight")
            base = stored.get(f"{module}.base_layer.weight")  # PEFT saves adapted embeddings whole
            entries.append(_entry(module, _Delta(entry, B, scaling, transposed, magnitude, base), config))
        elif "lora_" not in name and not _under_adapter(name, stored):
            name = name.replace(".modules_to_save.weight", ".weight").replace(".base_layer.", ".")
            entries.append(replace(entry, name=name))
    return entries


def merged_with_base(adapter: list[Entry], base: list[Entry]) -> list[Entry]:
    """The base's entries, those that the adapter touches replaced by W + ΔW (or by what `modules_to_save` holds).

    Args:
        adapter: from `adapter_entries`.
        base: of the base model.

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
        if isinstance(entry.read, _Delta) and entry.read.base is not None:
            target = replace(entry.read.base, name=target.name, kind=target.kind)
        if not isinstance(entry.read, _Delta):
            by_name[target.name] = replace(entry, name=target.name)
            continue
        if target.shape != entry.shape:
            raise SourceError(f"{target.name} is {target.shape} in the base model and {entry.shape} in the adapter")
        by_name[target.name] = _sum(target, entry.read)
    return list(by_name.values())


def dora_factor(adapted: Any, magnitude: Any, transposed: bool) -> Any:
    """What DoRA multiplies W + ΔW with: magnitude / ‖W + ΔW‖, one per output.

    Args:
        adapted: W + ΔW, (out, in, …), or (in, out) where `transposed`; NumPy or torch.
        magnitude: of any shape with one entry per output.
        transposed: embeddings and GPT-2's Conv1D.

    Returns:
        In a shape that broadcasts against `adapted`.

    Source: DoRA (arXiv 2402.09353), eq. 5.
    """
    if transposed:
        return magnitude.reshape(1, -1) / (adapted**2).sum(0) ** 0.5
    norm = (adapted.reshape(adapted.shape[0], -1) ** 2).sum(1) ** 0.5
    return (magnitude.reshape(-1) / norm).reshape(-1, *[1] * (adapted.ndim - 1))


@dataclass(frozen=True)
class _Delta:
    """Reads ΔW = scaling · B·A."""

    A: Entry
    B: Entry
    scaling: float
    transposed: bool
    magnitude: Entry | None = None
    base: Entry | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        shape = (self.B.shape[0], *self.A.shape[1:])
        return shape[::-1] if self.transposed else shape

    def __call__(self, index: int | None = None) -> Array:
        a, b = self._read()
        product = self.scaling * (b @ a.reshape(a.shape[0], -1))
        product = product.T if self.transposed else product.reshape(self.shape)
        return product if index is None else product[index]

    def factors(self) -> Product:
        """ΔW as its factors; a kernel's as (positions, out, r) and (positions, r, in)."""
        a, b = self._read()
        if a.ndim > 2:
            a = np.moveaxis(a.reshape(*a.shape[:2], -1), 2, 0)
            b = np.broadcast_to(b, (len(a), *b.shape))
        return Product(a.T, self.scaling * b.T) if self.transposed else Product(self.scaling * b, a)

    def _read(self) -> tuple[Numbers, Numbers]:
        a, b = (as_numpy(x.read()).astype("float32") for x in (self.A, self.B))
        return a, b.reshape(b.shape[0], -1)


def _under_adapter(name: str, stored: dict[str, Entry]) -> bool:
    module, found, _ = name.partition(".base_layer.")
    return bool(found) and any(other.startswith(f"{module}.lora_") for other in stored)


def _entry(module: str, delta: _Delta, config: dict[str, Any]) -> Entry:
    problem = None
    if delta.magnitude is not None:
        why = f"{module} is a DoRA module, whose ΔW depends on its base: analyze it with base=…"
        problem = ("needs_base", why)
    if any(str(target).rpartition(".")[0] in module for target in config.get("target_parameters") or ()):
        why = f"{module} has adapted parameters, not layers, which can be read from the loaded PeftModel only"
        problem = ("unsupported", why)
    return Entry(
        f"{module}.weight",
        delta.shape,
        delta.A.dtype,
        delta,
        kind="adapter",
        problem=problem,
        warning=f"ΔW of rank {delta.A.shape[0]}",
    )


def _sum(base: Entry, delta: _Delta) -> Entry:
    def read(index: int | None = None) -> Array:
        total = as_numpy(base.read()).astype("float32") + as_numpy(delta())
        if delta.magnitude is not None:
            total *= dora_factor(total, as_numpy(delta.magnitude.read()), delta.transposed)
        return total if index is None else total[index]

    return replace(base, read=read, storage=None)


def _pattern(patterns: dict[str, Any] | None, module: str, default: Any) -> float:
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return float(value)
    return float(default)
