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
        name: name of the block.
        probability: probability p that it is the first block drawn in an interval.
        intervals: number of intervals in which it was updated so far, the current one included.
        expected: number to expect after as many intervals (drawn without replacement).
    """

    name: str
    probability: float
    intervals: int
    expected: float


@dataclass
class Tally:
    """Intervals in which each member moved.

    Attributes:
        counts: (members,) int64 numbers of intervals.
        moved: indices of the members that moved in the current interval.

    Examples:
        Member 0 moves twice in the first interval, which counts once, and again in the second:

        >>> import numpy as np
        >>> from htsr.training.sampling.coverage import Tally
        >>> tally = Tally(np.zeros(3, dtype=np.int64))
        >>> for members in ([0], [0, 2]):
        ...     tally.add(members)
        >>> tally.begin()
        >>> tally.add([0])
        >>> tally.counts
        array([2, 0, 1])
    """

    counts: npt.NDArray[np.int64]
    moved: set[int] = field(default_factory=set)

    def add(self, members: Collection[int]) -> None:
        """Note that these `members` have moved, for the first time in this interval or again."""
        self.counts[list(set(members) - self.moved)] += 1
        self.moved |= set(members)

    def begin(self) -> None:
        """Begin a new interval."""
        self.moved = set()

    def rows(
        self, names: Iterable[str], probabilities: npt.NDArray[np.float64], expected: npt.NDArray[np.float64]
    ) -> tuple[Coverage, ...]:
        """One `Coverage` for each member.

        Args:
            names: names of the members.
            probabilities: (members,) probabilities of the first draw.
            expected: (members,) numbers of intervals to expect.
        """
        return tuple(
            Coverage(name, float(p), int(count), float(mean))
            for name, p, count, mean in zip(names, probabilities, self.counts, expected, strict=True)
        )
