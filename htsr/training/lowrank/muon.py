"""Muon's update of one matrix: momentum, orthogonalised, whole or of its coordinates in a subspace."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from htsr.training import adam
from htsr.training.lowrank import moments
from htsr.training.lowrank.subspace import is_distributed
from htsr.training.lowrank.update import Pending, add_directions

_COEFFICIENTS, _ITERATIONS, _EPS = (3.4445, -4.775, 2.0315), 5, 1e-7  # torch.optim.Muon's
_RMS = 0.2  # of AdamW's updates (arXiv 2502.16982, §2.2)


def update(one: Pending) -> None:
    """A step of Muon: W ← (1 - lr·weight_decay)·W - lr·scale·0.2·√max(m, n)·D, with D projected back from a subspace.

    D is the orthogonalised momentum of R: that of torch.optim.Muon, with ``adjust_lr_fn="match_rms_adamw"``, under
    which a learning rate means what it means for AdamW. `scale` counts in a subspace only.

    Args:
        one: parameter, with the keys ``momentum`` and ``nesterov`` in its group; it and its state are changed. The
            momentum is ``exp_avg`` in the state, in the group's ``state_dtype``.

    Source: Muon (kellerjordan.github.io/posts/muon); Muon is Scalable for LLM Training (arXiv 2502.16982).
    """
    state, group, R = one.state, one.group, one.R
    if "exp_avg" not in state:
        state["step"] = torch.zeros((), device="cpu")
        moments.create(state, R, group["state_dtype"], second=False)
    adam.count([state["step"]])
    held, beta = moments.read(state, "exp_avg"), float(group["momentum"])
    G = (R.to_local() if is_distributed(R) else R).to(held.dtype)  # type: ignore[attr-defined]
    held.lerp_(G, 1 - beta)
    direction = (G.lerp(held, beta) if group["nesterov"] else held).to(R.dtype)
    if held.dtype != state["exp_avg"].dtype:
        moments.write(state, "exp_avg", held)
    D = _over_processes(direction, R) if is_distributed(R) else orthogonalised(direction)
    lr, scale = one.constants.lr, 1.0 if group["rank"] is None else one.constants.scale
    add_directions([one], [one.done + 1], [D], [-lr * scale * _RMS * max(one.parameter.shape[-2:]) ** 0.5])


def orthogonalised(M: Tensor) -> Tensor:
    """About U·Vᵀ of M = U·diag(σ)·Vᵀ, by five Newton-Schulz iterations: singular values between 0.7 and 1.2.

    Args:
        M: (m, n) matrix, or (E, m, n) stack.

    Returns:
        The same shape and dtype; computed in that dtype, float16 in float32.

    Examples:
        >>> import torch
        >>> from htsr.training.lowrank.muon import orthogonalised
        >>> orthogonalised(torch.diag(torch.tensor([3.0, -0.2]))).round(decimals=1) + 0.0
        tensor([[ 0.7000,  0.0000],
                [ 0.0000, -1.1000]])

    Source: torch.optim.Muon, which computes it in bfloat16, as Keller Jordan's.
    """
    a, b, c = _COEFFICIENTS
    X = M.float() if M.dtype == torch.float16 else M
    tall = M.shape[-2] > M.shape[-1]
    X = X.mT if tall else X
    X = X / torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True).clamp(min=_EPS)
    add: Any = torch.addmm if X.ndim == 2 else torch.baddbmm
    for _ in range(_ITERATIONS):
        gram = X @ X.mT
        X = add(X, add(gram, gram, gram, beta=b, alpha=c), X, beta=a)
    return (X.mT if tall else X).to(M.dtype)


def _over_processes(part: Tensor, R: Tensor) -> Tensor:
    """This process's part of the orthogonalised matrix of which it holds `part`, sharded as the DTensor `R` is."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh, placements = R.device_mesh, R.placements  # type: ignore[attr-defined]
    sharded = DTensor.from_local(part, mesh, placements, run_check=False, shape=R.shape, stride=R.stride())
    whole = orthogonalised(sharded.full_tensor())
    everywhere = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(placements=placements).to_local()
