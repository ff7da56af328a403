"""What torch asks of an accelerator's C++ and a device made in Python cannot answer: answered here, for a while."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # it reads what is replaced here, so it comes before
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._device import _device_constructors

_data = torch._C.TensorBase.data
_compatible = torch._has_compatible_shallow_copy_type
_empty, _empty_like = torch.empty, torch.empty_like
_device_constructors()  # remembers which functions `with torch.device(...)` changes: before they are replaced
_new_storage = torch.UntypedStorage.__new__


class Event(torch.Event):
    """An event that has passed."""

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: torch.Event) -> float:
        return 0.0


class Stream(torch.Stream):
    """A stream on which everything is done at once."""

    def record_event(self, event: torch.Event | None = None) -> torch.Event:
        return event if event is not None else Event(self.device)


def _dense(tensor: torch.Tensor, name: str) -> bool:
    return (
        tensor.device.type in ("cpu", name)
        and tensor.layout == torch.strided
        and type(tensor).__torch_dispatch__
        in (
            torch._C._disabled_torch_dispatch_impl,
            torch.Tensor.__torch_dispatch__,
        )
    )


@contextlib.contextmanager
def applied(
    name: str, waits: Callable[[str], None], on_device: Callable[[torch.Tensor], torch.Tensor], meter: Any
) -> Iterator[None]:
    """Torch with these answers, for the device of this name."""
    pinned: dict[int, StorageWeakRef] = {}

    def compatible(input: torch.Tensor, from_: torch.Tensor) -> bool:
        """As between CPU and CUDA: what lets `module.to(device)` keep its parameters."""
        return _compatible(input, from_) or (_dense(input, name) and _dense(from_, name))

    def set_data(tensor: torch.Tensor, other: torch.Tensor) -> None:
        if tensor.device == other.device or not compatible(tensor, other):
            _data.__set__(tensor, other)
            return
        moved = other.detach().requires_grad_(tensor.requires_grad)
        if type(tensor.grad) is torch.Tensor and tensor.grad.shape == moved.shape:  # others cannot be told of the move
            moved.grad = tensor.grad.to(moved.device, moved.dtype)
        torch._C._swap_tensor_impl(tensor, moved)
        for hooks in ("_backward_hooks", "_post_accumulate_grad_hooks"):
            if getattr(tensor, hooks):  # they stay with the parameter
                setattr(tensor, hooks, getattr(tensor, hooks))

    def pin_memory(tensor: torch.Tensor, device: object = None) -> torch.Tensor:
        if is_pinned(tensor):
            return tensor
        copy = tensor.clone()
        pinned[copy.untyped_storage()._cdata] = StorageWeakRef(copy.untyped_storage())
        return copy

    def is_pinned(tensor: torch.Tensor, device: object = None) -> bool:
        found = pinned.get(tensor.untyped_storage()._cdata)
        return found is not None and not found.expired()

    def empty(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        made = _empty(*args, **kwargs)
        return made.pin_memory() if pin_memory else made

    def empty_like(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        made = _empty_like(*args, **kwargs)
        return made.pin_memory() if pin_memory else made

    def new_storage(cls: type, *args: Any, device: Any = None, **kwargs: Any) -> torch.UntypedStorage:
        if device is not None and torch.device(device).type == name:
            return on_device(_empty(*args, dtype=torch.uint8)).untyped_storage()
        return (
            _new_storage(cls, *args, **kwargs) if device is None else _new_storage(cls, *args, device=device, **kwargs)
        )

    accelerator = {
        "synchronize": lambda device=None: waits("synchronize"),
        "empty_cache": lambda: None,
        "memory_allocated": lambda device=None: meter.now,
        "max_memory_allocated": lambda device=None: meter.peak,
        "reset_peak_memory_stats": lambda device=None: setattr(meter, "peak", meter.now),
        "current_stream": lambda device=None: Stream(torch.device(name, 0)),
    }
    with contextlib.ExitStack() as stack:
        for function, answer in accelerator.items():
            stack.enter_context(mock.patch.object(torch.accelerator, function, answer))
        for owner, attribute, answer in (
            (torch, "Event", Event),
            (torch, "Stream", Stream),
            (torch, "empty", empty),
            (torch, "empty_like", empty_like),
            (torch, "_has_compatible_shallow_copy_type", compatible),
            (torch.Tensor, "pin_memory", pin_memory),
            (torch.Tensor, "is_pinned", is_pinned),
            (torch.UntypedStorage, "__new__", new_storage),
        ):
            stack.enter_context(mock.patch.object(owner, attribute, answer))
        torch.Tensor.data = property(_data.__get__, set_data)
        stack.callback(delattr, torch.Tensor, "data")
        yield
