"""The step of an optimizer while it runs: whose call it is, and whether it will do anything."""

from __future__ import annotations

import sys
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


def is_captured() -> bool:
    """Whether what runs now is captured into a CUDA graph, which will repeat it with the numbers of this moment."""
    begun: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return begun and torch.cuda.is_current_stream_capturing()
