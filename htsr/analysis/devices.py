"""Which device computes: the one that is asked for, where a live model lies, or this process's accelerator."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from itertools import chain

from htsr.spectra.device import usable_device


def pick_device(device: object, source: object = None) -> str:
    """`device`, with ``auto`` as where a live model lies, else as this process's accelerator where there is one.

    Args:
        device: device as torch names it, a `torch.device`, or ``auto``.
        source: model that is analyzed: a module, a state dict, or what is read from files.

    Raises:
        UsageError: it is no name of a device, or this machine has no such device.
    """
    name = usable_device(device)
    if name.partition(":")[0] == "cpu":
        return "cpu"  # "cpu:0" is no accelerator, whose matrices take their turns in one thread
    return name if name != "auto" else device_of(source) or own_accelerator() or "cpu"


def device_of(source: object) -> str | None:
    """The accelerator that a module or a state dict lies on, the first of several; None where it lies on none.

    Args:
        source: model in any form; what is read from files lies on none.
    """
    if "torch" not in sys.modules:
        return None
    from torch import Tensor, nn

    tensors: Iterable[object] = ()
    if isinstance(source, nn.Module):
        tensors = chain(source.parameters(), source.buffers())
    elif isinstance(source, Mapping):
        tensors = source.values()
    devices = (tensor.device for tensor in tensors if isinstance(tensor, Tensor))
    return next((str(device) for device in devices if device.type not in ("cpu", "meta")), None)


def own_accelerator() -> str | None:
    """This process's accelerator with float64, on a machine with several that of its rank; None where there is none.

    torch is asked only where a driver shows: a machine without an accelerator needs it for nothing else here, and
    importing it takes longer than many an analysis.
    """
    drivers = ("/proc/driver/nvidia/version", "/dev/kfd", "/dev/nvidiactl", "/dev/dxg", "/dev/dri/renderD128")
    if "torch" not in sys.modules and sys.platform != "win32" and not any(map(os.path.exists, drivers)):
        return None
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None or accelerator.type == "mps":
        return None
    rank = os.environ.get("LOCAL_RANK", "")
    own = int(rank) if rank.isdecimal() else torch.accelerator.current_device_index()
    if own >= torch.accelerator.device_count():  # the launcher shows each process its own only
        own = torch.accelerator.current_device_index()
    return f"{accelerator.type}:{own}"
