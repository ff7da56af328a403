"""What backward needs of a block that has left the device: autograd keeps where a weight lies, not the buffer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from htsr.training.streaming.slots import Slots


@dataclass(frozen=True)
class _Weight:
    """A saved weight, or a view of one, of a block that has been in a buffer."""

    block: int
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def again(self, slots: Slots) -> Tensor:
        memory = slots.fetch(self.block)
        return memory[self.start :].view(self.dtype).as_strided(self.shape, self.stride)


@dataclass(frozen=True)
class _Pack:
    """What autograd keeps of a tensor: the place of a weight, and whatever the hooks outside keep of either."""

    slots: Slots
    keep: Callable[[Tensor], Any]
    counts: bool

    def __call__(self, tensor: Tensor) -> tuple[_Weight | None, Any]:
        found = self.slots.find(tensor)
        if found is None:
            return None, self.keep(tensor)
        weight = _Weight(*found, tensor.dtype, tuple(tensor.shape), tensor.stride())
        # not the parameter itself, which will have gone home when the hooks outside look at it
        return weight, self.keep(tensor.detach()) if self.counts else None


def saved_weights(slots: Slots) -> torch.autograd.graph.saved_tensors_hooks | None:
    """A context in which autograd keeps the place of a weight that lies in a buffer, and asks for it again in backward.

    A linear layer keeps a view of its weight, which would read whatever has come into the buffer since. What hooks
    outside of this context do with a tensor (activation checkpointing counts them, and computes again what is asked
    for) they do in it, too.

    Args:
        slots: the buffers.

    Returns:
        The context; None where the innermost hooks are such ones of the same buffers already.
    """
    outside: Any = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if _is_of(slots, outside):
        return None
    keep, give = outside or (Tensor.detach, _same)

    def unpack(kept: tuple[_Weight | None, Any]) -> Any:
        weight, rest = kept
        given = give(rest) if weight is None or outside else None
        return given if weight is None else weight.again(slots)

    return torch.autograd.graph.saved_tensors_hooks(_Pack(slots, keep, outside is not None), unpack)


def _same(kept: Any) -> Any:
    return kept


def end_contexts(slots: Slots) -> None:
    """Take contexts of `saved_weights` away that were left in this thread, and leave all others as they are.

    Args:
        slots: the buffers.
    """
    others: list[Any] = []
    while (innermost := torch._C._autograd._top_saved_tensors_default_hooks(True)) is not None:
        torch._C._autograd._pop_saved_tensors_default_hooks()
        if not _is_of(slots, innermost):
            others.append(innermost)
    for pack, unpack in reversed(others):
        torch._C._autograd._push_saved_tensors_default_hooks(pack, unpack)


def _is_of(slots: Slots, hooks: Any) -> bool:
    return bool(hooks) and isinstance(hooks[0], _Pack) and hooks[0].slots is slots
