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
        patterns: shell-style patterns.

    Examples:
        >>> from htsr.matrices.patterns import matches
        >>> matches("h.0.attn.c_attn[q]", ["*.c_attn[q]"]), matches("h.0.attn.c_attn[q]", ["c_attn*"])
        (True, False)
    """
    return any(fnmatchcase(subject, pattern.replace("[", "[[]")) for pattern in patterns)


def require(patterns: Iterable[str], subjects: Collection[str], of: str, what: str = "name") -> None:
    """Refuse a pattern that matches nothing: it is most likely a typo, and would be ignored in silence.

    Args:
        patterns: patterns as `matches` takes them.
        subjects: the names or roles that there are.
        of: what has these names or roles, for the sentence.
        what: what the patterns stand for, ``name`` or ``role``, for the sentence.

    Raises:
        UsageError: a pattern matches none of `subjects`; the message has the nearest of them.

    Examples:
        >>> from htsr.matrices.patterns import require
        >>> require(["*.q_porj"], ["layers.0.q_proj", "layers.0.k_proj"], of="the model")
        Traceback (most recent call last):
        htsr.errors.UsageError: no name of the model matches '*.q_porj'; the nearest is *.q_proj
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
