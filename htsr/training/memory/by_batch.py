"""Plans of one way to train at every batch, from simulations of two."""

from __future__ import annotations

from functools import cached_property
from itertools import combinations
from typing import TYPE_CHECKING

from htsr.training.memory.plan import MemoryPlan

if TYPE_CHECKING:
    from htsr.training.memory.ledger import Trace
    from htsr.training.memory.simulation import Simulation


class PlansByBatch:
    """The plan of each batch; those of the first batches that are asked for are simulated.

    At each moment of a step the bytes of every part are linear in the batch, as long as the same operations run; which
    moment has the most changes with the batch, so the peak itself is not linear. A slice of a batch of one may need no
    copy where that of a larger one does, so a batch of one is simulated for itself.

    Args:
        simulation: model and step.
    """

    def __init__(self, simulation: Simulation) -> None:
        self._simulation = simulation
        self._traces: dict[int, Trace] = {}

    def __call__(self, batch: int) -> MemoryPlan:
        """The plan of a batch.

        Args:
            batch: sequences per backward pass.

        Raises:
            UsageError: torch cannot simulate the model's experts in this dtype.
        """
        plan = self._in_training(batch)
        if self._simulation.setting.evaluation > batch and self._in_evaluation.total > plan.total:
            return self._in_evaluation
        return plan

    @cached_property
    def _in_evaluation(self) -> MemoryPlan:
        return self._simulation.evaluated()

    def _in_training(self, batch: int) -> MemoryPlan:
        alone = not self._traces or batch in self._traces or batch == 1
        two = None if alone else self._two_alike
        if two is None:
            return self._simulation.plan(self._simulated(batch), batch)
        first, second = two
        trace = self._traces[first].along(self._traces[second], (batch - first, second - first))
        return self._simulation.plan(trace, batch)

    @cached_property
    def _two_alike(self) -> tuple[int, int] | None:
        """Two batches of which the same operations run; None where none were found."""
        for more in (2, 3):
            self._simulated(more)
            for first, second in combinations(self._traces, 2):
                if self._traces[first].operations == self._traces[second].operations:
                    return first, second
        return None

    def _simulated(self, batch: int) -> Trace:
        if batch not in self._traces:
            self._traces[batch] = self._simulation.trace(batch)
        return self._traces[batch]
