"""Loading of an optimizer's state as it was saved: torch casts its tensors to the dtype of their parameters.

Tensors are sealed while torch copies the state: after all hooks that come before loading, and opened before those that
come after it, which find them where they stay. A step goes to the CPU, so that no device is waited for to read it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class _Sealed:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()


@contextmanager
def sealed(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Within, ``torch.optim.Optimizer.load_state_dict`` passes tensors of the state on as they are, sealed.

    Args:
        optimizer: optimizer whose ``__setstate__`` calls `open_all`.
    """

    def seal(_: Any, given: dict[str, Any]) -> dict[str, Any]:
        state = {
            key: {name: _Sealed(value) if torch.is_tensor(value) else value for name, value in values.items()}
            for key, values in given["state"].items()
        }
        return {**given, "state": state}

    handle = optimizer.register_load_state_dict_pre_hook(seal)
    try:
        yield
    finally:
        handle.remove()


def open_all(state: dict[Any, dict[str, Any]]) -> None:
    """Put copies of sealed tensors in their place: on the parameter's device, in the dtype that was saved.

    A step that is a plain number becomes a tensor.

    Args:
        state: state by parameter, changed; without sealed tensors it stays as it is.
    """
    for parameter, values in state.items():
        for name, value in values.items():
            if isinstance(value, _Sealed):
                here = name == "step" or not torch.is_tensor(parameter)
                values[name] = value.tensor.to("cpu" if here else parameter.device, copy=True)
            elif name == "step" and isinstance(value, (int, float)):  # as older versions of torch counted
                values[name] = torch.tensor(float(value), device="cpu")
