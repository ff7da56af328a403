"""Weights that are stored as what they are computed from: torch's weight norm, spectral norm and pruning.

============================ ==================================================== =================================
kind                         stored for a weight ``x.weight``                     the weight
============================ ==================================================== =================================
weight norm, old             ``x.weight_g``, ``x.weight_v``                       g · v / ‖v‖, the norm over all axes
weight norm, new             ``x.parametrizations.weight.original0``, ``…1``      but that along which g has entries
spectral norm, old           ``x.weight_orig``, ``…_u``, ``…_v``                  W / (uᵀ W v), W as a matrix whose
spectral norm, new           ``x.parametrizations.weight.original``, ``….0._u``   rows are the axis of u
pruning                      ``x.weight_orig``, ``x.weight_mask``                 W · mask
============================ ==================================================== =================================

What other parametrizations do, files do not say: their rows tell so.

Sources: weight normalisation (arXiv 1602.07868), spectral normalisation (arXiv 1802.05957), `torch.nn.utils`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from htsr.arrays import Array, as_numpy
from htsr.matrices.stored_tensors import StoredTensor

BUFFERS = re.compile(r"weight\w*_(u|v|mask)$")  # of modules, which are no parameters
_NEW = re.compile(r"(?P<module>(?:.*\.)?)parametrizations\.(?P<name>\w+)\.(?P<part>original[01]?|\d+\.\w+)")
_OLD = re.compile(r"(?P<name>.*weight\w*)_(?P<part>g|v|orig|u|mask)")
_PARTS = {"g": "original0", "v": "original1", "orig": "original", "u": "0._u", "mask": "mask"}

Compute = Callable[..., Any]


def computed(tensors: Sequence[StoredTensor]) -> list[StoredTensor]:
    """`tensors`, in which the parts that a weight is computed from give way to one tensor that computes it.

    Args:
        tensors: stored tensors of a model.
    """
    names = {tensor.name for tensor in tensors}
    groups: dict[str, dict[str, StoredTensor]] = {}
    places: dict[str, str] = {}
    for tensor in tensors:
        if (found := _part(tensor.name, names)) is not None:
            weight, part = found
            groups.setdefault(weight, {})[part] = tensor
            places[tensor.name] = weight
    done: set[str] = set()
    result = []
    for tensor in tensors:
        weight = places.get(tensor.name, "")
        if tensor.name not in places:
            result.append(tensor)
        elif weight not in done:
            done.add(weight)
            result.append(_weight(weight, groups[weight]))
    return result


def _part(name: str, names: set[str]) -> tuple[str, str] | None:
    """The weight that a tensor is a part of, and which part, as the new style names it; None for a plain tensor."""
    if new := _NEW.fullmatch(name):
        return new["module"] + new["name"], new["part"]
    old = _OLD.fullmatch(name)
    if old is None:
        return None
    weight, part = old["name"], old["part"]
    if part in "gv" and {f"{weight}_g", f"{weight}_v"} <= names:
        return weight, _PARTS[part]
    if f"{weight}_orig" in names and (f"{weight}_u" in names or f"{weight}_mask" in names):
        return weight, "0._v" if part == "v" else _PARTS[part]
    return None


def _weight(name: str, parts: dict[str, StoredTensor]) -> StoredTensor:
    main = parts.get("original1") or parts.get("original") or next(iter(parts.values()))
    more: dict[str, Any] = {"name": name, "storage": None}
    problem = next((part.problem for part in parts.values() if part.problem is not None), None)
    arguments, compute, why = _rule(parts)
    if problem is not None or compute is None:
        return replace(main, problem=problem or ("parametrized", f"{name} {why}"), **more)

    def read(index: int | None = None) -> Array:
        W = compute(*(as_numpy(part.read()).astype(_wide(part.dtype)) for part in arguments))
        return W if index is None else W[index]  # type: ignore[no-any-return]

    return replace(main, read=read, **more)


def _rule(parts: dict[str, StoredTensor]) -> tuple[list[StoredTensor], Compute | None, str]:
    """The tensors that the weight is computed from, and the function; without a function, the reason."""
    kinds = set(parts)
    if kinds == {"original0", "original1"}:
        g, v = parts["original0"], parts["original1"]
        axes = [axis for axis, size in enumerate(g.shape) if size != 1]
        fits = not g.shape or (len(g.shape) == len(v.shape) and len(axes) <= 1)
        if not fits or any(g.shape[axis] != v.shape[axis] for axis in axes):
            return [], None, f"is computed from tensors of {g.shape} and {v.shape}, which are no weight norm's"
        others = tuple(axis for axis in range(len(v.shape)) if axis not in axes)
        return [g, v], lambda g, v: g * v / np.sqrt((v**2).sum(axis=others, keepdims=True)), ""
    if kinds == {"original", "mask"} and parts["mask"].shape == parts["original"].shape:
        return [parts["original"], parts["mask"]], lambda W, mask: W * mask, ""
    if kinds == {"original", "0._u", "0._v"}:
        W, u, v = (parts[part] for part in ("original", "0._u", "0._v"))
        whole = math.prod(W.shape)
        axes = [a for a, size in enumerate(W.shape) if u.shape == (size,) and v.shape == (whole // max(size, 1),)]
        if axes:
            return [W, u, v], lambda W, u, v: W / _sigma(W, u, v, axes), ""
        return [], None, f"has a spectral norm's vectors of {u.shape} and {v.shape}, which do not fit its {W.shape}"
    return [], None, "is computed by a parametrization that a file does not name: analyze the module instead"


def _sigma(W: Any, u: Any, v: Any, axes: list[int]) -> Any:
    """uᵀ W v, W as a matrix whose rows are one of `axes`: of several, that for which u and v are singular vectors."""
    found = [u @ np.moveaxis(W, axis, 0).reshape(W.shape[axis], -1) @ v for axis in axes]
    return max(found, key=abs)


def _wide(dtype: str) -> str:
    return "float64" if dtype == "float64" else "float32"
