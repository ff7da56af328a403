"""The methods of `htsr.repair`: the change of one matrix in, the change that is left of it out.

Each is a function of the base W_base (m, n) and the change ΔW = W - W_base alone. What is left of ΔW is added to the
base again.

=============== ======================================================================================================
``denoise``     singular values of ΔW below the threshold of Gavish & Donoho become 0 (DG-Hard, arXiv 2605.20296)
``ecs``         ΔW on its effective correlation space (SETOL's trace-log condition, arXiv 2507.17912; ours for ΔW)
``leading``     ΔW on its k leading directions (Eckart & Young)
``intruders``   singular values of W's intruder dimensions are multiplied by a factor (arXiv 2410.21228)
``interpolate`` factor · ΔW, the line between base and fine-tuned model that the others have to beat
=============== ======================================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from htsr.errors import UsageError
from htsr.spectra.denoising import denoise, shrink_intruders
from htsr.spectra.directions import project_tail
from htsr.spectra.intruders import LeftVectors

if TYPE_CHECKING:
    import torch

Known: TypeAlias = tuple[LeftVectors, ...] | None
MethodName: TypeAlias = Literal["denoise", "ecs", "leading", "intruders", "interpolate"]
METHODS: tuple[str, ...] = get_args(MethodName)
_TAKES = {
    "denoise": (),
    "ecs": (),
    "leading": ("k",),
    "intruders": ("k", "epsilon", "factor"),
    "interpolate": ("factor",),
}
_NOTHING = 2.0**-40  # of ‖ΔW‖²
_DEFAULTS: dict[str, dict[str, Any]] = {
    "leading": {"k": 10},
    "intruders": {"k": 10, "epsilon": 0.5, "factor": 0.75},
    "interpolate": {"factor": 0.5},
}


@dataclass(frozen=True)
class Left:
    """What a method leaves of a change.

    Attributes:
        change: the change that is left, in shape and dtype of the one before; None where nothing is taken away.
        kept: number of singular values of the change that were kept; None where the method keeps no directions.
        total: number of singular values of the change.
        threshold: threshold of the singular values; None where the method has none.
        intruders: number of intruders that were shrunk; None where they were not looked for.
        note: sentence why nothing is taken away; empty where that needs no words.
    """

    change: torch.Tensor | None
    kept: int | None = None
    total: int | None = None
    threshold: float | None = None
    intruders: int | None = None
    note: str = ""


@dataclass(frozen=True)
class Method:
    """A method with its numbers; those that it does not take are None.

    Attributes:
        name: one of `METHODS`.
        factor: number that the change, or the singular values of intruders, are multiplied with.
        k: number of leading directions that are kept, or looked at for intruders.
        epsilon: cosine below which a direction is an intruder.
    """

    name: MethodName
    factor: float | None = None
    k: int | None = None
    epsilon: float | None = None

    @property
    def needs_base(self) -> bool:
        """Whether it looks at the base, and not at the change alone."""
        return self.name == "intruders"

    def leave(self, change: torch.Tensor, base: torch.Tensor | None, known: Known = None) -> Left:
        """What is left of a change.

        Args:
            change: ΔW, (m, n) or (pieces, m, n), float32 or float64.
            base: W_base in the shape of the change, in its dtype; None where the method does not need it.
            known: left singular vectors of the base, where they are known.

        Raises:
            MatrixError: the change has no spectrum to speak of.
        """
        return _LEAVE[self.name](self, change, base, known)


def make_method(name: str, factor: float | None = None, k: int | None = None, epsilon: float | None = None) -> Method:
    """The method of a name, with its defaults for what is not given.

    Args:
        name: one of `METHODS`.
        factor: number that the change, or the singular values of intruders, are multiplied with.
        k: number of leading directions that are kept, or looked at for intruders.
        epsilon: cosine below which a direction is an intruder.

    Raises:
        UsageError: there is no such method, it takes no such number, or the number has no meaning.

    Examples:
        >>> from htsr.analysis.repair_methods import make_method
        >>> make_method("interpolate", factor=0.3)
        Method(name='interpolate', factor=0.3, k=None, epsilon=None)
    """
    if name not in METHODS:
        raise UsageError(f"the method is one of {', '.join(METHODS)}, not {name!r}")
    given = {key: v for key, v in (("factor", factor), ("k", k), ("epsilon", epsilon)) if v is not None}
    if unused := sorted(given.keys() - set(_TAKES[name])):
        takes = " and ".join(_TAKES[name]) or "no number"
        raise UsageError(f"the method {name} takes {takes}, not {unused[0]}")
    if factor is not None and not (_is_number(factor) and math.isfinite(factor) and factor >= 0):
        raise UsageError(f"factor is a number from 0 on, such as 0.5, not {factor!r}")
    if k is not None and (isinstance(k, bool) or not isinstance(k, int) or k < 1):
        raise UsageError(f"k is a number of directions from 1 on, not {k!r}")
    if epsilon is not None and not (_is_number(epsilon) and 0 < epsilon <= 1):
        raise UsageError(f"epsilon is a cosine between 0 and 1, such as 0.5, not {epsilon!r}")
    return Method(name, **_DEFAULTS.get(name, {}) | given)  # type: ignore[arg-type]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _denoise(_: Any, change: torch.Tensor, base: torch.Tensor | None, known: Known) -> Left:
    found = denoise(change)
    if found.norm_kept < 1 - _NOTHING:
        return Left(found.matrix, found.kept, found.total, found.threshold)  # type: ignore[arg-type]
    note = f"its change has rank {found.kept}, too low for noise to tell" if 2 * found.kept < found.total else ""
    return Left(None, found.kept, found.total, found.threshold, note=note)


def _ecs(_: Any, change: torch.Tensor, base: torch.Tensor | None, known: Known) -> Left:
    found = project_tail(change, "erg")
    return Left(found.matrix, found.kept, found.total)  # type: ignore[arg-type]


def _leading(method: Any, change: torch.Tensor, base: torch.Tensor | None, known: Known) -> Left:
    if method.k >= min(change.shape[-2:]):
        total = change.numel() // max(change.shape[-2:])
        return Left(None, total, total)
    found = project_tail(change, method.k)
    return Left(found.matrix, found.kept, found.total)  # type: ignore[arg-type]


def _intruders(method: Any, change: torch.Tensor, base: torch.Tensor | None, known: Known) -> Left:
    assert base is not None
    found: Any = shrink_intruders(known or base, base + change, method.factor, method.k, method.epsilon)
    same = found.intruders == 0 or method.factor == 1
    return Left(None if same else found.matrix.sub_(base), intruders=found.intruders)


def _interpolate(method: Any, change: torch.Tensor, base: torch.Tensor | None, known: Known) -> Left:
    return Left(None if method.factor == 1 else method.factor * change)


_LEAVE: dict[str, Callable[[Method, Any, Any, Known], Left]] = {
    "denoise": _denoise,
    "ecs": _ecs,
    "leading": _leading,
    "intruders": _intruders,
    "interpolate": _interpolate,
}
