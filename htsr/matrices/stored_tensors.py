"""Stored tensors, unread: what a checkpoint or a module holds under which name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from htsr.arrays import Array

FLOATS = frozenset({"float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"})

INTEGERS = frozenset({"int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"})

WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_forward_module.")
_PEFT = "base_model.model."
_SPARSE_LIMIT = 1 << 30  # bytes of a nearly empty sparse tensor made dense


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint or module.

    Attributes:
        name: as stored, wrappers' prefixes removed.
        shape: of the whole tensor.
        dtype: as torch names it, without ``torch.``.
        read: returns the tensor as a float array (NumPy, or torch where it lives on an accelerator or has a dtype
            that NumPy lacks). `read(i)` returns the slice [i] of the first axis without reading the others.
        storage: equal for tensors that share memory (tied weights).
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
    """`name` without the prefixes that DDP, FSDP, DeepSpeed, Lightning Fabric and torch.compile add.

    Of names that stand together `clean_names` is the better judge: ``module`` can be a model's own attribute.
    """
    name = _outside(name)
    while name.startswith("module."):
        name = _outside(name.removeprefix("module."))
    return name


def clean_names(names: Iterable[str]) -> dict[str, str]:
    """The `names` of one model, each to itself without wrappers' prefixes; no two become alike.

    ``module.`` is a wrapper's where everything lies under it: DDP and its kin hold nothing else.
    """
    cleaned = {name: _outside(name) for name in names}
    while (inner := [n for n in cleaned.values() if "." in n]) and all(n.startswith("module.") for n in inner):
        cleaned = {name: _outside(short.removeprefix("module.")) for name, short in cleaned.items()}
    return _unique(cleaned)


def base_name(name: str) -> str:
    """`name` as of `clean_name`, also without the prefix that PEFT adds: the name that the base model has for it."""
    return clean_name(name).removeprefix(_PEFT)


def base_names(names: Iterable[str]) -> dict[str, str]:
    """As `clean_names`, also without the prefix that PEFT adds: each of `names` to the one that the base model has."""
    return _unique({name: short.removeprefix(_PEFT) for name, short in clean_names(names).items()})


def _outside(name: str) -> str:
    """`name` without the wrappers that underscores tell from a model's own attributes."""
    for wrapper in WRAPPERS[1:]:
        name = name.replace("." + wrapper, ".").removeprefix(wrapper)
    return name


def _unique(cleaned: dict[str, str]) -> dict[str, str]:
    count = Counter(cleaned.values())
    return {name: short if count[short] == 1 else name for name, short in cleaned.items()}


def stored_tensor(name: str, tensor: Any, **more: Any) -> StoredTensor:
    """A torch tensor in memory as a stored tensor.

    Args:
        name: name that it is stored under.
        tensor: any torch tensor. One on the meta device is one with a problem; a sparse or quantised one reads
            dense.
        **more: further fields of `StoredTensor`.
    """
    import torch

    if tensor.is_nested:
        why = f"{name} is a nested tensor, a list of matrices in one"
        return StoredTensor(name, (0, 0), "nested", lambda *_: tensor, problem=("nested", why))
    dtype = str(tensor.dtype).removeprefix("torch.")
    shape = tuple(tensor.shape)
    if tensor.device.type == "meta":
        problem = ("meta", f"{name} is on the meta device and has no values")
        return StoredTensor(name, shape, dtype, lambda *_: tensor, ("meta", id(tensor)), **more | {"problem": problem})
    if tensor.layout != torch.strided:
        return StoredTensor(
            name, shape, dtype, partial(_dense, tensor), ("sparse", id(tensor)), **_sparse(name, tensor), **more
        )
    if tensor.is_quantized:
        more.setdefault("warning", f"de-quantised from {dtype}")
        return StoredTensor(name, shape, dtype, partial(_dequantized, tensor), ("quantized", id(tensor)), **more)

    def read(index: int | slice | None = None) -> Array:
        return tensor.detach() if index is None else tensor.detach()[index]

    return StoredTensor(name, shape, dtype, read, _storage(tensor), **more)


def _storage(tensor: Any) -> Hashable:
    address = tensor.data_ptr() if tensor.numel() else 0
    return (str(tensor.device), address, tuple(tensor.shape), tuple(tensor.stride())) if address else None


def _sparse(name: str, tensor: Any) -> dict[str, Any]:
    """A problem where a few entries stand for more zeros than memory need hold."""
    stored = tensor._nnz() if "sparse" in str(tensor.layout) else tensor.numel()
    if tensor.numel() * tensor.element_size() <= _SPARSE_LIMIT or stored * 1000 >= tensor.numel():
        return {}
    return {"problem": ("sparse", f"{name} is sparse: {stored} entries of {tuple(tensor.shape)} are stored")}


def _dense(tensor: Any, index: int | slice | None = None) -> Array:
    dense = _checked(tensor.detach()).to_dense()
    return dense if index is None else dense[index]


def _checked(tensor: Any) -> Any:
    """The same sparse tensor, once its indices are known to lie inside: torch trusts those of a file, and may crash."""
    import torch

    if tensor.layout == torch.sparse_coo:
        return torch.sparse_coo_tensor(tensor._indices(), tensor._values(), tensor.shape, check_invariants=True)
    if "sparse" not in str(tensor.layout):
        return tensor
    by_rows = tensor.layout in (torch.sparse_csr, torch.sparse_bsr)
    runs, indices = ("crow_indices", "col_indices") if by_rows else ("ccol_indices", "row_indices")
    parts = getattr(tensor, runs)(), getattr(tensor, indices)(), tensor.values()
    return torch.sparse_compressed_tensor(*parts, tensor.shape, layout=tensor.layout, check_invariants=True)


def _dequantized(tensor: Any, index: int | slice | None = None) -> Array:
    floats = tensor.detach().dequantize()
    return floats if index is None else floats[index]


def unshared(tensors: Iterable[StoredTensor]) -> list[StoredTensor]:
    """`tensors` without those that share their memory with an earlier one (tied weights count once)."""
    seen: set[Hashable] = set()
    kept = []
    for tensor in tensors:
        if tensor.storage is not None and tensor.storage in seen:
            continue
        seen.add(tensor.storage)
        kept.append(tensor)
    return kept
