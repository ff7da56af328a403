"""What a layerwise policy is: which score, which map, what it sets, when."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from types import MappingProxyType
from typing import Any, Literal, TypeAlias, get_args

from htsr import allocate
from htsr.errors import UsageError
from htsr.spectra.scores import Score, ScoreName
from htsr.spectra.tail import FitMethod
from htsr.spectra.windows import Windows

Unit: TypeAlias = Literal["matrix", "block", "role"]
Spectrum: TypeAlias = Literal["weights", "gradients", "momentum"]
Sets: TypeAlias = Literal["lr", "weight_decay"]
Embeddings: TypeAlias = float | Literal["max", "measured", "leave"]
PolicyLike: TypeAlias = "str | Policy | Mapping[str, float]"


@dataclass(frozen=True, kw_only=True)
class Policy:
    """How multipliers come from spectra. The defaults are LLR's, as published.

    A matrix that is neither pinned nor excluded nor too small is *measured*: its score is computed at every event and
    mapped to a multiplier. A score without meaning gives 1, and a wild one cannot squeeze the others together
    (`htsr.allocate`). Patterns are shell-style and match a role (``attn.q``, ``mlp.*``, ``norm``) or a name.

    Attributes:
        score: score of a matrix, see `htsr.spectra.scores`: ``alpha``, ``alpha_null`` (static by shape),
            ``alpha_minus_null`` (shape-corrected), ``erg_gap``, ``trace_log``, ``stable_rank``, or a function of an
            `ESD`. None measures nothing: only what is pinned, embeddings and head included, leaves 1.
        fit: how the power-law tail is chosen.
        windows: FARMS windows; None decomposes whole matrices.
        spectrum: what is decomposed: the ``weights``, their ``gradients``, or the optimizer's ``momentum``.
        map: map from scores to multipliers, see `htsr.allocate`.
        bounds: least and largest multiplier of what is measured, s1 and s2, and so of ``max``. Numbers that `pin`,
            `embeddings` and `head` name are taken as they are, such as the 5 of ``ends``.
        reverse: whether small scores get large multipliers instead.
        sets: what is multiplied, ``lr`` or ``weight_decay``.
        unit: what shares one multiplier: ``matrix``, or all matrices of a ``block`` or ``role``, their scores averaged.
        interval: steps between events, which fall on step 1 and on the multiples of `interval`; None for step 1 only.
        ramp: steps over which a multiplier moves to its new value, linearly.
        active_fraction: share of `total_steps` in which events happen, its last step included.
        embeddings: multiplier of input embeddings: a number, ``max`` (the largest that any measured matrix gets; the
            upper bound where none is measured), ``measured`` (like any matrix), ``leave`` (1).
        head: multiplier of the output head, as `embeddings`; None for that of `embeddings`. A head that is tied to the
            embedding is one tensor with it, whose multiplier `embeddings` says.
        min_size: matrices with fewer eigenvalues stay at 1; the slices of a kernel count together.
        exclude: patterns of matrices that stay at 1.
        exclude_ends: whether the first and the last layer stay at 1: embeddings and the head, and where there are none
            (or no head, unless the embedding is tied to one) the first or the last matrix in the order of the modules.
        pin: multipliers by pattern. The first that matches counts; it goes before all other rules.
        decouple_weight_decay: whether weight decay is divided by the lr multiplier, for optimizers that decay by lr·wd
            (AdamW).
        dtype: precision of the eigenvalues. ``float32`` takes half the time and resolves eigenvalues down to 2e-6·λ_max
            only: enough for ``hill`` on the weights of a trained model, not for gradients or momentum. Nothing is
            computed again in float64, as an analysis does: with other fits, another tail may win.

    Raises:
        UsageError: a field has no meaning.

    Examples:
        LLR on whole blocks, measured every 500 steps, norms and other vectors at twice the rate:

        >>> import htsr
        >>> policy = htsr.Policy(unit="block", interval=500, pin={"norm": 2.0, "vector": 2.0})
        >>> policy.score, policy.bounds
        ('alpha', (1.0, 5.0))
        >>> htsr.Policy(bounds=(5.0, 1.0))
        Traceback (most recent call last):
        htsr.errors.UsageError: bounds are (s1, s2), finite numbers with 0 ≤ s1 ≤ s2, not (5.0, 1.0)

    Source: LLR (arXiv 2605.22297); its relatives TempBalance (arXiv 2312.00359), AlphaDecay, FARMS (ICML 2025).
    """

    score: Score | None = "alpha"
    fit: FitMethod = "hill"
    windows: Windows | None = None
    spectrum: Spectrum = "weights"
    map: allocate.Map = "linear"
    bounds: tuple[float, float] = (1.0, 5.0)
    reverse: bool = False
    sets: Sets = "lr"
    unit: Unit = "matrix"
    interval: int | None = 100
    ramp: int = 50
    active_fraction: float = 0.2
    embeddings: Embeddings = "max"
    head: Embeddings | None = None
    min_size: int = 50
    exclude: tuple[str, ...] = ()
    exclude_ends: bool = False
    pin: Mapping[str, float] = field(default_factory=dict)
    decouple_weight_decay: bool = False
    dtype: Literal["float32", "float64"] = "float64"

    def __post_init__(self) -> None:
        for name, kind in (
            ("fit", FitMethod),
            ("spectrum", Spectrum),
            ("map", allocate.Map),
            ("sets", Sets),
            ("unit", Unit),
        ):
            _one_of(name, getattr(self, name), get_args(kind))
        _one_of("dtype", self.dtype, ("float32", "float64"))
        if not (self.score is None or callable(self.score)):
            _one_of("score", self.score, get_args(ScoreName))
        for name, rule in (("embeddings", self.embeddings), ("head", self.head)):
            if isinstance(rule, str):
                _one_of(name, rule, ("max", "measured", "leave"))
            elif not (_is_multiplier(rule) or (name == "head" and rule is None)):
                raise UsageError(f"{name} is max, measured, leave or a finite number ≥ 0, not {rule!r}")
        self._require_numbers()
        if not (self.windows is None or isinstance(self.windows, Windows)):
            raise UsageError(f"windows is htsr.Windows(rows, count) or None, not {self.windows!r}")
        if not isinstance(self.exclude, (tuple, list)) or not all(isinstance(p, str) for p in self.exclude):
            raise UsageError(f"exclude is a tuple of patterns, not {self.exclude!r}")
        if not isinstance(self.pin, Mapping):
            raise UsageError(f"pin is a mapping of patterns to multipliers, not {self.pin!r}")
        for pattern, value in self.pin.items():
            if not (isinstance(pattern, str) and _is_multiplier(value)):
                raise UsageError(f"a multiplier is a finite number ≥ 0, unlike that of {pattern!r}: {value!r}")
        if self.decouple_weight_decay and self.sets != "lr":
            raise UsageError(
                "decouple_weight_decay undoes what an lr multiplier does to the decay; this policy sets it"
            )

    def _require_numbers(self) -> None:
        bounds: Any = self.bounds
        if not (isinstance(bounds, Sequence) and len(bounds) == 2 and all(map(_is_multiplier, bounds))) or (
            bounds[0] > bounds[1]
        ):
            raise UsageError(f"bounds are (s1, s2), finite numbers with 0 ≤ s1 ≤ s2, not {bounds!r}")
        if self.interval is not None:
            require_count("interval", self.interval, 1)
        require_count("ramp", self.ramp, 0)
        require_count("min_size", self.min_size, 0)
        if not (_is_multiplier(self.active_fraction) and 0 < self.active_fraction <= 1):
            raise UsageError(f"active_fraction lies in (0, 1], unlike {self.active_fraction!r}")

    @property
    def of_head(self) -> Embeddings:
        """Rule of the output head: `head`, or what None stands for."""
        return self.embeddings if self.head is None else self.head

    @property
    def static(self) -> bool:
        """Whether the scores cannot change while training, so that one event is enough."""
        return self.score is None or self.score == "alpha_null" or self.interval is None

    def describe(self) -> str:
        """The policy as one line of JSON; functions by their name."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["pin"] = dict(self.pin)
        if self.windows is not None:
            values["windows"] = [self.windows.rows, self.windows.count, self.windows.aspect]
        values["score"] = name_of(self.score)
        return json.dumps(values, default=float)  # what NumPy counts and measures


