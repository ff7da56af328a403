"""What a monitor warns of: signs that somebody should look at a matrix, and what is known of them.

Each warning names a matrix once. The thresholds are ours: papers say what the numbers mean, and none says from where on
a training is lost. `SIGNS` say what is known and what is not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from htsr.analysis.trajectory_file import Point
from htsr.spectra.metrics import LayerMetrics

SIGNS = {
    "heavy": (
        "the evaluation loss has risen twice in a row, and α is below 2 by more than two standard errors in {names}. "
        "Papers take α < 2 for over-training; alone it is none, and many good models have such matrices. Look at "
        "earlier checkpoints, or lower the learning rate"
    ),
    "collapse": (
        "the stable rank has fallen below 2, and to less than half of what it was, in {names}: one direction holds "
        "most of the matrix. A learning rate that is too high does that; whether it harms is not known from "
        "the spectrum. Look at the loss, and at weight decay or clipping"
    ),
    "random": (
        "still cannot be told from noise after {times} measurements, while most matrices can: {names}. A layer that "
        "is frozen, not used, or gets no gradient stays so; some that train do, too: they have moved, as has what only "
        "decays. See whether it has a gradient"
    ),
    "broken": "NaN, infinite or overflowing entries in {names}: the loss is lost. Go back to an earlier checkpoint",
}
HEAVY, COLLAPSED, FALLEN, PATIENCE, MOST = 2.0, 2.0, 0.5, 3, 0.5
_NAMED = 5


@dataclass(frozen=True)
class Sign:
    """A warning that is due.

    Attributes:
        kind: key of `SIGNS`.
        matrices: names of the matrices that have it for the first time.
        moved: how far they have moved, ‖W - W_0‖ / ‖W_0‖, where that is known and not 0.
    """

    kind: str
    matrices: tuple[str, ...]
    moved: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        more = len(self.matrices) - _NAMED
        named = [f"{name} (moved by {self.moved[name]:.2g})" if name in self.moved else name for name in self.matrices]
        names = ", ".join(named[:_NAMED]) + (f" and {more} more" if more > 0 else "")
        return SIGNS[self.kind].format(names=names, times=PATIENCE)


class Watch:
    """The measurements of a run, looked through for signs.

    Examples:
        >>> from htsr.analysis.trajectory_file import Point
        >>> from htsr.spectra.metrics import LayerMetrics
        >>> from htsr.training.monitoring.alarms import Watch
        >>> watch = Watch()
        >>> rows = [LayerMetrics(name="up_proj", stable_rank=rank) for rank in (9.0, 1.4, 1.2)]
        >>> for step, row in enumerate(rows):
        ...     print([sign.kind for sign in watch.signs([Point(f"step {step}", row, step)])])
        []
        ['collapse']
        []
    """

    def __init__(self) -> None:
        self._losses: list[float] = []
        self._first_rank: dict[str, float] = {}
        self._alpha: dict[str, LayerMetrics] = {}
        self._moved: dict[str, float] = {}
        self._random: dict[str, int] = {}
        self._said: set[tuple[str, str]] = set()

    def began(self, ranks: Mapping[str, float | None]) -> None:
        """Take down the weights before training.

        Args:
            ranks: about the stable rank of each matrix; None where that is not known.
        """
        self._first_rank |= {name: rank for name, rank in ranks.items() if rank is not None}

    def evaluated(self, loss: float) -> list[Sign]:
        """Take down an evaluation.

        Args:
            loss: loss on data that the model does not train on.

        Returns:
            The warnings that are due now, and were not before.
        """
        self._losses = [*self._losses[-2:], loss]
        return self._due()

    def signs(self, points: Iterable[Point]) -> list[Sign]:
        """Take down measurements.

        Args:
            points: measurements in the order of their steps.

        Returns:
            The warnings that are due now, and were not before.
        """
        for point in points:
            row = point.row
            self._alpha[row.name] = row
            self._moved[row.name] = point.relative or 0.0
            if row.stable_rank is not None:
                self._first_rank.setdefault(row.name, row.stable_rank)
            if (noise := is_like_noise(row)) is not None:
                self._random[row.name] = self._random.get(row.name, 0) + 1 if noise else 0
        return self._due()

    def _due(self) -> list[Sign]:
        rows = self._alpha.values()
        found = {
            "heavy": [row.name for row in rows if is_heavy(row)] if is_rising(self._losses) else [],
            "collapse": [row.name for row in rows if self._is_collapsed(row)],
            "random": self._still_random(),
            "broken": [row.name for row in rows if row.status == "nan"],
        }
        signs = []
        for kind, names in found.items():
            if new := tuple(name for name in names if (kind, name) not in self._said):
                self._said.update((kind, name) for name in new)
                moved = {name: self._moved[name] for name in new if self._moved[name] and kind == "random"}
                signs.append(Sign(kind, new, moved))
        return signs

    def _is_collapsed(self, row: LayerMetrics) -> bool:
        rank = row.stable_rank
        return rank is not None and rank < COLLAPSED and rank < FALLEN * self._first_rank[row.name]

    def _still_random(self) -> list[str]:
        noisy = [name for name, times in self._random.items() if times]
        if len(noisy) > MOST * len(self._random):
            return []
        return [name for name in noisy if self._random[name] >= PATIENCE]


def is_heavy(row: LayerMetrics) -> bool:
    """Whether α is below 2 by more than two of its standard errors.

    Args:
        row: numbers of a matrix.

    Examples:
        >>> from htsr.spectra.metrics import LayerMetrics
        >>> from htsr.training.monitoring.alarms import is_heavy
        >>> [is_heavy(LayerMetrics(name="up_proj", alpha=1.8, sigma=sigma)) for sigma in (0.05, 0.2)]
        [True, False]
    """
    return row.alpha is not None and row.sigma is not None and row.alpha + 2 * row.sigma < HEAVY


def is_rising(losses: Sequence[float]) -> bool:
    """Whether each of the last two losses is above the one before.

    Args:
        losses: losses in their order.

    Examples:
        >>> from htsr.training.monitoring.alarms import is_rising
        >>> is_rising([3.0, 2.0, 2.1]), is_rising([2.0, 2.1, 2.2])
        (False, True)
    """
    return len(losses) > 2 and losses[-1] > losses[-2] > losses[-3]


def is_like_noise(row: LayerMetrics) -> bool | None:
    """Whether a spectrum is that of a Gaussian matrix of its shape, as far as two numbers tell.

    They are α, within two standard deviations of its null, and the largest eigenvalue, within the 99 % quantile of
    the Tracy-Widom law; a Gaussian matrix passes both about 19 times out of 20.

    Args:
        row: numbers of a matrix, with the null of α and the bulk.

    Returns:
        None where one of the numbers is missing.

    Examples:
        >>> import htsr, torch
        >>> from htsr.training.monitoring.alarms import is_like_noise
        >>> noise = torch.randn(60, 90, generator=torch.Generator().manual_seed(0))
        >>> is_like_noise(htsr.analyze({"up_proj.weight": noise}, bulk=True)[0])
        True
    """
    if row.alpha_minus_null is None or row.alpha_null_sd is None or row.num_spikes is None:
        return None
    return row.num_spikes == 0 and abs(row.alpha_minus_null) < 2 * row.alpha_null_sd
