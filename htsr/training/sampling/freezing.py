"""Which parameters train, kept so whoever else sets ``requires_grad``.

PEFT's `disable_adapter`, which TRL's trainers call at every step, makes all adapters trainable when it ends; between a
forward pass and its recomputation under checkpointing, too. So the flags are set again where they act: before the
forward of each part, also when it is recomputed, and before the optimizer's step.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from htsr.errors import UsageError
from htsr.matrices.stored_tensors import clean_name

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


class HeldFlags:
    """The flags that parameters are to have, and the hooks that see to it."""

    def __init__(self) -> None:
        self._wanted: dict[torch.nn.Parameter, bool] = {}
        self._handles: list[Any] = []

    @property
    def wanted(self) -> tuple[torch.nn.Parameter, ...]:
        """All parameters whose flags are held."""
        return tuple(self._wanted)

    def want(self, parameter: torch.nn.Parameter, trains: bool) -> None:
        """Set the flag that a parameter has from now on.

        Args:
            parameter: parameter of any shape.
            trains: whether it trains.
        """
        self._wanted[parameter] = trains
        parameter.requires_grad_(trains)

    def hold(self, module: torch.nn.Module, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Set the flags of `parameters` again before each forward of `module`."""
        self._handles.append(module.register_forward_pre_hook(_Hold(self, tuple(parameters)), prepend=True))

    def restore(self, parameters: Iterable[torch.nn.Parameter] | None = None) -> None:
        """Set flags again.

        Args:
            parameters: parameters whose flags are set; all by default.
        """
        for parameter in self._wanted if parameters is None else parameters:
            wanted = self._wanted[parameter]
            if parameter.requires_grad is not wanted:
                parameter.requires_grad_(wanted)

    def drop_gradients(self) -> None:
        """Drop the gradients of what is frozen, which come by a forward pass that goes around the hooks."""
        for parameter, trains in self._wanted.items():
            if not trains:
                parameter.grad = None

    def release(self) -> None:
        """Let go of all parameters: each of them trains, and nothing is held any more."""
        for handle in self._handles:
            handle.remove()
        for parameter in self._wanted:
            parameter.requires_grad_(True)
        self._handles.clear()
        self._wanted.clear()


class _Hold:
    """Forward pre-hook that sets flags; idle in compiled code, where flags are fixed, and in a copy of the model."""

    def __init__(self, flags: HeldFlags | None, parameters: tuple[torch.nn.Parameter, ...]) -> None:
        self._flags = None if flags is None else weakref.ref(flags)
        self._parameters = parameters

    def __call__(self, *_: Any) -> None:
        import torch

        if self._flags is not None and not torch.compiler.is_compiling() and (flags := self._flags()) is not None:
            flags.restore(self._parameters)

    def __reduce__(self) -> Any:
        return _Hold, (None, ())


def is_held(model: torch.nn.Module) -> bool:
    """Whether some flags of a `model`, or of one that it is a copy of, have been held and not released."""
    return any(isinstance(hook, _Hold) for part in model.modules() for hook in part._forward_pre_hooks.values())


def called_inside(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The parts of a module that its forward calls: its children, and those of lists and dicts among them.

    Args:
        module: a block of the model.
    """
    from torch import nn

    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from called_inside(child)
        else:
            yield child


def stop_input_gradients(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Undo `enable_input_require_grads`, which transformers calls with checkpointing: backward ran through all blocks.

    Only reentrant checkpointing needs it, and keeps it.

    Args:
        model: model, wrapped or not.

    Returns:
        The modules for which it was undone.
    """
    stopped: list[Any] = []
    for module in model.modules():
        if getattr(module, "_require_grads_hooks", None):
            if any(_is_reentrant(inner) for inner in module.modules()):
                logger.warning(
                    "reentrant checkpointing makes backward run through the frozen blocks below; "
                    "gradient_checkpointing_kwargs={'use_reentrant': False} does not"
                )
            else:
                module.disable_input_require_grads()  # type: ignore[operator]
                stopped.append(module)
    return stopped


def set_up_anew(model: torch.nn.Module, thawed: set[str]) -> None:
    """Have FSDP2 settle the dtypes of its modules again; it does so once, by the parameters that train then.

    Args:
        model: model, some modules of which may be sharded by FSDP2.
        thawed: names of parameters that train from now on, and did not before.
    """
    sharded = {clean_name(f"{name}.") if name else "": m for name, m in model.named_modules() if hasattr(m, "unshard")}
    if not sharded:
        return
    for prefix in {max((prefix for prefix in sharded if name.startswith(prefix)), key=len) for name in thawed}:
        module: Any = sharded[prefix]
        module.unshard()
        module.reshard()


def _is_reentrant(module: torch.nn.Module) -> bool:
    keywords = getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {})
    return bool(getattr(module, "gradient_checkpointing", False) and keywords.get("use_reentrant"))


def insist_on_unused_parameters(model: torch.nn.Module) -> None:
    """Refuse a DDP wrapper that waits for the gradients of frozen parameters.

    Args:
        model: model, wrapped or not.

    Raises:
        UsageError: the model is in such a wrapper.
    """
    from torch.nn.parallel import DistributedDataParallel

    if isinstance(model, DistributedDataParallel) and not model.find_unused_parameters:
        raise UsageError("layer sampling under DDP needs DistributedDataParallel(…, find_unused_parameters=True)")
