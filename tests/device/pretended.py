"""A pretended accelerator, `torch.device("pretended")`, for tests where there is none.

Its tensors are plain ones of the backend PrivateUse1 whose memory is the host's: DLPack hands memory from one device to
another without a copy, and each kernel runs that of the CPU on the same memory. What an accelerator refuses is
refused: a tensor of the CPU beside one of the device, if it has a dimension. What makes an accelerator wait is counted,
and so is the memory.
"""

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import dlpack

from . import patches

NAME = "pretended"
_CPU, _EXTENSION = 1, 12  # kDLCPU and kDLExtDev of dlpack.h; torch reads the second as PrivateUse1
_HOST_KERNELS = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_aten = torch.ops.aten

# What brings a number or a size to the host, and so waits for the device; after torch.cuda.set_sync_debug_mode.
_WAITING = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "equal",
    "_unique",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "bincount",
    "_linalg_eigh",
    "_linalg_eigvals",
    "_linalg_svd",
    "linalg_eig",
    "linalg_lstsq",
}
# Beside a tensor of the device these take indices that lie on the host, and move them.
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}


@dataclass(eq=False)
class Synchronisations:
    """The operations that made the device wait, in order."""

    names: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        return len(self.names)


@dataclass(eq=False)
class Memory:
    """Bytes of the device's tensors that were made within the context: those alive, and the most at one time."""

    peak: int = 0
    _alive: list[tuple[StorageWeakRef, int]] = field(default_factory=list)
    _at_most: int = 0  # what is freed is noticed where it matters: when there would be a new peak

    def allocate(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        self._alive.append((StorageWeakRef(storage), storage.nbytes()))
        self._at_most += storage.nbytes()
        if self._at_most > self.peak:
            self.peak = max(self.peak, self.now)

    @property
    def now(self) -> int:
        self._alive = [(storage, size) for storage, size in self._alive if not storage.expired()]
        self._at_most = sum(size for _, size in self._alive)
        return self._at_most


_counting: list[Synchronisations] = []
_metering: list[Memory] = []
_everything = Memory()


@contextlib.contextmanager
def synchronisations() -> Iterator[Synchronisations]:
    """Count what makes the pretended device wait, in every thread."""
    counted = Synchronisations()
    _counting.append(counted)
    try:
        yield counted
    finally:
        _counting.remove(counted)


@contextlib.contextmanager
def memory() -> Iterator[Memory]:
    """Count the bytes that the pretended device's tensors take."""
    metered = Memory()
    _metering.append(metered)
    try:
        yield metered
    finally:
        _metering.remove(metered)


def _waits(name: str) -> None:
    for counted in _counting:
        counted.names.append(name)


_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


def _handed_over(tensor: torch.Tensor, device: int) -> torch.Tensor:
    """The same memory as a tensor of another device; it keeps the first alive."""
    capsule = dlpack.to_dlpack(tensor)
    # struct DLTensor begins with `void *data; struct { int32_t device_type, device_id; } device`
    ctypes.c_int32.from_address(_pointer(capsule, b"dltensor") + ctypes.sizeof(ctypes.c_void_p)).value = device
    return dlpack.from_dlpack(capsule)


def _on_host(value: Any) -> Any:
    return _handed_over(value, _CPU) if _is_ours(value) else value


def _on_device(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    made = _handed_over(value, _EXTENSION)
    for metered in _metering:
        metered.allocate(made)
    return made


def _is_ours(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == NAME


def _each(change: Callable[[Any], Any], value: Any) -> Any:
    """`change` of everything in the arguments or results of an operation."""
    if isinstance(value, list | tuple):
        return type(value)([_each(change, one) for one in value])
    return change(value)


@cache
def _known_of(op: torch._ops.OpOverload) -> tuple[str, bool, list[str], set[str]]:
    """Name, whether it makes a view, the kinds of its arguments, and which of them are `out`."""
    schema = op._schema
    alias = schema.returns[0].alias_info if schema.returns else None
    kinds = [argument.type.kind() for argument in schema.arguments]
    outs = {argument.name for argument in schema.arguments if argument.is_out}
    return schema.name.removeprefix("aten::"), alias is not None and not alias.is_write, kinds, outs


def _run(op: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> Any:
    """Any operation: the CPU's, on the same memory."""
    name, makes_a_view, kinds, outs = _known_of(op)
    if makes_a_view:
        return op.redispatch(_HOST_KERNELS, *args, **kwargs)  # a view shares the storage, whoever makes it
    pairs: list[tuple[Any, Any]] = []
    grown: list[tuple[torch.Tensor, torch.Tensor]] = []

    def on_host(value: Any) -> Any:
        pairs.append((value, torch.device("cpu") if isinstance(value, torch.device) else _on_host(value)))
        return pairs[-1][1]

    def to_fill(value: torch.Tensor) -> torch.Tensor:
        """Memory that can grow, as `out` may have to: handed-over memory cannot."""
        pairs.append((value, torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)))
        grown.append(pairs[-1])
        return pairs[-1][1]

    args = tuple(  # torch hands over the number of `tensor & 3` as such, and does not take it for a tensor here
        torch.tensor(value) if type(value) is int and kind == "TensorType" else value
        for value, kind in zip(args, kinds, strict=False)
    )
    host_args = _each(on_host, args)
    host_kwargs = {key: _each(to_fill if key in outs else on_host, value) for key, value in kwargs.items()}
    _refuse_mixture(name, [given for given, _ in pairs])
    if name in _WAITING or (name == "_index_put_impl_" and _counts_a_mask([given for given, _ in pairs])):
        _waits(name)
    result = op(*host_args, **host_kwargs)
    for here, there in grown:
        if here.shape == there.shape:
            _on_host(here).copy_(there)
        else:
            _take(here, _on_device(there))
    of_host = {id(there): here for here, there in pairs if _is_ours(here)}
    return _each(lambda value: of_host[id(value)] if id(value) in of_host else _on_device(value), result)


def _take(tensor: torch.Tensor, other: torch.Tensor) -> None:
    """`tensor` becomes a view of all of `other`."""
    _aten.set_.source_Storage_storage_offset.redispatch(
        _HOST_KERNELS, tensor, other.untyped_storage(), other.storage_offset(), other.shape, other.stride()
    )


def _refuse_mixture(name: str, given: list[Any]) -> None:
    tensors = [value for value in given if isinstance(value, torch.Tensor)]
    ours = [tensor for tensor in tensors if _is_ours(tensor)]
    if not ours or (name in _INDEXING and _is_ours(tensors[0])):
        return
    for tensor in tensors:
        if not _is_ours(tensor) and tensor.dim() > 0:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, {ours[0].device} and "
                f"{tensor.device}! (aten::{name})"
            )


def _counts_a_mask(given: list[Any]) -> bool:
    """Whether `tensor[mask] = values` asks how many entries the mask has; for one value it fills instead."""
    _, *indices, values = [value for value in given if isinstance(value, torch.Tensor)]
    return values.numel() > 1 and any(index.dtype in (torch.bool, torch.uint8) for index in indices)


def _empty(size, *, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    return _on_device(
        torch.empty(size, dtype=dtype, device="cpu", memory_format=memory_format or torch.contiguous_format)
    )


def _empty_strided(size, stride, *, dtype=None, layout=None, device=None, pin_memory=None):
    return _on_device(torch.empty_strided(size, stride, dtype=dtype, device="cpu"))


def _copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    if source.device != target.device and not non_blocking:
        _waits(f"copy to {target.device.type}")
    _on_host(target).copy_(_on_host(source))
    return target


def _to_copy(source, *, dtype=None, layout=None, device=None, pin_memory=None, non_blocking=False, memory_format=None):
    """Torch's own would pin the host's memory, which no hook in Python can do."""
    target = torch.empty_like(
        source, dtype=dtype, device=device, memory_format=memory_format or torch.preserve_format, requires_grad=False
    )
    return target.copy_(source, non_blocking=non_blocking)


def _resize(tensor: torch.Tensor, size, *, memory_format=None):
    if tensor.shape != torch.Size(size):
        old = _on_host(tensor).flatten()
        new = torch.empty(size, dtype=tensor.dtype)
        new.view(-1)[: old.numel()].copy_(old[: new.numel()])
        _take(tensor, _on_device(new))
    return tensor


def _set_storage(tensor: torch.Tensor, *source: object) -> torch.Tensor:
    op = _aten.set_.source_Storage_storage_offset if len(source) > 1 else _aten.set_.source_Storage
    return op.redispatch(_HOST_KERNELS, tensor, *source)


def _in_lower_precision(op: torch._ops.OpOverload):
    """The operation under `torch.autocast`."""

    def lower(value: Any) -> Any:
        return value.to(torch.get_autocast_dtype(NAME)) if _is_ours(value) and value.dtype == torch.float32 else value

    def run(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = _each(lower, args), {key: _each(lower, value) for key, value in kwargs.items()}
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)):
            return op(*args, **kwargs)

    return run


class _Module:
    """`torch.pretended`, which torch asks about the device."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return bool(_switched_on)

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1 if _switched_on else 0

    def device(self, device: object) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_rng_state(self, device: object = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: object = None) -> None:
        torch.set_rng_state(state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


_libraries: list[torch.library.Library] = []  # what is registered goes with these
_switched_on: list[bool] = []


def install() -> torch.device:
    """The pretended device, made known to torch once in a process; an ImportError where torch is too old for it."""
    if not _libraries:
        from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

        _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
        kernels = torch.library.Library("aten", "IMPL")
        for name, kernel in {
            "empty.memory_format": _empty,
            "empty_strided": _empty_strided,
            "_copy_from": _copy_from,
            "_to_copy": _to_copy,
            "resize_": _resize,
            "record_stream": lambda tensor, stream: None,
            "set_.source_Storage": _set_storage,
            "set_.source_Storage_storage_offset": _set_storage,
        }.items():
            kernels.impl(name, kernel, "PrivateUse1")
        others = torch.library.Library("_", "IMPL")
        others.fallback(_run, "PrivateUse1")
        others.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
        for name in ("mm", "bmm", "addmm", "baddbmm", "matmul", "linear", "scaled_dot_product_attention"):
            kernels.impl(name, _in_lower_precision(getattr(_aten, name).default), "AutocastPrivateUse1")
        _libraries.extend([kernels, others])
    return torch.device(NAME, 0)


@contextlib.contextmanager
def switched_on() -> Iterator[torch.device]:
    """Within it the process has an accelerator: the pretended one."""
    device = install()
    _switched_on.append(True)
    _everything.peak = _everything.now
    _metering.append(_everything)
    try:
        with patches.applied(NAME, _waits, _on_device, _everything):
            yield device
    finally:
        _switched_on.pop()
        _metering.remove(_everything)
