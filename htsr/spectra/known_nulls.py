"""Shape nulls that need not be drawn again: those of common shapes in the package, others in the user's cache folder.

`shape_nulls.json` beside this file holds what `htsr.spectra.null` has drawn for the matrices of common transformers
(`python -m reports.shape_null` makes it). What else is drawn is kept in files of its own, one for each null: processes
that work at the same time cannot spoil one another's, and whichever writes last writes the same numbers.

The table stands for the algorithm: a test draws part of it again, so a change of the algorithm changes the table. The
folder of the others is named after the table's content and the version of NumPy, whose random numbers they are; after
a change of either, none of them is found.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from uuid import uuid4

import numpy as np

from htsr.cache import cache_folder

logger = logging.getLogger(__name__)

_LONGEST = 100  # bytes: two numbers with all their digits have fewer


@lru_cache(maxsize=1)
def table() -> dict[str, list[float]]:
    """Median and standard deviation by key (`htsr.spectra.null.null_key`), as the package carries them.

    Examples:
        >>> from htsr.spectra.known_nulls import table
        >>> [round(value, 4) for value in table()["hill-768x768"]]
        [2.1229, 0.0015]
    """
    return dict(json.loads(_content()))


def known_null(key: str) -> tuple[float, float] | None:
    """Median and standard deviation of α, from the table or from an earlier run's file.

    Args:
        key: name of shape and fit (`htsr.spectra.null.null_key`).

    Returns:
        Both numbers; None where they must be drawn, because nobody has, or because the file cannot be read.

    Examples:
        >>> from htsr.spectra.known_nulls import known_null
        >>> known_null("ks-no shape") is None
        True
    """
    if key in table():
        alpha, sd = table()[key]
        return alpha, sd
    file = None
    try:
        file = _file(key)
        with file.open("rb") as opened:
            return _two_numbers(opened.read(_LONGEST + 1))
    except FileNotFoundError:
        return None
    except ValueError as error:
        logger.warning("%s is damaged, and the shape null is drawn anew: %s", file, error)
    except (OSError, RuntimeError) as error:  # a folder that may not be read, a user without a home
        logger.info("the shape null is not looked up: %s", error)
    return None


def keep_null(key: str, alpha: float, sd: float) -> None:
    """Write what was drawn to the user's cache folder; where that cannot be done, nothing is kept.

    Args:
        key: name of shape and fit, as in `known_null`.
        alpha: median of α over the draws.
        sd: standard deviation of α over the draws.
    """
    try:
        file = _file(key)
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{uuid4().hex}")
        try:
            temporary.write_text(json.dumps([alpha, sd]), encoding="utf-8")
            temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:
        logger.info("the shape null is not kept: %s", error)


def _two_numbers(content: bytes) -> tuple[float, float]:
    """What `keep_null` has written."""
    if len(content) > _LONGEST:
        raise ValueError(f"it is longer than {_LONGEST} bytes")
    found = json.loads(content)
    if not isinstance(found, list) or [type(value) for value in found] != [float, float]:
        raise ValueError("it is no list of two numbers")
    alpha, sd = found
    if not (1 < alpha < math.inf and 0 <= sd < math.inf):
        raise ValueError(f"no fit has α = {alpha} with a standard deviation of {sd}")
    return alpha, sd


def _file(key: str) -> Path:
    return cache_folder() / f"shape-nulls-{_version()}" / f"{key}.json"


@lru_cache(maxsize=1)
def _content() -> bytes:
    return files("htsr.spectra").joinpath("shape_nulls.json").read_bytes()


@lru_cache(maxsize=1)
def _version() -> str:
    return hashlib.sha256(_content() + np.__version__.encode()).hexdigest()[:16]
