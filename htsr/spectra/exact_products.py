"""Products in full precision, whatever the process has allowed: training often allows TF32 or bfloat16."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any


@contextmanager
def exact_products(device: str) -> Iterator[None]:
    """Products in the precision of their factors, whatever the training around them has set: no autocast, no TF32.

    TF32 keeps 10 bits of each entry, bfloat16 keeps 7: eigenvalues below 1e-3·λ_max would be noise. No graph is kept.

    Args:
        device: device that computes, as torch names it.

    Examples:
        >>> import torch
        >>> from htsr.spectra.exact_products import exact_products
        >>> x = torch.ones(2, 2)
        >>> with torch.autocast("cpu", dtype=torch.bfloat16), exact_products("cpu"):
        ...     (x @ x).dtype
        torch.float32
    """
    import torch

    switches: Any = torch.backends
    cuda, onednn = switches.cuda.matmul, switches.mkldnn.matmul
    newer = cuda.fp32_precision, onednn.fp32_precision
    lowered = not {*newer} <= {"ieee", "none"}
    older = "highest"
    if lowered:  # torch has two sets of switches, and refuses to say what holds where they contradict each other
        with suppress(RuntimeError):
            older = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        cuda.fp32_precision = onednn.fp32_precision = "ieee"
    try:
        with torch.no_grad(), torch.autocast(torch.device(device).type, enabled=False):
            yield
    finally:
        if lowered:
            torch.set_float32_matmul_precision(older)
            cuda.fp32_precision, onednn.fp32_precision = newer
