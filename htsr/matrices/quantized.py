"""Quantised tensors: back to floats where their numbers can be had, else a row that says why not.

=================== ====================================== =========================================================
format              stored as                              read by
=================== ====================================== =========================================================
LLM.int8()          ``weight`` int8, ``SCB``               weight · SCB / 127
bitsandbytes 4-bit  ``weight`` uint8, ``quant_state``      bitsandbytes, where installed
FP8                 ``weight`` float8 with a scale         `htsr.matrices.scaled`: weight · scale (per tensor, row
                                                           or block); int8 likewise
MXFP4               ``*_blocks``, ``*_scales``             transformers' reader
GPTQ, AWQ, packed   ``qweight`` / ``weight_packed``        `htsr.matrices.packed`; 3 bits and what a kernel has
                                                           rearranged not: status ``quantized``
HQQ, quanto, …      `_FOREIGN`                             none: one row with status ``quantized``
=================== ====================================== =========================================================
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from htsr.arrays import Array, as_numpy
from htsr.matrices.packed import compressed, gptq_or_awq
from htsr.matrices.scaled import EIGHT_BITS, quantization_config, scale_of, scaled, unknown_scale
from htsr.matrices.stored_tensors import FLOATS, INTEGERS, StoredTensor

PACKED = (".qweight", ".weight_packed")
_COMPANIONS = (
    ".SCB", ".weight_format", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".weight_scale",
    ".weight_scale_inv", ".input_scale", ".weight_shape", ".weight_zero_point", ".weight_g_idx", ".qzeros", ".scales",
    ".g_idx", ".scale_weight", "_scale_inv", "_scales",
)  # fmt: skip
_OWNERS = ("", ".weight", ".qweight", ".weight_packed", "_blocks")  # what companions stand beside
_PLAIN = FLOATS - {"float8_e4m3fn", "float8_e5m2"}
_FOREIGN = {  # a tensor of integers, and what stands beside it where the name alone says little: whose format it is
    (".W_q", ""): "HQQ",
    (".weight._data", ""): "quanto",
    ("._weight_qdata", ""): "torchao",
    (".weight_qdata", ""): "torchao",
    (".B", ".s"): "Marlin",
    (".codes", ".codebooks"): "AQLM",
    (".indices", ".centroids"): "VPTQ",
    (".indices", ".centroids.weight"): "VPTQ",
    (".dense_weights", ".row_offsets"): "SpQR",
}
_INDICES = re.compile(  # integers of two axes or more that are no weights
    r"(^|[._])(ids?|idx|index|indices|mask|perm|permutation|counts?|buckets?|positions?|coords?|offsets?|steps?|bias|table|"
    r"tid2eid|shape|lengths?|tokens?|labels?|sizes?|order|map|initialized|seed|rng_state|state)(\.|_?\d*$)"
)
_SCALE = re.compile(r"(^|_)(q?scales?|q?zeros?|zero_?points?|absmax|codebooks?|centroids|g_idx)($|[_.\d])")


def dequantized(tensors: list[StoredTensor], config: Mapping[str, Any] | None = None) -> list[StoredTensor]:
    """`tensors`, in which each quantised weight and what belongs to it give way to one tensor that reads as floats.

    Args:
        tensors: stored tensors of a model.
        config: configuration of the model, which tells versions of formats and sizes of groups.
    """
    by_name = {tensor.name: tensor for tensor in tensors}
    eight = {tensor.name for tensor in tensors if tensor.dtype in EIGHT_BITS}
    used = {scale.name for name in eight if (scale := scale_of(name, by_name))}
    foreign = _foreign(by_name)
    modules = {module for module, _ in foreign.values()}
    integers = {e.name.rpartition(".")[0] for e in tensors if is_packed(e)}
    result = []
    for tensor in tensors:
        module, _, leaf = tensor.name.rpartition(".")
        if tensor.name in used or _is_companion(tensor.name, by_name):
            continue
        if tensor.name in foreign:
            shape = tensor.shape if len(tensor.shape) > 1 else (1, *tensor.shape)
            module, writer = foreign[tensor.name]
            why = f"{writer}'s packed format, that htsr does not unpack"
            result.append(_unreadable(replace(tensor, name=f"{module}.weight", shape=shape), why))
            continue
        above = {tensor.name[: i.start()] for i in re.finditer(r"\.", tensor.name)}
        if leaf != "bias" and not above.isdisjoint(modules):
            continue
        if module in integers and _SCALE.search(leaf) and tensor.dtype in FLOATS:
            continue
        try:
            found = _dequantized(tensor, by_name, config or {})
        except Exception as error:  # whatever is wrong with one tensor, the others are read
            found = _unreadable(tensor, f"a quantised form whose parts do not fit one another ({error})")
        if found is tensor and tensor.dtype.startswith("float8") and tensor.problem is None:
            found = _without_scale(tensor, by_name, bool(used) or bool(quantization_config(config or {})))
        result.append(found)
    return result


def is_packed(tensor: StoredTensor) -> bool:
    """Whether `tensor` holds integers that can only be a weight: two axes or more, and a name that means no indices."""
    return len(tensor.shape) > 1 and tensor.dtype in INTEGERS and not _INDICES.search(tensor.name)


def _is_companion(name: str, by_name: Mapping[str, StoredTensor]) -> bool:
    """Whether `name` goes by its ending with a quantised tensor that is there."""
    weight, found, _ = name.partition(".quant_state.")
    stems = [weight] if found else [name.removesuffix(ending) for ending in _COMPANIONS if name.endswith(ending)]
    owners = (by_name.get(stem + owner) for stem in stems for owner in _OWNERS)
    return any(owner is not None and owner.dtype not in _PLAIN for owner in owners)


def _foreign(by_name: Mapping[str, StoredTensor]) -> dict[str, tuple[str, str]]:
    """The modules whose weight is in a packed format that is known and not read, by the tensor that stands for it."""
    found = {}
    for name, tensor in by_name.items():
        for (ending, beside), writer in _FOREIGN.items():
            if name.endswith(ending) and tensor.dtype not in _PLAIN:
                if not beside or name.removesuffix(ending) + beside in by_name:
                    found[name] = name.removesuffix(ending), writer
    return found


def _dequantized(tensor: StoredTensor, by_name: dict[str, StoredTensor], config: Mapping[str, Any]) -> StoredTensor:
    name, stem = tensor.name, tensor.name.removesuffix(".weight")
    if name.endswith(PACKED):
        return _unpacked(tensor, by_name, config)
    scale: StoredTensor | None
    if tensor.dtype == "int8" and (scale := by_name.get(f"{stem}.SCB")):
        return _llm_int8(tensor, scale)
    for kind in ("nf4", "fp4"):
        if state := by_name.get(f"{name}.quant_state.bitsandbytes__{kind}"):
            return _bitsandbytes(tensor, state, by_name)
    if tensor.dtype == "int8" and f"{stem}.weight_scale_inv" in by_name:
        return _unreadable(tensor, "FP4 numbers, two to a byte, that htsr does not unpack")
    if tensor.dtype in EIGHT_BITS and (scale := scale_of(name, by_name)):
        if (more := f"{scale.name}_2") in by_name:
            why = f"{name} is stored as {tensor.dtype} with {scale.name} and {more}, which htsr does not know together"
            return replace(tensor, problem=("quantized", why))
        return scaled(tensor, scale, by_name.get(f"{stem}.weight_zero_point"), config)
    if name.endswith("_blocks") and (scale := by_name.get(name.removesuffix("_blocks") + "_scales")):
        return _mxfp4(tensor, scale)
    return tensor


def _unpacked(tensor: StoredTensor, by_name: dict[str, StoredTensor], config: Mapping[str, Any]) -> StoredTensor:
    stem = tensor.name.rsplit(".", 1)[0]
    parts = {c[1:]: by_name[stem + c] for c in _COMPANIONS if c[0] == "." and stem + c in by_name}
    unpack = gptq_or_awq if tensor.name.endswith(".qweight") else compressed
    found = unpack(tensor, parts, config)
    if found is None:
        return _unreadable(tensor, "a packed format (GPTQ, AWQ, compressed-tensors) that htsr does not unpack")

    def read(index: int | None = None) -> Array:
        W = found.read()
        return W if index is None else W[index]  # type: ignore[no-any-return]

    more: dict[str, Any] = {"dtype": f"{found.bits}-bit", "warning": f"de-quantised from {found.bits}-bit{found.note}"}
    return replace(tensor, name=found.name, shape=found.shape, read=read, **more)


def _llm_int8(tensor: StoredTensor, absmax: StoredTensor) -> StoredTensor:
    def read(index: int | None = None) -> Array:
        W = as_numpy(tensor.read()).astype("float32") * as_numpy(absmax.read()).reshape(-1, 1) / 127.0
        return W if index is None else W[index]  # type: ignore[no-any-return]

    return replace(tensor, read=read, warning="de-quantised from 8-bit")


def _without_scale(tensor: StoredTensor, by_name: dict[str, StoredTensor], quantised: bool) -> StoredTensor:
    """FP8 without a scale that is known: numbers only where nothing speaks of one."""
    if other := unknown_scale(tensor.name, by_name):
        why = f"{tensor.name} is stored as FP8 with {other} beside it, a scale that htsr does not know"
    elif quantised:
        why = f"{tensor.name} is stored as FP8 without a scale, in a model whose weights are scaled"
    else:
        return replace(tensor, warning=tensor.warning or "FP8 without a scale, taken as it is")
    return replace(tensor, problem=("quantized", why))


def _bitsandbytes(tensor: StoredTensor, state: StoredTensor, by_name: dict[str, StoredTensor]) -> StoredTensor:
    try:
        from bitsandbytes.functional import QuantState, dequantize_4bit
    except ImportError:
        return _unreadable(tensor, "bitsandbytes 4-bit, which needs the bitsandbytes package")

    import torch

    parts = {k.removeprefix(tensor.name + "."): v for k, v in by_name.items() if k.startswith(tensor.name + ".")}

    def quant_state() -> Any:
        return QuantState.from_dict(
            {k: torch.as_tensor(v.read()) for k, v in parts.items()}, device=torch.device("cpu")
        )

    def read(index: int | None = None) -> Array:
        W = dequantize_4bit(torch.as_tensor(tensor.read()), quant_state()).float()
        return W if index is None else W[index]  # type: ignore[no-any-return]

    shape = tuple(int(d) for d in quant_state().shape)
    return replace(
        tensor, shape=shape, dtype=state.name.rsplit("__", 1)[-1], read=read, warning="de-quantised from 4-bit"
    )


def _mxfp4(blocks: StoredTensor, scales: StoredTensor) -> StoredTensor:
    """gpt-oss experts: (E, rows, groups, 16) bytes of two 4-bit numbers and (E, rows, groups) exponents."""
    experts, rows, groups, width = blocks.shape
    name = blocks.name.removesuffix("_blocks")

    def read(index: int | None = None) -> Array:
        import torch
        from transformers.integrations.mxfp4 import convert_moe_packed_tensors

        which = slice(None) if index is None else slice(index, index + 1)
        packed = torch.as_tensor(blocks.read())[which]
        W = convert_moe_packed_tensors(packed, torch.as_tensor(scales.read())[which], dtype=torch.float32)
        return W if index is None else W[0]

    shape = (experts, groups * width * 2, rows)
    return replace(blocks, name=name, shape=shape, dtype="mxfp4", read=read, warning="de-quantised from MXFP4")


def _unreadable(tensor: StoredTensor, why: str) -> StoredTensor:
    name = tensor.name
    for suffix in (*PACKED, ".weight"):
        name = name.removesuffix(suffix)
    return replace(tensor, name=name, problem=("quantized", f"{name} is stored in {why}"))
