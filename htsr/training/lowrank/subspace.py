"""The low-rank subspace of a gradient (GaLore, arXiv 2403.03507): its basis, the way in, the way back.

G is m×n. Where m ≥ n the subspace is of its rows, R = G·P with P the top r right singular vectors (n×r), so R is m×r;
else of its columns, R = Pᵀ·G with the top r left singular vectors (m×r), so R is r×n. A stack of E matrices (the
experts of a mixture) has E subspaces, with E in front of every shape. All functions take plain tensors and DTensors:
for a DTensor gradient, P is sharded like the side of G that it multiplies, and by matrices where G is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from htsr.errors import HtsrError, UsageError

Method: TypeAlias = Literal["svd", "randomized", "random"]

OVERSAMPLING = 8  # directions beyond r, which take up what the iteration has not yet told apart from the top r
NOT_FINITE = "a gradient has NaN or Inf, so it has no singular vectors; lower the learning rate or clip"
_COLD_ITERATIONS, _WARM_ITERATIONS = 3, 1  # the subspace of the last refresh is near, so one from there will do


def projects_right(shape: torch.Size) -> bool:
    """Whether a gradient of this `shape`, (m, n) or (E, m, n), is multiplied by its basis on the right: m ≥ n."""
    return shape[-2] >= shape[-1]


def projector(
    G: Tensor,
    rank: int,
    method: Method = "svd",
    previous: Tensor | None = None,
    generator: torch.Generator | None = None,
    checked: bool = False,
) -> Tensor:
    """Orthonormal basis of the top singular subspace of a gradient, best direction first.

    ``svd`` takes LAPACK's vectors as they come, signs included. ``randomized`` is subspace iteration on GᵀG (or GGᵀ)
    with oversampling 8 and a Rayleigh-Ritz step at the end: one iteration from the previous basis where there is one,
    three from a Gaussian start; each direction takes the sign that agrees with the previous one at its place.

    Args:
        G: (m, n) gradient, or (E, m, n) stack; a DTensor is gathered, but for a stack that is sharded by matrices.
        rank: dimension r of the subspace, cut to min(m, n).
        method: ``svd`` or ``randomized``; ``random`` is `htsr.training.lowrank.scaling.random_basis`.
        previous: the last basis, (min(m, n), any rank) or a stack of them, for a warm start of ``randomized``.
        generator: generator of the Gaussian numbers of ``randomized``, on the CPU.
        checked: whether G is known to be finite; to look costs the wait for a device.

    Returns:
        Basis P, (min(m, n), r) or (E, min(m, n), r), in the dtype of G. Computed in float32 at least, but for the
        products with a bfloat16 gradient, which is not copied.

    Raises:
        HtsrError: G has NaN or Inf.
        UsageError: there is no such method.

    Examples:
        >>> import torch
        >>> from htsr.training.lowrank.subspace import projector
        >>> projector(torch.diag(torch.tensor([1.0, 3.0, 2.0])), rank=2).abs()
        tensor([[0., 0.],
                [1., 0.],
                [0., 1.]])

    Source: GaLore (arXiv 2403.03507), §3; Halko, Martinsson & Tropp (SIAM Rev. 53, 2011), algorithm 4.4.
    """
    if G.ndim == 3:
        return _projectors(G, rank, method, previous, generator, checked)
    whole = _whole(G)
    if not checked and first_not_finite([whole]) is not None:
        raise HtsrError(NOT_FINITE)
    right = projects_right(G.shape)
    rank = min(rank, *G.shape)
    if method == "svd":
        U, _, Vh = torch.linalg.svd(_widened(whole), full_matrices=False)
        P = Vh[:rank].mT if right else U[:, :rank]
    elif method == "randomized":
        start = None if previous is None else _widened(_whole(previous))
        A = _widened(whole) if whole.dtype == torch.float16 else whole  # its squares would underflow
        P = _subspace_iteration(A if right else A.mT, rank, start, generator)
    else:
        raise UsageError(f"unknown method {method!r}: a projector is computed by svd or randomized")
    return _sharded_like(P.to(G.dtype).contiguous(), G)


def first_not_finite(tensors: Sequence[Tensor]) -> int | None:
    """The place of the first tensor that has NaN or Inf; a device is waited for once.

    Args:
        tensors: tensors of any shape each, which may lie on several devices.

    Examples:
        >>> import torch
        >>> from htsr.training.lowrank.subspace import first_not_finite
        >>> first_not_finite([torch.ones(2, 3), torch.tensor([1.0, torch.inf])])
        1
    """
    by_device = defaultdict[torch.device, list[int]](list)
    for i, tensor in enumerate(tensors):
        if tensor.numel():
            by_device[tensor.device].append(i)
    found = []
    for places in by_device.values():
        # without a copy of a tensor: NaN goes through both
        finite = torch.stack([torch.isfinite(torch.stack(torch.aminmax(tensors[i]))).all() for i in places])
        found += [i for i, good in zip(places, finite.tolist(), strict=True) if not good]
    return min(found, default=None)


def _projectors(
    G: Tensor, rank: int, method: Method, previous: Tensor | None, generator: torch.Generator | None, checked: bool
) -> Tensor:
    """Bases of a stack. Noise depends on the place in the stack alone, not on how it is sharded."""
    seed = None if generator is None else int(torch.randint(2**62, (1,), generator=generator, device="cpu"))
    first = _first_slice(G)
    read = _whole if first is None else local
    slices, known = read(G), None if previous is None else read(previous)
    found = [
        projector(
            matrix,
            rank,
            method,
            None if known is None else known[i],
            None if seed is None else torch.Generator().manual_seed(seed + i + (first or 0)),
            checked,
        )
        for i, matrix in enumerate(slices)
    ]
    small, rank = min(G.shape[-2:]), min(rank, *G.shape[-2:])
    P = torch.stack(found) if found else slices.new_empty(0, small, rank)
    if first is None:
        return _sharded_like(P, G)
    if not is_distributed(G):
        return P
    from torch.distributed.tensor import DTensor

    mesh, placements = G.device_mesh, G.placements  # type: ignore[attr-defined]
    shape = torch.Size((G.shape[0], small, rank))
    return DTensor.from_local(P, mesh, placements, run_check=False, shape=shape, stride=(small * rank, rank, 1))


def _first_slice(G: Tensor) -> int | None:
    """Index in the stack of the first matrix that this process holds; None where it holds no whole matrices."""
    if not is_distributed(G):
        return 0
    mesh, placements = G.device_mesh, G.placements  # type: ignore[attr-defined]
    split = [axis for axis, placement in enumerate(placements) if not placement.is_replicate()]
    if any(not placements[axis].is_shard(0) for axis in split) or len(split) > 1:
        return None
    if not split:
        return 0
    each = -(-G.shape[0] // mesh.size(split[0]))
    return min(each * mesh.get_local_rank(split[0]), G.shape[0])


def _subspace_iteration(A: Tensor, rank: int, previous: Tensor | None, generator: torch.Generator | None) -> Tensor:
    """Basis of the top right singular subspace of A: products in A's dtype, bases in float32 at least."""
    dtype = torch.promote_types(A.dtype, torch.float32)
    width = min(A.shape[1], rank + OVERSAMPLING)
    known = A.new_empty(A.shape[1], 0, dtype=dtype) if previous is None else previous[:, :width]
    noise = torch.randn(A.shape[1], width - known.shape[1], generator=generator, dtype=dtype, device="cpu")
    Q = torch.linalg.qr(torch.cat([known.to(A.device), noise.to(A.device, non_blocking=True)], 1))[0]
    for _ in range(_COLD_ITERATIONS if previous is None else _WARM_ITERATIONS):
        # without QR all columns would turn into the top direction, and the others drown in rounding
        Q = torch.linalg.qr((A.mT @ (A @ Q.to(A.dtype))).to(dtype))[0]
    B = (A @ Q.to(A.dtype)).to(dtype)  # Rayleigh-Ritz: the best directions within the span of Q
    _, V = torch.linalg.eigh(B.mT @ B)
    P = Q @ V.flip(-1)[:, :rank]
    if previous is not None:
        common = min(rank, previous.shape[1])
        agreement = (P[:, :common] * previous[:, :common]).sum(0)
        P[:, :common] *= torch.where(agreement < 0, -1.0, 1.0)
    return P


