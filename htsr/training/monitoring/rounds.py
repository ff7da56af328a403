"""The matrices of a run in turn: who is next, what is known of each, and how old that is."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import count
from statistics import fmean
from typing import TYPE_CHECKING

from htsr.analysis.devices import device_of
from htsr.analysis.trajectory_file import Point
from htsr.errors import UsageError
from htsr.matrices.models import Filter, WeightMatrix
from htsr.matrices.modules import unwrapped
from htsr.matrices.sharded import refuse_flat
from htsr.ranks import Ranks
from htsr.spectra.metrics import Options
from htsr.spectra.sketch import relative_change
from htsr.training.monitoring.budget import Budget
from htsr.training.monitoring.measuring import Found, Start, insist_on_one, measured, open_wanted, starts_of

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

PREFIX = "spectrum"


class Rounds:
    """The rounds of one run. Every rank has one, and all of them know the same.

    Args:
        module: model in training, wrapped or not.
        wanted: filter of the matrices that are monitored.
        options: options that say what is computed.
        budget: what may be spent; that of the first rank counts.
        ranks: processes that measure together.

    Attributes:
        label: what to call the model.
        options: options that say what is computed.
        device: kind of the device that the weights lie on, such as ``cpu``.
        start: what is kept of the weights at the start of the run, by matrix.

    Raises:
        UsageError: there is no matrix, none passes the filter, or FSDP1 has flattened the model.
        HtsrError: the ranks do not train one model.
    """

    def __init__(self, module: torch.nn.Module, wanted: Filter, options: Options, budget: Budget, ranks: Ranks) -> None:
        refuse_flat(module)
        self._module, self._wanted, self._budget, self._ranks = module, wanted, budget, ranks
        self.label, self.options = type(unwrapped(module)).__name__, options
        self.device = (device_of(module) or "cpu").partition(":")[0]
        model = open_wanted(module, wanted)
        if model.shards and ranks.size < Ranks.running().size:
            raise UsageError("the processes hold parts of one model: they monitor it together, with distributed=True")
        insist_on_one(model, ranks, options, entries=True)
        self._costs = {matrix.name: matrix.cost for matrix in in_turn(model.matrices)}
        self._found: dict[str, Found] = {}
        self._points: dict[str, Point] = {}
        self._share_taken = 0.0
        if not self._costs:
            raise UsageError(f"{self.label} has no weight matrix to monitor")
        with self._spending():
            self.start: Mapping[str, Start] = starts_of(model, ranks)

    @property
    def unmeasured(self) -> int:
        """Number of matrices that were never measured."""
        return len(self._costs) - len(self._points)

    def __len__(self) -> int:
        return len(self._costs)

    def look_again(self) -> None:
        """Take the weights as they are now for those of the start, on every rank."""
        with self._spending():
            self.start = starts_of(open_wanted(self._module, self._wanted), self._ranks)

    def take_up(self, points: Sequence[Point], start: Mapping[str, Start]) -> None:
        """Go on where a run has stopped.

        Args:
            points: what it has measured, in the order of its steps.
            start: what it has kept of the weights at its start; those of now are forgotten.
        """
        self._points = {point.row.name: point for point in points if point.row.name in self._costs}
        self.start = start

    def measure(self, step: int) -> list[Point]:
        """Measure the matrices that the budget allows, the oldest numbers first; the same on every rank.

        Args:
            step: number of optimizer steps that are done.
        """
        self._wait_for_device()
        with self._spending():
            model = open_wanted(self._module, self._wanted)
            self._follow(model.matrices)
        names, self._share_taken = self._ranks.of_first(self._next)
        if not names:
            return []
        with self._spending(names):
            insist_on_one(model, self._ranks, self.options)
            kept = {matrix.name: matrix for matrix in model.matrices}
            model = replace(model, matrices=tuple(kept[name] for name in names))
            found = measured(model, self.options, self._found, self._ranks)
        points = [self._point(matrix.name, found[matrix.name], step) for matrix in model.matrices]
        self._found |= found
        self._points |= {point.row.name: point for point in points}
        return points

    def values(self, metrics: Sequence[str], step: int) -> dict[str, float]:
        """What a tracker should see: means by role of the latest numbers, and how many steps old they are.

        Args:
            metrics: names of fields of `LayerMetrics`, or ``relative``.
            step: number of optimizer steps that are done.
        """
        by_role: dict[str, dict[str, list[float]]] = {name: {} for name in (*metrics, "age")}
        for point in self._points.values():
            numbers = {**vars(point.row), "relative": point.relative, "age": step - (point.step or 0)}
            for name, roles in by_role.items():
                if numbers[name] is not None:
                    roles.setdefault(point.row.role, []).append(float(numbers[name]))
        values = {
            f"{PREFIX}/{name}/{role}": fmean(found)
            for name, roles in by_role.items()
            for role, found in sorted(roles.items())
        }
        values[f"{PREFIX}/measured"] = len(self._points) / len(self._costs)
        values[f"{PREFIX}/share_of_time"] = self._share_taken
        return values

    def _follow(self, matrices: Sequence[WeightMatrix]) -> None:
        """Take up matrices that are new, and forget those that are gone."""
        costs = {matrix.name: matrix.cost for matrix in in_turn(matrices)}
        new, gone = costs.keys() - self._costs.keys(), self._costs.keys() - costs.keys()
        if (new or gone) and self._ranks.is_first:
            logger.warning(
                "the model has changed since the monitor began: matrices %s are new, %s are gone",
                *(", ".join(sorted(names)) or "none" for names in (new, gone)),
            )
        self._costs = {name: costs[name] for name in self._costs if name in costs} | costs
        self._points = {name: point for name, point in self._points.items() if name in costs}

    def _next(self) -> tuple[list[str], float]:
        """Names of the matrices whose turn it is, and the share of time that was taken so far: asked on rank 0."""

        def measured_at(name: str) -> int:
            point = self._points.get(name)
            return -1 if point is None else point.step or 0

        order = sorted(self._costs, key=measured_at)
        affordable = self._budget.affordable([self._costs[name] for name in order], self._ranks.size)
        return order[:affordable], self._budget.taken()

    def _spending(self, names: Sequence[str] = ()) -> AbstractContextManager[None]:
        return self._budget.measuring([self._costs[name] for name in names])

    def _point(self, name: str, found: Found, step: int) -> Point:
        start = self.start.get(name)
        relative = relative_change(found.sketch, start.sketch) if found.sketch and start else None
        return Point(f"step-{step}", found.row, step, relative)

    def _wait_for_device(self) -> None:
        """Until the steps before are done, which take the time of training and not of the monitor."""
        if (device := device_of(self._module)) is not None:
            import torch

            torch.accelerator.synchronize(torch.device(device))


def in_turn(matrices: Sequence[WeightMatrix]) -> list[WeightMatrix]:
    """The order of the first round: one matrix of each role, then another of each, the cheapest first in each turn.

    Args:
        matrices: matrices in the order of the model.

    Examples:
        >>> import htsr, torch
        >>> from htsr.training.monitoring.rounds import in_turn
        >>> state = {f"layers.{i}.{name}.weight": torch.ones(8, 8) for i in (0, 1) for name in ("up_proj", "q_proj")}
        >>> [matrix.name for matrix in in_turn(htsr.describe(state).matrices)]
        ['layers.0.up_proj', 'layers.0.q_proj', 'layers.1.up_proj', 'layers.1.q_proj']
    """
    turns: dict[str, count[int]] = {}
    keys = {m.name: (next(turns.setdefault(m.role, count())), m.cost) for m in matrices}
    return sorted(matrices, key=lambda matrix: keys[matrix.name])
