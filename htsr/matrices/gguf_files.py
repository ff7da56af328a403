"""GGUF files: header, metadata and tensors, every count checked against the file before it is looped over.

The gguf package's own reader trusts the counts in the file; here it only de-quantises. Source: the format's
specification (github.com/ggml-org/ggml, docs/gguf.md), versions 2 and 3.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from htsr.arrays import Array
from htsr.errors import MissingDependencyError, SourceError
from htsr.matrices.file_bytes import SAFETENSORS_DTYPES, TensorInFile
from htsr.matrices.stored_tensors import StoredTensor

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_NESTING = 4
_MAX_DIMENSIONS = 8


@dataclass(frozen=True)
class _Tensor:
    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


def gguf_metadata(path: Path) -> dict[str, Any]:
    """The metadata of a GGUF file: numbers, texts, arrays of numbers; an array of texts as its length.

    Args:
        path: the GGUF file.

    Raises:
        SourceError: the file is not a GGUF file, or is truncated.
    """
    return _header(path)[0]


def gguf_tensors(path: Path) -> list[StoredTensor]:
    """The tensors of a GGUF file, which read as floats.

    Args:
        path: the GGUF file.

    Raises:
        SourceError: the file is not a GGUF file, or is truncated.
        MissingDependencyError: the gguf package is not installed.
    """
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(f"reading {path.name} needs the gguf package: pip install 'htsr[gguf]'") from error
    _, tensors = _header(path)
    return [_stored(path, tensor) for tensor in tensors]


def _stored(path: Path, tensor: _Tensor) -> StoredTensor:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    length = path.stat().st_size
    try:
        kind = GGMLQuantizationType(tensor.kind)
    except ValueError:
        if math.prod(tensor.shape) > 8 * length:  # not even a bit for each number
            raise _unfitting(path, tensor, f"GGML type {tensor.kind}") from None
        why = f"{tensor.name} is stored as GGML type {tensor.kind}, which the gguf package does not know"
        return StoredTensor(tensor.name, tensor.shape, f"ggml_{tensor.kind}", _unread, problem=("quantized", why))
    block, size = GGML_QUANT_SIZES[kind]
    columns = tensor.shape[-1] if tensor.shape else 1
    row = columns // block * size
    rows = math.prod(tensor.shape[:-1])
    if columns % block or tensor.offset + rows * row > length:
        raise _unfitting(path, tensor, kind.name)
    plain = SAFETENSORS_DTYPES.get(kind.name)
    if plain and kind.name != "BF16":
        in_file = TensorInFile(path, tensor.offset, plain, tensor.shape)
        return StoredTensor(tensor.name, tensor.shape, plain, in_file.array)

    def read(index: int | slice | None = None) -> Array:
        in_file = TensorInFile(path, tensor.offset, "uint8", (*tensor.shape[:-1], row))
        return np.asarray(dequantize(np.asarray(in_file.array(index)), kind), dtype=np.float32)

    warning = "" if plain else f"de-quantised from {kind.name}"
    return StoredTensor(tensor.name, tensor.shape, plain or kind.name.lower(), read, warning=warning)


def _unfitting(path: Path, tensor: _Tensor, kind: str) -> SourceError:
    what = f"{tensor.name}, {kind} of shape {tensor.shape}, does not fit in it"
    return SourceError(f"{path} is not a readable GGUF file, truncated perhaps: {what}")


def _unread(_index: int | slice | None = None) -> Array:
    raise TypeError("a GGML type that the gguf package does not know")


def _header(path: Path) -> tuple[dict[str, Any], list[_Tensor]]:
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(data).header()
    except (ValueError, OSError, struct.error) as error:
        raise SourceError(f"{path} is not a readable GGUF file, truncated perhaps: {error}") from error


class _Reader:
    """Walks over a header; raises ValueError where it does not fit the file."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def header(self) -> tuple[dict[str, Any], list[_Tensor]]:
        magic, version = self.text(4), self.number("I")
        if magic != "GGUF":
            raise ValueError("it does not begin with GGUF")
        if version not in (2, 3):
            raise ValueError(f"version {version}, where 2 and 3 are known (in little-endian order)")
        tensors, pairs = self.count(24), self.count(13)
        metadata = {}
        for _ in range(pairs):
            name = self.string()
            metadata[name] = self.value(self.number("I"))
        found = [self.tensor() for _ in range(tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"an alignment of {alignment}")
        start = -(-self.at // alignment) * alignment
        return metadata, [_Tensor(t.name, t.shape, t.kind, start + t.offset) for t in found]

    def tensor(self) -> _Tensor:
        name, axes = self.string(), self.number("I")
        if axes > _MAX_DIMENSIONS:
            raise ValueError(f"{name} has {axes} dimensions")
        sizes = [self.number("Q") for _ in range(axes)]
        return _Tensor(name, tuple(reversed(sizes)), self.number("I"), self.number("Q"))

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == _STRING:
            return self.string()
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind != _ARRAY or depth == _MAX_NESTING:
            raise ValueError(f"a value of kind {kind}")
        inner = self.number("I")
        if inner in _NUMBERS:
            code = np.dtype(f"<{_NUMBERS[inner]}")
            count = self.count(code.itemsize)
            return np.frombuffer(self.bytes(count * code.itemsize), code)
        count = self.count(8)
        for _ in range(count):
            self.value(inner, depth + 1)
        return count

    def count(self, least: int) -> int:
        """A number of things of which each takes `least` bytes or more."""
        count: int = self.number("Q")
        if count * least > len(self.data) - self.at:
            raise ValueError(f"it says {count} where {len(self.data) - self.at} bytes are left")
        return count

    def string(self) -> str:
        return self.text(self.count(1))

    def text(self, size: int) -> str:
        return self.bytes(size).decode("utf-8", "replace")

    def number(self, code: str) -> Any:
        (value,) = struct.unpack(f"<{code}", self.bytes(struct.calcsize(f"<{code}")))
        return value

    def bytes(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise ValueError("it ends too early")
        self.at += size
        return self.data[self.at - size : self.at]
