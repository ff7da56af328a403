"""Values from JSON back to frozen dataclasses, by the types of their fields: what does not fit is named."""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")
Check = Callable[[Any], Any]

_LARGEST = 2**63  # no size or count is larger


def from_json(kind: type[T], value: Any) -> T:
    """An instance of the dataclass `kind` from what `dataclasses.asdict` and JSON have made of one.

    Args:
        kind: dataclass whose fields are text, numbers, booleans, literals, None, tuples, or such dataclasses.
        value: value as JSON gives it. Fields with a default may be missing.

    Raises:
        ValueError: a field is unknown, missing, or not of its type, or `kind` itself refuses it.

    Examples:
        >>> from htsr.analysis.schema import from_json
        >>> from htsr.spectra.windows import Windows
        >>> from_json(Windows, {"rows": 100, "count": 9})
        Windows(rows=100, count=9, aspect=1.0)
        >>> from_json(Windows, {"rows": "100", "count": 9})
        Traceback (most recent call last):
        ValueError: rows: '100' is no whole number
    """
    return _check(kind)(value)  # type: ignore[arg-type, no-any-return]


@cache
def _check(kind: Any) -> Check:
    """A function that returns what it is given as a `kind`, or raises ValueError."""
    origin = get_origin(kind)
    if is_dataclass(kind):
        return _object(kind)
    if origin in (Union, types.UnionType):
        return _any_of(tuple(_check(inner) for inner in get_args(kind)))
    if origin is Literal:
        return _where(lambda value: isinstance(value, str) and value in get_args(kind), str(get_args(kind)))
    if origin is tuple:
        inner = _check(get_args(kind)[0])  # tuple[X, ...]
        return lambda value: tuple(map(inner, _insist(isinstance(value, (list, tuple)), value, "list")))
    if kind is float:
        return lambda value: float(_insist(_is_number(value), value, "number"))
    if kind is int:
        return _where(lambda value: _is_number(value) and isinstance(value, int), "whole number")
    if kind is type(None):
        return _where(lambda value: value is None, "null")
    return _where(lambda value: isinstance(value, kind), kind.__name__)


def _object(kind: Any) -> Check:
    types_ = get_type_hints(kind)
    checks = {field.name: _check(types_[field.name]) for field in fields(kind)}
    needed = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]

    def check(value: Any) -> Any:
        _insist(isinstance(value, dict), value, kind.__name__)
        if missing := [name for name in needed if name not in value]:
            raise ValueError(f"a {kind.__name__} without {missing[0]!r}")
        found = {}
        for name, inner in value.items():
            if name not in checks:
                raise ValueError(f"a {kind.__name__} has no {_shown(name)}")
            try:
                found[name] = checks[name](inner)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        return kind(**found)

    return check


def _any_of(checks: tuple[Check, ...]) -> Check:
    def check(value: Any) -> Any:
        reasons = []
        for inner in checks:
            try:
                return inner(value)
            except ValueError as error:
                reasons.append(error)
        raise reasons[0]

    return check


def _where(fits: Callable[[Any], bool], what: str) -> Check:
    return lambda value: _insist(fits(value), value, what)


def _is_number(value: Any) -> bool:
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and (isinstance(value, float) or abs(value) <= _LARGEST)
    )


def _insist(fits: bool, value: Any, what: str) -> Any:
    if not fits:
        raise ValueError(f"{_shown(value)} is no {what}")
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