def project(G: Tensor, P: Tensor) -> Tensor:
    """R = G·P, (m, r), where m ≥ n; else R = Pᵀ·G, (r, n).

    Args:
        G: (m, n) gradient.
        P: (min(m, n), r) basis from `projector`.

    Examples:
        >>> import torch
        >>> from htsr.training.lowrank.subspace import project, project_back
        >>> G, P = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), torch.tensor([[1.0], [0.0]])
        >>> project(G, P).flatten()
        tensor([1., 3., 5.])
        >>> project_back(project(G, P), P, G.shape)
        tensor([[1., 0.],
                [3., 0.],
                [5., 0.]])
    """
    return _product(G, P) if projects_right(G.shape) else _product(P.mT, G)


def project_back(R: Tensor, P: Tensor, shape: torch.Size) -> Tensor:
    """R·Pᵀ where m ≥ n, else P·R: (m, n).

    Args:
        R: (m, r) coordinates where m ≥ n, else (r, n).
        P: (min(m, n), r) basis.
        shape: (m, n) shape of the gradient.
    """
    return R @ P.mT if projects_right(shape) else P @ R


def add_projected_back(W: Tensor, R: Tensor, P: Tensor, right: bool, kept: float, factor: float) -> None:
    """W ← kept·W + factor · (R projected back), in place, without a matrix of W's size in between.

    The sum runs over r, which is never sharded, so every process does its own part.

    Args:
        W: (m, n) matrix or (E, m, n) stack, changed; these and the others may be some rows, or a process's part.
        R: (m, r) coordinates where `right`, else (r, n), in the dtype of W.
        P: (n, r) basis where `right`, else (m, r).
        right: whether the whole gradient is multiplied by its basis on the right, `projects_right`.
        kept: factor of what was in W.
        factor: factor of what is added.

    Examples:
        >>> import torch
        >>> from htsr.training.lowrank.subspace import add_projected_back
        >>> W = torch.ones(3, 2)
        >>> R, P = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[0.0], [1.0]])
        >>> add_projected_back(W, R, P, right=True, kept=0.5, factor=-1.0)
        >>> W
        tensor([[ 0.5000, -0.5000],
                [ 0.5000, -1.5000],
                [ 0.5000, -2.5000]])
    """
    add = W.addmm_ if W.ndim == 2 else W.baddbmm_
    add(*((R, P.mT) if right else (P, R)), beta=kept, alpha=factor)


