"""Weights of 8 bits that are to be multiplied with a scale: FP8 and int8, per tensor, per row, per group or per block.

================================ =================================== ================================================
written by                       scale of ``x.weight``               its shape
================================ =================================== ================================================
DeepSeek, transformers           ``x.weight_scale_inv``, ``x.scale`` (⌈out/b⌉, ⌈in/b⌉), b from `weight_block_size`
compressed-tensors               ``x.weight_scale``, and for int8    () or (1,), (out, 1), (out, in/group), or by
                                 ``x.weight_zero_point``             `block_structure`; uint8: exponents of 2
FBGEMM, ModelOpt                 ``x.weight_scale``                  (out, 1) or ()
ComfyUI                          ``x.scale_weight``                  ()
experts in one tensor ``x``      ``x_scale_inv``, ``x_scale``        the same behind the axis of the experts
================================ =================================== ================================================

All of them are multiplied with, also those called an inverse. Which blocks there are is the configuration's to say;
where it is silent they are of 128, as DeepSeek's, if that fits, and the row's warning says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from htsr.arrays import Array, as_numpy
from htsr.errors import MatrixError
from htsr.matrices.stored_tensors import StoredTensor

EIGHT_BITS = ("int8", "float8_e4m3fn", "float8_e5m2")
_OF_WEIGHT = (".weight_scale_inv", ".weight_scale", ".scale_weight", ".scale")
_OF_PARAMETER = ("_scale_inv", "_scale")
_OF_ACTIVATIONS = ("input", "activation", "output", "act_", "k_scale", "v_scale", "q_scale")
_USUAL = 128

Blocks = tuple[int, int]


def scale_of(name: str, names: Mapping[str, StoredTensor]) -> StoredTensor | None:
    """The scale that is stored beside the weight `name`; None where there is none under a name that is known.

    Args:
        name: name of the weight, with its ``.weight`` where it has one.
        names: all stored tensors of the model by name.
    """
    stem, endings = (name.removesuffix(".weight"), _OF_WEIGHT) if name.endswith(".weight") else (name, _OF_PARAMETER)
    return next((names[stem + ending] for ending in endings if stem + ending in names), None)


def unknown_scale(name: str, names: Mapping[str, StoredTensor]) -> str:
    """The name of a tensor beside the weight `name` that looks like a scale, but of an unknown format; else empty.

    Args:
        name: name of the weight.
        names: all stored tensors of the model by name.
    """
    stem = name.removesuffix(".weight")
    for other in names:
        more = other.removeprefix(stem)
        beside = more != other and "." not in more.lstrip(".").removeprefix("weight.")
        if beside and "scale" in more and other != name and not any(word in more for word in _OF_ACTIVATIONS):
            return other
    return ""


def scaled(
    tensor: StoredTensor, scale: StoredTensor, zero: StoredTensor | None, config: Mapping[str, Any]
) -> StoredTensor:
    """A weight of 8 bits as a tensor that reads as floats: (numbers - zero point) · scale.

    Args:
        tensor: stored tensor of the 8-bit numbers, (…, out, in).
        scale: stored tensor of the scale.
        zero: stored tensor of the zero point, of the scale's shape; None where there is none.
        config: configuration of the model.

    Examples:
        >>> import numpy as np
        >>> from htsr.matrices.scaled import scaled
        >>> from htsr.matrices.stored_tensors import StoredTensor
        >>> numbers = StoredTensor("w.weight", (2, 2), "int8", lambda *_: np.array([[1, 2], [3, 4]], np.int8))
        >>> scale = StoredTensor("w.weight_scale", (2, 1), "float32", lambda *_: np.array([[0.5], [2.0]], np.float32))
        >>> scaled(numbers, scale, None, {}).read().tolist()
        [[0.5, 1.0], [6.0, 8.0]]
    """
    what = "8-bit" if tensor.dtype == "int8" else "FP8"
    shape = _as_factor(tensor.shape, scale.shape)
    if shape is None or (zero is not None and zero.shape != scale.shape):
        why = f"is stored as {what} of shape {tensor.shape}, which its scale of {scale.shape} does not fit"
        return replace(tensor, problem=("quantized", f"{tensor.name} {why}"))
    blocks, note = _blocks(tensor.shape, shape, config)
    if blocks is None:
        why = f"{tensor.name} is stored as {what} of shape {tensor.shape} with a scale of {scale.shape}: {note}"
        return replace(tensor, problem=("quantized", why))

    def factor(part: StoredTensor, index: int | None) -> Any:
        values = as_numpy(part.read()).reshape(shape)
        if part is scale and part.dtype == "uint8":
            values = np.exp2(values.astype(np.float32) - 127)  # E8M0: a byte is an exponent, with 127 for 2⁰
        values = values if index is None or not shape or len(shape) < 3 or shape[0] == 1 else values[index]
        for axis, block in zip((-2, -1), blocks, strict=True):
            if shape and values.shape[axis] > 1:
                values = values.repeat(block, axis=axis).take(range(tensor.shape[axis]), axis=axis)
        return values.astype(np.float32)

    def read(index: int | None = None) -> Array:
        W = as_numpy(tensor.read() if index is None else tensor.read(index)).astype("float32")
        if zero is not None:
            W = W - factor(zero, index)
        W = W * factor(scale, index)
        if W.shape != (tensor.shape if index is None else tensor.shape[1:]):
            raise MatrixError("quantized", f"{tensor.name} and its scale do not fit one another")
        return W  # type: ignore[no-any-return]

    return replace(tensor, read=read, warning=f"de-quantised from {what}{note}")


def _as_factor(weight: tuple[int, ...], scale: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape in which a scale has one axis for each of the weight's, or none at all; None where it does not fit."""
    if 0 in scale or len(weight) < 2:
        return None
    if all(size == 1 for size in scale):
        return ()
    if len(scale) > len(weight):
        return None
    if len(scale) < len(weight):
        return (*scale, *[1] * (len(weight) - len(scale))) if scale == weight[: len(scale)] else None
    return scale if all(s in (1, w) for w, s in zip(weight[:-2], scale[:-2], strict=True)) else None


