"""Where a tensor's bytes lie in its file: read and overwritten in place, so that memory is one tensor.

Files are opened for each tensor and read, not mapped: no page of an earlier tensor stays, a file that is cut in the
meantime is an error and not the end of the process, and threads share nothing.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from htsr.arrays import Array
from htsr.errors import SourceError

if TYPE_CHECKING:
    import torch

SAFETENSORS_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "C64": "complex64",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
_NUMPY_HAS = {"float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"}
_LONG_HEADER = 1 << 20


def read_bytes(file: Path, offset: int, count: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """`count` bytes of a file, a copy in memory.

    Args:
        file: file to read.
        offset: position of the first byte in the file.
        count: number of bytes.

    Raises:
        OSError: the file ends earlier, or cannot be read.
    """
    data = np.fromfile(file, dtype=np.uint8, count=count, offset=offset)
    if data.size != count:
        raise OSError(f"{file.name} ends inside of it, cut since it was opened")
    return data


@dataclass(frozen=True)
class TensorInFile:
    """A tensor and where its bytes lie in a file, in C order.

    Attributes:
        file: file that holds the tensor.
        offset: position of its first byte, from the start of the file.
        dtype: dtype of the tensor, as torch names it.
        shape: shape of the tensor.
    """

    file: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]

    def array(self, index: int | slice | None = None) -> Array:
        """The tensor, or what is at `index` along its first axis, read without the rest of the tensor.

        Args:
            index: number or range of slices of the first axis; None for the whole tensor.

        Returns:
            An array of that shape in the stored dtype: NumPy, or torch for a dtype that NumPy lacks.

        Raises:
            OSError: the file ends earlier.
            TypeError: neither NumPy nor torch has the dtype.
        """
        shape, first = self.shape, 0
        if isinstance(index, slice):
            first, stop, _ = index.indices(shape[0])
            shape = (max(stop - first, 0), *shape[1:])
        elif index is not None:
            first, shape = range(shape[0])[index], shape[1:]
        size = self._itemsize()
        offset = self.offset + first * math.prod(self.shape[1:]) * size
        data = read_bytes(self.file, offset, math.prod(shape) * size)
        if self.dtype in _NUMPY_HAS:
            return data.view(self.dtype).reshape(shape)
        import torch

        dtype = getattr(torch, self.dtype)
        return torch.from_numpy(data).view(dtype).reshape(shape) if data.size else torch.empty(shape, dtype=dtype)

    def _itemsize(self) -> int:
        if self.dtype in _NUMPY_HAS:
            return np.dtype(self.dtype).itemsize
        import torch

        dtype = getattr(torch, self.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"{self.dtype} is no dtype of torch")
        return dtype.itemsize

    def read(self) -> torch.Tensor:
        """The tensor, of `shape` and `dtype`, a copy in memory."""
        import torch

        return torch.as_tensor(self.array())

    def write(self, tensor: torch.Tensor) -> None:
        """Overwrite the tensor by `tensor`, whose dtype and shape are those that `read` gave."""
        import torch

        with self.file.open("r+b") as file:
            file.seek(self.offset)
            tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tofile(file)


def safetensors_header(file: Path) -> dict[str, TensorInFile]:
    """The tensors of a safetensors `file` by name, as stored, in the order of its header.

    Raises:
        SourceError: the file is not a safetensors file, is truncated, or has a header that does not fit its data.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            data = file.stat().st_size - 8 - length
            if length > _LONG_HEADER and length > data:
                raise SourceError(
                    f"{file} is not a readable safetensors file, truncated perhaps: its header of {length} bytes "
                    f"describes {max(data, 0)} bytes of tensors"
                )
            with safe_open(file, "numpy"):  # checks dtypes, shapes and offsets against the file
                pass
            header: dict[str, Any] = json.loads(opened.read(length))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise SourceError(f"{file} is not a readable safetensors file, truncated perhaps: {error}") from error
    header.pop("__metadata__", None)
    return {
        name: TensorInFile(
            file,
            8 + length + about["data_offsets"][0],
            SAFETENSORS_DTYPES.get(about["dtype"], about["dtype"].lower()),
            tuple(about["shape"]),
        )
        for name, about in header.items()
    }
