"""How much memory a run may take: what the command line says, or what the device has."""

from __future__ import annotations

import re

from htsr.errors import UsageError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {f"{name}B": size for name, size in _UNITS.items()}
_UNITS |= {f"{name}iB": 2 ** (10 * power) for power, name in enumerate("KMGT", start=1)}


def parse_memory(text: str) -> int:
    """Bytes that a `text` such as ``24GB`` (10⁹ bytes each) or ``8 GiB`` (2³⁰ each) says.

    Raises:
        UsageError: it says no amount of memory.

    Examples:
        >>> from htsr.finetuning.budget import parse_memory
        >>> parse_memory("24GB"), parse_memory("1.5 GiB")
        (24000000000, 1610612736)
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text, re.ASCII)
    known = {name.upper(): size for name, size in _UNITS.items()}
    if not found or found[2].upper() not in known or float(found[1]) == 0:
        raise UsageError(f"--memory {text[:40]}: it is an amount of memory, as in 24GB, 8GiB or 900MB")
    return round(float(found[1]) * known[found[2].upper()])
