"""`--fail-on`: conditions on the rows of an analysis, and what has to be computed for them."""

from __future__ import annotations

import math
import operator
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, get_args, get_type_hints

from htsr.analysis.result import Analysis
from htsr.errors import UsageError
from htsr.reporting.text import visible
from htsr.spectra.alternatives import LAWS
from htsr.spectra.metrics import LayerMetrics
from htsr.spectra.tail import FitMethod

_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
    "~": operator.contains,
}
_TRUTH = {"true": True, "false": False, "1": True, "0": False}
_ALIASES = {"note": "warning"}  # the header of the tables

NEEDS = {
    "null": r"alpha_null|alpha_null_sd|alpha_minus_null",
    "bulk": r"sigma_mp|lambda_plus|lambda_minus|bulk_threshold|num_spikes|mp_softrank|mp_distance",
    "permuted": r"num_traps|max_rand_eval|rand_threshold|rand_distance|mean_shift|mean_shift_threshold",
    "alternatives": r"best_law|e_tpl_\w+|(tpl|exponential|stretched_exponential|lognormal)_\w+",
    "quality": r"quality_\w+",
}
"""Options by the fields of `LayerMetrics` that they fill in."""


KNOWN = {
    "status": (
        *("ok", "absent", "adapter", "degenerate", "empty", "failed", "meta", "missing", "nan", "needs_base"),
        *(
            "nested",
            "parametrized",
            "quantized",
            "sharded",
            "sparse",
            "tiny",
            "underflow",
            "unmatched",
            "unmerged",
            "unreadable",
            "unsupported",
            "zero",
        ),
    ),
    "kind": ("linear", "embedding", "conv", "expert", "adapter", "stack"),
    "best_law": ("power_law", *LAWS),
    "fit": get_args(FitMethod),
}
"""Values of the fields of `LayerMetrics` that have no others."""


@dataclass(frozen=True)
class Condition:
    """A condition on a row, such as alpha > 6."""

    field: str
    symbol: str
    value: float | str

    def met(self, row: LayerMetrics) -> bool:
        """Whether `row` meets it; a row without the number does not."""
        actual = getattr(row, self.field)
        return actual is not None and _OPERATORS[self.symbol](actual, self.value)

    def __str__(self) -> str:
        value = f"{self.value:g}" if isinstance(self.value, float) else self.value
        return visible(f"{self.field}{self.symbol}{value}")


def parse_conditions(texts: Sequence[str] | None) -> list[Condition]:
    """Conditions of `--fail-on`.

    Raises:
        UsageError: not of the form FIELD OPERATOR VALUE, no such field, or an operator or value of another kind.
    """
    return [_parsed(text) for text in texts or []]


def _parsed(text: str) -> Condition:
    match = re.fullmatch(r"\s*(\w+)\s*(>=|<=|==|!=|>|<|~)\s*(.+?)\s*", text)
    if not match:
        raise UsageError(f"--fail-on takes conditions such as 'alpha>6' or 'note~random-like', not {text!r}")
    name, symbol, value = match.groups()
    name = _ALIASES.get(name, name)
    kinds = get_type_hints(LayerMetrics)
    if name not in kinds:
        raise UsageError(f"--fail-on: rows have no {name!r}; among others alpha, trace_log, stable_rank, status, note")
    if kinds[name] in (str, str | None):
        if symbol not in ("==", "!=", "~"):
            raise UsageError(f"--fail-on: {name} is text, which has no order: {name}=={value}, {name}!={value}")
        if name == "warning" and symbol != "~":
            raise UsageError(f"--fail-on: a row has several notes; those with one of them are note~{value}")
        known = KNOWN.get(name, (value,))
        if not any(value in each if symbol == "~" else value == each for each in known):
            raise UsageError(
                f"--fail-on: no {name} {'contains' if symbol == '~' else 'is'} {value!r}: {', '.join(known)}"
            )
        return Condition(name, symbol, value)
    if symbol == "~":
        raise UsageError(f"--fail-on: {name} is a number, and ~ looks for text")
    if kinds[name] == bool | None and symbol in ("==", "!=") and value.lower() in _TRUTH:
        return Condition(name, symbol, _TRUTH[value.lower()])
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if math.isnan(number):
        raise UsageError(f"--fail-on: {name} is a number, and {value!r} is no number")
    return Condition(name, symbol, number)


def with_needed(options: dict[str, Any], conditions: Sequence[Condition]) -> dict[str, Any]:
    """`options` with everything computed that the conditions ask about.

    Raises:
        UsageError: what is asked about cannot be computed with these options.
    """
    fields = [condition.field for condition in conditions]
    needed = {option for option, names in NEEDS.items() if any(re.fullmatch(names, field) for field in fields)}
    if "null" in needed and (options.get("xmin") is not None or options.get("xmax") is not None):
        raise UsageError("--fail-on: with --xmin or --xmax no α of pure noise is computed")
    if not options.get("bootstrap") and (bounds := {"alpha_low", "alpha_high"}.intersection(fields)):
        raise UsageError(f"--fail-on: {min(bounds)} wants a number of resamples, such as --bootstrap 200")
    if "gof_p" in fields and not options.get("gof"):
        raise UsageError("--fail-on: gof_p wants a number of samples, such as --gof 200")
    return options | dict.fromkeys(needed, True)


def judge(analysis: Analysis, conditions: Sequence[Condition]) -> int:
    """The exit code: 3 where a row meets a condition, 2 where no row has the number that one asks about, else 0."""
    codes = [_judge(analysis, condition) for condition in conditions]
    return max(codes, default=0)


def _judge(analysis: Analysis, condition: Condition) -> int:
    for row in (met := [row for row in analysis if condition.met(row)]):
        value = getattr(row, condition.field)
        say_error(f"{condition} holds for {row.name}: {f'{value:.4g}' if isinstance(value, float) else value}")
    without = [row.name for row in analysis if getattr(row, condition.field) is None]
    if condition.field == "role" and condition.symbol != "!=" and not met:
        say_error(f"{condition} cannot be judged: there are {', '.join(sorted({row.role for row in analysis}))}")
        return 2
    if len(without) == len(analysis):
        say_error(f"{condition} cannot be judged: no matrix has {condition.field}")
        return 2
    if without and condition.field != "block":
        others = f" and {len(without) - 1} more" if len(without) > 1 else ""
        say_error(f"{condition} was not asked of {without[0]}{others}, without {condition.field}")
    return 3 if met else 0


def say_error(text: str) -> None:
    """A sentence on stderr that explains an exit code, also to who asked for quiet."""
    print(f"htsr: {visible(text)}", file=sys.stderr)  # noqa: T201
