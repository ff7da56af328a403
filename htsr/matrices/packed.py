"""Weights of 2, 4 or 8 bits in 32-bit words: GPTQ, AWQ, compressed-tensors.

A word holds p = 32/bits numbers, the first in its lowest bits (AWQ: of eight, in the order 0 2 4 6 1 3 5 7). Groups of
input features share scale s and zero point z, and the weight is s·(q - z):

================== =============================== ============================ ======================================
format             words                           zero points                  scales
================== =============================== ============================ ======================================
GPTQ               ``qweight`` (in/p, out)         ``qzeros`` (groups, out/p),  ``scales`` (groups, out); the group of
                                                   stored less 1 but for        each input in ``g_idx``, where there
                                                   ``gptq_v2``                  is one
AWQ                ``qweight`` (in, out/p)         ``qzeros`` (groups, out/p)   ``scales`` (groups, out)
compressed-tensors ``weight_packed`` (out, in/p)   ``weight_zero_point``        ``weight_scale`` (out, groups);
                   of q + 2^(bits-1)               (out/p, groups), likewise,   ``weight_g_idx``
                                                   or none
================== =============================== ============================ ======================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from htsr.arrays import as_numpy
from htsr.matrices.scaled import quantization_config
from htsr.matrices.stored_tensors import StoredTensor

Numbers = npt.NDArray[Any]

_AWQ = np.argsort([0, 2, 4, 6, 1, 3, 5, 7])  # the inverse of the order that AWQ packs in
_BITS = (2, 4, 8)


@dataclass(frozen=True)
class Packed:
    """How to read a packed weight.

    Attributes:
        name: name of the weight, ending in ``.weight``.
        shape: (out_features, in_features).
        bits: number of bits of each number.
        read: function that reads the weight, in float32.
        note: what the row's warning should say about groups, after what it says about bits; empty for nothing.
    """

    name: str
    shape: tuple[int, int]
    bits: int
    read: Callable[[], Numbers]
    note: str = ""


def unpacked(words: Numbers, bits: int, axis: int) -> Numbers:
    """The numbers in 32-bit words, one after the other along an axis.

    Args:
        words: (rows, columns) int32.
        bits: number of bits of each number: 2, 4 or 8.
        axis: axis along which words hold several numbers, 0 or 1; it becomes 32/bits times as long.

    Returns:
        (rows, columns) uint8, one axis of them longer.

    Examples:
        >>> import numpy as np
        >>> from htsr.matrices.packed import unpacked
        >>> unpacked(np.array([[0x43210]], dtype=np.int32), bits=4, axis=1)
        array([[0, 1, 2, 3, 4, 0, 0, 0]], dtype=uint8)
    """
    # read as unsigned, or the sign bit of a word would come in from the left when it is shifted
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    shifts = shifts[None, :, None] if axis == 0 else shifts
    numbers = (np.expand_dims(words.view(np.uint32), axis + 1) >> shifts) & np.uint32(2**bits - 1)
    rows, columns = words.shape
    shape = (rows * shifts.size, columns) if axis == 0 else (rows, columns * shifts.size)
    return numbers.astype(np.uint8).reshape(shape)


def gptq_or_awq(words: StoredTensor, parts: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> Packed | None:
    """The weight in ``qweight``, or None where its parts do not fit one another.

    Args:
        words: stored tensor ``qweight``.
        parts: stored tensors ``scales``, ``qzeros`` and ``g_idx``, as far as there are such.
        config: the model's configuration, whose `quantization_config` may say ``gptq_v2`` and the size of groups.

    Raises:
        ValueError: the number of scales is not that of the groups in the configuration.
    """
    if not {"scales", "qzeros"} <= parts.keys() or len(words.shape) != 2:
        return None
    scales, zeros, order = parts["scales"], parts["qzeros"], parts.get("g_idx")
    groups, out = scales.shape
    bits = next((b for b in _BITS if b * out == 32 * zeros.shape[1]), 0)
    if not bits:
        return None
    is_awq = words.shape[1] != out
    inputs = words.shape[0] if is_awq else words.shape[0] * 32 // bits
    if is_awq and (bits != 4 or words.shape[1] * 8 != out):
        return None
    if order is not None and order.shape != (inputs,):
        return None
    size, note = _group_size(inputs, groups, config) if order is None else (0, "")
    stored_less_one = not is_awq and quantization_config(config).get("checkpoint_format") != "gptq_v2"

    def read() -> Numbers:
        s, z = as_numpy(scales.read()).astype(np.float32), unpacked(as_numpy(zeros.read()), bits, 1)
        q = unpacked(as_numpy(words.read()), bits, 1 if is_awq else 0)
        if is_awq:
            z, q = (x.reshape(len(x), -1, 8)[:, :, _AWQ].reshape(x.shape) for x in (z, q))
        if stored_less_one:
            z = (z + 1) & np.uint8(2**bits - 1)  # in the width of the stored numbers: the largest is 0 less 1
        group = _groups(inputs, size, order)
        return np.ascontiguousarray((s[group] * (q.astype(np.float32) - z[group])).T)

    return Packed(words.name.removesuffix(".qweight") + ".weight", (out, inputs), bits, read, note)


def compressed(words: StoredTensor, parts: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> Packed | None:
    """The weight in ``weight_packed``, or None where its parts do not fit one another.

    Args:
        words: stored tensor ``weight_packed``.
        parts: stored tensors ``weight_scale``, ``weight_shape``, ``weight_zero_point`` and ``weight_g_idx``, as far as
            there are such.
        config: the model's configuration, whose `quantization_config` may say the size of groups.

    Raises:
        ValueError: the number of scales is not that of the groups in the configuration.
    """
    if not {"weight_scale", "weight_shape"} <= parts.keys() or len(words.shape) != 2:
        return None
    scale, zero, order = parts["weight_scale"], parts.get("weight_zero_point"), parts.get("weight_g_idx")
    out, inputs = (int(size) for size in as_numpy(parts["weight_shape"].read()))
    bits = next((b for b in (4, 8) if words.shape == (out, -(-inputs * b // 32))), 0)
    if not bits or len(scale.shape) != 2 or scale.shape[0] != out:
        return None
    size, note = _group_size(inputs, scale.shape[1], config) if order is None else (0, "")
    middle = 2 ** (bits - 1)

    def read() -> Numbers:
        s = as_numpy(scale.read()).astype(np.float32)
        q = unpacked(as_numpy(words.read()), bits, 1)[:, :inputs].astype(np.float32) - middle
        group = _groups(inputs, size, order)
        if zero is None:
            return np.ascontiguousarray(q * s[:, group])
        z = as_numpy(zero.read())
        z = unpacked(z, bits, 0)[:out].astype(np.float32) - middle if z.dtype == np.int32 else z.astype(np.float32)
        return np.ascontiguousarray((q - z[:, group]) * s[:, group])

    return Packed(words.name.removesuffix("_packed"), (out, inputs), bits, read, note)


def _group_size(inputs: int, groups: int, config: Mapping[str, Any]) -> tuple[int, str]:
    """The number of inputs that share a scale (the last group may have fewer), and a note for the row.

    The configuration gives the number; where it gives none, all groups are taken to be equal.
    """
    told = _told_sizes(quantization_config(config))
    fitting = {min(size, inputs) for size in told if -(-inputs // size) == groups}
    if len(fitting) == 1:
        return fitting.pop(), ""
    if told or groups < 1 or inputs % groups:
        sizes = " or ".join(map(str, sorted(told))) or "one size"
        raise ValueError(f"{groups} scales for {inputs} inputs are not those of groups of {sizes}")
    size = inputs // groups
    usual = groups == 1 or size & (size - 1) == 0
    return size, "" if usual else f" in groups of {size}, which no configuration says"


def _told_sizes(quantization: Mapping[str, Any]) -> set[int]:
    """The sizes of groups in a configuration, also those of some modules only; the whole input is one of 2³⁰."""
    places = [quantization]
    for key in ("config_groups", "dynamic"):
        if isinstance(more := quantization.get(key), Mapping):
            places += [place.get("weights", place) for place in more.values() if isinstance(place, Mapping)]
    sizes = set()
    for place in places:
        if isinstance(place, Mapping):
            sizes.add(1 << 30 if place.get("strategy") == "channel" else place.get("group_size"))
    return {1 << 30 if size == -1 else size for size in sizes if isinstance(size, int) and (size > 0 or size == -1)}


def _groups(inputs: int, size: int, order: StoredTensor | None) -> Numbers:
    """The group of each input: as `order` has it, else runs of one size."""
    if order is None:
        return np.arange(inputs) // size
    found = as_numpy(order.read())
    if found.shape != (inputs,) or found.min(initial=0) < 0:  # NumPy would count them from the end
        raise ValueError(f"{order.name} gives groups that there are not")
    return found
