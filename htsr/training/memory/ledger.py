"""Which tensors are alive at each moment of a training step, and how that goes with the batch."""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from htsr.training.memory.plan import PARTS

TILE = 4096  # tokens of which TRL makes logits at a time
_aten = torch.ops.aten
_SUMS = (_aten.add.Tensor, _aten._to_copy.default)  # of which autograd makes the gradient of a tied weight


@dataclass(frozen=True)
class Trace:
    """Bytes at each moment of a training step.

    Attributes:
        operations: what ran before each moment, and in which stage: ``forward``, ``backward`` or ``step``.
        sizes: (moments, parts) int64 bytes of what is alive.
        tiles: (moments,) int64 bytes more for each token of a tile of logits, of which there are at most `TILE`.
    """

    operations: tuple[tuple[str, Any], ...]
    sizes: npt.NDArray[np.int64]
    tiles: npt.NDArray[np.int64]

    def at_peak(self, tokens: int) -> tuple[str, dict[str, int]]:
        """The stage of the peak, and bytes by part then.

        Args:
            tokens: number of tokens that have logits.
        """
        tiles = self.tiles * min(tokens, TILE)
        moment = int((self.sizes.sum(axis=1) + tiles).argmax())
        parts = dict(zip(PARTS, self.sizes[moment].tolist(), strict=True))
        parts["logits"] += int(tiles[moment])
        return self.operations[moment][0], parts

    def along(self, other: Trace, share: tuple[int, int]) -> Trace:
        """The trace that lies from this one towards an `other` of the same operations.

        Args:
            other: trace of another batch.
            share: numerator and denominator of how far, in the distance between the two.
        """
        above, below = share
        return Trace(self.operations, self.sizes + (other.sizes - self.sizes) * above // below, self.tiles)


@dataclass
class _Storage:
    """A storage since the moment `born`, and up to `died`; `made_of` are those it is the sum or copy of."""

    part: str
    size: int
    born: int
    died: int | None = None
    made_of: list[_Storage] = field(default_factory=list)


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of all storages that operations have made and that are still alive, by part, moment by moment.

    Args:
        logits: numbers of entries by which a tensor is known as logits.
        fixed: bytes, by part, that are there all the time.
        dense: bytes of the weights in 4 bits, by storage, while an operation uses them.
    """

    def __init__(self, logits: set[int], fixed: dict[str, int], dense: dict[int, int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.logits, self.fixed, self.dense = logits, fixed, dense
        self.live: Counter[str] = Counter()
        self.now = "forward"
        self._known: dict[int, _Storage] = {}
        self._operations: list[tuple[str, Any]] = []
        self._sizes: list[list[int]] = []
        self._tiles: list[int] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation, and enter what it made."""
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                part = "logits" if leaf.numel() in self.logits else "activations"
                self.enter(leaf, part, move=False)
        if func in _SUMS and self.now == "backward":
            made_of = [self._known.get(_key(leaf)) for leaf in args if isinstance(leaf, Tensor)]
            self._known[_key(out)].made_of = [storage for storage in made_of if storage is not None]
        used = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)] if self.dense else []
        dense = max((self.dense.get(tensor.untyped_storage()._cdata, 0) for tensor in used), default=0)
        self.note(dense, operation=func)
        return out

    def enter(self, tensor: Tensor, part: str, move: bool = True) -> None:
        """Count the storage of a `tensor` of any shape under `part`; a known one changes its part if it may `move`."""
        storage, key = tensor.untyped_storage(), _key(tensor)
        known = self._known.get(key)
        if known is None:
            weakref.finalize(storage, self._leave, key)
            self._known[key] = _Storage(part, storage.nbytes(), len(self._sizes))
            self.live[part] += storage.nbytes()
        elif move:
            self._move(known, part)

    def arrive(self, gradient: Tensor) -> None:
        """Count a complete `gradient` under gradients since it was made, and with it those that it is the sum of.

        Args:
            gradient: gradient of a parameter, of its shape.
        """
        self.enter(gradient, "gradients", move=False)
        parts = [self._known[_key(gradient)]]
        while parts:
            one = parts.pop()
            if one.part == "activations":
                here, there = PARTS.index("activations"), PARTS.index("gradients")
                for sizes in self._sizes[one.born : one.died]:
                    sizes[here] -= one.size
                    sizes[there] += one.size
                if one.died is None:
                    self._move(one, "gradients")
                one.part = "gradients"
                parts += one.made_of

    def note(self, workspace: int = 0, *, tile: int = 0, operation: Any = None) -> None:
        """Note what is alive at this moment.

        Args:
            workspace: bytes more that are needed for this moment alone.
            tile: bytes more for each token of a tile of logits.
            operation: what has run.
        """
        self._operations.append((self.now, operation))
        live = {part: self.live[part] + self.fixed.get(part, 0) for part in PARTS}
        live["workspace"] += workspace
        self._sizes.append(list(live.values()))
        self._tiles.append(tile)

    def trace(self) -> Trace:
        """What was noted."""
        sizes = np.array(self._sizes, dtype=np.int64).reshape(-1, len(PARTS))
        return Trace(tuple(self._operations), sizes, np.array(self._tiles, dtype=np.int64))

    def _move(self, storage: _Storage, part: str) -> None:
        self.live[storage.part] -= storage.size
        self.live[part] += storage.size
        storage.part = part

    def _leave(self, key: int) -> None:
        storage = self._known.pop(key)
        storage.died = len(self._sizes)
        self.live[storage.part] -= storage.size


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
