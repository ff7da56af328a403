"""How much memory a run may take: what the command line says, or what the device has."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from htsr.errors import UsageError
from htsr.training.memory.plan import beside

if TYPE_CHECKING:
    from htsr.training.memory.plan import MemoryPlan

DEVIATION = 0.07  # of predictions from measured peaks: reports/memory
CONTEXT = 1 << 29  # bytes of an accelerator's context and its kernels' workspaces
MOST = 1 << 10  # no batch that is larger is looked for
_LEAST_BYTES = 1 << 20  # what is smaller and has no unit was not meant as bytes

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {f"{name}B": size for name, size in _UNITS.items()}
_UNITS |= {f"{name}iB": 2 ** (10 * power) for power, name in enumerate("KMGT", start=1)}


def parse_memory(text: str) -> int:
    """Bytes that a `text` such as ``24GB`` (10⁹ bytes each) or ``8 GiB`` (2³⁰ each) says.

    Raises:
        UsageError: it says no amount of memory, or a number without a unit that is too small for bytes.

    Examples:
        >>> from htsr.finetuning.budget import parse_memory
        >>> parse_memory("24GB"), parse_memory("1.5 GiB")
        (24000000000, 1610612736)
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text, re.ASCII)
    known = {name.upper(): size for name, size in _UNITS.items()}
    if not found or found[2].upper() not in known or float(found[1]) == 0:
        raise UsageError(f"--memory {text[:40]}: it is an amount of memory, as in 24GB, 8GiB or 900MB")
    if not found[2] and float(found[1]) < _LEAST_BYTES:
        raise UsageError(f"--memory {found[1]} has no unit, and would be bytes: write {found[1]}GB or {found[1]}GiB")
    return round(float(found[1]) * known[found[2].upper()])


@dataclass(frozen=True)
class Budget:
    """Memory that a run may take.

    Attributes:
        size: bytes.
        of: what has them, in words.
        is_host: whether that is main memory, in which the whole process lies.
    """

    size: int
    of: str
    is_host: bool

    @classmethod
    def of_device(cls, arguments: Any) -> Budget:
        """The memory of the device on which TRL's `arguments` train: an accelerator's, else main memory."""
        import torch

        device = arguments.device
        if device.type in ("cuda", "xpu"):
            module = getattr(torch, device.type)
            return cls(int(module.get_device_properties(device).total_memory), module.get_device_name(device), False)
        return cls(_main_memory(), "main memory of this machine", True)

    def needed(self, plan: MemoryPlan) -> int:
        """Bytes that the run of a `plan` needs there: 7 % more, by which plans were off, and what they leave out."""
        more = sum(beside(plan).values()) if self.is_host else CONTEXT
        return round(plan.total * (1 + DEVIATION)) + more

    def holds(self, plan: MemoryPlan) -> bool:
        """Whether the run of a `plan` fits."""
        return self.needed(plan) <= self.size


def largest_batch(plan_of: Callable[[int], MemoryPlan], batch: int, budget: Budget) -> int:
    """The largest batch whose run fits a `budget`, at most `MOST`, or `batch` if it is larger; 0 where none does.

    Args:
        plan_of: function from a batch to its plan.
        batch: batch of the recipe.
        budget: memory that there is.
    """
    sizes = range(1, max(MOST, batch) + 1)
    return bisect_left(sizes, True, key=lambda size: not budget.holds(plan_of(size)))


def _main_memory() -> int:
    """Bytes of main memory, or of what the control group of this process may have of it."""
    import psutil

    size = int(psutil.virtual_memory().total)
    limit = Path("/sys/fs/cgroup/memory.max")
    with suppress(OSError, ValueError):
        size = min(size, int(limit.read_text()))
    return size
