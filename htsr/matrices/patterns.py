"""Shell-style patterns of names and roles: the one place where what a user names meets what a model has."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from difflib import get_close_matches
from fnmatch import fnmatchcase

from htsr.errors import UsageError

_CLOSE = 0.6  # difflib's ratio of what may be a typo
_FEW = 30


def matches(subject: str, patterns: Iterable[str]) -> bool:
    """Whether any of the `patterns` matches all of `subject`.

    ``*`` stands for any characters and ``?`` for one. Brackets stand for themselves, so that a name as printed, such as
    ``c_attn[q]``, is a pattern that matches it.

    Args:
        subject: a name or role.
        patterns: shell-style.
    """
    return any(fnmatchcase(subject, pattern.replace("[", "[[]")) for pattern in patterns)


def require(patterns: Iterable[str], subjects: Collection[str], of: str, what: str = "name") -> None:
    """Refuse a pattern that matches nothing: it is a typo, and what it should have done is not done.

    Args:
        patterns: as for `matches`.
        subjects: the names and roles there are.
        of: whose they are, for the sentence.
        what: the patterns are of, for the sentence.

    Raises:
        UsageError: a pattern that matches none of `subjects`; the message names the nearest of them.
    """
    for pattern in patterns:
        if not any(matches(subject, (pattern,)) for subject in subjects):
            as_class = any(fnmatchcase(subject, pattern) for subject in subjects)
            hint = f"; brackets are no wildcards, give one pattern per {what}" if as_class else ""
            raise UsageError(f"no {what} of {of} matches {pattern!r}{hint or _nearest(pattern, subjects)}")


def _nearest(pattern: str, subjects: Collection[str]) -> str:
    """The subject that `pattern` comes closest to, or all of a few; where it has wildcards, the end of a name."""
    wild = pattern.startswith(("*", "?"))
    whole = pattern.strip("*?.")
    depth = whole.count(".") + 1
    ends = sorted({".".join(subject.split(".")[-depth:]) if wild else subject for subject in subjects})
    if not ends:
        return ""
    if len(ends) <= _FEW and not get_close_matches(whole, ends, n=1, cutoff=_CLOSE):
        return f"; there are {', '.join(ends)}" if len(ends) > 1 else f"; there is {ends[0]}"
    nearest = get_close_matches(whole, ends, n=1, cutoff=0.0)[0]
    return f"; the nearest is {'*.' if wild and '.' not in nearest else ''}{nearest}"
