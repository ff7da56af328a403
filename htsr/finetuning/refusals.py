"""Everything that is wrong, not only the first of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from htsr.errors import HtsrError, UsageError

T = TypeVar("T")


class Refusals:
    """What is refused, stage by stage: one that fails does not hide the next.

    Attributes:
        errors: what was raised.

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
        self.errors: list[HtsrError] = []

    def unless(self, stage: Callable[[], T]) -> T | None:
        """What `stage` returns, or None where it refuses."""
        try:
            return stage()
        except HtsrError as error:
            self.errors.append(error)
            return None

    @property
    def sentences(self) -> list[str]:
        """Why, each once."""
        return list(dict.fromkeys(line for error in self.errors for line in str(error).splitlines()))

    @property
    def is_wrong_usage(self) -> bool:
        """Whether one of them is of what was asked for, and not of what was found."""
        return any(isinstance(error, UsageError) for error in self.errors)

    def end(self) -> None:
        """Raise what was raised, and of several errors one with a line for each sentence.

        Raises:
            HtsrError: the only one.
            UsageError: there are several.
        """
        if len(self.errors) == 1:
            raise self.errors[0]
        if self.errors:
            raise UsageError("\n".join(self.sentences))
