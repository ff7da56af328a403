"""How often each block was trained: what happened, not what was drawn."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Coverage:
    """How often one block was trained.

    Attributes:
        name: the block.
        probability: p of the first draw of an interval.
        intervals: intervals in which it was updated so far, the current one included.
        expected: the number to expect of as many intervals (without replacement).
    """

    name: str
    probability: float
    intervals: int
    expected: float


@dataclass
class Tally:
    """Intervals in which each member moved.

    Attributes:
        counts: (members,) int64.
        moved: members that moved in the current interval.
    """

    counts: npt.NDArray[np.int64]
    moved: set[int] = field(default_factory=set)

    def add(self, members: Collection[int]) -> None:
        """These `members` have moved, once or again in this interval."""
        self.counts[list(set(members) - self.moved)] += 1
        self.moved |= set(members)

    def begin(self) -> None:
        """A new interval."""
        self.moved = set()

    def rows(
        self, names: Iterable[str], probabilities: npt.NDArray[np.float64], expected: npt.NDArray[np.float64]
    ) -> tuple[Coverage, ...]:
        """One `Coverage` for each member.

        Args:
            names: of the members.
            probabilities: (members,) of the first draw.
            expected: (members,) intervals to expect.
        """
        return tuple(
            Coverage(name, float(p), int(count), float(mean))
            for name, p, count, mean in zip(names, probabilities, self.counts, expected, strict=True)
        )
