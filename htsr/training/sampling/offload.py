"""Optimizer state of frozen blocks in host memory.

At a draw the state of the blocks that stop has left the device before that of others comes, so that the device holds
the state of the active blocks and no more. Host memory is pinned where the device copies from it by itself; what comes
does so on a stream of its own, beside the forward and backward pass, until `arrive` is called.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from htsr.errors import UsageError
from htsr.training.steps import counts_on_device
from htsr.training.streaming.homes import has_streams

State: TypeAlias = dict[str, Any]
Place: TypeAlias = tuple[torch.optim.Optimizer, torch.nn.Parameter]  # where a state belongs


def to_host(places: Iterable[Place]) -> None:
    """Move state to host memory, and wait until it is there.

    Args:
        places: optimizers and parameters whose state is moved, but for its scalars (step counters).

    Raises:
        UsageError: the state is sharded.
    """
    left: set[torch.device] = set()
    for optimizer, parameter in places:
        state = optimizer.state.get(parameter, {})
        for name, value in _away_from(torch.device("cpu"), state):
            state[name] = _in_host_memory(value, value.device)
            left.add(value.device)
    for device in left:
        if has_streams(device):
            torch.accelerator.current_stream(device).synchronize()


class Arrivals:
    """State on its way to the devices."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.Stream] = {}
        self._coming: set[torch.device] = set()

    def fetch(self, places: Iterable[Place]) -> None:
        """Move state to the devices of its parameters; it may be read after `arrive`.

        Args:
            places: optimizers and parameters whose state is moved.

        Raises:
            UsageError: the state is sharded.
        """
        begun: set[torch.device] = set()
        for optimizer, parameter in places:
            state, device = optimizer.state.get(parameter, {}), parameter.device
            for name, value in _away_from(device, state):
                if not has_streams(device):
                    state[name] = value.to(device)
                    continue
                if device not in begun:  # after whatever still reads the memory that this takes over
                    self._stream(device).wait_stream(torch.accelerator.current_stream(device))
                    begun.add(device)
                state[name] = self._sent(value, device)
        self._coming |= begun

    def arrive(self) -> None:
        """Have what is computed from here on wait for what is on its way."""
        for device in self._coming:
            torch.accelerator.current_stream(device).wait_stream(self._streams[device])
        self._coming.clear()

    def _stream(self, device: torch.device) -> torch.Stream:
        if device not in self._streams:
            self._streams[device] = torch.Stream(device)
        return self._streams[device]

    def _sent(self, value: Tensor, device: torch.device) -> Tensor:
        found = torch.empty_like(value, device=device)  # of the stream that computes, whose freed memory it takes
        with self._stream(device):
            found.copy_(value, non_blocking=True)
        found.record_stream(self._stream(device))
        return found


def loaded(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter, saved: Mapping[str, Any]) -> State:
    """The state of a frozen parameter as the optimizer would load it, but in host memory.

    Args:
        optimizer: optimizer that loads a state dict.
        parameter: frozen parameter.
        saved: its state in the state dict.
    """
    casts = type(optimizer).load_state_dict is torch.optim.Optimizer.load_state_dict and parameter.is_floating_point()
    state: State = {}
    for name, value in saved.items():
        if not torch.is_tensor(value):
            state[name] = value
        elif value.ndim == 0 or name == "step":
            state[name] = value.to(parameter.device) if _counts_on_device(optimizer, parameter) else value.cpu()
        else:
            dtype = parameter.dtype if casts else value.dtype
            state[name] = _in_host_memory(value.to("cpu", dtype), parameter.device)
    return state


def frozen_entries(
    optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any], frozen: Sequence[torch.nn.Parameter]
) -> dict[Any, torch.nn.Parameter]:
    """The entries of a state dict that belong to frozen parameters.

    Args:
        optimizer: optimizer that loads the state dict.
        state_dict: state dict with its groups; others load as torch loads them.
        frozen: frozen parameters.

    Returns:
        The parameters by their identifiers in the state dict.
    """
    saved, own = (
        [list(group["params"]) for group in groups] for groups in (state_dict["param_groups"], optimizer.param_groups)
    )
    if [len(members) for members in saved] != [len(members) for members in own]:
        return {}
    wanted = {id(parameter) for parameter in frozen}
    pairs = ((i, p) for ids, members in zip(saved, own, strict=True) for i, p in zip(ids, members, strict=True))
    return {identifier: p for identifier, p in pairs if id(p) in wanted and identifier in state_dict["state"]}


def _away_from(device: torch.device, state: State) -> Iterator[tuple[str, Tensor]]:
    for name, value in list(state.items()):
        if torch.is_tensor(value) and value.ndim > 0 and value.device != device:
            if type(value).__name__ == "DTensor":
                raise UsageError("sharded optimizer state cannot be offloaded block by block: take drop or keep")
            yield name, value


def _in_host_memory(value: Tensor, device: torch.device) -> Tensor:
    """A copy in host memory, for a device; the values may come later, in the order of what the device does."""
    if not has_streams(device):
        return value.cpu()
    return torch.empty_like(value, device="cpu", pin_memory=True).copy_(value, non_blocking=True)


def _counts_on_device(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter) -> bool:
    group = next(group for group in optimizer.param_groups if any(p is parameter for p in group["params"]))
    return counts_on_device(group)
