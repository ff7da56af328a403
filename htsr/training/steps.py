"""The step of an optimizer while it runs: whose call it is, and whether it will do anything."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import FrameType
from typing import Any

import torch

# every class of optimizer has its step wrapped by a function with this code, by which a running step is recognised
_STEP = torch.optim.Optimizer.profile_hook_step(lambda: None).__code__


def running_steps() -> list[FrameType | None]:
    """The calls of torch's wrapper around `Optimizer.step` that are running, innermost first.

    A subclass whose step calls its parent's runs the hooks of both.
    """
    found: list[FrameType | None] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename == _STEP.co_filename and frame.f_code.co_name == _STEP.co_name:
            found.append(frame)
        frame = frame.f_back
    return found or [None]


def skipped_by_scaler(optimizer: Any) -> bool:
    """Whether a fused optimizer was called by a GradScaler with gradients that overflowed, and does nothing.

    Args:
        optimizer: optimizer whose `step` is being called.
    """
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found.item())


def scale_of_running_step() -> float:
    """The factor that gradients had during backward: that of the GradScaler whose call the running step is, else 1."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self") if frame.f_code.co_name == "step" else None
        if isinstance(caller, torch.amp.GradScaler):
            return float(caller.get_scale()) if caller.is_enabled() else 1.0
        frame = frame.f_back
    return 1.0


def is_captured() -> bool:
    """Whether what runs now is captured into a CUDA graph, which will repeat it with the numbers of this moment."""
    begun: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return begun and torch.cuda.is_current_stream_capturing()


def counts_on_device(group: Mapping[str, Any]) -> bool:
    """Whether torch keeps the step counters of a parameter `group` on the device, where its kernels read them."""
    return bool(group.get("fused") or group.get("capturable"))


def counters_to_host(optimizer: torch.optim.Optimizer) -> None:
    """Put the step counters of a loaded state on the CPU, where torch makes them and reads them at each step.

    A checkpoint that was loaded onto a device leaves them there, and each step would wait for the device as often as
    there are parameters. Fused and capturable optimizers want them on the device.

    Args:
        optimizer: optimizer of any class; only those of torch are looked at, ASGD apart, which computes with them.
    """
    of_torch = (kind for kind in type(optimizer).__mro__ if kind.__module__.startswith("torch.optim."))
    if next(of_torch, torch.optim.Optimizer) in (torch.optim.Optimizer, torch.optim.ASGD):
        return
    for group in optimizer.param_groups:
        if counts_on_device(group):
            continue
        for parameter in group["params"]:
            step = optimizer.state.get(parameter, {}).get("step")
            if torch.is_tensor(step) and step.device.type != "cpu":
                optimizer.state[parameter]["step"] = step.cpu()
