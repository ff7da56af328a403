"""The differences of two models' tensors, each read when it is wanted, with what is known of its rounding."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from htsr.arrays import Array, Difference, as_numpy
from htsr.errors import SourceError
from htsr.matrices import roles, tying
from htsr.matrices.stored_tensors import StoredTensor


def differences(
    tensors: Sequence[StoredTensor], other: Sequence[StoredTensor], config: Mapping[str, Any]
) -> list[StoredTensor]:
    """The `tensors` of a model less those of another.

    Args:
        tensors: stored tensors of the model.
        other: stored tensors that are subtracted, under the same names.
        config: configuration of the other model.

    Returns:
        One tensor for each of `tensors`; what cannot be subtracted has a problem that says why.

    Raises:
        SourceError: the two have no name in common.
    """
    again = tying.repeated(tensors)
    names = {tensor.name for tensor in other}
    find = Counterparts(other, config)
    result = []
    for tensor in tensors:
        if tensor.name in again and tensor.name not in names:
            continue  # a tied weight that the other model stores once
        match = find(tensor)
        if match is None:
            why = f"{tensor.name} is not in the model it is compared against"
        elif match.shape != tensor.shape:
            why = f"{tensor.name} is {tensor.shape} here and {match.shape} there"
        elif match.order != tensor.order:
            why = f"the rows or columns of {tensor.name} may be in another order there: {tensor.order or match.order}"
        elif (match.kind == "adapter") != (tensor.kind == "adapter"):
            why = f"{tensor.name} is a change in the one model and a whole weight in the other"
        else:
            both = (tensor.storage, match.storage) if tensor.storage and match.storage else None
            read, problem = Minus(tensor, match), tensor.problem or match.problem
            result.append(replace(tensor, read=read, storage=both, problem=problem))
            continue
        result.append(replace(tensor, problem=("unmatched", why)))
    if not any(tensor.name in names for tensor in tensors):
        raise SourceError("the two models have no tensor name in common")
    return result


class Counterparts:
    """Finds what a tensor was before, among the tensors of another model.

    Args:
        tensors: stored tensors of the other model.
        config: configuration of that model. A head that it does not store is its embedding, unless it says otherwise.
    """

    def __init__(self, tensors: Iterable[StoredTensor], config: Mapping[str, Any]) -> None:
        self._by_name = {tensor.name: tensor for tensor in tensors}
        tables: dict[str, list[StoredTensor]] = {"embed": [], "head": []}
        for tensor in self._by_name.values():
            tables.get(roles.role_of(tensor.name, tensor.kind), []).append(tensor)
        is_tied = bool(config) and config.get("tie_word_embeddings", True) and not tables["head"]
        self._table = tables["embed"][0] if is_tied and len(tables["embed"]) == 1 else None

    def __call__(self, tensor: StoredTensor) -> StoredTensor | None:
        """The tensor of that name, or the embedding where `tensor` is a head that is tied there; else None."""
        found = self._by_name.get(tensor.name)
        if found is None and self._table is not None and roles.role_of(tensor.name, tensor.kind) == "head":
            return self._table if self._table.shape == tensor.shape else None
        return found


def computed_in(tensor: StoredTensor) -> str:
    """The dtype in which numbers of `tensor` are computed."""
    return "float64" if tensor.dtype == "float64" else "float32"


@dataclass(frozen=True)
class Minus:
    """Reads a - b, as a `Difference` that knows its rounding errors.

    `exact` says that both were computed from the same stored numbers: their rounding cancels in the difference, and
    only that of the computation is left. So it is where `a` is `b` with an adapter added.

    Attributes:
        a: stored tensor of which is subtracted.
        b: stored tensor that is subtracted.
        exact: whether both were computed from the same stored numbers.
    """

    a: StoredTensor
    b: StoredTensor
    exact: bool = False

    def __call__(self, index: int | None = None) -> Array:
        """The difference, or one slice of its first axis.

        Args:
            index: number of the slice; None for the whole tensor.
        """
        which = () if index is None else (index,)
        a, b = (self._read(e, *which) for e in (self.a, self.b))
        base = getattr(self.a.read, "base", None)
        if self.exact or (isinstance(base, StoredTensor) and np.array_equal(as_numpy(base.read(*which)), as_numpy(b))):
            return Difference.of(as_numpy(a), as_numpy(b), (computed_in(self.a), computed_in(self.b)))
        return Difference.of(a, b, (self.a.dtype, self.b.dtype))

    @staticmethod
    def _read(tensor: StoredTensor, *which: int) -> Any:
        values = tensor.read(*which)
        return values if isinstance(values, Difference) else as_numpy(values)
