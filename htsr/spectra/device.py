"""The same on an accelerator: a matrix and its Gram matrix lie there, and nothing but eigenvalues comes back.

One thread works on one matrix at a time, on the device's own stream: solvers of several threads would load torch's
library of them twice, which it refuses, and would each hold a matrix. All that the device holds is the matrix as it is
stored, its Gram matrix with the solver's copy of it, and 32 MiB of rows that are being up-cast.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from htsr.arrays import Array, Product, Vector
from htsr.errors import UsageError, is_out_of_memory
from htsr.spectra.checks import require_finite, require_squares
from htsr.spectra.exact_products import exact_products

if TYPE_CHECKING:
    import torch

BATCHED_UP_TO = 32  # M up to which torch solves a stack of matrices in one call of cuSOLVER; a loop from there on
_CHUNK = 1 << 22  # entries that are up-cast at a time while a Gram matrix is accumulated


def usable_device(device: object) -> str:
    """The name of a device that computes here.

    Args:
        device: device as torch names it, or a `torch.device`; ``auto`` is left as it is.

    Raises:
        UsageError: it is no device's name, or this machine has no such device.

    Examples:
        >>> import torch
        >>> from htsr.spectra.device import usable_device
        >>> usable_device(torch.device("cpu")), usable_device("auto")
        ('cpu', 'auto')
    """
    name = str(device)
    if name in ("auto", "cpu"):
        return name
    import torch

    try:
        torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"unknown device {name!r}: auto, cpu, cuda, cuda:1, mps, xpu") from error
    try:
        if torch.zeros(1, device=name).is_meta:
            raise UsageError("device 'meta' computes nothing")
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        if is_out_of_memory(error):  # of one that is here
            return name
        raise UsageError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return name


def solving_device(device: str | torch.device, matrix: Array | Product | None = None) -> str:
    """The device that computes where `device` is asked for.

    Apple's MPS has neither float64 nor an eigensolver: its matrices are solved on the CPU.

    Args:
        device: device as torch names it, or a `torch.device`; ``auto`` is where the matrix lies.
        matrix: matrix to be solved, (m, n) or (pieces, m, n).

    Examples:
        >>> import numpy as np
        >>> from htsr.spectra.device import solving_device
        >>> solving_device("auto", np.eye(2)), solving_device("mps:0"), solving_device("cuda:1")
        ('cpu', 'cpu', 'cuda:1')
    """
    device = str(device)
    if device == "auto":
        device = "cpu" if matrix is None or isinstance(matrix, (np.ndarray, Product)) else str(matrix.device)
    return "cpu" if device.partition(":")[0] == "mps" else device


def on_device(matrix: Array, device: str) -> torch.Tensor:
    """A matrix as a tensor of `device`, in its stored dtype, without a graph.

    Args:
        matrix: array of any shape, on any device.
        device: device as torch names it.

    Examples:
        >>> import numpy as np
        >>> from htsr.spectra.device import on_device
        >>> on_device(np.eye(2, dtype=np.float32), "cpu").dtype
        torch.float32
    """
    import torch

    if isinstance(matrix, np.ndarray):  # torch warns of those nobody may write to, and takes none that run backwards
        as_it_is = matrix.flags.writeable and min(matrix.strides, default=0) >= 0
        matrix = np.ascontiguousarray(matrix if as_it_is else matrix.copy())
    return torch.as_tensor(matrix).detach().to(device, non_blocking=torch.device(device).type != "cpu")


def device_eigenvalues(W: torch.Tensor, route: str, dtype: str) -> Vector:
    """Eigenvalues of a matrix or of a stack of such, computed on the device where they lie.

    Args:
        W: (m, n) or (pieces, m, n), any float dtype.
        route: ``gram`` or ``svd``.
        dtype: precision of the computation, ``float32`` or ``float64``.

    Returns:
        (M,) or (pieces, M) float64 on the CPU, ascending along the last axis, nothing set to 0 yet.

    Raises:
        MatrixError: entries are NaN, infinite or overflow (status ``nan``), or are so small that their squares vanish
            (``underflow``).

    Examples:
        >>> import torch
        >>> from htsr.spectra.device import device_eigenvalues
        >>> device_eigenvalues(torch.tensor([[3.0, 0.0], [0.0, 1.0], [4.0, 0.0]]), "gram", "float64")
        array([ 1., 25.])
    """
    import torch

    kind = getattr(torch, dtype)
    with exact_products(str(W.device)):
        if route == "svd":
            values = W.to(kind)
            require_finite(float(values.sum(dtype=torch.float64)))
            with np.errstate(over="ignore"):  # what overflows is refused, in words
                return np.sort(_on_host(torch.linalg.svdvals(values)) ** 2)
        grams = device_gram(W, kind)
        require_squares(float(grams.max()), dtype, W.any)
        return _on_host(torch.linalg.eigvalsh(grams))


def batch_on_device(matrices: Sequence[Array], dtype: str, device: str) -> Vector:
    """Eigenvalues of several small matrices of one shape by the route ``gram``, in one call of the solver.

    Args:
        matrices: matrices of one shape, each (m, n), any float dtype.
        dtype: precision of the computation, ``float32`` or ``float64``.
        device: device that computes, as torch names it.

    Returns:
        (len(matrices), M) float64 on the CPU, ascending along the last axis, nothing set to 0 yet.

    Raises:
        MatrixError: `device_eigenvalues` would refuse one of them; one bad matrix spoils the batch.

    Examples:
        >>> import numpy as np
        >>> from htsr.spectra.device import batch_on_device
        >>> batch_on_device([np.eye(2), np.diag([2.0, 3.0])], "float64", "cpu")
        array([[1., 1.],
               [4., 9.]])
    """
    import torch

    kind = getattr(torch, dtype)
    with exact_products(device):
        tensors = [on_device(matrix, device) for matrix in matrices]
        grams = torch.stack([device_gram(W, kind) for W in tensors])
        for largest, W in zip(grams.amax(dim=(1, 2)).tolist(), tensors, strict=True):
            require_squares(largest, dtype, W.any)
        return _on_host(torch.linalg.eigvalsh(grams))


def device_gram(W: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The smaller Gram matrix, (M, M) or (pieces, M, M), accumulated so that W is never up-cast whole.

    Args:
        W: (m, n) or (pieces, m, n), any float dtype.
        dtype: dtype of products and sums.

    Examples:
        >>> import torch
        >>> from htsr.spectra.device import device_gram
        >>> device_gram(torch.tensor([[3.0, 0.0], [0.0, 1.0], [4.0, 0.0]]), torch.float64)
        tensor([[25.,  0.],
                [ 0.,  1.]], dtype=torch.float64)
    """
    import torch

    tall = W if W.shape[-2] >= W.shape[-1] else W.mT
    *pieces, N, M = tall.shape
    grams = torch.zeros((*pieces, M, M), dtype=dtype, device=W.device)
    add: Any = grams.baddbmm_ if pieces else grams.addmm_  # in place: no second matrix of this size
    rows = max(1, _CHUNK // max(1, tall[..., 0, :].numel()))
    for start in range(0, N, rows):
        block = tall[..., start : start + rows, :].to(dtype)
        add(block.mT, block)
    return grams


def _on_host(values: torch.Tensor) -> Vector:
    return np.asarray(values.double().cpu().numpy())
