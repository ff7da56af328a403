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
        name: name that the tensor is stored under, without wrappers' prefixes.
        shape: shape of the whole tensor.
        dtype: dtype as torch names it, without ``torch.``.
        read: function that returns the tensor as a float array (NumPy, or torch where it lives on an accelerator or
            has a dtype that NumPy lacks). `read(i)` returns the slice [i] of the first axis and reads no other.
        storage: key of the memory that holds the tensor, equal for tensors that share it (tied weights); None where
            not known.
        kind: ``conv``, ``embedding`` … where the source knows; None where name and shape have to tell.
        problem: (status, sentence) where the tensor cannot be read as numbers.
        warning: sentence that a reader of its row should know; empty where there is none.
        order: what is not known of the order of its rows or columns, where that may not be transformers'; empty where
            it is.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[..., Array] = field(repr=False, compare=False)
    storage: Hashable = None
    kind: str | None = None
    problem: tuple[str, str] | None = None
    warning: str = ""
    order: str = ""


def clean_name(name: str) -> str:
    """`name` without the prefixes that DDP, FSDP, DeepSpeed, Lightning Fabric and torch.compile add.

    For all names of a model `clean_names` judges better: ``module`` can be an attribute of the model itself.
    """
    name = _outside(name)
    while name.startswith("module."):
        name = _outside(name.removeprefix("module."))
    return name


def clean_names(names: Iterable[str]) -> dict[str, str]:
    """The `names` of one model, each with its form without wrappers' prefixes; no two become alike.

    ``module.`` is a wrapper's prefix where all names begin with it: DDP and its kin hold nothing else.

    Examples:
        >>> from htsr.matrices.stored_tensors import clean_names
        >>> clean_names(["module.h.0.weight", "module._orig_mod.h.1.weight"])
        {'module.h.0.weight': 'h.0.weight', 'module._orig_mod.h.1.weight': 'h.1.weight'}
        >>> clean_names(["module.weight", "head.weight"])  # a model's own attribute
        {'module.weight': 'module.weight', 'head.weight': 'head.weight'}
    """
    cleaned = {name: _outside(name) for name in names}
    while (inner := [n for n in cleaned.values() if "." in n]) and all(n.startswith("module.") for n in inner):
        cleaned = {name: _outside(short.removeprefix("module.")) for name, short in cleaned.items()}
    return _unique(cleaned)


def base_name(name: str) -> str:
    """`name` as `clean_name` gives it, and without the prefix that PEFT adds: its name in the base model."""
    return clean_name(name).removeprefix(_PEFT)


def base_names(names: Iterable[str]) -> dict[str, str]:
    """The `names` of one model, each with its name in the base model: as `clean_names`, without PEFT's prefix too."""
    return _unique({name: short.removeprefix(_PEFT) for name, short in clean_names(names).items()})


def _outside(name: str) -> str:
    """`name` without the wrappers that underscores tell from a model's own attributes."""
    *modules, last = name.split(".")
    return ".".join([*(module for module in modules if f"{module}." not in WRAPPERS[1:]), last])


def _unique(cleaned: dict[str, str]) -> dict[str, str]:
    while (count := Counter(cleaned.values())).total() > len(count):  # a whole name can be the short one of another
        cleaned = {name: short if count[short] == 1 else name for name, short in cleaned.items()}
    return cleaned


def stored_tensor(name: str, tensor: Any, **more: Any) -> StoredTensor:
    """A torch tensor in memory as a stored tensor.

    Args:
        name: name that it is stored under.
        tensor: any torch tensor. One on the meta device has a problem; a sparse or quantised one reads dense.
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
    """A problem for a tensor so sparse that it would be made dense for next to nothing but zeros."""
    stored = tensor._nnz() if "sparse" in str(tensor.layout) else tensor.numel()
    if tensor.numel() * tensor.element_size() <= _SPARSE_LIMIT or stored * 1000 >= tensor.numel():
        return {}
    return {"problem": ("sparse", f"{name} is sparse: {stored} entries of {tuple(tensor.shape)} are stored")}


def _dense(tensor: Any, index: int | slice | None = None) -> Array:
    dense = _checked(tensor.detach()).to_dense()
    return dense if index is None else dense[index]


def _checked(tensor: Any) -> Any:
    """The sparse tensor, checked: torch trusts indices from a file, and one that lies outside may end the process."""
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
