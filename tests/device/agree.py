"""Whether two runs, on the CPU and on the device, have given the same numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from numbers import Real
from typing import Any

import numpy as np
import torch

_OF_THE_RUN = {"seconds", "options", "meta", "device"}


def differences(here: Any, there: Any, relative: float, where: str = "") -> list[str]:
    """Every number that differs by more than `relative`, and all else that differs at all."""
    if isinstance(here, torch.Tensor | np.ndarray):
        a, b = (np.asarray(torch.as_tensor(x).detach().cpu().double()) for x in (here, there))
        if a.shape != b.shape:
            return [f"{where}: shapes {a.shape} and {b.shape}"]
        largest = max(np.abs(a).max(initial=0.0), np.abs(b).max(initial=0.0))
        worst = np.abs(a - b).max(initial=0.0)
        same = np.array_equal(np.isnan(a), np.isnan(b)) and not worst > relative * largest
        return [] if same else [f"{where}: tensors of up to {largest:.3g} differ by {worst:.3g}"]
    if is_dataclass(here) and type(here) is type(there):
        here, there = ({f.name: getattr(x, f.name) for f in fields(x)} for x in (here, there))
    if isinstance(here, Mapping) and isinstance(there, Mapping):
        found = (
            [] if list(here) == list(there) else [f"{where}: {sorted(map(str, set(here) ^ set(there)))} in one only"]
        )
        both = [key for key in here if key in there and key not in _OF_THE_RUN]
        return found + [one for key in both for one in differences(here[key], there[key], relative, f"{where}.{key}")]
    if isinstance(here, Sequence) and not isinstance(here, str) and isinstance(there, Sequence):
        if len(here) != len(there):
            return [f"{where}: {len(here)} and {len(there)} values"]
        pairs = enumerate(zip(here, there, strict=True))
        return [one for i, (a, b) in pairs for one in differences(a, b, relative, f"{where}[{i}]")]
    if isinstance(here, Real) and isinstance(there, Real) and not isinstance(here, bool):
        same = here == there or abs(here - there) <= relative * max(abs(here), abs(there)) or here != here != there
    else:
        same = here == there
    return [] if same else [f"{where}: {here!r} and {there!r}"]


def assert_agree(here: Any, there: Any, relative: float = 1e-4) -> None:
    """That both runs gave the same: numbers to `relative`, tensors to that of their largest entry."""
    found = differences(here, there, relative)
    assert not found, "\n".join(found)
