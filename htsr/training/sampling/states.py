"""What becomes of the optimizers' state of members that stop: it is dropped, kept, or moved to host memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal, TypeAlias

import torch

from htsr.training.sampling.offload import Arrivals, Place, State, frozen_entries, loaded, to_host
from htsr.training.steps import counters_to_host

FrozenState: TypeAlias = Literal["drop", "keep", "offload"]


class MemberStates:
    """The state of the members' parameters in some optimizers.

    Args:
        how: what becomes of the state of a member that is frozen.
        optimizers: optimizers that hold the parameters.
        parameters: parameters of each member.
    """

    def __init__(
        self,
        how: FrozenState,
        optimizers: tuple[torch.optim.Optimizer, ...] = (),
        parameters: list[list[torch.nn.Parameter]] | None = None,
    ) -> None:
        self.how, self._optimizers, self._parameters = how, optimizers, parameters or []
        self._arrivals = Arrivals()
        self._kept_back: list[tuple[torch.nn.Parameter, State]] = []  # of a state dict that is being loaded

    def drop(self, parameter: torch.nn.Parameter) -> None:
        """Drop the state of a `parameter` that stops, where that is to be."""
        if self.how == "drop":
            for optimizer in self._optimizers:
                if hasattr(optimizer, "drop_state"):  # LowRankAdamW, whose rounding may have kept some of the weight
                    optimizer.drop_state(parameter)
                else:
                    optimizer.state.pop(parameter, None)

    def send_away(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Move the state of `parameters` that have stopped to host memory, where that is to be."""
        if self.how == "offload":
            to_host((optimizer, parameter) for parameter in parameters for optimizer in self._optimizers)

    def fetch(self, members: Iterable[int]) -> None:
        """Bring the state of `members` to where their parameters are: what was kept may come from elsewhere, too."""
        self._arrivals.fetch(self._places(members))
        if any(getattr(optimizer, "gradients", "keep") != "keep" for optimizer in self._optimizers):
            self._arrivals.arrive()  # which read their state during backward

    def arrive(self) -> None:
        """Have what is computed from here on wait for state that is on its way."""
        self._arrivals.arrive()

    def hold_back(
        self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any], active: Iterable[int]
    ) -> dict[str, Any] | None:
        """A state dict without what is to stay in host memory: torch brings all that it finds to the device.

        Args:
            optimizer: optimizer that loads the state dict.
            state_dict: state dict with its groups.
            active: members that train when it is loaded.

        Returns:
            None where there is nothing to hold back.
        """
        self._arrivals.arrive()
        if self.how != "offload":
            return None
        frozen = [p for index, own in enumerate(self._parameters) if index not in set(active) for p in own]
        entries = frozen_entries(optimizer, state_dict, frozen)
        states = {key: value for key, value in state_dict["state"].items() if key not in entries}
        self._kept_back = [(parameter, state_dict["state"][key]) for key, parameter in entries.items()]
        return {**state_dict, "state": states}

    def give_back(self, optimizer: torch.optim.Optimizer) -> None:
        """Put what was held back into the state of an `optimizer` that has loaded the rest."""
        counters_to_host(optimizer)
        for parameter, saved in self._kept_back:
            optimizer.state[parameter] = loaded(optimizer, parameter, saved)
        self._kept_back = []

    def _places(self, members: Iterable[int]) -> Iterator[Place]:
        for index in members:
            for parameter in self._parameters[index]:
                yield from ((optimizer, parameter) for optimizer in self._optimizers)
