"""A gentle nudge of each matrix's spectrum towards α = 2 every few steps, for any torch optimizer.

    optimizer = htsr.spectral_projection(torch.optim.AdamW(model.parameters(), lr=1e-3), model)

The optimizer stays what it is. After every `interval` of its steps the weights are nudged (`htsr.spectra.nudge`): the
exponent of each power-law tail moves towards 2 as far as the trace-log (ERG) condition allows, at constant norm.
Like decoupled weight decay it acts on the weights alone and leaves moments as they are.

On SETOL's perceptron (``reports/setol_mlp3``) it brings α and the trace-log number to (2, 0) at every learning rate,
and the test error does not fall with them: an instrument, not a regularizer.

The only state is a count of steps, in the param groups, so `optimizer.state_dict()` carries it through any checkpoint.
The ranks of a distributed run share the tensors, one each at a time, and each tensor goes from the rank that nudged it
to all others, so that replicas end bit for bit alike. FSDP2's sharded tensors are put together one a rank. Weights that
lie on a device are decomposed there.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from htsr.analysis.sharing import described
from htsr.errors import MatrixError, UsageError
from htsr.matrices.models import Filter, WeightMatrix, as_filter, by_tensor
from htsr.matrices.roles import whole_name
from htsr.matrices.sharded import Shard, open_live, refuse_flat
from htsr.matrices.stored_tensors import base_names
from htsr.ranks import Ranks
from htsr.spectra.attempts import attempted
from htsr.spectra.nudge import Nudge, nudge
from htsr.spectra.tail import FitMethod

if TYPE_CHECKING:
    import torch
    from torch import nn

logger = logging.getLogger(__name__)

OptimizerType = TypeVar("OptimizerType", bound="torch.optim.Optimizer")

STEPS = "htsr_spectral_steps"
MIN_SIZE = 50  # smaller matrices have no tail to speak of


def spectral_projection(
    optimizer: OptimizerType,
    model: nn.Module,
    *,
    strength: float = 0.05,
    interval: int = 100,
    fit: FitMethod = "ks",
    where: Filter | None = None,
    distributed: bool = True,
) -> OptimizerType:
    """Nudge the spectra of `model` towards α = 2 every `interval` steps of `optimizer`; returns the same optimizer.

    Args:
        optimizer: optimizer that trains parameters of `model`; its moments and learning rates, and the gradients, are
            left alone.
        model: model, wrapped or not. Only weights that the optimizer trains are changed, tied ones once.
        strength: strength of one nudge, in [0, 1]; 0 changes nothing.
        interval: optimizer steps from one nudge to the next.
        fit: how the power-law tail is chosen.
        where: which matrices are nudged; by default those whose smaller side is at least 50.
        distributed: whether the ranks of a process group train one model and share its matrices; False where each
            process trains its own.

    Returns:
        `optimizer`.

    Raises:
        UsageError: the strength is outside [0, 1], the interval is below 1, there is no matrix to nudge, or weights
            are sharded otherwise than by FSDP2 or tensor parallelism.

    Examples:
        A matrix of noise has a steep tail, α above 2, and a nudge at every step makes it heavier:

        >>> import htsr, torch
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(64, 64)
        >>> before = htsr.fit_power_law(htsr.esd(model.weight).eigenvalues).alpha
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        >>> optimizer = htsr.spectral_projection(optimizer, model, strength=0.5, interval=1)
        >>> model(torch.ones(1, 64)).sum().backward()
        >>> optimizer.step()
        >>> htsr.fit_power_law(htsr.esd(model.weight).eigenvalues).alpha < before
        True

    Source: an experiment on top of SETOL (arXiv 2507.17912); the formulas are in `htsr.spectra.nudge`.
    """
    if not 0 <= strength <= 1:
        raise UsageError(f"strength is between 0 and 1, not {strength}")
    if interval < 1:
        raise UsageError(f"interval is a number of steps, at least 1, not {interval}")
    wanted = as_filter(where, Filter(min_size=MIN_SIZE))
    if not any(
        tensor.shard or any(map(tensor.stands, tensor.matrices)) for tensor in _trained(optimizer, model, wanted)
    ):
        raise UsageError("the optimizer trains no matrix of the model that could be nudged")

    def after_step(stepped: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        steps = 1 + max(group.get(STEPS, 0) for group in stepped.param_groups)
        for group in stepped.param_groups:
            group[STEPS] = steps
        if strength > 0 and steps % interval == 0:
            nudge_model(stepped, model, strength, fit=fit, where=wanted, distributed=distributed)

    optimizer.register_step_post_hook(after_step)
    return optimizer


def nudge_model(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    strength: float,
    *,
    fit: FitMethod = "ks",
    where: Filter | None = None,
    distributed: bool = True,
) -> dict[str, Nudge]:
    """Nudge now every wanted matrix that the optimizer trains.

    Matrices without a tail that could be moved, and those that cannot be decomposed, are left as they are, on all ranks
    alike. In a distributed run every rank calls this.

    Args:
        optimizer: optimizer that trains parameters of `model`.
        model: model, wrapped or not; its weights are changed in place.
        strength: η in [0, 1], see `htsr.spectra.nudge`.
        fit: how the power-law tail is chosen.
        where: which matrices are nudged; by default those whose smaller side is at least 50.
        distributed: whether the ranks of a process group train one model and share its matrices.

    Returns:
        What was moved, by the matrix's name, on every rank.

    Raises:
        UsageError: the strength is outside [0, 1], the ranks train different matrices, or weights are sharded otherwise
            than by FSDP2 or tensor parallelism.
    """
    ranks = Ranks.running() if distributed else Ranks()
    tensors = _trained(optimizer, model, as_filter(where, Filter(min_size=MIN_SIZE)))
    matrices = [matrix for tensor in tensors for matrix in tensor.matrices]
    if differ := ranks.difference([f"strength {strength}", f"fit {fit}", *described(matrices)]):
        raise UsageError(
            f"the processes do not train one model: {differ}; with distributed=False each process nudges its own"
        )
    moved: dict[str, Nudge] = {}
    tensors.sort(key=lambda tensor: -sum(matrix.cost for matrix in tensor.matrices))
    for first in range(0, len(tensors), ranks.size):
        moved |= _nudge_together(tensors[first : first + ranks.size], ranks, strength, fit)
    return {matrix.name: moved[matrix.name] for matrix in matrices if matrix.name in moved}


@dataclass(frozen=True)
class _Trained:
    """A parameter that is trained, its wanted matrices, and its shard where each rank holds a part of it."""

    parameter: torch.Tensor
    matrices: Sequence[WeightMatrix]
    shard: Shard | None

    def whole(self) -> torch.Tensor:
        return self.shard.read() if self.shard else self.parameter.detach()

    def stands(self, matrix: WeightMatrix) -> bool:
        """Whether the matrix is the parameter itself, of whatever class, and not computed from it."""
        import torch

        own: torch.Tensor = matrix.position.take(self.whole())  # type: ignore[assignment]
        return torch.equal(torch.as_tensor(matrix.read()).to(own), own)

    def nudge(self, strength: float, fit: FitMethod) -> dict[str, Nudge]:
        """Nudge the matrices in the whole tensor, in place; returns what was moved."""
        moved: dict[str, Nudge] = {}
        for matrix in self.matrices:
            found = attempted(partial(self._nudge, matrix, strength, fit))
            if isinstance(found, MatrixError):
                level = logging.WARNING if found.status == "failed" else logging.INFO
                logger.log(level, "%s is not nudged: %s", matrix.name, found)
            elif found is not None:
                moved[matrix.name] = found
        return moved

    def _nudge(self, matrix: WeightMatrix, strength: float, fit: FitMethod) -> Nudge | None:
        if not self.stands(matrix):
            return None
        whole = self.whole()
        W, moved = nudge(matrix.position.take(whole), strength, fit=fit)
        matrix.position.put(whole, W)
        return moved

    def send(self, source: int, ranks: Ranks) -> None:
        """Give all ranks the tensor, or their parts of it, as rank `source` has it."""
        import torch
        from torch import distributed

        mine = self.parameter.detach()
        if self.shard is None or source == ranks.rank or ranks.size == 1:
            whole = self.whole().contiguous()
        else:
            local = mine.to_local()  # type: ignore[attr-defined]
            whole = torch.empty(tuple(mine.shape), dtype=local.dtype, device=local.device)
        if ranks.size > 1:
            distributed.broadcast(whole.view(torch.uint8), source)  # bytes, which every backend sends
        if self.shard is not None:
            from torch.distributed.tensor import distribute_tensor

            parts: Any = mine
            cut = distribute_tensor(whole, parts.device_mesh, parts.placements, src_data_rank=None)
            parts.to_local().copy_(cut.to_local())
        elif whole.data_ptr() != mine.data_ptr():
            mine.copy_(whole)


def _nudge_together(tensors: Sequence[_Trained], ranks: Ranks, strength: float, fit: FitMethod) -> Mapping[str, Nudge]:
    """Nudge at most one tensor a rank, and give each to all; returns what was moved on any of them."""
    import torch

    with torch.no_grad():
        for owner, tensor in enumerate(tensors):
            if tensor.shard is not None:
                tensor.shard.gather(ranks, keep=owner == ranks.rank or ranks.size == 1)
        mine = tensors[ranks.rank : ranks.rank + 1]
        moved = dict(ranks.gather_from(lambda: [item for own in mine for item in own.nudge(strength, fit).items()]))
        for owner, tensor in enumerate(tensors):
            if any(matrix.name in moved for matrix in tensor.matrices):
                tensor.send(owner, ranks)
            if tensor.shard is not None:
                tensor.shard.release()
    return moved


def _trained(optimizer: torch.optim.Optimizer, model: nn.Module, where: Filter) -> list[_Trained]:
    """The wanted matrices of which the optimizer trains the parameter (not W + ΔW, nor what is de-quantised)."""
    refuse_flat(model)
    mine = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    names = base_names(name for name, _ in model.named_parameters())
    parameters = {
        names[name]: parameter
        for name, parameter in model.named_parameters()
        if id(parameter) in mine and parameter.requires_grad
    }
    live = open_live(model)
    found: list[_Trained] = []
    for parts in by_tensor(matrix for matrix in live.matrices if matrix.problem is None and where(matrix)):
        parameter = parameters.get(parts[0].position.tensor)
        if parameter is None or parts[0].dtype != str(parameter.dtype).removeprefix("torch."):
            continue
        shard = live.shards.get(whole_name(parts[0].name))
        if shard is not None and not _can_be_cut(parameter):
            raise UsageError(f"{parts[0].name} is sharded over processes in a way that only its trainer can write to")
        found.append(_Trained(parameter, parts, shard))
    return found


def _can_be_cut(parameter: torch.Tensor) -> bool:
    """Whether it is a DTensor whose parts are plain slices."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    return isinstance(parameter, DTensor) and all(type(place) in (Replicate, Shard) for place in parameter.placements)
