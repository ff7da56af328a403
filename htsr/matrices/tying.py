"""Which tensors are one weight under several names: a fact of the tensors, not of a configuration.

Tensors that share memory are one. A file can hold a tied head a second time; then its numbers are those of the
embedding, and it counts once. A head whose numbers differ is a weight of its own, whatever the configuration says:
transformers ties neither when it loads such a file (`PreTrainedModel.tie_weights`). Where a tied head is not stored
there is nothing to count twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from htsr.arrays import Array, as_numpy
from htsr.matrices import roles
from htsr.matrices.stored_tensors import FLOATS, StoredTensor

_COMPARED = 16 << 20  # bytes at once
_EMBEDDINGS = ("embed", "head")


def tied(tensors: Sequence[StoredTensor]) -> list[StoredTensor]:
    """`tensors`, in which an embedding or head that is stored twice has the same `storage` both times.

    Args:
        tensors: stored tensors of a checkpoint. Its embeddings and heads are read, row by row until they differ.

    Returns:
        The tensors in the same order, but repeated ones last: a tied head counts under the embedding's name.
    """
    found = list(tensors)
    tables: list[int] = []
    copies: set[int] = set()
    # embeddings before heads, what is shared (T5's `shared`) before what shares it (`decoder.embed_tokens`)
    for i in sorted(range(len(found)), key=lambda i: (_role(found[i]) == "head", found[i].name.count("."))):
        if not _is_table(found[i]):
            continue
        first = next((j for j in tables if _equal(found[j], found[i])), None)
        if first is None:
            tables.append(i)
            continue
        storage = found[first].storage or ("equal", found[first].name)
        found[first], found[i] = replace(found[first], storage=storage), replace(found[i], storage=storage)
        copies.add(i)
    return [found[i] for i in sorted(range(len(found)), key=copies.__contains__)]


def repeated(tensors: Iterable[StoredTensor]) -> dict[str, str]:
    """The names of `tensors` that are the same weight as an earlier tensor, each with the name of that one."""
    first: dict[object, str] = {}
    found = {}
    for tensor in tensors:
        if tensor.storage is not None and first.setdefault(tensor.storage, tensor.name) != tensor.name:
            found[tensor.name] = first[tensor.storage]
    return found


def _is_table(tensor: StoredTensor) -> bool:
    plain = len(tensor.shape) == 2 and 0 not in tensor.shape and tensor.dtype in FLOATS and not tensor.warning
    return plain and tensor.problem is None and _role(tensor) in _EMBEDDINGS


def _role(tensor: StoredTensor) -> str:
    return roles.role_of(tensor.name, tensor.kind)


def _equal(a: StoredTensor, b: StoredTensor) -> bool:
    """Whether two tables hold the same numbers; a few rows tell that they do not."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.storage is not None and a.storage == b.storage:
        return True
    try:
        return all(_same(a.read(rows), b.read(rows)) for rows in _rows(a.shape))
    except Exception:  # its row will say that it cannot be read
        return False


def _rows(shape: tuple[int, ...]) -> Iterator[slice]:
    """The first row, then all in pieces."""
    yield slice(0, 1)
    step = max(1, _COMPARED // (8 * math.prod(shape[1:])))
    for start in range(0, shape[0], step):
        yield slice(start, start + step)


def _same(a: Array, b: Array) -> bool:
    return as_numpy(a).tobytes() == as_numpy(b).tobytes()
