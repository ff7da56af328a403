"""A gentle nudge of each matrix's spectrum towards α = 2 every few steps, for any torch optimizer.

    optimizer = htsr.spectral_projection(torch.optim.AdamW(model.parameters(), lr=1e-3), model)

The optimizer stays what it is. After every `interval` of its steps the weights are nudged (`htsr.spectra.nudge`): the
exponent of each power-law tail moves towards 2 as far as the trace-log (ERG) condition allows, at constant norm.
Like decoupled weight decay it acts on the weights alone and leaves moments as they are.

On SETOL's perceptron (``reports/setol_mlp3``) it brings α and the trace-log number to (2, 0) at every learning rate,
and the test error does not fall with them: an instrument, not a regularizer.

The only state is a count of steps, in the param groups, so `optimizer.state_dict()` carries it through any checkpoint.
In a data-parallel run every rank does the same arithmetic on the same weights.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, TypeVar

from htsr.errors import MatrixError, UsageError
from htsr.matrices.models import Filter, WeightMatrix, as_filter
from htsr.matrices.sources import open_model
from htsr.matrices.stored_tensors import base_names
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

    Returns:
        `optimizer`.

    Raises:
        UsageError: the strength is outside [0, 1], the interval is below 1, there is no matrix to nudge, or weights
            are sharded.

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
    if not _trained(optimizer, model, wanted):
        raise UsageError("the optimizer trains no matrix of the model that could be nudged")

    def after_step(stepped: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        steps = 1 + max(group.get(STEPS, 0) for group in stepped.param_groups)
        for group in stepped.param_groups:
            group[STEPS] = steps
        if strength > 0 and steps % interval == 0:
            nudge_model(stepped, model, strength, fit=fit, where=wanted)

    optimizer.register_step_post_hook(after_step)
    return optimizer


def nudge_model(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    strength: float,
    *,
    fit: FitMethod = "ks",
    where: Filter | None = None,
) -> dict[str, Nudge]:
    """Nudge now every wanted matrix that the optimizer trains.

    Matrices without a tail that could be moved are left as they are.

    Args:
        optimizer: optimizer that trains parameters of `model`.
        model: model, wrapped or not; its weights are changed in place.
        strength: η in [0, 1], see `htsr.spectra.nudge`.
        fit: how the power-law tail is chosen.
        where: which matrices are nudged; by default those whose smaller side is at least 50.

    Returns:
        What was moved, by the matrix's name.

    Raises:
        UsageError: the strength is outside [0, 1], or weights are sharded.
    """
    import torch

    moved: dict[str, Nudge] = {}
    for matrix, parameter in _trained(optimizer, model, as_filter(where, Filter(min_size=MIN_SIZE))):
        whole = parameter.detach()
        try:
            W, moved[matrix.name] = nudge(matrix.position.take(whole), strength, fit=fit)
        except MatrixError as error:
            logger.info("%s is not nudged: %s", matrix.name, error)
            continue
        with torch.no_grad():
            matrix.position.put(whole, W)
    return moved


def _trained(
    optimizer: torch.optim.Optimizer, model: nn.Module, where: Filter
) -> list[tuple[WeightMatrix, torch.Tensor]]:
    """The wanted matrices that are parameters of the optimizer as they stand (not W + ΔW, nor a parametrization)."""
    mine = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    names = base_names(name for name, _ in model.named_parameters())
    parameters = {
        names[name]: parameter
        for name, parameter in model.named_parameters()
        if id(parameter) in mine and parameter.requires_grad
    }
    found: list[tuple[WeightMatrix, torch.Tensor]] = []
    for matrix in open_model(model):
        parameter = parameters.get(matrix.position.tensor)
        if parameter is None or not where(matrix):
            continue
        if matrix.problem is not None and matrix.problem[0] == "sharded":
            raise UsageError(f"{matrix.name} is sharded over processes, and a spectrum needs the whole matrix")
        if matrix.problem is None and _stands(matrix, parameter):
            found.append((matrix, parameter))
    return found


def _stands(matrix: WeightMatrix, parameter: torch.Tensor) -> bool:
    """Whether the matrix is the parameter itself, of whatever class, and not computed from it."""
    import torch

    if matrix.dtype != str(parameter.dtype).removeprefix("torch."):
        return False  # de-quantised
    own: torch.Tensor = matrix.position.take(parameter.detach())  # type: ignore[assignment]
    return torch.equal(torch.as_tensor(matrix.read()).to(own), own)
