"""Quantised tensors: back to floats where their numbers can be had, else a row that says why not.

=================== ====================================== =========================================================
format              stored as                              read by
=================== ====================================== =========================================================
LLM.int8()          ``weight`` int8, ``SCB``               weight · SCB / 127
bitsandbytes 4-bit  ``weight`` uint8, ``quant_state``      bitsandbytes, where installed
FP8                 ``weight`` float8, ``weight_scale``    weight · scale (per tensor, row or block)
                    or ``weight_scale_inv``
MXFP4               ``*_blocks``, ``*_scales``             transformers' reader
GPTQ, AWQ, packed   ``qweight`` / ``weight_packed``        `htsr.matrices.packed`; 3 bits and what a kernel has
                                                           rearranged not: status ``quantized``
=================== ====================================== =========================================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from htsr.matrices.entries import Entry
from htsr.matrices.packed import compressed, gptq_or_awq
from htsr.spectra.esd import Array, as_numpy

PACKED = (".qweight", ".weight_packed")
_COMPANIONS = (
    ".SCB", ".weight_format", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".weight_scale",
    ".weight_scale_inv", ".input_scale", ".weight_shape", ".weight_zero_point", ".weight_g_idx", ".qzeros", ".scales",
    ".g_idx", ".scale_weight", "_scale_inv", "_scales",
)  # fmt: skip


def dequantized(entries: list[Entry], config: Mapping[str, Any] | None = None) -> list[Entry]:
    """`entries` with quantised tensors and their companions replaced by one entry each that reads as floats.

    Args:
        entries: of a model.
        config: of the model; it says which GPTQ this is.
    """
    by_name = {entry.name: entry for entry in entries}
    result = []
    for entry in entries:
        if entry.name.endswith(_COMPANIONS) or ".quant_state." in entry.name:
            continue
        result.append(_dequantized(entry, by_name, config or {}))
    return result


def _dequantized(entry: Entry, by_name: dict[str, Entry], config: Mapping[str, Any]) -> Entry:
    name, stem = entry.name, entry.name.removesuffix(".weight")
    if name.endswith(PACKED):
        return _unpacked(entry, by_name, config)
    scale: Entry | None
    if entry.dtype == "int8" and (scale := by_name.get(f"{stem}.SCB")):
        return _scaled(entry, scale, lambda W, s: W * s.reshape(-1, 1) / 127.0, "8-bit")
    for kind in ("nf4", "fp4"):
        if state := by_name.get(f"{name}.quant_state.bitsandbytes__{kind}"):
            return _bitsandbytes(entry, state, by_name)
    if entry.dtype == "int8" and f"{stem}.weight_scale_inv" in by_name:
        return _unreadable(entry, "FP4 numbers, two to a byte, that htsr does not unpack")
    for suffix in (".weight_scale_inv", ".weight_scale", ".scale_weight"):
        if (scale := by_name.get(stem + suffix)) and entry.dtype in ("int8", "float8_e4m3fn", "float8_e5m2"):
            return _scaled(entry, scale, _by_blocks, "8-bit" if entry.dtype == "int8" else "FP8")
    if (scale := by_name.get(f"{name}_scale_inv")) and entry.dtype.startswith("float8"):
        return _scaled(entry, scale, _by_blocks, "FP8")
    if name.endswith("_blocks") and (scale := by_name.get(name.removesuffix("_blocks") + "_scales")):
        return _mxfp4(entry, scale)
    return entry


def _unpacked(entry: Entry, by_name: dict[str, Entry], config: Mapping[str, Any]) -> Entry:
    stem = entry.name.rsplit(".", 1)[0]
    parts = {c[1:]: by_name[stem + c] for c in _COMPANIONS if c[0] == "." and stem + c in by_name}
    found = gptq_or_awq(entry, parts, config) if entry.name.endswith(".qweight") else compressed(entry, parts)
    if found is None:
        return _unreadable(entry, "a packed format (GPTQ, AWQ, compressed-tensors) that htsr does not unpack")

    def read(index: int | None = None) -> Array:
        W = found.read()
        return W if index is None else W[index]  # type: ignore[no-any-return]

    more: dict[str, Any] = {"dtype": f"{found.bits}-bit", "warning": f"de-quantised from {found.bits}-bit"}
    return replace(entry, name=found.name, shape=found.shape, read=read, **more)


def _scaled(entry: Entry, scale: Entry, combine: Callable[[Any, Any], Array], what: str) -> Entry:
    def read(index: int | None = None) -> Array:
        factor = as_numpy(scale.read())
        if index is None:
            return combine(as_numpy(entry.read()).astype("float32"), factor)
        if factor.ndim and factor.shape[0] == entry.shape[0]:
            factor = factor[index]
        return combine(as_numpy(entry.read(index)).astype("float32"), factor)

    return replace(entry, read=read, warning=f"de-quantised from {what}")


def _by_blocks(W: Any, scale: Any) -> Array:
    """W times a scale that is a scalar, one per row, or one per block (of 128, the last one cut, or of equal parts)."""
    if scale.size == 1:
        return W * float(scale.reshape(-1)[0])  # type: ignore[no-any-return]
    if scale.ndim == 1:
        scale = scale.reshape(-1, *[1] * (W.ndim - 1))
    for axis in (-2, -1):
        size, blocks = W.shape[axis], scale.shape[axis]
        block = 128 if -(-size // 128) == blocks else -(-size // blocks)
        scale = scale.repeat(block, axis=axis).take(range(size), axis=axis)
    return W * scale  # type: ignore[no-any-return]


def _bitsandbytes(entry: Entry, state: Entry, by_name: dict[str, Entry]) -> Entry:
    try:
        from bitsandbytes.functional import QuantState, dequantize_4bit
    except ImportError:
        return _unreadable(entry, "bitsandbytes 4-bit, which needs the bitsandbytes package")

    import torch

    parts = {k.removeprefix(entry.name + "."): v for k, v in by_name.items() if k.startswith(entry.name + ".")}

    def quant_state() -> Any:
        return QuantState.from_dict(
            {k: torch.as_tensor(v.read()) for k, v in parts.items()}, device=torch.device("cpu")
        )

    def read(index: int | None = None) -> Array:
        W = dequantize_4bit(torch.as_tensor(entry.read()), quant_state()).float()
        return W if index is None else W[index]  # type: ignore[no-any-return]

    shape = tuple(int(d) for d in quant_state().shape)
    return replace(
        entry, shape=shape, dtype=state.name.rsplit("__", 1)[-1], read=read, warning="de-quantised from 4-bit"
    )


def _mxfp4(blocks: Entry, scales: Entry) -> Entry:
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


def _unreadable(entry: Entry, why: str) -> Entry:
    name = entry.name
    for suffix in (*PACKED, ".weight"):
        name = name.removesuffix(suffix)
    return replace(entry, name=name, problem=("quantized", f"{name} is stored in {why}"))
