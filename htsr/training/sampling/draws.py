"""Which members train in an interval: drawn by their probabilities, a function of a seed and the interval's number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from htsr.arrays import Vector
from htsr.calibration.outliers import Outliers
from htsr.errors import UsageError
from htsr.matrices.blocks import Blocks
from htsr.matrices.stored_tensors import clean_name
from htsr.training.sampling.members import Unit
from htsr.training.sampling.probabilities import (
    Scores,
    Strategy,
    block_probabilities,
    inclusion_probabilities,
    lower_threshold,
    matrix_probabilities,
)

if TYPE_CHECKING:
    import torch

_SIMULATED = 4096  # draws from which the probability to be among the drawn is estimated where sizes differ


@dataclass
class Draws:
    """Members drawn one by one without replacement, by probabilities that may change from one draw to the next.

    Attributes:
        names: names of the members.
        probabilities: (members,) float64 probabilities of the first to be drawn, with the sum 1.
        active: number γ of members of a draw, where there is no `room`.
        seed: seed of the draws.
        top: whether the most probable are taken for good.
        sizes: (members,) numbers of parameters.
        room: number of parameters of a draw; None for γ members. As many of the members are taken, in the order in
            which they are drawn, as fit; the first that does not fit ends the draw.

    Examples:
        Of matrices with 3, 1 and 2 parameters as many as have 3 together:

        >>> import numpy as np
        >>> from htsr.training.sampling.draws import Draws
        >>> draws = Draws(("q", "k", "v"), np.array([0.2, 0.3, 0.5]), 1, 0, False, np.array([3, 1, 2]), room=3)
        >>> [draws.draw(number) for number in range(4)]
        [(0,), (1, 2), (0,), (1, 2)]
    """

    names: tuple[str, ...]
    probabilities: Vector
    active: int
    seed: int
    top: bool
    sizes: npt.NDArray[np.int64]
    room: int | None = None

    def draw(self, number: int) -> tuple[int, ...]:
        """The members of interval `number`, ascending.

        Args:
            number: number of the interval, counted from 0.
        """
        if self.top:
            order = np.argsort(-self.probabilities, kind="stable")
        else:
            # a generator for each draw, so that a resumed run and all processes agree without those before it
            random = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, number])))
            if self.room is None:
                order = random.choice(len(self.names), size=self.active, replace=False, p=self.probabilities)
            else:
                order = self._orders(random, 1)[0]
        taken = order[: self.active] if self.room is None else order[: self._fitting(order[None])[0]]
        return tuple(sorted(int(i) for i in taken))

    def inclusion(self) -> Vector:
        """(members,) probabilities to be among the drawn; where there is `room`, estimated to about one percent."""
        if self.top:
            return np.isin(np.arange(len(self.names)), self.draw(0)).astype(np.float64)
        if self.room is None:
            return inclusion_probabilities(self.probabilities, self.active)
        orders = self._orders(np.random.Generator(np.random.Philox(0)), _SIMULATED)
        taken = np.arange(len(self.names)) < self._fitting(orders)[:, None]
        return np.bincount(orders[taken], minlength=len(self.names)) / _SIMULATED

    def _orders(self, random: np.random.Generator, number: int) -> npt.NDArray[np.int64]:
        """(number, members) orders of arrival: each member comes at a time with the law Exp(p)."""
        with np.errstate(divide="ignore"):
            times = random.exponential(size=(number, len(self.names))) / self.probabilities
        found: npt.NDArray[np.int64] = np.argsort(times, axis=1)
        return found

    def _fitting(self, orders: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """How many of each order fit into the room, of those that can be drawn."""
        sizes = np.where(self.probabilities > 0, self.sizes, np.inf)[orders]
        found: npt.NDArray[np.int64] = (np.cumsum(sizes, axis=1) <= (self.room or 0)).sum(axis=1)
        return found


def draws_of(
    model: torch.nn.Module,
    blocks: Blocks,
    members: Mapping[str, Sequence[str]],
    unit: Unit,
    weights: tuple[Strategy | Sequence[float], Scores | None, float],
    *,
    active: int,
    seed: int,
    top: bool,
) -> Draws:
    """The draws of a model's blocks or matrices.

    Args:
        model: model, wrapped or not.
        blocks: blocks of this model.
        members: names of the parameters of each member, from `members_of`.
        unit: what the members are.
        weights: strategy, scores and threshold, as `block_probabilities` takes them.
        active: number γ of blocks, or of blocks whose parameters the drawn matrices have.
        seed: seed of the draws.
        top: whether the most probable are taken for good.

    Raises:
        UsageError: the strategy does not fit the model, fewer blocks than `active` can be drawn, or a matrix is larger
            than all that is drawn.
    """
    strategy, scores, threshold = weights
    names = tuple(members)
    drawable = sorted({index for name in names if (index := blocks.index_of(f"{name}.")) is not None})
    count = len(drawable)
    sizes_of = {clean_name(name): parameter.numel() for name, parameter in model.named_parameters()}
    sizes = np.array([sum(sizes_of[name] for name in inside) for inside in members.values()])
    if unit == "matrix":
        probabilities = matrix_probabilities(strategy, names, blocks, scores, threshold)
        room = int(sizes.sum()) * active // count
        if not 1 <= active <= count:
            raise UsageError(f"sampling.active (active=) is between 1 and the {count} blocks, not {active}")
        large = sizes * (probabilities > 0) > room
        if large.any():
            raise UsageError(
                f"{names[int(large.argmax())]} has more parameters than {active} of {count} blocks on average, and "
                "could never be drawn: take a larger sampling.active (active=), or unit='block'"
            )
        return Draws(names, probabilities, active, seed, top, sizes, room)
    probabilities = block_probabilities(strategy, blocks, scores, threshold)
    if count < len(blocks):  # the others keep their weights among themselves
        probabilities = probabilities[drawable] / (probabilities[drawable].sum() or 1.0)
    if len(names) > count:
        probabilities = np.append(probabilities, 1 / count) / (1 + 1 / count)
    possible = int((probabilities > 0).sum())
    if possible < active <= count and isinstance(scores, Outliers) and strategy == "owlore":
        advice = lower_threshold(scores, threshold, active, f"entries of {active} blocks exceed")
        have = "has" if possible == 1 else "have"
        raise UsageError(
            f"sampling.active (active=) is {active}, and {possible} of the {len(names)} blocks of {scores.label} "
            f"{have} an entry above {threshold:g} times its mean: {advice}"
        )
    if not 1 <= active <= possible:
        which = "" if possible == len(names) else " with a probability above 0"
        raise UsageError(f"sampling.active (active=) is between 1 and the {possible} blocks{which}, not {active}")
    return Draws(names, probabilities, active, seed, top, sizes)
