"""JSON of records, in which no key of an object stands twice."""

from __future__ import annotations

import json
import re
from typing import Any

from htsr.errors import SourceError


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise SourceError(f"the key {twice[:80]} stands twice in one object: write it once")
    return found


_STRICT = json.JSONDecoder(object_pairs_hook=_once)
_BETWEEN = re.compile(r"[\s,]*")


def from_json(text: str) -> Any:
    """What a JSON `text` says; Python's own would keep the last of the values that a key has in one object.

    Raises:
        SourceError: an object has a key twice.
        ValueError: it is no JSON.

    Examples:
        >>> from htsr.calibration.record_json import from_json
        >>> from_json('{"text": "a", "text": "b"}')
        Traceback (most recent call last):
        htsr.errors.SourceError: the key text stands twice in one object: write it once
    """
    return _STRICT.decode(text)


def first_refused(array: str) -> int:
    """Number, from 1, of the first element of an `array` in which `from_json` has found a key twice.

    Examples:
        >>> from htsr.calibration.record_json import first_refused
        >>> first_refused('[{"text": "a"}, {"text": "a", "text": "b"}]')
        2
    """
    at, number = array.index("[") + 1, 1
    while True:
        try:
            _, at = _STRICT.raw_decode(array, _BETWEEN.match(array, at).end())  # type: ignore[union-attr]
        except SourceError:
            return number
        number += 1


def is_one_object(text: str) -> bool:
    """Whether a JSON `text` is one object, over however many lines, and nothing else.

    Examples:
        >>> from htsr.calibration.record_json import is_one_object
        >>> is_one_object('{\\n"text": "a"\\n}\\n'), is_one_object('{"text": "a"}\\n{"text": "b"}\\n')
        (True, False)
    """
    text = text.strip()
    try:
        found, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and end == len(text)