def name_of(score: Score | None) -> str | None:
    """The name of a `score`, also of one that is a function."""
    return getattr(score, "__qualname__", type(score).__name__) if callable(score) else score


def require_count(name: str, value: Any, least: int) -> None:
    """Refuse a `value` of the argument `name` that is no whole number, or is below `least`.

    Raises:
        UsageError: it is none, or is below.
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or int(value) < least:
        raise UsageError(f"{name} is a whole number, at least {least}, not {value!r}")


def _is_multiplier(value: Any) -> bool:
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value) and float(value) >= 0
    except OverflowError:  # a whole number that no float holds
        return False


def _one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UsageError(f"unknown {name} {value!r}: {', '.join(known)}")


PRESETS: Mapping[str, Policy] = MappingProxyType(
    {
        "llr": Policy(),
        "ends": Policy(score=None, embeddings=5.0),
        "tempbalance": Policy(
            bounds=(0.5, 1.5), interval=None, ramp=0, active_fraction=1.0, embeddings="leave", exclude_ends=True
        ),
        "alphadecay": Policy(
            sets="weight_decay", bounds=(2 / 3, 3.0), interval=500, ramp=0, active_fraction=1.0, embeddings="leave"
        ),
        "model_balancing": Policy(
            map="model_balancing",
            bounds=(10**-0.5, 10**0.5),
            unit="block",
            ramp=0,
            active_fraction=1.0,
            embeddings="leave",
        ),
    }
)
"""Policies by name: published ones, and ``ends``, which measures nothing and is the arm to beat by what this toolkit
measured at small size (`reports/llr_small`). ModelBalancing's interval is not published; 100 steps is our choice."""


