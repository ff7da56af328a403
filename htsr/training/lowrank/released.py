"""What stands in ``parameter.grad`` once an optimizer has projected or used up a gradient during backward.

Others read gradients between backward and step: clipping, GradScaler, DDP, loggers. Were ``grad`` None they would pass
over the parameter in silence; this stands there instead, does what is right in the subspace, and refuses the rest.
"""

from __future__ import annotations

import math
import sys
import weakref
from typing import Any, Literal, Protocol, Self, TypeAlias

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from htsr.errors import UsageError

_aten: Any = torch.ops.aten


Gradients: TypeAlias = Literal["keep", "project", "update"]

_PROJECTED = (
    "gradients='project' has projected it during backward. A GradScaler, or whatever else reads whole gradients, wants "
    "gradients='keep'; clip by the 2-norm (with process_group by the optimizer's clip_grad_norm_), and run DDP under "
    "no_sync() and pass process_group"
)
_USED = (
    "gradients='update' has used it up during backward, and nothing can clip, scale or average it any more. Set "
    "max_grad_norm to 0 (transformers' Trainer clips by default), or take gradients='project', or for a GradScaler and "
    "DDP 'keep'"
)


class Owner(Protocol):
    """An optimizer that releases gradients during backward.

    Attributes:
        gradients: what it does with them, ``project`` or ``update``.
        process_group: processes over which it averages what it has projected.
    """

    gradients: Gradients
    process_group: ProcessGroup | None

    def take_up(self, parameter: Tensor, released: ReleasedGradient, G: Tensor) -> None:
        """Take a full gradient into the subspace, or use it up.

        Args:
            parameter: parameter of the optimizer, of any shape.
            released: what stands in its ``grad``; its ``R`` or ``used``, and ``spent``, are set.
            G: gradient in the parameter's shape.
        """


class ReleasedGradient(Tensor):
    """A gradient in the shape and dtype of its parameter, without entries: its part in the subspace stands for it.

    Where it was used up, nothing does. Its 2-norm is that of what the optimizer uses, and what scales it scales R; what
    backward adds to it goes to its owner. Any other use is refused.

    Args:
        parameter: parameter whose gradient it is, of any shape.
        owner: optimizer that has released it.
        sentence: sentence for refusals: why there is nothing to use, and what to do.
        clips: whether others may see the norm.

    Attributes:
        R: the gradient's coordinates in the subspace; None where it was used up during backward.
        used: 2-norm, a scalar, of what was used up.
        spent: whether the optimizer has made its step with it; it then is as good as no gradient.
    """

    R: Tensor | None
    used: Tensor | None
    spent: bool

    @staticmethod
    def __new__(cls, parameter: Tensor, owner: Owner, sentence: str, clips: bool) -> Self:
        """A tensor without storage."""
        made: Self = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, parameter.shape, dtype=parameter.dtype, device=parameter.device
        )
        return made

    def __init__(self, parameter: Tensor, owner: Owner, sentence: str, clips: bool) -> None:
        self.sentence, self.clips = sentence, clips
        self.R = self.used = None
        self.spent = True
        # weak, since torch would not collect a cycle
        self._parameter, self._owner = weakref.ref(parameter), weakref.ref(owner)

    def is_of(self, owner: Owner) -> bool:
        """Whether it was released by `owner`."""
        return self._owner() is owner

    def add_full(self, G: Tensor) -> None:
        """Have the owner take up one more full gradient.

        Args:
            G: gradient in the parameter's shape.

        Raises:
            UsageError: the owner is gone.
        """
        parameter, owner = self._parameter(), self._owner()
        if parameter is None or owner is None:
            raise UsageError("the optimizer that released a gradient is gone: call model.zero_grad() before backward")
        owner.take_up(parameter, self, G)

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        """The shapes, since there are no entries to show."""
        return f"ReleasedGradient({tuple(self.shape)}, R={None if self.R is None else tuple(self.R.shape)})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Answer norm, scaling and accumulation, and refuse all else."""
        me = args[0]
        if func is _aten.detach.default:
            return me
        if isinstance(me, ReleasedGradient) and not kwargs:
            if func is _aten.add_.Tensor and not isinstance(args[1], ReleasedGradient):
                me.add_full(args[1])
                return me
            if me.clips and not me.spent:
                if func is _aten.linalg_vector_norm.default and args[1:] in ((), (2,)):
                    return me.used if me.R is None else torch.linalg.vector_norm(me.R)
                if func in (_aten.mul_.Tensor, _aten.mul_.Scalar) and (me.R is not None or _asks_for_the_norm_alone()):
                    if me.R is not None:
                        me.R.mul_(args[1])
                    return me
        flat = (leaf for arg in args for leaf in (arg if isinstance(arg, (list, tuple)) else [arg]))
        mine = next(leaf for leaf in flat if isinstance(leaf, ReleasedGradient))
        raise UsageError(f"{func.overloadpacket.__name__} asks for a gradient that is gone: {mine.sentence}")


def release_in_backward(parameter: Tensor, owner: Owner) -> None:
    """Have the owner take up a parameter's gradient, in every backward to come, as soon as it is whole.

    Args:
        parameter: parameter of any shape, frozen or not.
        owner: optimizer; once it is gone, gradients stay.
    """
    reference = weakref.ref(owner)  # parameters outlive an optimizer, and its hooks are then idle

    def hook(parameter: Tensor) -> None:
        if (alive := reference()) is not None:
            _release(parameter, alive)

    trains = parameter.requires_grad
    parameter.requires_grad_(True)  # torch hooks no frozen tensor; the hook outlives freezing
    parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
    parameter.requires_grad_(trains)


@torch.no_grad()
def _release(parameter: Tensor, owner: Owner) -> None:
    G = parameter.grad
    if isinstance(G, ReleasedGradient) and G.is_of(owner):
        return  # it has taken up this gradient
    if G is None or isinstance(G, ReleasedGradient):
        raise UsageError("a parameter's gradient is released during backward by another optimizer, too; delete one")
    parameter.grad = None
    sentence = _PROJECTED if owner.gradients == "project" else _USED
    averaged = owner.process_group is None or owner.gradients == "update"
    released = ReleasedGradient(parameter, owner, sentence, clips=averaged)
    owner.take_up(parameter, released, G)
    parameter.grad = released


def _asks_for_the_norm_alone() -> bool:
    """Whether torch's clip_grad_norm_ is running with max_norm inf, as in transformers' Trainer without clipping.

    The factor alone does not tell: it is 1 as well where a gradient happens to be smaller than the largest norm.
    """
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_name != "clip_grad_norm_":
        frame = frame.f_back  # type: ignore[assignment]
    return frame is not None and frame.f_locals.get("max_norm") == math.inf
