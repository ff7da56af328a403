"""Two buffers on the device through which the blocks pass: one is filled while the other is read."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from htsr.training.streaming.homes import Home, has_streams


class Order:
    """The order in which blocks are asked for, learned: what came after two blocks is expected after them again.

    Until it is known, the next block in the direction of the last two is.

    Args:
        members: indices of the blocks that are asked for, ascending.

    Examples:
        Forward upwards and backward down to block 2; the second time the end of backward is known:

        >>> from htsr.training.streaming.slots import Order
        >>> order = Order([0, 2, 3])
        >>> for _ in range(2):
        ...     [order.after(block) for block in (0, 2, 3, 3, 2)]
        ...     order.end()
        [2, 3, None, None, 0]
        [2, 3, 2, 2, None]
    """

    def __init__(self, members: list[int]) -> None:
        self._members = members
        self._known: dict[tuple[int | None, int], int | None] = {}
        self._last: tuple[int | None, int] | None = None

    def after(self, block: int) -> int | None:
        """The block that is expected after `block`, which is asked for now; None where none is."""
        if self._last is None or self._last[1] != block:
            self._note(block)
            self._last = (None if self._last is None else self._last[1], block)
        if self._last in self._known:
            return self._known[self._last]
        before = self._last[0]
        step = -1 if before is not None and before > block else 1
        position = self._members.index(block) + step
        return self._members[position] if 0 <= position < len(self._members) else None

    def end(self) -> None:
        """Note that nothing more came."""
        if self._last is not None:
            self._note(None)
        self._last = None

    def _note(self, block: int | None) -> None:
        if self._last is not None:
            self._known[self._last] = block


@dataclass(eq=False)
class _Slot:
    memory: Tensor
    holds: int | None = None
    filled: Any = None  # event after which its content is there
    waited: bool = True  # whether computing waits for it already
    reading: Future[Any] | None = None  # the event in another thread, which reads what the slot holds


class Slots:
    """The two buffers.

    A copy into a buffer waits for all that was asked of the device before, so for whatever reads the buffer's last
    content; computing waits for the copy.

    Args:
        homes: home of each block that may be asked for, by its index.
        device: device of the buffers.
    """

    def __init__(self, homes: Mapping[int, Home], device: torch.device) -> None:
        self._homes, self._device = homes, device
        size = max((home.layout.size for home in homes.values()), default=0)
        self._slots = [_Slot(torch.empty(size, dtype=torch.uint8, device=device)) for _ in range(2)]
        self._stream = torch.Stream(device) if has_streams(device) else None
        self._reader = ThreadPoolExecutor(1) if any(home.reads for home in homes.values()) else None
        self._order = Order(sorted(homes))

    def expect(self, members: list[int]) -> None:
        """Forget contents and order.

        Args:
            members: indices of the blocks that will be asked for, ascending.
        """
        self.forget()
        for slot in self._slots:
            self._take(slot)
            if slot.filled is not None:
                slot.filled.synchronize()  # whoever asks will change the homes
        self._order = Order(members)

    def forget(self) -> None:
        """Trust no content any more: weights may have changed. What follows is a pass of its own."""
        self._order.end()
        for slot in self._slots:
            slot.holds = None

    def fetch(self, block: int) -> Tensor:
        """The buffer that holds a block, from now until two others are asked for; the next one is on its way after.

        Args:
            block: index of the block.

        Returns:
            (bytes,) uint8 buffer, in which the block's weights lie as its home's layout says.
        """
        slot, other = self._slots if self._slots[1].holds != block else reversed(self._slots)
        if slot.holds != block:
            self._fill(slot, block)
        self._take(slot)
        if not slot.waited:
            torch.accelerator.current_stream(self._device).wait_event(slot.filled)
            slot.waited = True
        expected = self._order.after(block)
        if expected not in (None, block, other.holds):
            self._fill(other, expected)
        return slot.memory

    def find(self, tensor: Tensor) -> tuple[int, int] | None:
        """The block in whose buffer a `tensor` of any shape lies, and at which byte; None where it lies elsewhere."""
        start = tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else 0
        for slot in self._slots:
            if slot.holds is not None and start and start == slot.memory.untyped_storage().data_ptr():
                return slot.holds, int(tensor.storage_offset()) * tensor.element_size()
        return None

    def _fill(self, slot: _Slot, block: int) -> None:
        home = self._homes[block]
        if self._stream is not None:
            self._stream.wait_stream(torch.accelerator.current_stream(self._device))
        self._take(slot)
        if home.reads and self._reader is not None:
            slot.reading = self._reader.submit(self._send, home, slot.memory)
        else:
            slot.filled = self._send(home, slot.memory)
            slot.waited = slot.filled is None
        slot.holds = block

    def _send(self, home: Home, memory: Tensor) -> Any:
        """Copy a block into a buffer; the event after which it is there, None where it is."""
        if self._stream is None:
            home.send(memory)
            return None
        with self._stream:
            home.send(memory)
            return self._stream.record_event()

    def _take(self, slot: _Slot) -> None:
        """Wait until another thread has read what a slot holds."""
        if slot.reading is not None:
            reading, slot.reading = slot.reading, None
            slot.filled = reading.result()
            slot.waited = slot.filled is None