def rotated(exp_avg: Tensor, exp_avg_sq: Tensor, old: Tensor, new: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Adam's moments in the coordinates of a new basis: with C = newᵀ·old, C·exp_avg and (C∘C)·exp_avg_sq.

    The first is the part of the old first moment that lies in the new subspace. The second is what the squares would be
    if the old coordinates were uncorrelated; it is never negative. What lies outside the new subspace is dropped.

    Args:
        exp_avg: (m, r) first moment where m ≥ n, else (r, n); for a sharded matrix, this process's part.
        exp_avg_sq: second moment, shape of the first.
        old: (min(m, n), r) basis that the moments are in.
        new: (min(m, n), r') basis to go to.
        shape: (m, n) shape of the whole matrix.

    Returns:
        Both moments with r' in place of r, in their dtype.

    Examples:
        A basis that is turned by 45°: half of each direction's variance goes to the new one.

        >>> import math, torch
        >>> from htsr.training.lowrank.subspace import rotated
        >>> old, new = torch.eye(2), torch.tensor([[1.0], [1.0]]) / math.sqrt(2)
        >>> m, v = rotated(torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, 3.0]]), old, new, torch.Size((2, 2)))
        >>> round(m.item(), 4), round(v.item(), 4)
        (1.4142, 2.0)
    """
    C = local(_product(new.mT, old)).to(exp_avg.dtype)
    if projects_right(shape):
        return exp_avg @ C.mT, exp_avg_sq @ (C * C).mT
    return C @ exp_avg, (C * C) @ exp_avg_sq


def local(tensor: Tensor) -> Tensor:
    """This process's part of a `tensor` of any shape if it is a DTensor, on the same memory; else the tensor itself."""
    return tensor.to_local() if hasattr(tensor, "device_mesh") else tensor  # type: ignore[attr-defined]


def is_distributed(tensor: Tensor) -> bool:
    """Whether `tensor`, of any shape, is a DTensor."""
    return hasattr(tensor, "device_mesh")


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if is_distributed(tensor) else tensor  # type: ignore[attr-defined]


def _widened(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _sharded_like(P: Tensor, G: Tensor) -> Tensor:
    if not is_distributed(G):
        return P
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(P, G.device_mesh, basis_placements(G))  # type: ignore[attr-defined]


def basis_placements(G: Tensor) -> list[Any]:
    """The placements of a basis for a DTensor gradient: sharded like the side of G that it multiplies.

    Args:
        G: (m, n) gradient, or (E, m, n) stack.
    """
    from torch.distributed.tensor import Replicate, Shard

    own = G.ndim - 2  # the axis of the basis that goes with that side of G
    side = own + 1 if projects_right(G.shape) else own
    return [
        Shard(own) if placement.is_shard(side) else placement if placement.is_shard(own - 1) else Replicate()
        for placement in G.placements  # type: ignore[attr-defined]
    ]


def _product(A: Tensor, B: Tensor) -> Tensor:
    """A·B, summed over the processes where the inner side is sharded."""
    C = A @ B
    if not hasattr(C, "device_mesh"):
        return C
    from torch.distributed.tensor import Replicate

    settled = [Replicate() if placement.is_partial() else placement for placement in C.placements]  # type: ignore[attr-defined]
    return C.redistribute(placements=settled)  # type: ignore[attr-defined,no-any-return]