def make_policy(policy: PolicyLike = "llr", **changes: Any) -> Policy:
    """A `Policy` from a preset's name, another policy, or a mapping of patterns to fixed multipliers; with changes.

    Args:
        policy: ``llr``, ``ends`` (embedding and head ×5, all else 1), ``tempbalance``, ``alphadecay``,
            ``model_balancing``, a `Policy`, or a mapping.
        **changes: fields of `Policy` to be changed; ``tempbalance`` needs `interval`.

    Raises:
        UsageError: the name or a field is unknown, or a field has no meaning.

    Examples:
        >>> from htsr.training.layerwise.policy import make_policy
        >>> make_policy("alphadecay", interval=100).sets
        'weight_decay'
        >>> make_policy({"attn.*": 4.0, "embed": 10.0}).pin
        {'attn.*': 4.0, 'embed': 10.0}
    """
    if isinstance(policy, str):
        if policy not in PRESETS:
            raise UsageError(f"unknown policy {policy!r}: {', '.join(PRESETS)}, a Policy or a mapping of multipliers")
        if policy == "tempbalance" and "interval" not in changes:
            raise UsageError("tempbalance measures once an epoch: give interval=the optimizer steps of one epoch")
        policy = PRESETS[policy]
    elif not isinstance(policy, (Policy, Mapping)):
        raise UsageError(f"a policy is one of {', '.join(PRESETS)}, a Policy or a mapping of multipliers: {policy!r}")
    elif not isinstance(policy, Policy):
        policy = Policy(score=None, embeddings="leave", min_size=1, pin=dict(policy))
    known = {f.name for f in fields(Policy)}
    if unknown := sorted(set(changes) - known):
        raise UsageError(f"a policy has no {', '.join(unknown)}; it has {', '.join(sorted(known))}")
    return replace(policy, **changes)
