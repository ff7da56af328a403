"""How long a change is against the weights that it changed: ‖W - W_ref‖_F / ‖W_ref‖_F, matrix by matrix."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from htsr.analysis.distance import squared_norm
from htsr.analysis.matching import match
from htsr.analysis.pairs import WeightPair
from htsr.analysis.sharing import share
from htsr.errors import MatrixError
from htsr.matrices.models import Model, WeightMatrix
from htsr.ranks import Ranks
from htsr.spectra.attempts import attempted
from htsr.spectra.metrics import LayerMetrics


@dataclass
class Reference:
    """The model that changes are relative to. One pair of matrices is in memory at a time.

    Attributes:
        model: the model.
        squared: ‖W_ref‖_F² by name, as far as this process has needed it: each is read once for all checkpoints.

    Examples:
        >>> import torch, htsr
        >>> from htsr.analysis.reference import Reference
        >>> before, after = (htsr.describe({"up.weight": scale * torch.eye(4)}) for scale in (1.0, 1.5))
        >>> Reference(before).relative(after, after)
        {'up': 0.5}
    """

    model: Model
    squared: dict[str, float] = field(default_factory=dict)

    def relative(
        self, measured: Iterable[WeightMatrix], weights: Model, ranks: Ranks | None = None
    ) -> dict[str, float]:
        """The length of the change of each matrix, by name.

        Matrices are missing that the reference does not have in their shape, that have no numbers, or whose rows are in
        an order that is not known.

        Args:
            measured: matrices that were measured: weights or their changes.
            weights: the weights after the change, under the names of `measured` or of the reference.
            ranks: processes that share the work, and all get the result; this one alone by default.
        """
        ranks = ranks or Ranks()
        after, before = ({matrix.name: matrix for matrix in model} for model in (weights, self.model))
        pairs = []
        for row, other in match(list(map(_labels, measured)), list(map(_labels, self.model))):
            old, new = before[other.name], after.get(row.name) or after.get(other.name)
            if new is not None and WeightPair(new, old).is_comparable:
                pairs.append((row.name, new, old))
        mine = share([new.cost for _, new, _ in pairs], ranks.size)[ranks.rank]
        found = ranks.gather_from(lambda: [(pairs[i][0], self._length(*pairs[i][1:])) for i in mine])
        return {name: length for name, length in found if length is not None}

    def _length(self, new: WeightMatrix, old: WeightMatrix) -> float | None:
        def length() -> float:
            before = old.read()
            if old.name not in self.squared:
                self.squared[old.name] = squared_norm(before)
            whole, after = self.squared[old.name], new.read()
            if WeightPair(new, old).is_transposed:
                after = after.swapaxes(-1, -2)
            return math.sqrt(squared_norm(after, before) / whole) if 0 < whole < math.inf else math.nan

        found = attempted(length)
        return found if not isinstance(found, MatrixError) and math.isfinite(found) else None


def _labels(matrix: WeightMatrix) -> LayerMetrics:
    """What tells a matrix's counterpart, as a row."""
    return LayerMetrics(name=matrix.name, role=matrix.role, block=matrix.block)
