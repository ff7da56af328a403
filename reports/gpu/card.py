"""The device of this study: its clock, its memory, and weights that are made on it."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from reports import common


@dataclass(frozen=True)
class Bench:
    """What every stage is given.

    Attributes:
        device: device that is measured.
        small: whether everything is in miniature.
        ends: time of `time.monotonic` at which the stage should be over.
    """

    device: torch.device
    small: bool
    ends: float

    def left(self) -> float:
        """Seconds that are left to the stage."""
        return self.ends - time.monotonic()


def find_device() -> torch.device | None:
    """This machine's accelerator."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device(found.type, torch.accelerator.current_device_index()) if found is not None else None


def describe(device: torch.device) -> dict[str, Any]:
    """What the maker calls the device, its memory, and torch's CUDA."""
    if device.type != "cuda":
        return {"name": device.type}
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
    }


@dataclass(frozen=True)
class Clocked:
    """Seconds until the device had done the work, the most bytes it held meanwhile and before, and what came out."""

    seconds: float
    peak: int
    before: int
    out: Any


def clocked(work: Callable[[], Any], device: torch.device) -> Clocked:
    """Run `work` once, the allocator's cache empty before."""
    before = forget(device)
    start = time.perf_counter()
    out = work()
    common.wait_for(device)
    return Clocked(time.perf_counter() - start, peak(device), before, out)


def forget(device: torch.device) -> int:
    """Give cached memory back and count the peak from here; returns the bytes that are still held."""
    gc.collect()
    common.wait_for(device)
    if device.type == "cpu":
        return 0
    torch.accelerator.empty_cache()
    torch.accelerator.reset_peak_memory_stats(device)
    return torch.accelerator.memory_allocated(device)


def peak(device: torch.device) -> int:
    """The most bytes that tensors held since `forget`."""
    return torch.accelerator.max_memory_allocated(device) if device.type != "cpu" else 0


def fastest(work: Callable[[], Any], device: torch.device, times: int = 3) -> float:
    """Least seconds of a few runs, after one that warms up."""
    work()
    least = float("inf")
    for _ in range(times):
        common.wait_for(device)
        start = time.perf_counter()
        work()
        common.wait_for(device)
        least = min(least, time.perf_counter() - start)
    return least


def heavy(
    rows: int, columns: int, seed: int, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """A (rows, columns) matrix whose columns have heavy-tailed scales on a floor of noise, made on the device."""
    torch.manual_seed(seed)
    scale = (1 - torch.rand(columns, device=device)) ** -0.35
    return (0.02 * torch.randn(rows, columns, device=device) * scale).to(dtype)


def said(error: BaseException) -> str:
    """A failure in one line."""
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words[:400]}"


def llama(device: torch.device, dtype: torch.dtype = torch.bfloat16, **sizes: int) -> Any:
    """A LLaMA with random weights, made on the device and never on the host."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(llama_config(dtype, **sizes), dtype=dtype)
    model.config.use_cache = False
    return model.train()


def llama_config(dtype: torch.dtype = torch.bfloat16, **sizes: int) -> Any:
    """Its configuration; embedding and head are untied."""
    from transformers import LlamaConfig

    return LlamaConfig(**sizes, max_position_embeddings=2048, tie_word_embeddings=False, dtype=dtype)
