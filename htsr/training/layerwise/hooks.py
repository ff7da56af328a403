"""How an engine is attached to its optimizer: hooks, a step that restores when it fails, and what a copy is made of.

torch keeps no hooks in a copied or pickled optimizer. A layerwise one is put together again with its engine, whose
model is copied with it, so that `copy.deepcopy((model, optimizer))` and `torch.save` of both go on as one run.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch

from htsr.training.layerwise.engine import Layerwise
from htsr.training.layerwise.together import together
from htsr.training.steps import counters_to_host

_ENGINE = "_htsr_layerwise"


def attach(engine: Layerwise, optimizer: torch.optim.Optimizer) -> None:
    """Attach the `engine` to its `optimizer`."""
    untraced: Callable[[Any], Any] = torch.compiler.disable
    engine.handles = [
        optimizer.register_step_pre_hook(untraced(engine.before_step)),
        optimizer.register_step_post_hook(untraced(engine.after_step)),
        optimizer.register_state_dict_pre_hook(engine.before_state_dict),
        optimizer.register_load_state_dict_pre_hook(engine.before_load),
        optimizer.register_load_state_dict_post_hook(counters_to_host),
    ]
    setattr(optimizer, _ENGINE, engine)
    me = weakref.ref(optimizer)  # not the optimizer itself, which would then outlive its last use
    optimizer.__dict__["__reduce_ex__"] = partial(_reduce, me)
    _restore_when_step_raises(engine, optimizer)


def detach(optimizer: torch.optim.Optimizer) -> None:
    """Take the engine off its `optimizer`."""
    engine: Layerwise = getattr(optimizer, _ENGINE)
    engine.restore()
    for handle in engine.handles:
        handle.remove()
    for name in (_ENGINE, "__reduce_ex__", "step"):
        optimizer.__dict__.pop(name, None)


def engine_of(optimizer: Any) -> Layerwise | None:
    """The engine of an `optimizer`, also of one that accelerate has wrapped; None where there is none."""
    while optimizer is not None and not hasattr(optimizer, _ENGINE):
        optimizer = getattr(optimizer, "optimizer", None)
    return getattr(optimizer, _ENGINE, None)


def _restore_when_step_raises(engine: Layerwise, optimizer: torch.optim.Optimizer) -> None:
    """Have groups stepped together, and the rates restored when a step raises: torch runs no hook then, and a scheduler
    would go on from wrong ones."""
    step: Any = optimizer.step
    inner: Callable[..., Any] | None = getattr(step, "__func__", None)
    if inner is None:  # something else steps in its place
        return
    me = weakref.ref(optimizer)
    inner = together(optimizer, inner)

    @wraps(inner)
    def guarded(self: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        try:
            return inner(self, *args, **kwargs)
        except BaseException:
            engine.restore()
            raise

    untraced: Callable[..., Any] = torch.compiler.disable
    method = untraced(guarded, recursive=False)

    @wraps(step)
    def bound(*args: Any, **kwargs: Any) -> Any:
        return method(me(), *args, **kwargs)

    setattr(bound, "__func__", method)  # noqa: B010 - torch's schedulers ask a step for it
    optimizer.__dict__["step"] = bound


def _reduce(me: weakref.ref[torch.optim.Optimizer], _protocol: int) -> tuple[Any, ...]:
    optimizer = me()
    assert optimizer is not None
    engine: Layerwise = getattr(optimizer, _ENGINE)
    engine.restore()
    cls = type(optimizer)
    return _revived, (cls, cls.__getstate__(optimizer), copy.copy(engine))


def _revived(cls: type[torch.optim.Optimizer], state: dict[str, Any], engine: Layerwise) -> torch.optim.Optimizer:
    optimizer = cls.__new__(cls)
    optimizer.__setstate__(state)
    attach(engine, optimizer)
    return optimizer