def _blocks(weight: tuple[int, ...], scale: tuple[int, ...], config: Mapping[str, Any]) -> tuple[Blocks | None, str]:
    """Rows and columns that share a number of the scale, and what the row should say about them; or None, and why."""
    sizes, counts = weight[-2:], scale[-2:] if scale else (1, 1)
    told = configured_blocks(config)
    for rows, columns in told:
        if counts == (-(-sizes[0] // rows), -(-sizes[1] // columns)):
            return (rows, columns), ""
    if all(count in (1, size) for size, count in zip(sizes, counts, strict=True)):
        return (1, 1), ""
    if told:
        return None, f"the configuration's blocks of {told[0][0]} × {told[0][1]} do not fit"
    if all(count in (1, size) or size % count == 0 for size, count in zip(sizes, counts, strict=True)):
        exact = tuple(1 if count in (1, size) else size // count for size, count in zip(sizes, counts, strict=True))
        if all(block in (1, _USUAL) for block in exact):
            return (exact[0], exact[1]), ""
    found = [_guessed(*which) for which in zip(sizes, counts, strict=True)]
    if None in found:
        return None, "no configuration says which blocks share a number"
    rows, columns = (block or 1 for block in found)
    return (rows, columns), f" in blocks of {rows} × {columns}, which no configuration says"


def _guessed(size: int, count: int) -> int | None:
    """The block that `count` numbers for `size` entries speak of: 128, or the one power of two that can be."""
    if count in (1, size):
        return 1
    possible = [block for block in (_USUAL, 16, 32, 64, 256, 512) if -(-size // block) == count]
    return _USUAL if _USUAL in possible else possible[0] if len(possible) == 1 else None


def configured_blocks(config: Mapping[str, Any]) -> list[Blocks]:
    """The blocks (rows, columns) that a model's `config` gives its quantised weights; those of groups are (1, size)."""
    quantization = quantization_config(config)
    groups = quantization.get("config_groups")
    schemes = (
        [g.get("weights") for g in groups.values() if isinstance(g, Mapping)] if isinstance(groups, Mapping) else []
    )
    found: list[Any] = [quantization.get("weight_block_size")]
    for scheme in schemes:
        if isinstance(scheme, Mapping):
            structure, size = scheme.get("block_structure"), scheme.get("group_size")
            found.append(structure.lower().split("x") if isinstance(structure, str) else structure)
            found.append([1, size])
    return [blocks for value in found if (blocks := _pair(value)) is not None]


def quantization_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a model's `config` says about its quantisation; empty where it says nothing."""
    for place in (config, config.get("text_config")):
        for key in ("quantization_config", "compression_config"):
            if isinstance(place, Mapping) and isinstance(place.get(key), Mapping):
                return place[key]  # type: ignore[no-any-return]
    return {}


def _pair(value: Any) -> Blocks | None:
    try:
        rows, columns = (int(x) for x in value)
    except (TypeError, ValueError, OverflowError):
        return None
    return (rows, columns) if rows > 0 and columns > 0 else None
