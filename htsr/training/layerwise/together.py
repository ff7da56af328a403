"""A step of torch's Adam and AdamW for all groups together.

torch makes the step group by group, which with a group for each matrix takes the host several times as long as the step
of one group. Here what does not depend on learning rate and weight decay is one call for the parameters of all groups,
and what does is one call with a list of rates (foreach) or one for each rate (fused). Operations and numbers are those
of `torch.optim.adam`, so that the weights are the same bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, zip_longest
from operator import itemgetter
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim.optimizer import _default_to_fused_or_foreach

from htsr.training import adam

_PIECE = 1 << 26  # entries that have temporary copies at a time (foreach), beside those of the last matrix among them
_options = itemgetter(
    "betas", "eps", "amsgrad", "maximize", "decoupled_weight_decay", "foreach", "fused", "capturable", "differentiable"
)

Step: TypeAlias = Callable[..., Any]
Options: TypeAlias = tuple[Any, ...]
Rates: TypeAlias = tuple[float, float]  # learning rate and weight decay
# parameters, gradients, exp_avg, exp_avg_sq, max_exp_avg_sq (without amsgrad empty) and step, in the order of torch's
Lists: TypeAlias = tuple[list[Tensor], ...]


def together(optimizer: torch.optim.Optimizer, step: Step) -> Step:
    """The `step` of an optimizer's class, or one that does the same for all groups together where that is possible.

    Args:
        optimizer: optimizer of any class. torch's own Adam and AdamW can, but for what is capturable or differentiable,
            has tensors as rates, or steps in a loop over its parameters.
        step: step of its class with torch's hooks, a function of the optimizer and a closure.
    """
    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW) or step.__module__ != "torch.optim.adam":
        return step
    group_by_group: Step = getattr(step, "__wrapped__")  # noqa: B009 - without the hooks, which are called below

    def stepped(self: torch.optim.Optimizer, closure: Callable[[], Any] | None = None) -> Any:
        if torch.compiler.is_compiling():
            return group_by_group(self, closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            collected = _collected(self)
            if collected is None:
                group_by_group(self)
                return loss
            for options, by_rates in collected.items():
                if options[6]:
                    _step_fused(options, by_rates, getattr(self, "grad_scale", None), getattr(self, "found_inf", None))
                else:
                    for lists, rates in _pieces(by_rates, options[4]):
                        _step_foreach(options, lists, rates)
        return loss

    return torch.optim.Optimizer.profile_hook_step(stepped)


def _collected(optimizer: Any) -> dict[Options, dict[Rates, Lists]] | None:
    """All parameters that have gradients, by options and rates; None where torch has to make the step itself.

    State that is missing is begun by torch, which refuses what it refuses.
    """
    found: dict[Options, dict[Rates, Lists]] = {}
    last: Options | None = None
    states = optimizer.state
    for group in optimizer.param_groups:
        options = _options(group)
        if type(options[0]) is list:  # betas, as a distributed checkpoint gives them back
            options = (tuple(options[0]), *options[1:])
        if options != last:
            by_rates, last = found.setdefault(options, {}), options
        if (lists := by_rates.get(rates := (group["lr"], group["weight_decay"]))) is None:
            lists = by_rates[rates] = ([], [], [], [], [], [])
        for parameter in group["params"]:
            if (gradient := parameter.grad) is None:
                continue
            state = states[parameter]
            if not state or gradient.is_sparse:
                optimizer._init_group(group, [], [], [], [], [], [])
            lists[0].append(parameter)
            lists[1].append(gradient)
            lists[2].append(state["exp_avg"])
            lists[3].append(state["exp_avg_sq"])
            lists[5].append(state["step"])
            if group["amsgrad"]:
                lists[4].append(state["max_exp_avg_sq"])
    scaled = getattr(optimizer, "grad_scale", None) is not None or getattr(optimizer, "found_inf", None) is not None
    return found if all(_can(options, by_rates, scaled) for options, by_rates in found.items()) else None


def _can(options: Options, by_rates: Mapping[Rates, Lists], scaled: bool) -> bool:
    """Whether what torch does with these parameters is what is done here; `scaled`: by a GradScaler."""
    betas, *_, foreach, fused, capturable, differentiable = options
    numbers = set(map(type, chain(betas, *by_rates)))
    if capturable or differentiable or any(issubclass(kind, Tensor) for kind in numbers):
        return False
    if fused:
        return True
    parameters = [parameter for lists in by_rates.values() for parameter in lists[0]]
    if foreach is None and fused is None:
        foreach = _default_to_fused_or_foreach(parameters, differentiable=False)[1]
    return bool(foreach) and not scaled and not any(parameter.is_complex() for parameter in parameters)


def _alike(lists: Lists) -> Iterable[Lists]:
    """Parts, each on one device and of one dtype."""
    if not lists[0]:
        return ()
    grouped = torch.optim.Optimizer._group_tensors_by_device_and_dtype(list(lists))  # type: ignore[arg-type]
    return [tuple(part) for part, _ in grouped.values()]  # type: ignore[arg-type]


def _step_fused(
    options: Options, by_rates: Mapping[Rates, Lists], grad_scale: Tensor | None, found_inf: Tensor | None
) -> None:
    """Step with a call for each pair of rates.

    Args:
        options: options of all parameters.
        by_rates: parameters by their rates.
        grad_scale: factor of the gradients, where a GradScaler has put it.
        found_inf: scalar, above 0 where the scaler has found an overflow: nothing moves then.
    """
    (beta1, beta2), eps, amsgrad, maximize, decoupled, *_ = options
    kernel = torch._fused_adamw_ if decoupled else torch._fused_adam_
    how = {"beta1": beta1, "beta2": beta2, "eps": eps, "amsgrad": amsgrad, "maximize": maximize}
    how |= {"grad_scale": grad_scale, "found_inf": found_inf}
    if steps := [step for lists in by_rates.values() for step in lists[5]]:
        adam.count(steps)
    for (lr, decay), lists in by_rates.items():
        for part in (lists,) if len(lists[0]) == 1 else _alike(lists):
            if found_inf is not None:
                device = part[0][0].device
                how["found_inf"] = found_inf.to(device, non_blocking=True)
                how["grad_scale"] = None if grad_scale is None else grad_scale.to(device, non_blocking=True)
            kernel(*part, lr=lr, weight_decay=decay, **how)
            if found_inf is not None:
                torch._foreach_sub_(part[5], [how["found_inf"]] * len(part[5]))


def _pieces(by_rates: Mapping[Rates, Lists], decoupled: bool) -> Iterator[tuple[Lists, list[Rates]]]:
    """Parameters with the rates of each, in pieces that can be stepped with one call of each operation.

    A piece is on one device, of one dtype, and not much larger than `_PIECE`, so that its temporary copies stay small.
    """
    pieces: dict[Any, tuple[Lists, list[Rates]]] = {}
    entries: dict[Any, int] = {}
    for rates, lists in by_rates.items():
        shared = None if decoupled else rates[1]  # decay that is added to gradients is one number a call
        for row in zip_longest(*lists):
            parameter = row[0]
            kind = parameter.device, parameter.dtype
            number, entries[kind] = entries.get(kind, 0) // _PIECE, entries.get(kind, 0) + parameter.numel()
            columns, own = pieces.setdefault((*kind, number, shared), (([], [], [], [], [], []), []))
            own.append(rates)
            for column, tensor in zip(columns, row, strict=True):
                column.append(tensor)
    yield from pieces.values()


def _step_foreach(options: Options, lists: Lists, rates: list[Rates]) -> None:
    """Step with one call of each operation.

    Args:
        options: options of all parameters.
        lists: parameters on one device.
        rates: rates of each of them.
    """
    (beta1, beta2), eps, amsgrad, maximize, decoupled, *_ = options
    parameters, gradients, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps = lists
    if maximize:
        gradients = torch._foreach_neg(gradients)  # type: ignore[assignment]
    adam.count(steps)
    decays = any(decay for _, decay in rates)
    if decays and decoupled:
        torch._foreach_mul_(parameters, [1 - lr * decay for lr, decay in rates])
    elif decays:  # the same for the whole piece
        gradients = torch._foreach_add(gradients, parameters, alpha=rates[0][1])  # type: ignore[assignment]
    adam.advance(exp_avgs, exp_avg_sqs, gradients, beta1, beta2)
    del gradients
    done = [step.item() for step in steps]
    sizes = adam.step_sizes([lr for lr, _ in rates], done, beta1)
    if amsgrad:
        torch._foreach_maximum_(max_exp_avg_sqs, exp_avg_sqs)
        exp_avg_sqs = max_exp_avg_sqs
    torch._foreach_addcdiv_(parameters, exp_avgs, adam.denominators(exp_avg_sqs, done, beta2, eps), sizes)
