"""Products of float32 matrices in float32, whatever the process has allowed: training often allows TF32 or bfloat16."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def exact_products() -> Iterator[None]:
    """Within it a product of float32 matrices is one of float32 numbers, on a CPU and on CUDA devices.

    TF32 keeps 10 bits of each entry, bfloat16 keeps 7: eigenvalues below 1e-3·λ_max would be noise.

    Examples:
        >>> import torch
        >>> from htsr.spectra.exact_products import exact_products
        >>> torch.set_float32_matmul_precision("high")
        >>> with exact_products():
        ...     torch.backends.cuda.matmul.fp32_precision
        'ieee'
        >>> torch.backends.cuda.matmul.fp32_precision
        'tf32'
        >>> torch.set_float32_matmul_precision("highest")
    """
    import torch

    known: Any = torch.backends  # torch does not declare all of them
    backends = (known.cuda.matmul, known.mkldnn.matmul)
    before = [(backend, backend.fp32_precision) for backend in backends]
    changed = [(backend, precision) for backend, precision in before if precision not in ("ieee", "none")]
    for backend, _ in changed:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, precision in changed:
            backend.fp32_precision = precision
