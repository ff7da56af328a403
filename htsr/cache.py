"""Where htsr keeps what a later run may use again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """$HTSR_CACHE, else htsr in the user's cache folder; it need not exist.

    Raises:
        RuntimeError: the user, or the one that the folder names, has no home folder.

    Examples:
        >>> from htsr.cache import cache_folder
        >>> print(cache_folder())  # doctest: +SKIP
        /home/me/.cache/htsr
    """
    if folder := os.environ.get("HTSR_CACHE"):
        return Path(folder).expanduser()  # a .env or a unit file leaves ~ as it is
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "htsr"
