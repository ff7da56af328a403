"""One block whose weights live in host memory, and which of them do."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from htsr.errors import HtsrError, UsageError
from htsr.training.streaming.calls import Instead
from htsr.training.streaming.homes import Home, Where


def resident(model: nn.Module, blocks: Iterable[nn.Module]) -> set[int]:
    """Identities of the parameters of blocks that stay on the device.

    They are those that other parts of the model have, too, and those that a block has itself and not in one of its
    parts: checkpointing may compute the inside of a block again without calling the block, and only a call is seen.

    Args:
        model: model with these blocks.
        blocks: its blocks.
    """
    blocks = tuple(blocks)
    lists = (nn.ParameterList, nn.ParameterDict)
    own = {id(part) for block in blocks for part in (block, *block.children()) if part is block or type(part) in lists}
    inside = {id(part): index for index, block in enumerate(blocks) for part in block.modules() if id(part) not in own}
    found: dict[int, set[int | None]] = {}
    for part in model.modules():
        for parameter in part._parameters.values():
            if parameter is not None:
                found.setdefault(id(parameter), set()).add(inside.get(id(part)))
    return {parameter for parameter, places in found.items() if len(places) > 1 or None in places}


class StreamedBlock:
    """A block, the home of its parameters, and which of them are away from the device.

    Args:
        name: name of the block.
        module: the block; its weights move into host memory of the home.
        stays: identities of parameters that stay on the device, see `resident`.
        device: device that the block visits.
        where: where the weights live, see `Home`.

    Attributes:
        parameters: its parameters, without those that stay.
        home: home of their values.
        away: indices of those that are away from the device.
        begun: forwards of the block and of its parts that run, one in another, each with its context of
            `saved_weights` if it has one.
    """

    def __init__(self, name: str, module: nn.Module, stays: set[int], device: torch.device, where: Where) -> None:
        self.name, self.module, self._device = name, module, device
        found = {
            id(parameter): (owner, key, parameter)
            for owner in module.modules()
            for key, parameter in owner._parameters.items()
            if parameter is not None and id(parameter) not in stays
        }
        self._owners = [(owner, key) for owner, key, _ in found.values()]
        self.parameters = [parameter for _, _, parameter in found.values()]
        self._rest = [parameter for parameter in module.parameters() if id(parameter) in stays]
        self.home = Home(self.parameters, device, where)
        self.away = list(range(len(self.parameters)))
        self.begun: list[torch.autograd.graph.saved_tensors_hooks | None] = []
        self.go_home()
        self._apply = Instead(module, "_apply", self._moved)

    def visit(self, memory: Tensor) -> None:
        """Point the parameters that are away into a buffer of the device, `memory` (bytes,), that holds the block."""
        for i in self.away:
            self.parameters[i].data = self.home.layout.places[i].of(memory)

    def go_home(self) -> None:
        """Point the parameters that are away to their home."""
        for i in self.away:
            self.parameters[i].data = self.home.views[i]

    def adopt(self) -> bool:
        """Take home what others have put in the place of a parameter's value since; whether there was such a value.

        Raises:
            HtsrError: the parameter itself is another one now, or its value another in kind.
        """
        found = False
        for i in self.away:
            (owner, key), parameter, view = self._owners[i], self.parameters[i], self.home.views[i]
            if owner._parameters.get(key) is not parameter or parameter.shape != view.shape:
                raise HtsrError(f"{key} of {self.name} has been replaced while its block is streamed: stop that before")
            if parameter.data_ptr() != view.data_ptr():
                view.copy_(parameter)
                parameter.data = view
                found = True
        return found

    @torch.no_grad()
    def let_go(self, trains: set[int]) -> None:
        """Write what is on the device, and is not among the identities `trains`, back to its home."""
        for i, parameter in enumerate(self.parameters):
            if i not in self.away and id(parameter) not in trains:
                self.home.views[i].copy_(parameter)
                parameter.data = self.home.views[i]
                self.away = sorted((*self.away, i))

    @torch.no_grad()
    def take(self, trains: set[int]) -> None:
        """Give what is among the identities `trains` memory of its own on the device."""
        self.adopt()
        for i in [i for i in self.away if id(self.parameters[i]) in trains]:
            place = self.home.layout.places[i]
            own = torch.empty_strided(place.shape, place.stride, dtype=place.dtype, device=self._device)
            self.parameters[i].data = own.copy_(self.home.views[i])
            self.away.remove(i)

    def free(self) -> None:
        """Let ``module.to`` move the block as any other."""
        self._apply.remove()

    def _moved(self, convert: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """What ``module.to`` does: move buffers and what stays on the device, and leave the others where they are."""
        for parameter in self.parameters:
            like = convert(torch.empty(0, dtype=parameter.dtype, device=self._device))
            if like.dtype != parameter.dtype or like.device != self._device:
                raise UsageError(
                    f"{self.name} is streamed to {self._device}: stop that before the model is moved elsewhere or cast"
                )
        for part in self.module.modules():
            for key, buffer in part._buffers.items():
                if buffer is not None:
                    part._buffers[key] = convert(buffer)
        for parameter in self._rest:
            parameter.data = convert(parameter.data)
        return self.module
