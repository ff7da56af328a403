"""The scores of a model in training, shared among the processes that train it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from htsr.analysis.devices import device_of
from htsr.analysis.execution import for_each
from htsr.analysis.sharing import described, entries_difference, results_of_all, shared_out
from htsr.arrays import Array
from htsr.errors import HtsrError, MatrixError, is_out_of_memory
from htsr.matrices.models import WeightMatrix
from htsr.matrices.roles import whole_name
from htsr.matrices.sharded import LiveModel, open_live
from htsr.ranks import Ranks
from htsr.spectra.attempts import give_back_memory
from htsr.spectra.esd import esd_batch
from htsr.spectra.scores import null_of_shape, score
from htsr.training.layerwise.policy import Policy, Spectrum, name_of

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

# what may befall a computation whatever the weights: no convergence (LinAlgError is one of them), no memory, no device
_PASSING = (RuntimeError, ArithmeticError, MemoryError, np.linalg.LinAlgError)
_COMPARED = 64  # entries of a matrix that ranks compare at each event
_MOMENTUM = ("exp_avg", "momentum_buffer", "mu", "m")


def view_of(spectrum: Spectrum, optimizer: torch.optim.Optimizer) -> Callable[[Any], Any] | None:
    """What is decomposed for each parameter.

    Args:
        spectrum: ``weights``, ``gradients`` or ``momentum``.
        optimizer: optimizer whose first moments are looked up by the names that torch's and other optimizers give them.

    Returns:
        None for the parameter itself; else a function from the parameter to a tensor of its shape, or None where it
        has no such thing yet.
    """
    if spectrum == "weights":
        return None
    if spectrum == "gradients":
        return lambda parameter: parameter.grad

    def momentum(parameter: Any) -> Any:
        state = optimizer.state.get(parameter, {})
        found = (state[key] for key in _MOMENTUM if key in state)
        return next((m for m in found if m.shape == parameter.shape and m.is_floating_point()), None)

    return momentum


@dataclass(frozen=True)
class Failure:
    """A matrix whose score could not be computed.

    Attributes:
        why: reason, in one sentence.
        passing: whether it may be computed the next time: out of memory, no convergence. Else the score itself is at
            fault, a function of the user's.
    """

    why: str
    passing: bool

    def __str__(self) -> str:
        return self.why


def live_scores(
    module: torch.nn.Module,
    policy: Policy,
    wanted: set[str],
    view: Callable[[Any], Any] | None = None,
    ranks: Ranks | None = None,
    rules: Sequence[str] = (),
) -> dict[str, float | Failure]:
    """Scores of the wanted matrices of a module, the same on every rank.

    Ranks share the matrices by cost. Whole tensors are read where they are; sharded ones are gathered a round at a
    time, one for each rank, so that memory is one whole tensor per rank.

    Args:
        module: model, wrapped or not.
        policy: policy that says which score.
        wanted: names of the matrices to score.
        view: what is decomposed for each parameter, see `view_of`.
        ranks: processes that share the matrices; by default those of the default process group.
        rules: lines that say what else all ranks must have alike.

    Returns:
        Scores by matrix, in the form of `scores`; failures are passing ones.

    Raises:
        HtsrError: the ranks do not hold the same matrices, or are not about to score them in the same way, or a score
            that is a function fails. All ranks raise alike.
    """
    model = open_live(module, view)
    todo = [matrix for matrix in model.matrices if matrix.name in wanted]
    if policy.score == "alpha_null":
        return scores(todo, policy, "cpu")
    ranks = ranks or Ranks.running()
    if ranks.size > 1:
        rules = [*rules, *(f"with {field} {value}" for field, value in json.loads(policy.describe()).items())]
        _agree(ranks, todo, model, rules)
        if view is not None:  # the first gradients may be alike where the models are not
            weights = open_live(module)
            _agree(ranks, [matrix for matrix in weights.matrices if matrix.name in wanted], weights, rules)
    whole, spread = shared_out(todo, model.shards, ranks)
    device = device_of(module) or "cpu"
    found = dict(results_of_all(whole, spread, model.shards, ranks, lambda part: scores(part, policy, device).items()))
    found = {matrix.name: found[matrix.name] for matrix in todo}
    refuse_faults(found, policy)
    return found


def _agree(ranks: Ranks, matrices: Sequence[WeightMatrix], model: LiveModel, rules: Sequence[str]) -> None:
    """Make sure that all ranks measure one model, in one way: names, shapes, sharded tensors, and a few entries."""
    shards = [f"{name} sharded" for name in sorted(model.shards)]
    if differ := ranks.difference([*rules, *described(matrices), *shards]):
        raise HtsrError(
            f"the processes do not train one model: they measure {differ}; all ranks must hold the same parameters (no "
            "pipeline stages), freeze the same ones, and have the same policy and total_steps"
        )
    whole = [matrix for matrix in matrices if whole_name(matrix.name) not in model.shards]
    if differ := entries_difference(ranks, whole, _COMPARED):
        raise HtsrError(
            f"the processes do not train one model: they measure {differ}; with distributed=False each process "
            "measures its own"
        )


def refuse_faults(found: Mapping[str, float | Failure], policy: Policy) -> None:
    """Refuse scores that are at fault themselves.

    Args:
        found: scores by matrix.
        policy: policy that says which score.

    Raises:
        HtsrError: a failure will not pass.
    """
    for name, failure in found.items():
        if isinstance(failure, Failure) and not failure.passing:
            raise HtsrError(f"the score {name_of(policy.score)} of {name} fails: {failure}")


def scores(matrices: Sequence[WeightMatrix], policy: Policy, device: str) -> dict[str, float | Failure]:
    """Scores by name, computed in this process.

    Args:
        matrices: matrices to read and decompose.
        policy: policy that says which score.
        device: device that the matrices lie on, as torch names it.

    Returns:
        Scores by matrix; NaN for those whose weights give none, which are logged, and a `Failure` where something else
        failed.
    """
    if policy.score == "alpha_null":
        return {m.name: null_of_shape(m.shape, m.pieces, policy.fit, policy.windows) for m in matrices}
    found = for_each(matrices, partial(_work, policy), device, WeightMatrix.read)
    return {matrices[i].name: value for i, value in found}


def _work(policy: Policy, matrices: Sequence[WeightMatrix]) -> list[float | Failure]:
    """Scores of a few matrices of one shape, their Gram matrices decomposed together; one by one where that fails."""
    try:
        return _together(policy, matrices)
    except Exception as error:
        if len(matrices) > 1:
            return [_work(policy, [matrix])[0] for matrix in matrices]
        return [_failure(error, isinstance(error, _PASSING))]


def _failure(error: Exception, passing: bool) -> Failure:
    why = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return Failure(why.removesuffix(": "), passing)


def _together(policy: Policy, matrices: Sequence[WeightMatrix]) -> list[float | Failure]:
    assert policy.score is not None
    results: dict[int, float | Failure] = dict.fromkeys(range(len(matrices)), float("nan"))
    loaded: dict[int, Array] = {}
    for i, matrix in enumerate(matrices):
        try:
            loaded[i] = matrix.read()
        except MatrixError as problem:
            if isinstance(problem.__cause__, _PASSING):
                results[i] = _failure(problem.__cause__, passing=True)
                if is_out_of_memory(problem.__cause__):
                    give_back_memory()
            else:
                logger.warning("%s keeps a multiplier of 1: %s", matrix.name, problem)
    if loaded:
        how: dict[str, Any] = {"route": "gram", "dtype": policy.dtype, "windows": policy.windows}
        for i, spectrum in zip(loaded, esd_batch(list(loaded.values()), **how), strict=True):
            try:
                if isinstance(spectrum, MatrixError):
                    raise spectrum
                results[i] = score(spectrum, policy.score, policy.fit)
            except MatrixError as problem:
                if problem.status == "failed":  # of the computation, not of the weights
                    results[i] = Failure(str(problem), passing=True)
                else:
                    logger.warning("%s keeps a multiplier of 1: %s", matrices[i].name, problem)
            except Exception as error:
                if not callable(policy.score):
                    raise
                results[i] = _failure(error, passing=False)  # a function of the user's fails the next time, too
    return [results[i] for i in range(len(matrices))]
