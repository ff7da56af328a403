"""Stored tensors, unread: what a checkpoint or a module holds under which name."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any

from htsr.spectra.esd import Array

FLOATS = frozenset({"float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"})

WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint or module.

    Attributes:
        name: as stored, wrappers' prefixes removed.
        shape: of the whole tensor.
        dtype: as torch names it, without ``torch.``.
        read: returns the tensor as a float array (NumPy, or torch where it lives on an accelerator or has a dtype
            that NumPy lacks). `read(i)` returns the slice [i] of the first axis without reading the others.
        storage: equal for entries that share memory (tied weights).
        kind: ``conv``, ``embedding`` … where the source knows; else it is told from name and shape.
        problem: (status, sentence) where the tensor cannot be read as numbers.
        warning: what a reader of its row should know.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[..., Array] = field(repr=False, compare=False)
    storage: Hashable = None
    kind: str | None = None
    problem: tuple[str, str] | None = None
    warning: str = ""


def clean_name(name: str) -> str:
    """`name` without the prefixes that DDP, FSDP and torch.compile add."""
    for wrapper in WRAPPERS:
        name = name.replace("." + wrapper, ".")
        while name.startswith(wrapper):
            name = name[len(wrapper) :]
    return name


def base_name(name: str) -> str:
    """`name` as of `clean_name`, also without the prefix that PEFT adds: the name that the base model has for it."""
    return clean_name(name).removeprefix("base_model.model.")


def tensor_entry(name: str, tensor: Any, **more: Any) -> Entry:
    """The entry of a torch tensor in memory.

    Args:
        name: as stored.
        tensor: any torch tensor; one on the meta device is an entry with a problem.
        **more: further fields of `Entry`.
    """
    dtype = str(tensor.dtype).removeprefix("torch.")
    storage: Hashable = None
    if tensor.device.type == "meta":
        more["problem"] = ("meta", f"{clean_name(name)} is on the meta device and has no values")
        storage = ("meta", id(tensor))
    elif tensor.numel():
        storage = (str(tensor.device), tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride()))

    def read(index: int | None = None) -> Array:
        return tensor.detach() if index is None else tensor.detach()[index]

    return Entry(clean_name(name), tuple(tensor.shape), dtype, read, storage=storage, **more)


def unshared(entries: Iterable[Entry]) -> list[Entry]:
    """`entries` without those that share their memory with an earlier one (tied weights count once)."""
    seen: set[Hashable] = set()
    kept = []
    for entry in entries:
        if entry.storage is not None and entry.storage in seen:
            continue
        seen.add(entry.storage)
        kept.append(entry)
    return kept
