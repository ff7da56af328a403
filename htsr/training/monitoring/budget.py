"""What a monitor may take of the time of a training, and which matrices fit in it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

_GUESS = 3e-11  # seconds a unit of cost, before anything has been measured
_LEAST = 2e7  # units: what a matrix costs, however small it is


class Budget:
    """A share of the seconds of training, which is saved up while nothing is measured.

    What is measured is paid for with the seconds that it took, so that a wrong estimate is made good the next time.

    Args:
        share: seconds of measuring for each second of training without it.
        clock: function that tells the time in seconds.

    Attributes:
        spent: seconds that measuring has taken.

    Examples:
        >>> from htsr.training.monitoring.budget import Budget
        >>> now = [0.0]
        >>> budget = Budget(0.01, clock=lambda: now[0])
        >>> now[0] = 1000.0  # a thousand seconds of training
        >>> budget.left()
        10.0
        >>> with budget.measuring([1e12]):
        ...     now[0] += 4.0
        >>> budget.left(), budget.affordable([1e12, 1e12, 1e12])  # 4 seconds each, it has learned
        (6.0, 1)
    """

    def __init__(self, share: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self.share = share
        self.spent = 0.0
        self._clock = clock
        self._begun = clock()
        self._cost = 0.0
        self._took = 0.0

    def left(self) -> float:
        """Seconds that may be spent now; below 0 where more was spent than was saved."""
        return self.share * max(self._trained(), 1e-9) - self.spent  # of an infinite share all fits, also at once

    def taken(self) -> float:
        """The share of the time of training that was spent so far."""
        return self.spent / max(self._trained(), 1e-9)

    def affordable(self, costs: Sequence[float], together: int = 1) -> int:
        """How many of the next matrices can be measured now, one after the other.

        Before anything has been measured, and seconds are a guess, it is one for each process at most.

        Args:
            costs: floating-point operations of each, in the order in which they are to be measured.
            together: number of processes that share them.
        """
        left, count = self.left(), 0
        if left == math.inf:
            return len(costs)
        rate = self._took / self._cost if self._cost else _GUESS / together
        for cost in costs if self._cost else costs[:together]:
            left -= rate * (cost + _LEAST)
            if left < 0:
                break
            count += 1
        return count

    @contextmanager
    def measuring(self, costs: Sequence[float] = ()) -> Iterator[None]:
        """Within it, time is the monitor's, not that of training.

        Args:
            costs: floating-point operations of what is measured, from which the seconds of others are estimated; none
                where it is something else.
        """
        started = self._clock()
        try:
            yield
        finally:
            took = self._clock() - started
            self.spent += took
            if costs:
                self._took += took
                self._cost += sum(costs) + _LEAST * len(costs)

    def _trained(self) -> float:
        return self._clock() - self._begun - self.spent
