"""Everything that is wrong, not only the first of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from htsr.errors import HtsrError, UsageError

T = TypeVar("T")


class Refusals:
    """What is refused, stage by stage: one that fails does not hide the next.

    Attributes:
        sentences: why, each once.
        is_wrong_usage: whether one of them is of what was asked for, and not of what was found.

    Examples:
        >>> from htsr.errors import UsageError
        >>> from htsr.finetuning.refusals import Refusals
        >>> def below(value, limit):
        ...     if value >= limit:
        ...         raise UsageError(f"{value} is not below {limit}")
        ...     return value
        >>> refusals = Refusals()
        >>> [refusals.unless(lambda: below(value, 3)) for value in (2, 3, 4)]
        [2, None, None]
        >>> refusals.sentences
        ['3 is not below 3', '4 is not below 3']
    """

    def __init__(self) -> None:
        self.sentences: list[str] = []
        self.is_wrong_usage = False

    def unless(self, stage: Callable[[], T]) -> T | None:
        """What `stage` returns, or None where it refuses."""
        try:
            return stage()
        except HtsrError as error:
            self.sentences += [line for line in str(error).splitlines() if line not in self.sentences]
            self.is_wrong_usage |= isinstance(error, UsageError)
            return None

    def end(self) -> None:
        """Refuse, a line for each sentence, where there are any.

        Raises:
            UsageError: there are.
        """
        if self.sentences:
            raise UsageError("\n".join(self.sentences))
