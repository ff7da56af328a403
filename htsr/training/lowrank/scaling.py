"""Learning rates by channel or by matrix, as Adam has them in a random projection (APOLLO, arXiv 2412.05270).

Of a gradient G with coordinates R, and D Adam's direction for R, the subspace tells only how far to go:

    W ← W - lr·scale·G·s        s = ‖D‖/‖R‖

by channel, which is a row of G where m ≥ n and else a column, or once for the whole matrix. The projection P has
independent normal entries of variance 1/r, which keep norms on average, and is made of its seed whenever it is needed,
so that nothing of it is stored.

From one step to the next ‖G·s‖ grows by a factor of at most `GROWTH` (Fira's limiter, arXiv 2410.01623), where it was
not 0. As in the authors' code, its norm is that with Adam's moments as they are, uncorrected for their bias.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from htsr.training.lowrank.rounding import axis_keys, entry_normals
from htsr.training.lowrank.subspace import basis_placements, is_distributed, local, projects_right

ScaledBy: TypeAlias = Literal["channel", "tensor"]

SCALED_BY: tuple[ScaledBy, ...] = ("channel", "tensor")
GROWTH = 1.01
_LEAST = 1e-8  # what is added to norms that divide, as the authors have it


def random_basis(G: Tensor, rank: int, seed: int) -> Tensor:
    """Random projection of a gradient: independent normal numbers of variance 1/r.

    It is a function of the gradient's shape, the rank and the seed alone, however the gradient is sharded.

    Args:
        G: (m, n) gradient, or (E, m, n) stack.
        rank: dimension r, cut to min(m, n).
        seed: seed of the numbers, the same on all processes.

    Returns:
        (min(m, n), r) or (E, min(m, n), r) numbers in the dtype of G, sharded like the side of G that they multiply.

    Examples:
        Norms are kept on average:

        >>> import torch
        >>> from htsr.training.lowrank.scaling import random_basis
        >>> from htsr.training.lowrank.subspace import project
        >>> G = torch.ones(2000, 50)
        >>> norms = [project(G, random_basis(G, rank=16, seed=seed))[0].square().sum() for seed in range(1000)]
        >>> round((torch.stack(norms).mean() / 50).item(), 1)
        1.0
    """
    small = min(G.shape[-2:])
    shape = (*G.shape[:-2], small, min(rank, small))
    if not is_distributed(G):
        keys = axis_keys(torch.empty(shape, device=G.device), seed)
        return entry_normals(keys).div_(shape[-1] ** 0.5).to(G.dtype)
    from torch.distributed.tensor import DTensor, empty

    whole = empty(shape, device_mesh=G.device_mesh, placements=basis_placements(G))  # type: ignore[attr-defined]
    part = entry_normals(axis_keys(whole, seed)).div_(shape[-1] ** 0.5).to(G.dtype)
    mesh, placements = whole.device_mesh, whole.placements
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride())


def scaling(G: Tensor, R: Tensor, D: Tensor, by: ScaledBy) -> Tensor:
    """How far Adam goes in the subspace for the length of the gradient there: ‖D‖/‖R‖.

    Args:
        G: (m, n) gradient, or (E, m, n) stack, of which shape and placements are read.
        R: its coordinates, (m, r) where m ≥ n, else (r, n).
        D: Adam's direction for R, (m, r) or (r, n) as R; of a DTensor this process's part, as of the result.
        by: ``channel``: for each row of G where m ≥ n, else for each column; ``tensor``: for the whole matrix.

    Returns:
        Factors of the gradient in the dtype of D: (m, 1) or (1, n), or (1, 1); a stack has E of them.

    Examples:
        >>> import torch
        >>> from htsr.training.lowrank.scaling import scaling
        >>> R, D = torch.tensor([[3.0, 4.0], [0.0, 0.5]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        >>> scaling(torch.ones(2, 2), R, D, "channel")
        tensor([[0.2000],
                [2.0000]])
    """
    R_here = local(R).to(D.dtype)
    if by == "channel":
        axis = -1 if projects_right(G.shape) else -2
        lengths = [torch.linalg.vector_norm(part, dim=axis, keepdim=True) for part in (D, R_here)]
    else:
        lengths = [_norms(part.square().sum((-2, -1), keepdim=True), R) for part in (D, R_here)]
    return lengths[0] / (lengths[1] + _LEAST)


def limited(state: dict[str, Any], G: Tensor, factors: Tensor, correction: float) -> Tensor:
    """Factors of a gradient with which its update grows by at most `GROWTH` since the last step.

    Args:
        state: state of the parameter; ``update_norm``, (1, 1) or (E, 1, 1), is put into it.
        G: (m, n) gradient, or (E, m, n) stack.
        factors: (m, 1), (1, n) or (1, 1) factors from `scaling`, (E, …) of a stack; those of this process's part.
        correction: √(1 - β₂ᵗ), by which the corrected root of the second moment is too large for the uncorrected norm.

    Returns:
        The factors, divided where the update is limited; in their shape.

    Examples:
        >>> import torch
        >>> from htsr.training.lowrank.scaling import limited
        >>> G, state = torch.ones(2, 2), {}
        >>> limited(state, G, torch.full((1, 1), 1.0), correction=1.0).item()
        1.0
        >>> round(limited(state, G, torch.full((1, 1), 3.0), correction=1.0).item(), 4)
        1.01
    """
    axis = -1 if projects_right(G.shape) else -2
    lengths = torch.linalg.vector_norm(local(G), dim=axis, keepdim=True, dtype=factors.dtype)
    norm = _norms((lengths * factors).square_().sum((-2, -1), keepdim=True), G).div_(correction)
    if "update_norm" in state:
        before = local(state["update_norm"]).to(norm.dtype)
        excess = (norm / (before + _LEAST)).clamp_(min=GROWTH).div_(GROWTH)
        excess = torch.where(before > 0, excess, 1.0)  # else an expert without tokens would stand still for long
        factors, norm = factors / excess, norm / excess
        local(state["update_norm"]).copy_(norm)
    else:
        state["update_norm"] = _of_stack(norm.to(torch.promote_types(norm.dtype, torch.float32)), G)
    return factors


def _norms(squares: Tensor, like: Tensor) -> Tensor:
    """Roots of sums of squares, (1, 1) or (E, 1, 1), over the processes between which a matrix is shared out."""
    if is_distributed(like):
        from torch.distributed.tensor import DTensor, Partial, Replicate

        stack = like.ndim - 3  # the axis of a stack's matrices, none of which is shared out by it
        placements = [Partial() if p.is_shard() and p.dim != stack else Replicate() for p in like.placements]  # type: ignore[attr-defined]
        shared = DTensor.from_local(squares, like.device_mesh, placements, run_check=False)  # type: ignore[attr-defined]
        squares = shared.redistribute(placements=[Replicate()] * len(placements)).to_local()
    return squares.sqrt()


def _of_stack(norms: Tensor, G: Tensor) -> Tensor:
    """The norms of a stack's matrices as a DTensor where the stack is shared out by matrices."""
    if not is_distributed(G) or G.ndim < 3:
        return norms
    from torch.distributed.tensor import DTensor, Replicate

    placements = [p if p.is_shard(0) else Replicate() for p in G.placements]  # type: ignore[attr-defined]
    shape = torch.Size((G.shape[0], 1, 1))
    return DTensor.from_local(norms, G.device_mesh, placements, run_check=False, shape=shape, stride=(1, 1, 1))  # type: ignore[attr-defined]
